"""Quantization that looks at what goes through a model: calibration text, statistics, and what is fitted to them."""
