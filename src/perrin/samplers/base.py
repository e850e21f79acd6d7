"""The sampler: a list of times and the one loop over it; each step rule is a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Self, TypedDict

import torch
from torch import Tensor, nn

from perrin.denoiser import Denoiser, DiffusionDenoiser, Guidable, Time
from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError, ShapeError
from perrin.forward import noise_like, with_shape
from perrin.guidance import Guidance, ScoreGuided
from perrin.noise import CLEAN
from perrin.parameterization import Denoised
from perrin.randomness import generator_for, normal_rows
from perrin.reverse import CondFn, Model, ModelKwargs
from perrin.samplers.grids import Grid, grid_times
from perrin.tensors import append_dims

Draw = Callable[[], Tensor]
NoiseFn = Callable[[Tensor, float], Tensor]


class Sample(TypedDict):
    """The next x, and the x_0 that was predicted on the way; both shaped like x."""

    sample: Tensor
    pred_xstart: Tensor


class Visit(NamedTuple):
    """One call of the denoiser: the state that it was shown, when, and what it said."""

    t: Time
    x: Tensor
    denoised: Denoised


Memory = tuple[Visit, ...]
"""What a multistep rule knows of earlier visits, the newest first."""


class Stepped(NamedTuple):
    """What a step gives: the next x, the x_0 that was predicted on the way, and what the next step is to know.

    A rule that can do without x_0 gives what makes it, from the step's x and the network's output: read
    `pred_xstart` before either is changed.
    """

    sample: Tensor
    x_start: Tensor | Callable[[], Tensor]
    memory: Memory = ()

    @property
    def pred_xstart(self) -> Tensor:
        """The x_0 that was predicted, shaped like the sample."""
        return self.x_start() if callable(self.x_start) else self.x_start

    @property
    def state(self) -> Sample:
        """Without the memory."""
        return {"sample": self.sample, "pred_xstart": self.pred_xstart}


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

    def __call__(self, x: Tensor, t: float = CLEAN) -> Tensor:
        """The next noise, shaped like ``x``."""
        return normal_rows(x, self._generators)


@dataclass(frozen=True)
class Sampler(ABC):
    """Draws data by walking a diffusion back in ``steps`` steps, all of its timesteps if None.

    ``grid`` says where they lie, see `grid_times`. Raises `ArgumentError` unless 1 <= steps <= T, or for a grid that
    there is not.
    """

    diffusion: GaussianDiffusion
    steps: int | None = None
    grid: Grid = field(default="uniform", kw_only=True)

    discrete: ClassVar[bool] = False
    """Whether the rule is that of a chain, which has whole times only."""

    def __post_init__(self) -> None:
        times = self.times
        if not isinstance(self.grid, str):  # a list of the caller's could change, and has no hash
            object.__setattr__(self, "grid", times[:-1])

    @cached_property
    def times(self) -> tuple[float, ...]:
        """The times visited, from the noisiest down, and CLEAN at the end."""
        whole = self.discrete or not self.diffusion.knows_fractional_times
        return (*grid_times(self.diffusion, self.grid, self.steps, whole=whole), CLEAN)

    @property
    def convergence_order(self) -> int | None:
        """The p of an error of the samples that falls as K^-p; None for a rule that is no ODE's or SDE's solver.

        Of an SDE's solver it is the error of their variance. It holds on the grids "log-snr" and "karras": on one
        even in time the last steps before the data are long ones in log-SNR, and their error is most of it.
        """
        return None

    @property
    def network_calls(self) -> int:
        """How often the network is called for one batch of samples, without guidance."""
        return len(self.times) - 1

    def at_times(self, times: Sequence[float]) -> Self:
        """This rule on other ``times``, as in a list for `grid`: some of its own take the same steps there."""
        return replace(self, steps=None, grid=tuple(times))

    @abstractmethod
    def step(
        self, denoise: Denoiser, x: Tensor, t: Time, s: Time, draw: Draw, memory: Memory = ()
    ) -> Stepped:
        """From ``x`` at time ``t`` to the earlier time ``s``; ``draw`` gives noise shaped like ``x``.

        ``memory`` is what the step before gave, if there was one.
        """

    def guide(self, denoiser: Guidable, cond_fn: CondFn) -> Guidable:
        """``denoiser`` guided by a classifier's gradient, as suits the step rule."""
        return ScoreGuided(denoiser, cond_fn)

    def denoiser(
        self,
        model: Model,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        guidance: Sequence[Guidance] = (),
    ) -> Denoiser:
        """The denoiser that this sampler's steps see."""
        denoiser: Guidable = DiffusionDenoiser(
            self.diffusion, model, clip_denoised, denoised_fn, model_kwargs
        )
        for guided in guidance:
            denoiser = guided(denoiser)
        return denoiser if cond_fn is None else self.guide(denoiser, cond_fn)

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
        guidance: Sequence[Guidance] = (),
    ) -> Tensor:
        """Samples of ``shape`` (B, ...).

        ``noise`` is x_T; without it, it is drawn. ``clip_denoised`` clips each prediction of x_0 to [-1, 1], after
        ``denoised_fn``. ``cond_fn(x, t, **model_kwargs)`` is a gradient of log p(y | x_t). ``device`` defaults to
        that of ``noise``, else of the model's parameters, else of the diffusion. ``progress`` shows a bar.
        With ``seed``, sample i is the same for any batch size; without, a seed comes from torch's default
        generator. ``noise_fn(x, t)`` replaces the noise of the steps: called once each, in order. ``guidance`` is
        applied in order, the first to the network itself; see `perrin.guidance`.

        Raises `ShapeError` if ``noise`` is not of ``shape``.
        """
        denoise = self.denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, guidance)
        for stepped in self._steps(denoise, model, shape, noise, device, progress, seed, noise_fn):
            x = stepped.sample
            del stepped
        return x

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
        guidance: Sequence[Guidance] = (),
    ) -> Iterator[Sample]:
        """The states of `sample`, with the same arguments: one after each step."""
        denoise = self.denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, guidance)
        for stepped in self._steps(denoise, model, shape, noise, device, progress, seed, noise_fn):
            with torch.no_grad():
                state = stepped.state
            del stepped
            yield state

    def _steps(
        self,
        denoise: Denoiser,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
        seed: int | None,
        noise_fn: NoiseFn | None,
    ) -> Iterator[Stepped]:
        """All steps from x_T at the first of `times` on, with the arguments of `sample`.

        Drop each one before the next: what it may hold is memory that the next step then need not find elsewhere.
        """
        seeded = _Streams(seed, tuple(shape), device_of(device, noise, model, self.diffusion))
        x = seeded.start(noise)
        memory: Memory = ()
        for t, s in _shown(list(pairwise(self.times)), progress):
            given = None if noise_fn is None else noise_like(x, noise_fn(x, t))
            with torch.no_grad():
                stepped = self.step(denoise, x, t, s, _draw(x, given, seeded), memory)
            x, memory = stepped.sample, stepped.memory
            yield stepped
            del stepped

    def times_at(self, t: Tensor, ndim: int, later: int = 0) -> Tensor:
        """The times of the chain's steps ``t`` (B,), or ``later`` steps up, shaped to broadcast; -1 is CLEAN.

        Raises `ArgumentError` for a grid with fractional times, of which single steps know none, and unless
        0 <= t < steps, where looking is free: on the CPU.
        """
        if any(time != int(time) for time in self.times):
            raise ArgumentError(f"a single step needs a grid of whole times, got {self.grid!r}")
        if t.device.type == "cpu" and not bool(((t >= 0) & (t < len(self.times) - 1)).all()):
            raise ArgumentError(f"t must be from 0 to {len(self.times) - 2}, got {t.tolist()}")
        if t.device not in self._ascending:
            self._ascending[t.device] = torch.tensor(self.times[::-1], device=t.device)
        return append_dims(self._ascending[t.device][t + 1 + later], ndim)

    @cached_property
    def _ascending(self) -> dict[torch.device, Tensor]:
        return {}


