"""What training reached so far: held-out bits/dim, a grid of samples, and how far the variance strays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perrin.data import spread, to_levels, write_grid
from perrin.diffusion import GaussianDiffusion
from perrin.errors import NonFiniteError
from perrin.likelihood import PILOT_IMAGES, bound, mean_and_error, term_probabilities
from perrin.reverse import Model
from perrin.samplers import SampleNoise, SamplerDDIM
from perrin.training.step import Batches, chunks, model_kwargs

MOST_IMAGES = 512
TERMS = 16
SAMPLING_STEPS = 50
SEED = 0
"""The same images, noise and samples at every evaluation, so that only the network differs."""


@dataclass(frozen=True)
class Evaluation:
    """One measurement; ``held_out_bpd`` is an estimate of the bound, from few images and `TERMS` timesteps."""

    held_out_bpd: float
    held_out_bpd_se: float
    outside_range: float | None
    """Share of the LEARNED_RANGE output outside [-1, 1]; None for other variances."""
    grid: Path | None
    """The picture of samples; None for vectors."""

    def row(self, step: int) -> dict[str, Any]:
        """Its line of the metrics."""
        figures = {"held_out_bpd": self.held_out_bpd, "held_out_bpd_se": self.held_out_bpd_se}
        outside = {} if self.outside_range is None else {"outside_range": self.outside_range}
        return {"step": step, **figures, **outside}


class RangeCounter:
    """A network whose variance outputs are counted: in all, and outside [-1, 1]."""

    def __init__(self, network: Model) -> None:
        self._network = network
        self._outside: Tensor | int = 0
        self._count = 0

    def __call__(self, x: Tensor, t: Tensor, **model_kwargs: Any) -> Tensor:
        """The network's output as it is."""
        output: Tensor = self._network(x, t, **model_kwargs)
        extra = output[:, x.shape[1] :]
        self._outside = self._outside + (extra.abs() > 1).sum()
        self._count += extra.numel()
        return output

    def share(self) -> float:
        """The share outside [-1, 1] of all outputs so far."""
        return float(self._outside) / self._count


def evaluate(
    network: nn.Module, diffusion: GaussianDiffusion, batches: Batches, grid_path: Path
) -> Evaluation:
    """Measure ``network``, which is in eval mode, on the held-out part and draw its samples to ``grid_path``.

    A bound that is not finite does not end the training that asks: its figures are NaN.
    """
    counted = RangeCounter(network)
    try:
        figures = mean_and_error(held_out_bpd(counted, diffusion, batches))
    except NonFiniteError:
        figures = math.nan, math.nan
    ranged = batches.config.diffusion.var_type == "learned-range"
    grid = draw_grid(network, diffusion, batches, grid_path) if _drawable(batches) else None
    return Evaluation(*figures, counted.share() if ranged else None, grid)


def held_out_bpd(network: RangeCounter, diffusion: GaussianDiffusion, batches: Batches) -> Tensor:
    """Bits per dimension (N,) of at most `MOST_IMAGES` examples, spread evenly over the held-out part."""
    chosen = spread([int(i) for i in batches.held_out], MOST_IMAGES)
    terms = TERMS if diffusion.num_timesteps > TERMS + 1 else None
    probabilities = None
    if terms is not None:
        x_start, told = _told(batches, chosen[:PILOT_IMAGES])
        probabilities = term_probabilities(diffusion, network, x_start, seed=SEED, model_kwargs=told)
    totals = []
    for rows in chunks(len(chosen), _chunk(batches)):
        x_start, told = _told(batches, chosen[rows])
        found = bound(
            diffusion,
            network,
            x_start,
            indices=chosen[rows],
            seed=SEED,
            terms=terms,
            probabilities=probabilities,
            model_kwargs=told,
        )
        totals.append(found.total)
    return torch.cat(totals)


def _told(batches: Batches, chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The examples ``chosen`` and what the network is told of them."""
    x_start, labels = batches.dataset.batch(chosen, batches.device)
    return x_start, model_kwargs(labels if batches.config.data.conditional else None)


def draw_grid(network: nn.Module, diffusion: GaussianDiffusion, batches: Batches, path: Path) -> Path:
    """Write 64 samples (16 above 64 pixels), each the same at every call for the same network."""
    facts, device = batches.dataset.facts, batches.device
    count = 64 if max(facts.shape[1:]) <= 64 else 16
    sampler = SamplerDDIM(diffusion, steps=min(SAMPLING_STEPS, diffusion.num_timesteps))
    samples = []
    for rows in chunks(count, _chunk(batches)):
        noise = SampleNoise(SEED, range(rows.start, rows.stop))
        shape = (rows.stop - rows.start, *facts.shape)
        labels = _labels(range(rows.start, rows.stop), batches)
        start = noise.initial(shape, device)
        told = model_kwargs(labels)
        samples.append(sampler.sample(network, shape, noise=start, noise_fn=noise, model_kwargs=told))
    write_grid(path, to_levels(torch.cat(samples), facts.levels), facts.levels)
    return path


def _chunk(batches: Batches) -> int:
    """As many examples at a time as training takes, which are known to fit the memory."""
    return batches.config.training.microbatch or batches.config.training.batch_size


def _drawable(batches: Batches) -> bool:
    shape = batches.dataset.facts.shape
    return len(shape) == 3 and shape[0] <= 4


def _labels(numbers: range, batches: Batches) -> Tensor | None:
    """The classes in turn, where the network is told them."""
    names = batches.dataset.facts.class_names
    if not batches.config.data.conditional or names is None:
        return None
    return torch.tensor([number % len(names) for number in numbers], device=batches.device)
