"""f_delta(x) = E f(x - delta u) of Rastrigin's function and of the drop-wave, exactly or with a
stated error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from fastsmooth.smooth.noises import Noise

REACH = 5.0  # x is in [-REACH, REACH], in every coordinate
# of quadrature: what doubling the nodes may change, and when to give up
TOLERANCE, MAX_NODES = 1e-10, 1 << 14
BLOCK = 1 << 20  # values that are held at a time, so that memory is bounded


def rastrigin(x: ndarray) -> ndarray:
    return x**2 - 10 * np.cos(2 * np.pi * x) + 10


def drop_wave(r: ndarray) -> ndarray:
    return -(1 + np.cos(12 * np.pi * r)) / (2 + 0.5 * r**2)


@dataclass(frozen=True)
class Smoothed:
    """f_delta at every x: [n], or [n, n] in two dimensions. `values` is None where the expectation
    does not exist."""

    values: ndarray | None
    method: str
    # the largest over x: of quadrature an estimate, of draws the standard error
    error: float | None


@dataclass(frozen=True)
class Case:
    """f_delta of one function under one noise."""

    function: str
    noise: str
    delta: float
    smoothed: Smoothed


def smooth_rastrigin(x: ndarray, delta: float, noise: Noise, shift: float) -> Smoothed:
    """(x - delta m)^2 + delta^2 v - 10 E cos(2 pi (x - delta u)) + 10 with the mean m and the
    variance v of u - shift."""
    if delta == 0:
        return Smoothed(rastrigin(x), "f itself", 0.0)
    if noise.mean is None or noise.variance is None:
        return Smoothed(None, "undefined: the second moment of u is infinite", None)
    x = x + delta * shift
    wave = np.exp(2j * np.pi * x) * noise.characteristic(np.array([2 * np.pi * delta])).conj()
    square = (x - delta * noise.mean) ** 2 + delta**2 * noise.variance
    return Smoothed(square - 10 * wave.real + 10, "closed form", 0.0)


def smooth_drop_wave(x: ndarray, delta: float, noise: Noise, shift: float) -> Smoothed:
    """By quadrature over frequencies, with more nodes until twice as many change nothing.

    1 / (4 + y^2) is the integral of exp(iky - 2|k|) / 4 over all k, so that f_delta is one of
    exp(ikx) times the characteristic function of u at -delta k. It decays like exp(-2k) for every
    noise: a heavy tail costs nothing.
    """
    if delta == 0:
        return Smoothed(drop_wave(x), "f itself", 0.0)
    nodes, before = 128, None
    while True:
        values = over_frequencies(x + delta * shift, delta, noise, nodes)
        error = math.inf if before is None else float(np.abs(values - before).max())
        if error <= TOLERANCE or nodes >= MAX_NODES:
            return Smoothed(values, f"quadrature, {nodes} nodes", error)
        nodes, before = 2 * nodes, values


def over_frequencies(x: ndarray, delta: float, noise: Noise, nodes: int) -> ndarray:
    """-1/2 Re of the integral over k > 0 of exp(-2k) (2 p(k) + p(w + k) + p(w - k)), p(k) =
    exp(ikx) E exp(-ik delta u).

    w = 12 pi is the drop-wave's frequency. k = s^2 smooths the root at 0 in Levy's characteristic
    function, and at k = 18 the factor exp(-2k) is 2e-16.
    """
    # in panels: many nodes at once are slow to find
    at, weight = np.polynomial.legendre.leggauss(min(nodes, 64))
    panels = nodes // len(at)
    end = math.sqrt(18)
    s = ((at + 1) / 2 + np.arange(panels)[:, None]).ravel() * end / panels
    weight = np.tile(weight, panels) * end / panels / 2 * 2 * s * np.exp(-2 * s**2)
    total = np.zeros(len(x))
    w = 12 * np.pi
    for factor, k in ((2, s**2), (1, w + s**2), (1, w - s**2)):
        amplitude = factor * weight * noise.characteristic(delta * k).conj()
        for part in np.array_split(np.arange(len(k)), -(-len(k) * len(x) // BLOCK)):
            total += (np.exp(1j * np.outer(x, k[part])) @ amplitude[part]).real
    return -total / 2


def smooth_rastrigin_2d(x: ndarray, delta: float, noise: Noise, shift: float) -> Smoothed:
    """The sum over two coordinates, with independent noise in each."""
    one = smooth_rastrigin(x, delta, noise, shift)
    return (
        one
        if one.values is None
        else Smoothed(one.values[:, None] + one.values, one.method, one.error)
    )


def smooth_drop_wave_2d(
    x: ndarray, delta: float, noise: Noise, shift: float, samples: int, seed: int
) -> Smoothed:
    """The drop-wave of the radius by `samples` draws of u [2], the same at every x, so that
    surfaces are smooth."""
    if delta == 0:
        return Smoothed(drop_wave(np.hypot(x[:, None], x)), "f itself", 0.0)
    u = noise.draw(np.random.default_rng(seed), (samples, 2)) - shift
    total, squares = np.zeros((2, len(x), len(x)))
    for part in np.array_split(u, -(-samples * len(x) ** 2 // BLOCK)):
        a, b = (x[:, None] - delta * part[:, i] for i in (0, 1))
        values = drop_wave(np.hypot(a[:, None], b))
        total += values.sum(axis=2)
        squares += (values**2).sum(axis=2)
    mean = total / samples
    error = np.sqrt(np.maximum(squares / samples - mean**2, 0) / (samples - 1))
    return Smoothed(mean, f"{samples} common draws", float(error.max()))
