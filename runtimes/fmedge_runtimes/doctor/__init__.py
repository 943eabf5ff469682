"""What this machine is, what of fmedge can run on it, and which command makes what is missing."""
