"""The perceptual distance LPIPS (Zhang et al. 2018): torch-fidelity's network with weights passed by the caller.

The constructors of torch-fidelity download weights and are therefore not called. These subclasses build the same layers
and inherit the forward pass. Importing this module imports torch-fidelity and torchvision.
"""

from __future__ import annotations

import torch
from torch import nn
from torch_fidelity.sample_similarity_base import SampleSimilarityBase
from torch_fidelity.sample_similarity_lpips import NetLinLayer, SampleSimilarityLPIPS, VGG16features

from stylegan_pg.metrics.classifiers import vgg16

CHANNELS = [64, 128, 256, 512, 512]  # channels of the five feature maps of VGG16 that are compared
CUTS = [0, 4, 9, 16, 23, 30]  # indices of VGG16's layers at which the slices begin and end


class _Maps(VGG16features):
    """Five intermediate feature maps of VGG16."""

    def __init__(self, state: dict[str, torch.Tensor]):
        nn.Module.__init__(self)
        layers = vgg16(state).features
        self.N_slices = len(CHANNELS)
        for i in range(self.N_slices):
            setattr(self, f"slice{i + 1}", layers[CUTS[i] : CUTS[i + 1]])


class LPIPS(SampleSimilarityLPIPS):
    """The distance [n, 1, 1] of two batches of images in 0 to 255, float32 [n, 3, H, W].

    Args:
        lin: The learned weights of the feature maps' channels.
        vgg: The weights of torchvision's VGG16.

    Raises:
        RuntimeError: if the weights do not fit.
    """

    def __init__(self, lin: dict[str, torch.Tensor], vgg: dict[str, torch.Tensor]):
        SampleSimilarityBase.__init__(self, "lpips")
        self.sample_similarity_resize = self.sample_similarity_dtype = None  # images are neither resized nor converted
        self.chns, self.L = CHANNELS, len(CHANNELS)
        self.lins = [NetLinLayer(channels, use_dropout=True) for channels in CHANNELS]
        for i, layer in enumerate(self.lins):
            setattr(self, f"lin{i}", layer)
        self.load_state_dict(lin)
        self.net = _Maps(vgg)
        self.eval().requires_grad_(False)
