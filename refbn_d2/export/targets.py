"""Name what can be written, and the suffixes of its files."""

TARGETS = {
    "detectron2": (".pkl", ".pth", ".safetensors"),
    "torchvision": (".pth", ".pt", ".safetensors"),
    "onnx": (".onnx",),
    "torchscript": (".pt", ".ts"),
}
