"""TensorRT engines of a bundle's graphs, built where they are to run. Nothing here needs torch or onnx."""
