"""One step of training: what is random in it, its losses and gradient, and whether they are finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from perrin.config import RunConfig
from perrin.data import Dataset, batch_indices, split
from perrin.diffusion import GaussianDiffusion
from perrin.errors import ConfigError, DataError
from perrin.networks import NO_CLASS
from perrin.randomness import generator_for, seed_of
from perrin.reverse import Model
from perrin.timestep_sampling import TimestepSampler

RANK = 0
"""The place of this process among those that train together, part of every key."""


class Draw(NamedTuple):
    """Everything that is random in a step, for the whole batch of B."""

    x_start: Tensor
    """(B, *shape) in [-1, 1]."""
    labels: Tensor | None
    """(B,) classes where the network is told them, `NO_CLASS` where it is not told this one."""
    t: Tensor
    weights: Tensor
    """(B,) importance weights of the timesteps ``t`` (B,)."""
    noise: Tensor
    """(B, *shape), standard normal."""


def check_data(dataset: Dataset, config: RunConfig) -> None:
    """Raise `DataError` or `ConfigError` where ``config`` cannot be trained on ``dataset``."""
    if config.data.conditional and dataset.labels is None:
        raise DataError("data.conditional = true needs labels, and this data set has none")
    if config.data.flip and len(dataset.facts.shape) != 3:
        raise ConfigError(f"data.flip = true needs images, got vectors of shape {dataset.facts.shape}")
    if config.training.label_drop > 0 and not config.data.conditional:
        raise ConfigError(
            f"training.label_drop = {config.training.label_drop}: needs data.conditional = true, got false"
        )
    split(len(dataset), config.data.held_out)


class Batches:
    """The training part of a data set, as draws that depend on (seed, step) alone; and the held-out part."""

    def __init__(self, dataset: Dataset, config: RunConfig, device: torch.device) -> None:
        check_data(dataset, config)
        self.dataset, self.config, self.device = dataset, config, device
        self.train, self.held_out = split(len(dataset), config.data.held_out)

    def draw(self, step: int, t_sampler: TimestepSampler) -> Draw:
        """The batch of the 0-based ``step``."""
        seed, size = self.config.training.seed, self.config.training.batch_size
        places = batch_indices(len(self.train), size, step, seed)
        x_start, labels = self.dataset.batch(self.train[places], self.device)
        if self.config.data.flip:
            x_start = _flip(x_start, generator_for(self.device, seed, RANK, step, "flip"))
        generator = generator_for(self.device, seed, RANK, step)
        t, weights = t_sampler.sample(size, self.device, generator)
        noise = torch.randn(x_start.shape, generator=generator, device=self.device)
        return Draw(x_start, self._told(labels, step), t, weights, noise)

    def _told(self, labels: Tensor | None, step: int) -> Tensor | None:
        """The classes that the network is told, some of them withheld (arXiv:2207.12598 alg. 1)."""
        if labels is None or not self.config.data.conditional:
            return None
        share = self.config.training.label_drop
        if not share:
            return labels
        generator = generator_for(self.device, self.config.training.seed, RANK, step, "label drop")
        dropped = torch.rand(len(labels), generator=generator, device=labels.device) < share
        return labels.masked_fill(dropped, NO_CLASS)


def _flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(x), generator=generator, device=x.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def seed_dropout(device: torch.device, seed: int, step: int) -> None:
    """Set torch's global generators of the CPU and of ``device``, which dropout draws from, for one step."""
    key = seed_of(seed, RANK, step, "dropout")
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(key)


def network_call(network: nn.Module, precision: str, device: torch.device) -> Model:
    """The network under bf16 autocast where ``precision`` says so; its output is float32 either way."""

    def call(x: Tensor, t: Tensor, **model_kwargs: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output: Tensor = network(x, t, **model_kwargs)
        return output.float()

    return call


def model_kwargs(labels: Tensor | None) -> dict[str, Tensor]:
    """What the network is told besides x and t."""
    return {} if labels is None else {"y": labels}


def backward(
    diffusion: GaussianDiffusion, model: Model, draw: Draw, microbatch: int | None
) -> dict[str, Tensor]:
    """Add the gradient of the batch's mean weighted loss; return the loss's terms, each (B,) and detached.

    ``microbatch`` examples at a time: each part counts by its share of the batch, so that the gradient is
    that of the whole batch.
    """
    parts = []
    for rows in chunks(len(draw.t), microbatch or len(draw.t)):
        labels = None if draw.labels is None else draw.labels[rows]
        terms = diffusion.training_losses(
            model,
            draw.x_start[rows],
            draw.t[rows],
            model_kwargs=model_kwargs(labels),
            noise=draw.noise[rows],
        )
        torch.autograd.backward((terms["loss"] * draw.weights[rows]).sum() / len(draw.t))
        parts.append({name: cast(Tensor, term).detach() for name, term in terms.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``count``."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class StepRecord(NamedTuple):
    """What is kept of a step until the device is next waited for."""

    step: int
    """Its number, from 1."""
    t: Tensor
    losses: Tensor
    """(B,) losses of the timesteps ``t`` (B,), not weighted."""
    parameters: list[str]
    gradient_norms: Tensor
    """One per name in ``parameters``."""
    figures: dict[str, Tensor]
    """Scalars: the weighted means of the losses' terms, and the norm of the gradient."""

    @classmethod
    def of(cls, step: int, draw: Draw, terms: dict[str, Tensor], network: nn.Module) -> StepRecord:
        """The record of a step whose loss has these ``terms`` (B,), while its gradient is not yet clipped."""
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))
        figures = {name: (term * draw.weights).mean() for name, term in terms.items()}
        figures["grad_norm"] = torch.linalg.vector_norm(norms)
        return cls(step, draw.t, terms["loss"], list(gradients), norms, figures)

    def fault(self) -> str:
        """What is not finite in a record whose figures are not, and at which t."""
        broken = ~torch.isfinite(self.losses)
        if bool(broken.any()):
            return f"step {self.step}: the loss is not finite at t = {_listed(self.t[broken])}"
        bad = (~torch.isfinite(self.gradient_norms)).nonzero().flatten().tolist()
        culprit = f"the gradient of {self.parameters[bad[0]]}" if bad else "the norm of the gradient"
        return f"step {self.step}: {culprit} is not finite; the batch had t = {_listed(self.t)}"


def _listed(t: Tensor) -> str:
    values = sorted(set(t.tolist()))
    return ", ".join(map(str, values[:8])) + (f" … {values[-1]}" if len(values) > 8 else "")
