"""Objectives compared with their formulas in NumPy, and terms of D with discriminators whose gradients are known."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from stylegan_pg import config
from stylegan_pg.config import ObjectiveName
from stylegan_pg.losses import OBJECTIVES, TERMS, DInputs, terms

N, SHAPE = 6, (2, 3, 4)
CLASSES = 3


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.log(1 / (1 + np.exp(-x)))


# The losses as defined in the papers: G's as functions of (fake, real), D's as functions of (real, fake).
FORMULAS = {
    "logistic": (lambda f, r: -log_sigmoid(f), lambda r, f: -log_sigmoid(r) - log_sigmoid(-f)),
    "saturating": (lambda f, r: log_sigmoid(-f), lambda r, f: -log_sigmoid(r) - log_sigmoid(-f)),
    "wgan": (lambda f, r: -f, lambda r, f: f - r),
    "lsgan": (lambda f, r: 0.5 * (f - 1) ** 2, lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2),
    "hinge": (lambda f, r: -f, lambda r, f: -np.minimum(0, r - 1) - np.minimum(0, -f - 1)),
    "relativistic": (lambda f, r: -log_sigmoid(f - r), lambda r, f: -log_sigmoid(r - f)),
}


def scores(seed: int = 0, n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    real, fake = (3 * torch.randn([n, 1], generator=g, dtype=torch.float64) for _ in range(2))
    return real.requires_grad_(True), fake.requires_grad_(True)


def test_configuration_and_losses_have_the_same_names():
    assert {name.value for name in ObjectiveName} == set(OBJECTIVES) == set(FORMULAS)
    assert set(config.TERMS) == set(TERMS)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_equal_their_formulas(name):
    objective, (g, d) = OBJECTIVES[name], FORMULAS[name]
    real, fake = scores()
    r, f = real.detach().numpy(), fake.detach().numpy()
    ours_g, ours_d = objective.g(fake, real if objective.paired else None), objective.d(real, fake)
    assert ours_g.shape == ours_d.shape == real.shape
    np.testing.assert_allclose(ours_g.detach().numpy(), g(f, r), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours_d.detach().numpy(), d(r, f), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_can_be_differentiated(name):
    objective = OBJECTIVES[name]
    real, fake = scores(1, 8)
    assert gradcheck(objective.d, (real, fake))
    assert gradcheck(objective.g, (fake, real))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_g_and_d_change_scores_in_opposite_directions(name):
    """Where the gradient is not zero, D raises scores of real images and lowers those of generated ones, and G raises
    the latter. Least squares does so between its targets."""
    objective = OBJECTIVES[name]
    real, fake = scores(2)
    if name == "lsgan":
        real, fake = (t.detach().sigmoid().requires_grad_(True) for t in (real, fake))
    to_real, to_fake = torch.autograd.grad(objective.d(real, fake).sum(), [real, fake])
    (of_g,) = torch.autograd.grad(objective.g(fake, real).sum(), fake)
    assert (to_real <= 0).all()
    assert (to_fake >= 0).all()
    assert (of_g < 0).all()
    assert (to_real < 0).any()
    assert (to_fake > 0).any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_scores_of_any_size_stay_finite(name):
    objective = OBJECTIVES[name]
    far = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    for loss in (objective.d(far, -far), objective.g(far, -far)):
        assert loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), far)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "real", "fake", "value"),
    [
        # For densities p and q, the best score of D is log(p / q); these are the values where p = q.
        ("logistic", 0, 0, 2 * np.log(2)),
        ("saturating", 0, 0, 2 * np.log(2)),
        ("relativistic", 0, 0, np.log(2)),
        ("lsgan", 0.5, 0.5, 0.25),
        ("hinge", 1, -1, 0),
        ("lsgan", 1, 0, 0),
        ("wgan", 0.3, 0.3, 0),
    ],
)
def test_values_at_equilibrium_and_optimum(name, real, fake, value):
    r, f = (torch.tensor([[float(x)]], dtype=torch.float64) for x in (real, fake))
    loss = OBJECTIVES[name].d(r, f)
    assert float(loss) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("logistic", lambda p, q: np.log(p / q)),  # Goodfellow et al. 2014, proposition 1
        ("lsgan", lambda p, q: p / (p + q)),  # Mao et al. 2017, equation 5
        ("hinge", lambda p, q: np.sign(p - q)),
    ],
)
def test_the_best_score_at_densities_p_and_q(name, best):
    """At a point with density p of real and q of generated images, the known score minimises D's loss."""
    candidates = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for p, q in ((0.7, 0.2), (0.1, 0.6)):
        none = torch.zeros_like(candidates)
        d = OBJECTIVES[name].d
        offset = d(none, none)
        loss = p * (d(candidates, none) - offset) + q * (d(none, candidates) - offset)
        assert float(candidates[loss.argmin()]) == pytest.approx(best(p, q), abs=2e-4)


def test_relativistic_needs_scores_of_both():
    assert [name for name, o in OBJECTIVES.items() if o.paired] == ["relativistic"]
    with pytest.raises(ValueError, match="scores of real images"):
        OBJECTIVES["relativistic"].g(torch.zeros(2, 1), None)


