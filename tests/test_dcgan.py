"""DCGAN's pair: the published layers, any size, precision, and what becomes of labels."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from configuring import config_of, refused
from first_step import parameters
from safetensors import safe_open

from stylegan_pg.config import DCGANConfig
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.export.formats import FORMATS
from stylegan_pg.export.program import Wanted, program_of
from stylegan_pg.networks import NETWORKS, NetworkShape, to_channels_last
from stylegan_pg.networks.normalization import group_batch_norms

PAIR = NETWORKS["dcgan"]


class Case:
    """The networks and tensors of the file of reference numbers."""

    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.meta = {k: json.loads(v) for k, v in file.metadata().items()}
            self.t = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        width = self.meta["generator_base_channels"]
        how = {"resolution": self.meta["resolution"], "channel_base": 32 * width, "channel_max": 8 * width}
        self.G: Any = PAIR.G(z_dim=self.meta["latent_size"], **how)
        self.D: Any = PAIR.D(**how)
        for net, prefix in ((self.G, "G."), (self.D, "D.")):
            net.load_state_dict(self.part(prefix))  # under the published names
        self.z, self.real = self.t["in.z"].flatten(1), self.t["in.real"]

    def part(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.t.items() if k.startswith(prefix)}


@pytest.fixture
def case(parity_dir):
    path = parity_dir.parent / "parity-systems" / "dcgan_64.safetensors"
    if not path.is_file():
        pytest.skip("no reference numbers: ../shared/parity-systems does not exist beside this checkout")
    return Case(path)


def close(actual, expected, tolerance=5e-5):
    error = float((actual.detach() - expected.reshape(actual.shape)).abs().max()) / float(expected.abs().max())
    assert error <= tolerance, f"{error:.2e} of the largest magnitude"


@pytest.mark.parametrize("grouped", [False, True], ids=["torch", "grouped"])
def test_losses_and_gradients_are_those_of_the_published_code(case, grouped):
    """In training mode, also with the batch normalisation that the trainer puts in."""
    if grouped:
        for net in (case.G, case.D):
            group_batch_norms(net, case.meta["batch"])
    image = case.G(case.z)
    close(image, case.t["out.image"])
    fake = case.D(image)
    close(fake.sigmoid(), case.t["out.probability_fake"])
    close(F.softplus(-fake).mean(), case.t["out.loss_g"])
    compare(F.softplus(-fake).mean(), case.G, case.part("grad_loss_g."))
    real, fake = case.D(case.real), case.D(image.detach())
    close(real.sigmoid(), case.t["out.probability_real"])
    loss = F.softplus(-real).mean() + F.softplus(fake).mean()
    close(loss, case.t["out.loss_d"])
    compare(loss, case.D, case.part("grad_loss_d."))


def compare(loss, net, expected):
    found = dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))
    assert found.keys() == expected.keys()
    whole = max(float(t.abs().max()) for t in expected.values())
    for name, g in found.items():
        scale = max(float(expected[name].abs().max()), whole / 100)
        assert float((g - expected[name]).abs().max()) <= 5e-5 * scale, name


@torch.no_grad()
def test_stored_statistics_give_the_published_images(case):
    for net in (case.G, case.D):
        group_batch_norms(net, case.meta["batch"]).eval()
    close(case.G(case.z), case.t["out.image_eval_mode"])
    close(case.D(case.real).sigmoid(), case.t["out.probability_real_eval_mode"])


def test_the_published_numbers_of_parameters():
    config = load_config("systems/dcgan64")
    shape = NetworkShape(64, 64, False, 3, 0, 64)
    assert isinstance(config.model, DCGANConfig)
    G, D = PAIR.G(**PAIR.g_kwargs(config.model, shape)), PAIR.D(**PAIR.d_kwargs(config.model, shape))
    assert (parameters(G), parameters(D)) == (3_576_704, 2_765_568)


def test_initial_weights_have_the_published_deviations():
    torch.manual_seed(0)
    for net in (PAIR.G(resolution=32), PAIR.D(resolution=32)):
        for name, p in net.named_parameters():
            mean, deviation = (1.0 if name.endswith("weight") and p.ndim == 1 else 0.0), 0.02
            if name.endswith("bias"):
                assert not p.any()
            else:
                assert abs(float(p.detach().mean()) - mean) < 0.01
                assert abs(float(p.detach().std()) - deviation) < 0.005, name


@pytest.mark.parametrize(("resolution", "base"), [(4, (4, 4)), (8, (1, 1)), (16, (3, 5)), (128, (4, 2))])
@pytest.mark.parametrize("channels", [1, 4])
def test_any_size(resolution, base, channels):
    how = {"resolution": resolution, "base": base, "img_channels": channels, "channel_base": 256, "channel_max": 8}
    G: Any = PAIR.G(z_dim=5, **how)
    D: Any = PAIR.D(outputs=3, **how)
    image = G(torch.randn(3, 5))
    size = (base[0] * resolution // 4, base[1] * resolution // 4)
    assert image.shape == (3, channels, *size)
    assert G.img_size == D.img_size == size
    assert D.features(image).shape == (3, D.channels, *D.feature_size)
    scores = D(image)
    assert scores.shape == (3, 3)
    (gradient,) = torch.autograd.grad(scores.sum(), image)
    assert (gradient != 0).any(dim=1).all()  # every pixel has an influence


def test_batch_norm_compares_the_whole_batch():
    """Groups of one image would be instance normalisation."""
    for name in ("dcgan", "dcgan64", "conditional", "acgan", "infogan"):
        config = load_config(f"systems/{name}")
        assert {p.mbstd_group for p in phases(config)} == {config.train.batch}
    assert phases(config_of("model.name=dcgan", "model.normalization=none"))[0].mbstd_group == 1


def test_without_batch_norm_there_are_biases():
    how = {"resolution": 16, "channel_max": 8}
    for net in (PAIR.G(z_dim=4, normalization="none", **how), PAIR.D(normalization="none", **how)):
        names = dict(net.named_parameters())
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
        assert sum(name.endswith("bias") for name in names) == 2
    model, shape = DCGANConfig(d_normalization="none"), NetworkShape(16, 16, False, 1, 0, 4)
    assert PAIR.g_kwargs(model, shape)["normalization"] == "batch"
    assert PAIR.d_kwargs(model, shape)["normalization"] == "none"
    whole = DCGANConfig(normalization="none")
    assert {kwargs(whole, shape)["normalization"] for kwargs in PAIR[2:]} == {"none"}


@torch.no_grad()
def test_low_precision_and_layout_change_images_by_rounding_only():
    torch.manual_seed(3)
    how = {"resolution": 32, "channel_max": 16}
    z, c, real = torch.randn(8, 6), torch.eye(3)[torch.arange(8) % 3], torch.randn(8, 3, 32, 32)
    G, D = PAIR.G(z_dim=6, c_dim=3, **how), PAIR.D(c_dim=3, **how)
    low = {"low_precision": "bf16", "low_precision_at": [16, 32]}
    halved = PAIR.G(z_dim=6, c_dim=3, **how, **low), PAIR.D(c_dim=3, **how, **low)
    for net, other in zip((G, D), halved, strict=True):
        other.load_state_dict(net.state_dict())
        for one in (net, other):
            group_batch_norms(one, 8)
    for net, inputs in ((G, (z, c)), (D, (real, c))):
        twin = halved[0] if net is G else halved[1]
        expected, rounded = net(*inputs), twin(*inputs)
        assert rounded.dtype == expected.dtype == torch.float32
        error = float((rounded - expected).abs().max() / expected.abs().max())
        assert 0 < error < 0.05
        last = to_channels_last(net)(*inputs)
        assert float((last - expected).abs().max() / expected.abs().max()) < 1e-5


def test_projection_is_that_of_the_paper():
    """Miyato and Koyama 2018, equation 3: a score, and the inner product of the class's embedding with the features."""
    torch.manual_seed(1)
    D: Any = PAIR.D(resolution=16, c_dim=3, channel_max=8).double()
    images, c = torch.randn(4, 3, 16, 16).double(), torch.eye(3)[[0, 2, 1, 0]].double()
    features = D.features(images, c)
    last = D.main[-1].weight[0]
    column = D.embed.weight.t()[[0, 2, 1, 0]]
    expected = torch.einsum("nchw,chw->n", features, last) + torch.einsum("nchw,nc->n", features, column)
    torch.testing.assert_close(D(images, c)[:, 0], expected)
    with pytest.raises(ValueError, match="conditional"):
        D(images)


