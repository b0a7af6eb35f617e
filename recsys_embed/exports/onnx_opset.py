"""Which version of ONNX's operators graphs are written in, and what needs the libraries that write them."""

OPSET = 18
PURPOSE = "writing an ONNX graph"
