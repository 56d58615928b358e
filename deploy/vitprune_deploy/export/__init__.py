"""From a torch model to an ONNX file that ONNX Runtime and TensorRT run: graph, precision, proof of parity."""
