"""Snapshots in the formats of other programs: ONNX, torch.export, AOTInductor, public names, hub folders, web pages."""
