"""From a PyTorch model to a bundle: trace, rewrite, quantize, prove, write.

This package needs the `export` extra. The runtime that executes what it writes does not.
"""
