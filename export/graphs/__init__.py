"""The ONNX graph of a model, drawn from its sizes and a plan of forms."""
