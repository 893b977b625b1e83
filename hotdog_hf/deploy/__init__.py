"""A model on its way to users (one ONNX file, a web page, an app), and a training on its way to the Hub."""