def test_bad_arguments_and_keys():
    for wrong in ({"normalization": "layer"}, {"outputs": 0}, {"channel_base": 8}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PAIR.D(resolution=16, **wrong)
    assert "model.channel_base=16" in refused("model.name=dcgan", "model.channel_base=16", "resolution=32")
    assert "train.freeze_d=1" in refused("model.name=dcgan", "train.freeze_d=1", "init=x", "resolution=32")
    assert config_of("model.name=dcgan", "augment=diffaugment", "resolution=32").augment.mode == "diffaugment"


def test_it_is_exported(tmp_path):
    """As torch.export's program, which makes the same images, also with conditions and codes."""
    torch.manual_seed(2)
    kwargs = {"resolution": 16, "channel_max": 8, "z_dim": 9, "c_dim": 2, "categories": [3], "continuous": 1}
    G: Any = PAIR.G(**kwargs).eval()
    G.description = {"network": "dcgan", "kwargs": kwargs, "alpha": 1.0, "nimg": 1, "label_names": ["a", "b"]}
    program = program_of(G, Wanted())
    path = tmp_path / "G.pt2"
    FORMATS["torch"].write(program, "cpu", path)
    z, c = torch.randn(3, 9), torch.eye(2)[[0, 1, 0]]
    with torch.no_grad():
        made = FORMATS["torch"].load(path, "cpu")({"z": z, "c": c})
        torch.testing.assert_close(torch.as_tensor(made), G(z, c), rtol=1e-5, atol=1e-5)
