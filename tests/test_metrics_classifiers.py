"""Inception, VGG16 and LPIPS: weights, fused convolutions, chunks and number formats."""

import subprocess
import sys

import harness
import pytest
import torch
from measuring import CPU, random_vgg16
from torch.utils._python_dispatch import TorchDispatchMode

from stylegan_pg.metrics import classifiers, features
from stylegan_pg.metrics.lpips import LPIPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Mixed_7c.branch3x3_2b.bn.bias"), r"Mixed_7c\.branch3x3_2b\.bn\.bias is missing"),
        (lambda s: s.pop("fc.weight"), "fc.weight"),
        (lambda s: s.update({"AuxLogits.fc.weight": torch.zeros(1)}), "AuxLogits.fc.weight"),
        (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), r"\[1000, 2048\]"),
        (lambda s: s.update({"Mixed_6a.branch3x3.bn.bias": torch.zeros(1)}), "shapes of Mixed_6a.branch3x3"),
        (lambda s: s.update({"Mixed_6a.branch3x3.conv.weight": torch.zeros(384, 7, 3, 3)}), "channels"),
    ],
)
def test_inception_refuses_wrong_weights(inception, change, message):
    state = torch.load(inception, weights_only=True)
    change(state)
    with pytest.raises(RuntimeError, match=message):
        classifiers.Inception(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_convolutions_equal_plain_convolutions(inception, dtype):
    """Without gradients the fused convolutions run, with gradients the plain ones, for several sizes and batches."""
    network = classifiers.Inception(torch.load(inception, weights_only=True)).to(dtype)
    for n, size in ((2, 64), (3, 32)):
        images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
        with torch.no_grad():
            found = network(images)["pool"]
        expected = network(images)["pool"].detach()
        assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * expected.abs().max()


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest image or feature map of any operation, and counts convolutions."""

    def __init__(self):
        super().__init__()
        self.nbytes = self.convolutions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 4 and out.shape[2] > 100:
            self.nbytes = max(self.nbytes, out.nbytes)
        self.convolutions += "conv" in str(function)
        return out


@pytest.mark.parametrize("name", ["inception", "vgg16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_give_the_same_features(inception, monkeypatch, name, dtype):
    """Networks process a few images at a time, so that glibc can reuse the memory of their tensors."""
    if name == "inception":
        network, feature = classifiers.Inception(torch.load(inception, weights_only=True)), "pool"
    else:
        network, feature = classifiers.VGG16(random_vgg16()), "fc2"
    network = network.requires_grad_(False).eval().to(dtype).to(memory_format=torch.channels_last)
    most = 2 * network.MAX_VALUES * dtype.itemsize
    for n, size in ((5, 64), (3, 1200)) if dtype == torch.float32 else ((3, 1200),):
        images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
        monkeypatch.setattr(classifiers, "MAX_CHUNK_BYTES", 2**40)
        whole = network(images)[feature]
        monkeypatch.setattr(classifiers, "MAX_CHUNK_BYTES", max(most, 2 * 12 * size * size))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        with torch.no_grad(), LargestTensor() as seen:
            found = network(images)[feature]
        assert found.shape == whole.shape
        assert (found - whole).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * whole.abs().max()
        assert seen.nbytes <= classifiers.MAX_CHUNK_BYTES
        assert seen.nbytes > classifiers.MAX_CHUNK_BYTES / 4
        assert seen.convolutions >= 13 * -(-n // 2)
    assert network(images[:0])[feature].shape == (0, whole.shape[1])


def test_lpips_in_chunks(monkeypatch):
    channels = [64, 128, 256, 512, 512]
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    distance = features.Distance(LPIPS(lin, random_vgg16()), "")
    a, b = (255 * torch.rand(5, 3, 40, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
    with torch.no_grad():
        whole = distance(a, b)
        monkeypatch.setattr(classifiers, "MAX_CHUNK_BYTES", 2 * 4 * 64 * 40 * 32)
        torch.testing.assert_close(distance(a, b), whole, rtol=1e-5, atol=0)
    assert whole.shape == (5,)


@pytest.mark.parametrize("name", ["inception", "vgg16"])
def test_bf16_on_a_cpu_without_bf16_instructions(inception, tmp_path, monkeypatch, name):
    """The weights are rounded and the rest is float32. Results are close to both other modes but cached separately."""
    file = inception
    if name == "vgg16":
        torch.save(random_vgg16(), file := tmp_path / "vgg.pth")
    images = torch.randint(0, 256, (2, 3, 48, 40), dtype=torch.uint8)
    found, identities = {}, set()
    for precision, has in (("fp32", False), ("bf16", False), ("bf16", True)):
        monkeypatch.setattr(features, "has_bf16_instructions", lambda has=has: has)
        extractor = features.load_extractor(name, [file], CPU, precision)
        (found[precision, has],) = (v for k, v in extractor(images).items() if k in ("pool", "fc2"))
        identities.add(extractor.identity)
        assert extractor.name_suffix.endswith("@bf16") == (precision == "bf16")
    exact, rounded, native = found.values()
    assert len(identities) == 3
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert 0 < (native - exact).abs().max() < 0.05 * exact.abs().max()


def test_metrics_import_no_slow_packages():
    """Importing any of these packages takes at least half as long as importing torch."""
    heavy = "torchvision torch_fidelity matplotlib tensorboard accelerate deepspeed webdataset"
    code = "import sys, stylegan_pg.metrics.command, stylegan_pg.metrics.features; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=harness.environment())
    assert "torch" in done.stdout.split()
    assert not set(heavy.split()) & set(done.stdout.split())
