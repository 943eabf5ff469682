"""Quantization schemes: how a Linear and the token embedding are spelled in ONNX, one file each."""
