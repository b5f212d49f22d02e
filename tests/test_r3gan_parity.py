"""R3GAN's networks and losses compared with the results of the original implementation (../shared/parity-systems)."""

import json

import pytest
import torch
from safetensors import safe_open

from stylegan_pg.losses import DInputs, objectives, terms
from stylegan_pg.networks import NETWORKS
from stylegan_pg.networks.public_names import from_public, to_public

FILES = ["r3gan_uncond_16", "r3gan_cond_8"]


class Case:
    def __init__(self, path):
        with safe_open(path, "pt") as file:
            meta = {k: json.loads(v) for k, v in file.metadata().items()}
            self.t = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        form = {
            "resolution": meta["resolution"],
            "c_dim": meta.get("number_of_classes", 0),
            "widths": meta["generator_widths_per_stage"],
            "groups": meta["generator_groups_per_stage"],
            "blocks": meta["generator_blocks_per_stage"],
            "expansion": meta["expansion_factor"],
        }
        self.gamma = meta["gamma"]
        own = {"z_dim": meta["latent_size"], "embedding": meta["generator_condition_embedding_size"] or 1}
        self.G = NETWORKS["r3gan"].G(**own, **form)
        self.D = NETWORKS["r3gan"].D(embedding=meta["generator_widths_per_stage"][0], **form)
        self.G.load_state_dict(from_public(self.part("G.")))
        self.D.load_state_dict(from_public(self.part("D.")))
        self.z, self.c, self.real = self.t["in.z"], self.t.get("in.c"), self.t["in.real"]

    def part(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.t.items() if k.startswith(prefix)}


@pytest.fixture(scope="module", params=FILES)
def case(request, parity_dir):
    path = parity_dir.parent / "parity-systems" / f"{request.param}.safetensors"
    if not path.is_file():
        pytest.skip("no reference numbers: ../shared/parity-systems does not exist beside this checkout")
    return Case(path)


def close(actual, expected, tolerance=1e-5):
    error = float((actual.detach() - expected.reshape(actual.shape)).abs().max()) / float(expected.abs().max())
    assert error <= tolerance, f"{error:.2e} of the largest magnitude"


def compare_gradients(loss, net, expected):
    """On the larger of a tensor's own largest magnitude and 1/100 of that of the whole network."""
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    names = from_public({name: torch.full([1], i) for i, name in enumerate(expected)})
    public = dict(zip(names, expected, strict=True))
    found = {name: g for (name, _), g in zip(net.named_parameters(), gradients, strict=True)}
    assert found.keys() == names.keys()
    whole = max(float(t.abs().max()) for t in expected.values())
    for name, g in found.items():
        wanted = expected[public[name]]
        scale = max(float(wanted.abs().max()), whole / 100)
        error = float((g - wanted).abs().max()) / scale
        assert error <= 1e-4, f"{name}: {error:.2e}"


def test_images_and_scores(case):
    with torch.no_grad():
        image = case.G(case.z, case.c)
        real, fake = case.D(case.real, case.c), case.D(image, case.c)
    close(image, case.t["out.image"])
    close(real, case.t["out.real_logits"])
    close(fake, case.t["out.fake_logits"])
    close(fake - real, case.t["out.relativistic_logits_g"])
    close(real - fake, case.t["out.relativistic_logits_d"])
    both = [torch.cat([case.real, image]), *([] if case.c is None else [torch.cat([case.c, case.c])])]
    with torch.no_grad():
        for one, other in zip(case.D(*both, batches=2).chunk(2), (real, fake), strict=True):
            close(one, other)


def test_penalties(case):
    inputs = DInputs(D=case.D, real=case.real, c=case.c, fake=case.t["out.image"], c_fake=case.c)
    close(terms.r1_term(inputs)["r1_penalty"], case.t["out.r1_per_sample"])
    close(terms.r2_term(inputs)["r2_penalty"], case.t["out.r2_per_sample"])


def test_losses_and_their_gradients(case):
    fake = case.D(case.G(case.z, case.c), case.c)
    with torch.no_grad():
        real = case.D(case.real, case.c)
    loss_g = objectives.relativistic_g(fake, real).mean()
    close(loss_g, case.t["out.loss_g"])
    compare_gradients(loss_g, case.G, case.part("grad_loss_g."))

    image = case.G(case.z, case.c).detach()
    adversarial = objectives.relativistic_d(case.D(case.real, case.c), case.D(image, case.c)).mean()
    close(adversarial, case.t["out.loss_d_adversarial"])
    inputs = DInputs(D=case.D, real=case.real, c=case.c, fake=image, c_fake=case.c)
    penalties = [terms.r1_term(inputs)["loss"], terms.r2_term(inputs)["loss"]]
    loss_d = adversarial + case.gamma * torch.stack(penalties).sum(dim=0).mean()
    close(loss_d, case.t["out.loss_d"])
    compare_gradients(loss_d, case.D, case.part("grad_loss_d."))


def test_export_gives_the_same_tensors(case):
    for net, prefix in ((case.G, "G."), (case.D, "D.")):
        exported, expected = to_public(net), case.part(prefix)
        assert exported.keys() == expected.keys()
        for name, t in expected.items():
            torch.testing.assert_close(exported[name], t, rtol=1e-6, atol=0)
