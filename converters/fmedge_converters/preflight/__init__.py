"""Whether TensorRT will take a graph, found out before the device is reached: rules, and a parser where there is one.

It needs onnx-ir (the `export` extra) and never torch.
"""
