"""The networks compared with the results of the original implementations (../shared/parity)."""

import json

import pytest
import torch
from safetensors import safe_open

from stylegan_pg.losses import objectives, terms
from stylegan_pg.networks.public_names import from_public, to_public
from stylegan_pg.networks.stylegan2 import Discriminator, Generator

FILES = ["stylegan2_cond_64", "stylegan2_orig_orig_16", "stylegan2_resnet_skip_32", "stylegan2_skip_resnet_32"]


class Case:
    def __init__(self, path):
        with safe_open(path, "pt") as file:
            meta = {k: json.loads(v) for k, v in file.metadata().items()}
            self.t = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        shape = {k: meta[k] for k in ("resolution", "channel_base", "channel_max", "conv_clamp", "c_dim")}
        self.G = Generator(
            **shape,
            z_dim=meta["z_dim"],
            w_dim=meta["w_dim"],
            mapping_layers=meta["mapping_layers"],
            architecture=meta["g_architecture"],
        )
        self.D = Discriminator(**shape, architecture=meta["d_architecture"], mbstd_group=meta["mbstd_group"])
        self.G.load_state_dict(from_public(self.part("G.")))
        self.D.load_state_dict(from_public(self.part("D.")))
        self.c = self.t.get("in.c")

    def part(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.t.items() if k.startswith(prefix)}

    def fake(self, **kwargs):
        return self.G(self.t["in.z"], self.c, **kwargs)


@pytest.fixture(scope="module", params=FILES)
def case(request, parity_dir):
    return Case(parity_dir / f"{request.param}.safetensors")


def close(actual, expected, tolerance=1e-5, scale=None):
    expected = expected.reshape(actual.shape)
    scale = float(expected.abs().max()) if scale is None else scale
    error = float((actual.detach() - expected).abs().max()) / max(scale, 1e-30)
    assert error <= tolerance, f"{error:.2e} of the largest magnitude"


def test_styles_and_images(case):
    with torch.no_grad():
        close(case.G.styles(case.t["in.z"], case.c), case.t["out.ws"])
        close(case.G.styles(case.t["in.z"], case.c, psi=0.7, cutoff=4), case.t["out.ws_psi0.7_cutoff4"])
        close(case.fake(), case.t["out.image_const_noise"])
        close(case.fake(noise="none"), case.t["out.image_no_noise"])
        close(case.fake(psi=0.7, cutoff=4), case.t["out.image_psi0.7_cutoff4_const_noise"])


def test_logits_and_second_derivatives(case):
    with torch.no_grad():
        close(case.D(case.t["out.image_const_noise"], case.c), case.t["out.fake_logits"])
        close(case.D(case.t["in.real"], case.c), case.t["out.real_logits"])
    real = case.t["in.real"].clone().requires_grad_(True)
    close(terms.r1(case.D(real, case.c), real), case.t["out.r1_per_sample"])
    ws = case.G.styles(case.t["in.z"], case.c)
    lengths = terms.path_lengths(case.G.synthesis(ws), ws, case.t["in.pl_noise"])
    close(lengths, case.t["out.pl_lengths"])


def check_gradients(module, expected):
    largest = max(float(g.abs().max()) for g in expected.values())
    gradients = {n: p.grad for n, p in module.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, reference in expected.items():
        grad = torch.zeros_like(reference) if gradients[name] is None else gradients[name]
        close(grad, reference, 1e-4, scale=max(float(reference.abs().max()), largest / 100))


def test_loss_gradients(case):
    case.G.zero_grad()
    case.D.zero_grad()
    loss = objectives.logistic_g(case.D(case.fake(), case.c)).mean()
    close(loss, case.t["out.loss_g"])
    loss.backward()
    check_gradients(case.G, from_public(case.part("grad_loss_g.")))

    case.D.zero_grad()
    real = case.t["in.real"].clone().requires_grad_(True)
    real_logits = case.D(real, case.c)
    fake_logits = case.D(case.t["out.image_const_noise"], case.c)
    loss = (objectives.logistic_d(real_logits, fake_logits) + 5 * terms.r1(real_logits, real)[:, None]).mean()
    close(loss, case.t["out.loss_d_with_r1_weight_5"])
    loss.backward()
    check_gradients(case.D, from_public(case.part("grad_loss_d.")))


def test_public_names_round_trip(case):
    for prefix, module in (("G.", case.G), ("D.", case.D)):
        public, original = to_public(module), case.part(prefix)
        assert public.keys() == original.keys()
        for name, tensor in public.items():
            assert tensor.shape == original[name].shape
            assert torch.equal(tensor, original[name]), name
