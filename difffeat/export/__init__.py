"""From weights to truncated, folded torch modules to ONNX graphs."""
