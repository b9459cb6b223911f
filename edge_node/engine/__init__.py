"""Everything a node decides about its sequences, as pure code: no clock, no socket, no ONNX Runtime."""
