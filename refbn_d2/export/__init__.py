"""Checkpoint tools that build a model: from file to file, verification, ONNX and TorchScript."""
