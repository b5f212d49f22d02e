"""Snapshots in the formats of other programs: ONNX, torch.export, AOTInductor, public names, a model hub, a web page."""
