"""Named configurations, and the values in them that are chosen by the data before a run begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from perrin.config import DataConfig, DiffusionConfig, RunConfig, TrainingConfig, UNetConfig

SIGMA_SHARE = 1 / 3
"""The first sigma of a chain for data with levels, in halves of the distance of two levels: the level is then as good
as known (VDM's log-SNR of 13.3 for 256 levels, arXiv:2107.00630)."""

CONTINUOUS_LOG_SNR = 13.3
"""The first log-SNR for data without levels."""

BASIS = 16
"""Functions over the levels."""

MOST_WEIGHED = 1024
"""The most levels that a `LevelPosterior` takes."""

PATCHED_SIDE = 16
"""From so many pixels on, the fewest of which two are taken at a time."""


def resolved(config: RunConfig, shape: Sequence[int], levels: int | None) -> RunConfig:
    """``config`` with the values in the place of those None that stand for a choice by the data.

    ``shape`` (C, H, W) or (D,) and ``levels`` are the data's. Values that are given stay as they are, but where
    ``level_basis`` is None and the data do not admit one, the network predicts eps.
    """
    diffusion, network = config.diffusion, config.network
    if network.level_basis is None:
        network = replace(network, level_basis=basis_of(levels))
        if not network.level_basis:  # then the noise is predicted, which is what is left to say at low noise
            diffusion = replace(diffusion, mean_type="epsilon")
    if diffusion.log_snr_max is None:
        diffusion = replace(diffusion, log_snr_max=first_log_snr(levels))
    if network.fourier is None:
        network = replace(network, fourier=() if network.level_basis else fourier_of(levels))
    if isinstance(network, UNetConfig) and network.patch is None:
        network = replace(network, patch=patch_of(shape))
    return replace(config, diffusion=diffusion, network=network)


def first_log_snr(levels: int | None) -> float:
    """The log-SNR of the first timestep: there sigma is `SIGMA_SHARE` of half the distance of two levels."""
    if levels is None:
        return CONTINUOUS_LOG_SNR
    return round(2 * math.log((levels - 1) / SIGMA_SHARE), 2)


def fourier_of(levels: int | None) -> tuple[int, ...]:
    """The n of three input Fourier features, of which the highest turns half round from one level to the next.

    None for data without levels.
    """
    if levels is None:
        return ()
    top = max(round(math.log2((levels - 1) / 4)), 0)
    return tuple(range(max(top - 2, 0), top + 1))


def basis_of(levels: int | None) -> int:
    """`BASIS`, or 0 for data without levels or with so many that weighing them one by one would take too long."""
    return BASIS if levels is not None and levels <= MOST_WEIGHED else 0


def patch_of(shape: Sequence[int]) -> int:
    """2 for images whose sides are even and at least `PATCHED_SIDE`, else 1."""
    sides = shape[1:]
    return 2 if all(side % 2 == 0 and side >= PATCHED_SIDE for side in sides) else 1


LIKELIHOOD = RunConfig(
    diffusion=DiffusionConfig(
        schedule="log-snr-linear",
        num_timesteps=500,
        log_snr_max=None,
        log_snr_min=-7.0,
        mean_type="start-x",
        var_type="learned-range",
        loss="rescaled-kl",
    ),
    network=UNetConfig(
        channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_levels=(),
        fourier=None,
        patch=None,
        level_basis=None,
    ),
    training=TrainingConfig(
        steps=None,
        minutes=10,
        batch_size=32,
        lr=3e-3,
        warmup_steps=50,
        decay="cosine",
        ema=(0.998,),
        t_sampler="stratified-importance",
        precision="bf16",
        evaluate_every=1000,
    ),
)
"""Bits per dimension, in minutes on a CPU.

The loss is the bound itself, of a chain that leaves no doubt of the level at its first step and no signal at its
last; a small network says which levels it expects, and `LevelPosterior` makes the mean and the variance of that.
"""

DEMO = RunConfig(
    data=DataConfig(path="digits", held_out=0.2),
    diffusion=replace(LIKELIHOOD.diffusion, num_timesteps=250, log_snr_max=9.0, log_snr_min=-5.0),
    network=UNetConfig(
        channels=24,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_levels=(),
        num_heads=1,
        level_basis=16,
    ),
    training=replace(
        LIKELIHOOD.training,
        minutes=0.95,
        batch_size=48,
        lr=5e-3,
        precision="fp32",
        log_every=25,
        evaluate_every=400,
    ),
)
"""What ``perrin demo`` trains in less than a minute.

`LIKELIHOOD`, smaller: a chain whose first sigma, a sixth of half the distance of two of the 17 levels, leaves
no doubt of the level; a network that says which levels it expects, so small that it sees each digit some
fifty times; and the bound itself as the loss."""


PRESETS = {"likelihood": LIKELIHOOD}
"""What ``perrin train --preset`` knows."""
