"""The commands of the CLI, one file each. Heavy imports stay inside the functions."""
