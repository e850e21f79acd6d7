"""The sampler: a list of times and the one loop over it; each step rule is a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from perrin.denoiser import Denoiser, DiffusionDenoiser, Time
from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError, ShapeError
from perrin.forward import noise_like, with_shape
from perrin.guidance import ScoreGuided
from perrin.noise import CLEAN
from perrin.randomness import generator_for, normal_rows
from perrin.reverse import CondFn, Model, ModelKwargs
from perrin.schedules import space_timesteps
from perrin.tensors import append_dims

Draw = Callable[[], Tensor]
NoiseFn = Callable[[Tensor, int], Tensor]


class Sample(TypedDict):
    """The next x, and the x_0 that was predicted on the way; both shaped like x."""

    sample: Tensor
    pred_xstart: Tensor


class SampleNoise:
    """The noise of samples ``indices`` under ``seed``: each has its own stream.

    Sample i is the same image whatever it is drawn together with. Call `initial` once, then the object itself at
    each step of the loop, as its ``noise_fn``.
    """

    def __init__(self, seed: int, indices: Iterable[int]) -> None:
        self.keys: Sequence[tuple[int, int]] = [(int(seed), int(index)) for index in indices]
        self._generators: list[torch.Generator] = []

    def initial(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """The noise (B, ...) to start from. Raises `ShapeError` unless there is one row for each index."""
        if len(self.keys) != shape[0]:
            raise ShapeError(f"shape must begin with {len(self.keys)}, one row a sample, got {tuple(shape)}")
        self._generators = [generator_for(device, "sample", *key) for key in self.keys]
        return self(torch.empty(tuple(shape), device=device))

    def __call__(self, x: Tensor, t: int = CLEAN) -> Tensor:
        """The next noise, shaped like ``x``."""
        return normal_rows(x, self._generators)


@dataclass(frozen=True)
class Sampler(ABC):
    """Draws data by walking a diffusion back in ``steps`` steps, all of its timesteps if None.

    Raises `ArgumentError` unless 1 <= steps <= T.
    """

    diffusion: GaussianDiffusion
    steps: int | None = None

    def __post_init__(self) -> None:
        steps = self.diffusion.num_timesteps if self.steps is None else self.steps
        if steps != int(steps) or not 1 <= steps <= self.diffusion.num_timesteps:
            raise ArgumentError(f"steps must be from 1 to {self.diffusion.num_timesteps}, got {self.steps}")

    @cached_property
    def times(self) -> tuple[int, ...]:
        """The times visited, from the noisiest down, and CLEAN at the end."""
        total = self.diffusion.num_timesteps
        return (*sorted(space_timesteps(total, self.steps or total), reverse=True), CLEAN)

    @abstractmethod
    def step(self, denoise: Denoiser, x: Tensor, t: Time, s: Time, draw: Draw) -> Sample:
        """From ``x`` at time ``t`` to the earlier time ``s``; ``draw`` gives noise shaped like ``x``."""

    def guide(self, denoiser: DiffusionDenoiser, cond_fn: CondFn) -> Denoiser:
        """``denoiser`` guided by a classifier's gradient, as suits the step rule."""
        return ScoreGuided(denoiser, cond_fn)

    def denoiser(
        self,
        model: Model,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
    ) -> Denoiser:
        """The denoiser that this sampler's steps see."""
        plain = DiffusionDenoiser(self.diffusion, model, clip_denoised, denoised_fn, model_kwargs)
        return plain if cond_fn is None else self.guide(plain, cond_fn)

    def sample(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        seed: int | None = None,
        noise_fn: NoiseFn | None = None,
    ) -> Tensor:
        """Samples of ``shape`` (B, ...).

        ``noise`` is x_T; without it, it is drawn. ``clip_denoised`` clips each prediction of x_0 to [-1, 1], after
        ``denoised_fn``. ``cond_fn(x, t, **model_kwargs)`` is a gradient of log p(y | x_t). ``device`` defaults to
        that of ``noise``, else of the model's parameters, else of the diffusion. ``progress`` shows a bar.
        With ``seed``, sample i is the same for any batch size; without, a seed comes from torch's default
        generator. ``noise_fn(x, t)`` replaces the noise of the steps: called once each, in order.

        Raises `ShapeError` if ``noise`` is not of ``shape``.
        """
        sample = torch.empty(0)
        for state in self.sample_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
            seed=seed,
            noise_fn=noise_fn,
        ):
            sample = state["sample"]
        return sample

    def sample_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        seed: int | None = None,
        noise_fn: NoiseFn | None = None,
    ) -> Iterator[Sample]:
        """The states of `sample`, with the same arguments: one after each step."""
        denoise = self.denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        seeded = SampleNoise(_fresh_seed() if seed is None else seed, range(shape[0]))
        start = seeded.initial(shape, _device(device, noise, model, self.diffusion))
        x = start if noise is None else with_shape(noise, start).to(start.device)
        for t, s in _shown(list(pairwise(self.times)), progress):
            given = None if noise_fn is None else noise_like(x, noise_fn(x, t))
            with torch.no_grad():
                state = self.step(denoise, x, t, s, _draw(x, given, seeded))
            yield state
            x = state["sample"]

    def times_at(self, t: Tensor, ndim: int, later: int = 0) -> Tensor:
        """The times of the chain's steps ``t`` (B,), or ``later`` steps up, shaped to broadcast; -1 is CLEAN.

        Raises `ArgumentError` unless 0 <= t < steps, where looking is free: on the CPU.
        """
        if t.device.type == "cpu" and not bool(((t >= 0) & (t < len(self.times) - 1)).all()):
            raise ArgumentError(f"t must be from 0 to {len(self.times) - 2}, got {t.tolist()}")
        ascending = self._ascending.setdefault(t.device, torch.tensor(self.times[::-1], device=t.device))
        return append_dims(ascending[t + 1 + later], ndim)

    @cached_property
    def _ascending(self) -> dict[torch.device, Tensor]:
        return {}


def _draw(x: Tensor, given: Tensor | None, seeded: SampleNoise) -> Draw:
    return lambda: seeded(x) if given is None else given


def _fresh_seed() -> int:
    return int(torch.randint(2**62, ()))


def _device(
    device: torch.device | str | None, noise: Tensor | None, model: Model, diffusion: GaussianDiffusion
) -> torch.device | str:
    if device is not None:
        return device
    if noise is not None:
        return noise.device
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return diffusion.betas.device if parameter is None else parameter.device


def _shown(steps: Sequence[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return steps
    from rich.progress import track

    return track(steps, description="sampling")
