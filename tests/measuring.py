"""Helpers for the tests and the benchmark of metrics: networks with random weights, datasets, and torch-fidelity."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import harness
import numpy as np
import torch
from PIL import Image

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.pack.pack import pack
from stylegan_pg.images import save_image
from stylegan_pg.metrics.base import Settings
from stylegan_pg.metrics.evaluate import Evaluator
from stylegan_pg.metrics.registry import parse

CPU = torch.device("cpu")


def random_inception(path: Path, seed: int = 7) -> Path:
    """Write the weights of a random Inception, whose features vary as those of a trained one do, to a file."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(seed)
    with (
        mock.patch.object(module, "load_state_dict_from_url"),
        mock.patch.object(module.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    for m in network.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
        if isinstance(m, torch.nn.BatchNorm2d):
            m.register_buffer("running_mean", 0.1 * torch.randn(m.num_features))
            m.register_buffer("running_var", 0.7 * torch.rand(m.num_features) + 0.7)
            m.weight.data.uniform_(0.8, 1.2)
            m.bias.data.normal_(0, 0.1)
    torch.save(network.state_dict(), path)
    return path


def random_vgg16(seed: int = 3) -> dict[str, torch.Tensor]:
    """Return weights of a random VGG16. Large tensors repeat a million random numbers, because drawing all 138 million
    takes seconds. The period is a prime, so rows differ."""
    import torchvision

    with torch.device("meta"):
        shapes = {name: t.shape for name, t in torchvision.models.vgg16().state_dict().items()}
    drawn = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
    state = {}
    for name, shape in shapes.items():
        count, fan_in = shape.numel(), shape[1:].numel()
        values = drawn.repeat(-(-count // len(drawn)))[:count].reshape(shape)
        state[name] = values * (2 / fan_in) ** 0.5 if len(shape) > 1 else torch.zeros(shape)
    return state


def packed(folder: Path, count: int) -> tuple[Path, Path]:
    """Create a folder with `count` pictures of 64x64, and pack it. Return both folders."""
    rng, source = np.random.default_rng(4), folder / "pictures"
    source.mkdir()
    for i in range(count):
        small = rng.integers(0, 256, [5, 5, 3], dtype=np.uint8)
        Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC).save(source / f"{i:03d}.png")
    pack(str(source), folder / "packed", resolution=64, lowest=8, format="png", workers=0, progress=False)
    return source, folder / "packed"


def fidelity(real: Path, fake: Path, weights: Path, *options: str) -> dict[str, float]:
    """Return the metrics that torch-fidelity's command line computes."""
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--input1", str(fake), "--input2", str(real), "--json"]
    command += ["--cpu", "--feature-extractor-weights-path", str(weights), "--no-cache", "--batch-size", "16", *options]
    result = subprocess.run(command, capture_output=True, text=True, env=harness.environment())
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout[result.stdout.index("{") :])


class Painter(torch.nn.Module):
    """A stand-in for a generator. Its smooth images are a function of z, bit for bit the same at any batch size."""

    z_dim, c_dim, img_channels = 12, 0, 3

    def __init__(self, resolution: int = 64):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.resolution = resolution

    def forward(self, z, c=None, *, psi=1.0, alpha=1.0):
        small = (psi * z).reshape(-1, 3, 2, 2)
        return torch.nn.functional.interpolate(small, self.resolution, mode="bilinear")


def evaluator(data: Path, names: str, **settings) -> Evaluator:
    return Evaluator(load_index(str(data)), 64, [parse(n) for n in names.split(",")], Settings(CPU, **settings))


def paint(e: Evaluator, G: Painter, count: int, folder: Path) -> None:
    """Write the images that an evaluator would generate to files."""
    folder.mkdir()
    for block in range(-(-count // 64)):
        z, _ = e._latents(G, "metric-z", block, count)
        for i, image in enumerate((G(z) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)):
            save_image(image, folder / f"{block * 64 + i:03d}.png")
