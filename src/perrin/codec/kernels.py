"""The distributions of a chain as the coder takes them: of noised values on grids, and of what a network predicts."""

from __future__ import annotations

import copy
import math
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from perrin.codec.gaussians import Gaussians
from perrin.codec.values import Values
from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError, RunError
from perrin.forward import filled
from perrin.randomness import seed_of

FINENESS = 4
"""Steps of a grid in the narrowest true standard deviation of its values, given those above or those below.

The values' own rounding then adds 1/192 to that variance at most, which changes the rate by 4e-6 nats a step;
twice as fine a grid takes 2 initial bits more per value.
"""
_LARGEST = 64.0  # no noised value of data in [-1, 1] lies beyond: draws end at 5.5 standard deviations


class Kernels:
    """The distributions of ``chain`` and its ``network``, which is called on the CPU, in float64, on a copy.

    A latent is whole numbers k (B, ...) int64, which stand for (k + offset) times the step of their timestep's
    grid. The steps are powers of two; the offsets in [0, 1) are random, but always the same: on the bare grid a
    network whose Fourier features repeat within a step would see one phase only, which no training showed it
    (0.1 bits per dimension on MNIST). Raises `ArgumentError` for a chain of continuous data.
    """

    def __init__(self, chain: GaussianDiffusion, network: nn.Module) -> None:
        if chain.levels is None:
            raise ArgumentError(
                "the model is one of continuous data: only data with levels can be compressed"
            )
        self.levels = chain.levels
        self.steps = chain.num_timesteps
        self._chain = copy.deepcopy(chain).cpu()
        self._network = copy.deepcopy(network).cpu().double().eval()
        self._betas = self._chain.floats["betas"]
        downwards = self._chain.floats["posterior_variance"][1:]
        variances = (min(pair) for pair in zip_longest(self._betas, downwards, fillvalue=math.inf))
        self._grids = [2.0 ** math.floor(math.log2(math.sqrt(v) / FINENESS)) for v in variances]

    def first(self, x: np.ndarray) -> Gaussians:
        """q(x_1 | x) of level indices ``x``."""
        return self._noised(0, 2 * x / (self.levels - 1) - 1)

    def noised(self, latent: np.ndarray, t: int) -> Gaussians:
        """q(x_t | x_{t-1}) of the ``latent`` at t - 1, on the grid of t (DDPM eq. 2)."""
        return self._noised(t, self._placed(latent, t - 1))

    def _noised(self, t: int, below: np.ndarray) -> Gaussians:
        mean = math.sqrt(1 - self._betas[t]) * below.ravel()
        return self._on_grid(t, mean, np.full(mean.shape, 0.5 * math.log2(self._betas[t])), ends=True)

    def prior(self, size: int) -> Gaussians:
        """N(0, 1) of ``size`` values, on the grid of the last timestep."""
        return self._on_grid(self.steps - 1, np.zeros(size), np.zeros(size))

    def values(self, latent: np.ndarray, classes: Tensor | None) -> Values:
        """p(x | x_1)."""
        return Values.of(*self._reverse(latent, 0, classes), self.levels)

    def denoised(self, latent: np.ndarray, t: int, classes: Tensor | None) -> Gaussians:
        """p(x_{t-1} | x_t) of the ``latent`` at t, on the grid of t - 1."""
        return self._on_grid(t - 1, *self._reverse(latent, t, classes))

    def _on_grid(self, t: int, mean: np.ndarray, log2_std: np.ndarray, *, ends: bool = False) -> Gaussians:
        grid = self._grids[t]
        width = None if ends else round(math.log2(_LARGEST / grid)) + 1
        return Gaussians.of(mean / grid - _offsets(t, mean.size), log2_std - math.log2(grid), width)

    def _placed(self, latent: np.ndarray, t: int) -> np.ndarray:
        """The values (B, ...) that the ``latent`` at t stands for."""
        placed: np.ndarray = (latent + _offsets(t, latent.size).reshape(latent.shape)) * self._grids[t]
        return placed

    def _reverse(self, latent: np.ndarray, t: int, classes: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and binary logarithm of the standard deviation, (n,) float64.

        Raises `RunError` where they are not finite.
        """
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            x = torch.from_numpy(self._placed(latent, t))
            told = None if classes is None else {"y": classes}
            output = self._chain.output(self._called, x, t, told)
            denoised = self._chain.read(output, x, t, clip_denoised=True)
            mean, log_variance = self._chain.reverse(denoised, x, t)
            log2_std = filled(log_variance, mean) * (0.5 / math.log(2))
        if not bool((mean.isfinite() & log2_std.isfinite()).all()):
            raise RunError(
                f"the network's output at step {t} of the chain is not finite: nothing can be coded"
            )
        return mean.numpy().ravel(), log2_std.numpy().ravel()

    def _called(self, x: Tensor, t: Tensor, **model_kwargs: Tensor) -> Tensor:
        output: Tensor = self._network(x, t.double(), **model_kwargs)  # else the time's features are float32
        return output


def _offsets(t: int, size: int) -> np.ndarray:
    """Where the grid of t lies, (``size``,) from 0 to 1 in steps of 2^-16."""
    raw = np.random.PCG64(seed_of("grid", t)).random_raw(size)  # the raw stream is stable (NEP 19)
    offsets: np.ndarray = (raw >> np.uint64(48)) * 2.0**-16
    return offsets