@dataclass(frozen=True)
class _Streams:
    """The noise of the samples, begun when it is first wanted: before, torch's default generator is left alone."""

    seed: int | None
    shape: tuple[int, ...]
    device: torch.device | str

    @cached_property
    def _begun(self) -> tuple[SampleNoise, Tensor]:
        noise = SampleNoise(_fresh_seed() if self.seed is None else self.seed, range(self.shape[0]))
        return noise, noise.initial(self.shape, self.device)

    def start(self, noise: Tensor | None) -> Tensor:
        """x_T: ``noise``, or the first of the streams."""
        if noise is None:
            return self._begun[1]
        return with_shape(noise, torch.empty(self.shape, device="meta")).to(self.device)

    def __call__(self, x: Tensor) -> Tensor:
        """The next noise, shaped like ``x``; never the same as the first."""
        return self._begun[0](x)


def _draw(x: Tensor, given: Tensor | None, seeded: _Streams) -> Draw:
    return lambda: seeded(x) if given is None else given


def _fresh_seed() -> int:
    return int(torch.randint(2**62, ()))


def device_of(
    device: torch.device | str | None, noise: Tensor | None, model: Model, diffusion: GaussianDiffusion
) -> torch.device | str:
    """``device`` where one is named, else that of ``noise``, of the model's parameters, or of the diffusion."""
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
