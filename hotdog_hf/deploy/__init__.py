"""A model on its way to users: one ONNX file, a web page."""
