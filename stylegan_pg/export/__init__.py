"""Snapshots in other formats: ONNX, torch.export, AOTInductor, public names, a folder for a model hub, a web page."""
