"""The kinds of sharpness, a row each, and what a measurement is set to. No torch: flags name them.

After Andriushchenko et al. 2023 (arXiv 2302.07011).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastsmooth.names import about_value


@dataclass(frozen=True)
class Algorithm:
    """Of the loss around the weights either the largest value (`at_worst`) or the mean."""

    at_worst: bool
    norm: str  # of the region in which weights move: l2 or linf
    scanned_rho: str  # by the authors of the algorithms, as a command line has them
    published_rho: float | None = None  # in arXiv 2311.08745


ALGORITHMS = {
    "avg_l2": Algorithm(False, "l2", "0.05 0.1 0.2 0.4"),
    "avg_linf": Algorithm(False, "linf", "0.1 0.2 0.4 0.8"),
    "m_apgd_l2": Algorithm(True, "l2", "0.25 0.5 1 2"),
    "m_apgd_linf": Algorithm(True, "linf", "0.0005 0.001 0.002 0.004", 0.0002),
}


@dataclass(frozen=True)
class Setting:
    """What is measured, but for rho and the images."""

    algorithm: str = "m_apgd_linf"
    adaptive: bool = True
    normalize_logits: bool = False
    n_iters: int = 20  # draws, for the averages
    restarts: int = 1
    step_size_mult: float = 1.0
    random_start: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            meant = about_value("--algorithm", str(self.algorithm), ALGORITHMS)
            raise ValueError(f"algorithm {self.algorithm!r}: {meant}")
