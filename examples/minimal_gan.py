"""A GAN of one's own in sixty lines: a plain pair of networks, trained on the handwritten digits of scikit-learn.

    python examples/minimal_gan.py [FOLDER] [KEY=VALUE ...]

The pictures are packed into FOLDER/data, and the run is in FOLDER/run: statistics, sample grids, checkpoints and the
snapshot. The same command again continues a run that was stopped.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from stylegan_pg import GAN, Pair, load_config, load_snapshot, pack, train

Z_DIM = 32


class Generator(nn.Sequential):
    """z [N, 32] -> images [N, 1, 8, 8] in [-1, 1]."""

    def __init__(self):
        dense = [nn.Linear(Z_DIM, 64 * 16), nn.Unflatten(1, (64, 4, 4)), nn.BatchNorm2d(64), nn.ReLU()]
        super().__init__(*dense, nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.extend([nn.Conv2d(32, 1, 3, padding=1), nn.Tanh()])


class Discriminator(nn.Sequential):
    """Images [N, 1, 8, 8] -> scores [N, 1]."""

    def __init__(self):
        act = nn.LeakyReLU(0.2)
        super().__init__(nn.Conv2d(1, 32, 3, 1, 1), act, nn.Conv2d(32, 64, 4, 2, 1), act, nn.Flatten())
        self.append(nn.Linear(64 * 16, 1))


def pack_digits(folder: Path) -> None:
    """Pack the 1,797 digits of 8x8 grey pixels."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for i, digit in enumerate(load_digits(return_X_y=True)[0].reshape(-1, 8, 8)):
        Image.fromarray((digit * 255 / 16).astype("uint8")).save(pictures / f"{i:04d}.png")
    pack(pictures, folder / "data", resolution=8, channels=1, format="png")


def main(folder: str = "runs/digits", *overrides: str) -> int:
    if not Path(folder, "data", "index.json").exists():
        pack_digits(Path(folder))
    common = "resolution=8 model.z_dim=32 model.mbstd_group=16 train.batch=64 train.total_kimg=300 loss.pl_weight=0"
    rates = "loss.r1_gamma=0.1 optim.g_lr=0.0005 optim.d_lr=0.0005 optim.beta1=0.5 ema.kimg=5 output.grid_kimg=50"
    given = [f"run={folder}/run", f"data.url={folder}/data", *common.split(), *rates.split(), *overrides]
    pair = Pair(Generator, Discriminator, lambda model, shape: {}, lambda model, shape: {})
    config = load_config(None, given)
    code = train(config, system=GAN(config, pair))
    if code == 0:
        newest = max(Path(folder, "run", "snapshots").glob("[0-9]*.safetensors"))
        G = load_snapshot(newest, network=Generator)
        print(f"{newest}: images of shape {list(G(torch.randn(4, Z_DIM)).shape)}")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
