"""fmedge."""
