"""TensorRT 10.3 to 11.x and TensorRT-RTX: an ONNX file of explicit types in, a plan for one GPU architecture out."""
