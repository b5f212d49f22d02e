"""Inception-v3 and VGG16, the classifiers whose features define the published metrics.

They compute the same as torch-fidelity's networks; tests compare them with its command line. Inception is implemented
here because importing torch-fidelity or torchvision also imports torch's compiler, which doubles the start time of a
small measurement.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_weights

# glibc returns allocations of 32 MiB and more to the system at once, so every such tensor costs new page faults. With
# larger tensors these take a third of a network's time.
MAX_CHUNK_BYTES = 2**25 - 2**12


def in_chunks(
    network: Callable[..., torch.Tensor], *images: torch.Tensor, values: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return network(*images) for images [n, ...], computed in chunks on a CPU.

    A chunk is so small that its largest tensor stays below MAX_CHUNK_BYTES, but it has at least one image per thread,
    because fewer images do not keep all threads busy in small layers.

    Args:
        network: A function of batches that returns one tensor.
        images: Batches [n, ...] of the same length.
        values: The number of elements per image of the network's largest tensor.
        dtype: The number format of that tensor.
    """
    if not images[0].is_cpu or not len(images[0]):
        return network(*images)
    largest = max(values * dtype.itemsize, images[0][0].numel() * 4)  # images are float32 before they are resized
    parts = zip(*(x.split(max(torch.get_num_threads(), MAX_CHUNK_BYTES // largest)) for x in images), strict=True)
    return torch.cat([network(*part) for part in parts])


def resize_matrix(size: int, to: int) -> torch.Tensor:
    """Return the matrix, float32 [to, size], of bilinear interpolation at i * size / to. TensorFlow 1 resized the
    images of the published numbers this way, without half-pixel shift."""
    place = torch.arange(to, dtype=torch.float32) * torch.tensor(size / to, dtype=torch.float32)
    low = place.long()
    matrix = torch.zeros(to, size)
    part = place - low
    matrix.scatter_add_(1, low[:, None], 1 - part[:, None])
    matrix.scatter_add_(1, (low + 1).clamp(max=size - 1)[:, None], part[:, None])
    return matrix


class _Resized(nn.Module):
    """Base class of both classifiers. It resizes uint8 RGB [n, 3, H, W] to the classifier's square input."""

    size: int

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        x = images.to(torch.float32)
        return resize_matrix(height, self.size).to(x.device) @ x @ resize_matrix(width, self.size).t().to(x.device)


POOLS = {
    "down": lambda x: F.max_pool2d(x, 3, stride=2),
    "mean": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),  # TensorFlow omits padding
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
}
# The architecture: each string is a sequence of layers, which are names of convolutions or pools. "a|b" stands for two
# parallel convolutions. Widths and kernel sizes are taken from the weights.
STEM = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 down Conv2d_3b_1x1 Conv2d_4a_3x3 down"
# fmt: off
_THREE = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
_A = ("branch1x1", "branch5x5_1 branch5x5_2", _THREE, "mean branch_pool")
_B = ("branch3x3", _THREE, "down")
_C = (
    "branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5", "mean branch_pool",
)
_D = ("branch3x3_1 branch3x3_2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4", "down")
_E = (
    "branch1x1", "branch3x3_1 branch3x3_2a|branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b",
)
MIXED = {
    "Mixed_5b": _A, "Mixed_5c": _A, "Mixed_5d": _A, "Mixed_6a": _B, "Mixed_6b": _C, "Mixed_6c": _C, "Mixed_6d": _C,
    "Mixed_6e": _C, "Mixed_7a": _D, "Mixed_7b": (*_E, "mean branch_pool"), "Mixed_7c": (*_E, "max branch_pool"),
}
# fmt: on
STRIDE_2 = {
    "Conv2d_1a_3x3",
    "Mixed_6a.branch3x3",
    "Mixed_6a.branch3x3dbl_3",
    "Mixed_7a.branch3x3_2",
    "Mixed_7a.branch7x7x3_4",
}  # fmt: skip
UNPADDED = STRIDE_2 | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}


class _Convolution(nn.Module):
    """A convolution followed by ReLU. The batch normalisation between them is folded into the weights."""

    def __init__(self, state: dict[str, torch.Tensor], name: str):
        super().__init__()
        try:
            weight = state.pop(f"{name}.conv.weight").float()
            norm = [state.pop(f"{name}.bn.{key}").float() for key in ("running_mean", "running_var", "weight", "bias")]
        except KeyError as error:
            raise RuntimeError(f"the tensor {error.args[0]} is missing") from None
        state.pop(f"{name}.bn.num_batches_tracked", None)
        if weight.ndim != 4 or any(n.shape != weight.shape[:1] for n in norm):
            raise RuntimeError(f"the shapes of {name} do not match each other")
        mean, variance, scale, shift = norm
        self.weight, self.bias = fuse_conv_bn_weights(weight, None, mean, variance, 0.001, scale, shift)
        self.stride = 2 if name in STRIDE_2 else 1
        self.padding = [0 if name in UNPADDED else k // 2 for k in weight.shape[2:]]
        self.packed: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, pool: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Apply the convolution. A mean pool that precedes a 1x1 convolution can be passed as `pool`; it is applied
        after the convolution, which is equivalent and has fewer channels."""
        if pool is None:
            return self._convolved(x, self.bias, "relu")
        return pool(self._convolved(x, None, "none")).add_(self.bias[:, None, None]).relu_()

    def _convolved(self, x: torch.Tensor, bias: torch.Tensor | None, act: str) -> torch.Tensor:
        fits = x.shape[1] == self.weight.shape[1]  # otherwise F.conv2d raises an error that names the shapes
        if not fits or torch.is_grad_enabled() or not _has_fused_convolution(x.device.type, x.dtype):
            y = F.conv2d(x, self.weight, bias, self.stride, self.padding)
            return y.relu_() if act == "relu" else y
        stride, key = [self.stride] * 2, (self.weight.data_ptr(), self.weight.dtype, x.shape[2:])
        if self.packed is None or self.packed[0] != key:  # oneDNN's own layout; plain calls convert to it every time
            pack = torch.ops.mkldnn._reorder_convolution_weight
            self.packed = key, pack(self.weight, self.padding, stride, [1, 1], 1, list(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.packed[1], bias, self.padding, stride, [1, 1], 1, act, [], ""
        )


@functools.cache
def _has_fused_convolution(device: str, dtype: torch.dtype) -> bool:
    """Return whether PyTorch offers oneDNN's convolution with fused activation, which torch.compile uses. It computes
    the same bits 10 % faster and has no derivative."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    rng = torch.Generator().manual_seed(0)  # the global generator must not advance
    x, w, b = (torch.randn(shape, generator=rng).to(dtype) for shape in ([1, 2, 4, 4], [16, 2, 3, 3], [16]))
    how = ([1, 1], [1, 1], [1, 1], 1)
    try:
        packed = torch.ops.mkldnn._reorder_convolution_weight(w, *how, [1, 2, 4, 4])
        y = torch.ops.mkldnn._convolution_pointwise(x, packed, b, *how, "relu", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(y.float(), F.conv2d(x, w, b, padding=1).relu().float(), rtol=0.02, atol=0.02)


class Inception(_Resized):
    """The Inception-v3 that defines FID, KID and IS (Szegedy et al. 2016, with the pooling layers and the 1008 classes
    of TensorFlow's model of 2015). The names of its weights are torch-fidelity's.

    It maps uint8 RGB [n, 3, H, W] to {"pool": [n, 2048], "logits": [n, 1008] without the bias}.

    Raises (the constructor):
        RuntimeError: if the weights do not fit.
    """

    size = 299
    MAX_VALUES = 147 * 147 * 64  # elements per image of the largest tensor, the output of Conv2d_2b_3x3

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        state = dict(state)
        chains = [("", STEM), *((f"{block}.", chain) for block, branches in MIXED.items() for chain in branches)]
        names = (prefix + step for prefix, chain in chains for step in re.split("[ |]", chain) if step not in POOLS)
        self.convolutions = nn.ModuleDict({_key(n): _Convolution(state, n) for n in dict.fromkeys(names)})
        classes = state.pop("fc.weight", torch.empty(0)).float()
        if classes.shape != (1008, 2048) or state.keys() - {"fc.bias"}:
            raise RuntimeError(
                f"fc.weight has the shape {list(classes.shape)}, and the tensors {sorted(state)[:3]} are unknown"
            )
        self.classes = nn.Parameter(classes, requires_grad=False)
        with torch.no_grad():
            self._pool(torch.zeros(1, 3, 75, 75))  # the smallest possible input: do the shapes fit together?

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = self.classes.dtype
        pool = in_chunks(self._features, images, values=self.MAX_VALUES, dtype=dtype)
        return {"pool": pool, "logits": pool @ self.classes.t()}

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        x = (self.prepare(images) - 128) / 128
        return self._pool(x.to(self.classes.dtype).contiguous(memory_format=torch.channels_last))

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        x = self._chain("", STEM, x)
        for block, branches in MIXED.items():
            x = torch.cat([self._chain(f"{block}.", chain, x) for chain in branches], dim=1)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def _chain(self, prefix: str, chain: str, x: torch.Tensor) -> torch.Tensor:
        if chain == "mean branch_pool":
            return self.convolutions[_key(f"{prefix}branch_pool")](x, POOLS["mean"])
        for step in chain.split():
            if step in POOLS:
                x = POOLS[step](x)
            else:
                beside = [self.convolutions[_key(prefix + name)](x) for name in step.split("|")]
                x = beside[0] if len(beside) == 1 else torch.cat(beside, dim=1)
        return x


def _key(name: str) -> str:
    return name.replace(".", "_")  # a module's name cannot contain dots


class VGG16(_Resized):
    """VGG16 up to its second fully connected layer, whose features define precision and recall (Simonyan and Zisserman
    2015). It maps uint8 RGB [n, 3, H, W] to {"fc2": [n, 4096]}.

    Raises (the constructor):
        RuntimeError: if the weights do not fit.
    """

    size = 224
    MAX_VALUES = 224 * 224 * 64  # elements per image of the largest tensors, the outputs of the first two convolutions
    MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's RGB channels

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        self.network = vgg16(state)
        self.network.classifier = self.network.classifier[:5]  # up to the activation of the second layer

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = next(self.parameters()).dtype
        x = in_chunks(self._features, images, values=self.MAX_VALUES, dtype=dtype)
        return {"fc2": self.network.classifier(x)}  # its many weights are read only once for the whole batch

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        x = self.prepare(images)
        mean, deviation = (x.new_tensor(v)[:, None, None] for v in (self.MEAN, self.DEVIATION))
        x = ((x - mean) / deviation).to(next(self.parameters()).dtype).contiguous(memory_format=torch.channels_last)
        return self.network.avgpool(self.network.features(x)).flatten(1)


def vgg16(state: dict[str, torch.Tensor]) -> Any:
    """Return torchvision's VGG16 with these weights.

    Raises:
        RuntimeError: if the weights do not fit.
    """
    import torchvision

    with torch.device("meta"):  # this avoids the random initialisation of 138 million parameters
        network = torchvision.models.vgg16()
    network.load_state_dict(state, assign=True)
    return network.float().eval()
