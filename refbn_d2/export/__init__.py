"""Convert checkpoint files, verify the results, and export to ONNX and TorchScript."""
