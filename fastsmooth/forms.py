"""The forms of the update, a row each: SGD, SHB, NSHB, QHM and Nesterov.

One rule covers them. With g the gradient and u = g + decay p:

    m = beta m + alpha u                  from m = 0, where the form has a buffer
    p -= lr (fresh u + kept m)            the bracket is the direction m_t

A row says what alpha, fresh and kept are, how large the noise of the direction may be (the bound
psi^2 on E||m_t - grad f(x_t)||^2 behind delta = lr psi) and the factor kappa of the critical batch
size; where no paper has published these, there is neither. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastsmooth.names import about_value


@dataclass(frozen=True)
class Bound:
    """psi^2 as one version of a paper has it. `variance` is C^2 / b, the bound on E||g - grad
    f||^2; k2 is K^2."""

    # (variance, k2, beta, nu) -> psi^2; grows with beta
    noise: Callable[[float, float, float, float], float]
    # (psi^2, variance, k2, nu) -> beta, but for rounding
    momentum: Callable[[float, float, float, float], float]
    uses_k2: bool = False


@dataclass(frozen=True)
class Form:
    """A row of FORMS."""

    name: str
    direction: str  # in words, of g the gradient
    # (beta, nu) -> alpha, fresh, kept
    coefficients: Callable[[float, float], tuple[float, float, float]]
    # by the version that published it; the first is meant where none is named; empty where none is
    # published
    bounds: dict[str, Bound]
    # (beta, nu) -> kappa in C^2 = b* eps^2 / (kappa lr), for beta > 0; None where it is not known
    kappa: Callable[[float, float], float] | None
    has_buffer: bool = True
    # whether the direction has a part of u beside the buffer's; else fresh = 0 and kept = 1
    mixes: bool = False
    uses_nu: bool = False

    def bound(self, version: str | None = None) -> Bound:
        """Raises ValueError for a version that has not published one, and for a form that has
        none."""
        if not self.bounds:
            raise ValueError(f"no noise bound is published for {self.name}, so it has no delta")
        if version is None:
            return next(iter(self.bounds.values()))
        if version not in self.bounds:
            raise ValueError(
                f"{self.name} has no bound of version {version!r}: there is "
                f"{', '.join(self.bounds)}"
            )
        return self.bounds[version]


def form_named(name: str) -> Form:
    """Raises ValueError, with what may have been meant, for a name that is no row."""
    if name not in FORMS:
        raise ValueError(f"form {name!r}: {about_value('--optimizer', str(name), FORMS)}")
    return FORMS[name]


def is_foreign(optimizer: str) -> bool:
    """Whether the name is of an optimizer that is no form: torch/NAME, timm/NAME, FILE.py:NAME."""
    return str(optimizer).startswith(("torch/", "timm/")) or ".py:" in str(optimizer)


def noise_of(optimizer: str) -> Form:
    """What is known of the noise of an optimizer's direction: the row of a form, and of a foreign
    optimizer a row without bounds. Raises ValueError for any other name."""
    if not is_foreign(optimizer):
        return form_named(optimizer)
    return Form(optimizer, "its own", lambda beta, nu: (0.0, 1.0, 0.0), {}, None, has_buffer=False)


# The bounds


def of_gradient(variance: float, k2: float, beta: float, nu: float) -> float:
    return variance


def never(psi2: float, variance: float, k2: float, nu: float) -> float:
    """Where the noise does not depend on the momentum."""
    return math.nan


def growth(beta: float) -> float:
    """beta (beta^2 - beta + 1) / (1 - beta)^2."""
    return (beta / (1 - beta)) ** 2 + beta


def heavy_ball(variance: float, k2: float, beta: float, nu: float) -> float:
    return (1 + growth(beta)) * variance + growth(beta) * k2


def heavy_ball_momentum(psi2: float, variance: float, k2: float, nu: float) -> float:
    """The root of growth(beta) = u, by Newton's method from above."""
    u = (psi2 - variance) / (variance + k2)
    beta = min(math.sqrt(u) / (1 + math.sqrt(u)), 1 - 2**-53)
    for _ in range(8):
        odds = beta / (1 - beta)
        step = (odds * odds + beta - u) / (2 * odds / (1 - beta) ** 2 + 1)
        beta -= step
        if abs(step) <= 1e-8 * beta:  # the next one would be its square
            break
    return beta


def normalised_v1(variance: float, k2: float, beta: float, nu: float) -> float:
    return variance + 4 * beta**2 * (variance + k2)


def normalised_v1_momentum(psi2: float, variance: float, k2: float, nu: float) -> float:
    return math.sqrt((psi2 - variance) / (4 * (variance + k2)))


def averaged(variance: float, k2: float, beta: float, nu: float) -> float:
    return (1 + nu * beta / (1 - beta)) * variance


def averaged_momentum(psi2: float, variance: float, k2: float, nu: float) -> float:
    excess = psi2 - variance
    return excess / (nu * variance + excess)


# The rows

ROWS = (
    Form(
        "sgd",
        "g",
        lambda beta, nu: (0.0, 1.0, 0.0),
        {"v1": Bound(of_gradient, never)},
        lambda beta, nu: 1.0,
        has_buffer=False,
    ),
    Form(
        "shb",
        "beta m + g",
        lambda beta, nu: (1.0, 0.0, 1.0),
        {"v3": Bound(heavy_ball, heavy_ball_momentum, uses_k2=True)},
        lambda beta, nu: 1 / (1 - beta) ** 2 + 1 / beta,
    ),
    Form(
        "nshb",
        "beta m + (1 - beta) g",
        lambda beta, nu: (1 - beta, 0.0, 1.0),
        {
            "v3": Bound(averaged, averaged_momentum),
            "v1": Bound(normalised_v1, normalised_v1_momentum, uses_k2=True),
        },
        lambda beta, nu: 1 + beta / (1 - beta),
    ),
    Form(
        "qhm",
        "(1 - nu) g + nu d, d = beta d + (1 - beta) g",
        lambda beta, nu: (1 - beta, 1 - nu, nu),
        {"ours": Bound(averaged, averaged_momentum)},  # an interpolation, exact at nu = 0 and 1
        lambda beta, nu: 1 + nu * beta / (1 - beta),
        mixes=True,
        uses_nu=True,
    ),
    Form(
        "nesterov",
        "g + beta m, m = beta m + g",  # torch.optim.SGD(nesterov=True)
        lambda beta, nu: (1.0, 1.0, beta),
        {},
        None,
        mixes=True,
    ),
)
FORMS = {form.name: form for form in ROWS}