def test_relativistic_pairs_images_by_position():
    real, fake = scores(3)
    shifted = OBJECTIVES["relativistic"].d(real + 5, fake + 5)
    torch.testing.assert_close(shifted, OBJECTIVES["relativistic"].d(real, fake))
    (mixed,) = torch.autograd.grad(OBJECTIVES["relativistic"].g(fake, real)[3], real)
    assert mixed.nonzero().tolist() == [[3, 0]]


# ------------------------------------------------------------------------------------------------------------- terms


def inputs(D, n: int = N, seed: int = 0) -> DInputs:
    g = torch.Generator().manual_seed(seed)
    real, fake, noise = (torch.randn([n, *SHAPE], generator=g, dtype=torch.float64) for _ in range(3))
    u = torch.rand([n], generator=g, dtype=torch.float64)
    c, c_fake = (
        torch.nn.functional.one_hot(torch.randint(CLASSES, [n], generator=g), CLASSES).double() for _ in range(2)
    )
    return DInputs(D, real, c, fake, c_fake, u, noise)


def quadratic(a: torch.Tensor, b: torch.Tensor):
    """D(x, c) = sum(a x^2) / 2 + (1 + k) sum(b x) for class k, whose gradient is a x + (1 + k) b."""

    def D(x: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        k = 0 if c is None else c.argmax(dim=1)[:, None, None, None]
        return ((a * x.square()).sum(dim=[1, 2, 3]) / 2 + ((1 + k) * b * x).sum(dim=[1, 2, 3]))[:, None]

    return D


def coefficients() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    a, b = (torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(2))
    return a.requires_grad_(True), b.requires_grad_(True)


def known_norm(name: str, x: DInputs, a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Return the norm [N] of the gradient in NumPy, at the images and with the labels that the term uses."""
    real, fake, u, noise, c, c_fake = (np.asarray(t) for t in (x.real, x.fake, x.u, x.noise, x.c, x.c_fake))
    u = u.reshape(-1, 1, 1, 1)
    places = {"r1": real, "r2": fake, "gradient_penalty": u * real + (1 - u) * fake, "dragan": real + 0.25 * noise}
    classes = (c_fake if name == "r2" else c).argmax(axis=1).reshape(-1, 1, 1, 1)
    gradient = a.detach().numpy() * places[name] + (1 + classes) * b.detach().numpy()
    return np.sqrt((gradient**2).sum(axis=(1, 2, 3)))


def options(name: str, target: float) -> dict[str, float]:
    """The options of a term with this target, if it has one."""
    has_target = "target" in config.TERMS[name]().options()
    return {"target": target} if has_target else {}


GRADIENT_TERMS = ["r1", "r2", "gradient_penalty", "dragan"]


@pytest.mark.parametrize("target", [1.0, 3.0])
@pytest.mark.parametrize("name", GRADIENT_TERMS)
def test_terms_of_a_quadratic_discriminator(name, target):
    a, b = coefficients()
    x = inputs(quadratic(a, b))
    values = TERMS[name].compute(x, **options(name, target))
    n = known_norm(name, x, a, b)
    wanted = {
        "r1": {"loss": n**2 / 2, "r1_penalty": n**2},
        "r2": {"loss": n**2 / 2, "r2_penalty": n**2},
        "gradient_penalty": {"loss": (n - target) ** 2 / target**2, "gp_norm": n},
        "dragan": {"loss": (n - target) ** 2, "dragan_norm": n},
    }[name]
    assert values.keys() == wanted.keys() == {"loss", *TERMS[name].reports}
    for key, value in values.items():
        np.testing.assert_allclose(value.detach().numpy(), wanted[key], rtol=1e-12)
    assert x.fake is not None
    assert not x.real.requires_grad
    assert not x.fake.requires_grad


@pytest.mark.parametrize("name", GRADIENT_TERMS)
def test_terms_have_gradients_for_the_discriminators_weights(name):
    """They are differentiated backwards through a gradient."""

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return TERMS[name].compute(inputs(quadratic(a, b), n=2), **options(name, 2.0))["loss"]

    assert gradcheck(loss, coefficients())
    assert gradgradcheck(loss, coefficients())


@pytest.mark.parametrize("name", GRADIENT_TERMS)
def test_terms_of_a_network_against_finite_differences(name):
    """The gradient with respect to the image is compared with central differences for each pixel."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(24, 16), torch.nn.Softplus(), torch.nn.Linear(16, 1))
    net = net.double()
    x = inputs(lambda image, c: net(image))
    assert x.fake is not None
    assert x.u is not None
    assert x.noise is not None
    u = x.u[:, None, None, None]
    place = {"r1": x.real, "r2": x.fake, "gradient_penalty": x.fake + u * (x.real - x.fake)}
    at = place.get(name, x.real + x.noise / 4)
    steps = 1e-5 * torch.eye(24, dtype=torch.float64).reshape(24, 1, *SHAPE)
    with torch.no_grad():
        squared = sum(((net(at + e) - net(at - e)) / 2e-5).square().flatten() for e in steps)
    assert isinstance(squared, torch.Tensor)
    wanted = squared / 2 if name in ("r1", "r2") else (squared.sqrt() - 1).square()
    torch.testing.assert_close(TERMS[name].compute(x)["loss"].detach(), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", GRADIENT_TERMS)
def test_sums_over_micro_batches_equal_the_batch(name):
    a, b = coefficients()
    x = inputs(quadratic(a, b))
    whole = torch.autograd.grad(TERMS[name].compute(x, **options(name, 2.0))["loss"].sum(), [a, b])
    total = [torch.zeros_like(t) for t in whole]
    for part in ([0, 3], [1, 4, 5], [2]):
        fields = (None if t is None else t[part] for t in (x.real, x.c, x.fake, x.c_fake, x.u, x.noise))
        loss = TERMS[name].compute(DInputs(x.D, *fields), **options(name, 2.0))["loss"].sum()  # type: ignore[arg-type]  # real is there
        for t, g in zip(total, torch.autograd.grad(loss, [a, b]), strict=True):
            t += g
    for t, g in zip(total, whole, strict=True):
        torch.testing.assert_close(t, g)


@pytest.mark.parametrize("name", GRADIENT_TERMS)
def test_terms_use_only_their_declared_inputs(name):
    a, b = coefficients()
    x = inputs(quadratic(a, b))
    full = TERMS[name].compute(x)["loss"]
    pairs = {"fake": ("fake", "c_fake"), "u": ("u",), "noise": ("noise",)}
    for need, attributes in pairs.items():
        if need not in TERMS[name].needs:
            for attribute in attributes:
                setattr(x, attribute, None)
    assert torch.equal(TERMS[name].compute(x)["loss"], full)
    for need in TERMS[name].needs:
        without = inputs(quadratic(a, b))
        setattr(without, need, None)
        with pytest.raises(AssertionError):
            TERMS[name].compute(without)


def test_gradient_penalty_is_zero_for_a_critic_of_slope_one():
    direction = torch.ones(SHAPE, dtype=torch.float64) / 24**0.5
    x = inputs(lambda image, c: (image * direction).sum(dim=[1, 2, 3])[:, None])
    assert TERMS["gradient_penalty"].compute(x)["loss"].abs().max() < 1e-24
    seen: list[torch.Tensor] = []

    def watching(image: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        seen.append(image.detach())
        return image.sum(dim=[1, 2, 3])[:, None]

    for u, end in ((1.0, "real"), (0.0, "fake")):
        x = inputs(watching)
        x.u = torch.full([N], u, dtype=torch.float64)
        TERMS["gradient_penalty"].compute(x)
        torch.testing.assert_close(seen[-1], getattr(x, end), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["gradient_penalty", "dragan"])
def test_a_critic_without_slope_gives_no_nan(name):
    """The norm has no derivative at zero. The weights of a new or constant critic must not become NaN."""
    weight = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    x = inputs(lambda image, c: (image * weight).sum(dim=[1, 2, 3])[:, None])
    loss = TERMS[name].compute(x)["loss"]
    assert torch.equal(loss, torch.ones_like(loss))
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    assert gradient.isfinite().all()


def test_drift_is_the_square_of_the_real_scores():
    real, fake = scores(4)
    values = TERMS["drift"].compute(real, fake)
    assert set(values) == {"loss"}
    assert TERMS["drift"].of_scores
    np.testing.assert_allclose(values["loss"].detach().numpy(), real.detach().numpy()[:, 0] ** 2)
    assert gradcheck(lambda r, f: TERMS["drift"].compute(r, f)["loss"], scores(5, 4))


def test_path_length_of_a_generator_without_a_mapping_to_learn():
    """For G(w) = A w and ws without a graph, J^T y is A^T y for any w, and A gets a gradient."""
    g = torch.Generator().manual_seed(6)
    a = torch.randn([24, 5], generator=g, dtype=torch.float64).requires_grad_(True)
    ws, noise = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ([N, 1, 5], [N, *SHAPE]))

    def values(a: torch.Tensor) -> dict[str, torch.Tensor]:
        x = terms.GInputs(lambda w: (w[:, 0] @ a.t()).reshape(-1, *SHAPE), ws, noise, {"pl_mean": 0.5})
        return TERMS["path_length"].compute(x)

    wanted = np.linalg.norm(noise.flatten(1).numpy() / np.sqrt(12) @ a.detach().numpy(), axis=1)
    np.testing.assert_allclose(values(a)["pl_length"].detach().numpy(), wanted, rtol=1e-12)
    np.testing.assert_allclose(values(a)["loss"].detach().numpy(), (wanted - 0.5) ** 2, rtol=1e-12)
    assert gradcheck(lambda a: values(a)["loss"], a)
    assert not ws.requires_grad


def test_options_of_a_term_are_arguments_of_its_function():
    for name, term in TERMS.items():
        assert term.on in "GD", name
        assert set(term.needs) <= {"fake", "u", "noise"}
        arguments = inspect.signature(term.compute).parameters.values()
        named = {p.name: p.default for p in arguments if p.kind is p.KEYWORD_ONLY}
        assert named == config.TERMS[name]().options()
