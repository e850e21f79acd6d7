"""DDIM (arXiv:2010.02502): deterministic sampling and its inversion, or with eta > 0 as much noise as DDPM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from perrin.denoiser import Denoiser, Time, combined
from perrin.errors import ArgumentError
from perrin.forward import noise_like
from perrin.guidance import Guidance
from perrin.noise import CLEAN, Level
from perrin.reverse import CondFn, Model, ModelKwargs
from perrin.samplers.base import Draw, Memory, Sample, Sampler, Stepped
from perrin.tensors import Coefficient, gather, mean_flat, mix, root, widest_dtype


class RoundTrip(NamedTuple):
    """An inversion, what sampling makes of it again, and how far that is from the data."""

    noise: Tensor
    sample: Tensor
    rmse: Tensor
    """Root mean square error of each example, (B,)."""


@dataclass(frozen=True)
class SamplerDDIM(Sampler):
    """DDIM with ``eta`` in [0, 1]: 0 is deterministic, 1 is ancestral sampling with FIXED_SMALL variance.

    The network's own variance has no part in it. Raises `ArgumentError` for an ``eta`` out of range.
    """

    eta: float = 0.0

    @property
    def convergence_order(self) -> int:
        """The p of an error that falls as K^-p."""
        return 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ArgumentError(f"eta must be from 0 to 1, got {self.eta}")

    def step(
        self, denoise: Denoiser, x: Tensor, t: Time, s: Time, draw: Draw, memory: Memory = ()
    ) -> Stepped:
        """From ``x`` at time ``t`` to the earlier time ``s``."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoise.schedule(t), denoise.schedule(s)
        std: Coefficient = 0.0
        kept = sigma_s / sigma_t
        if self.eta > 0:
            std = self.eta * kept * root(1 - (alpha_t / alpha_s) ** 2)  # DDIM eq. 16
            kept = root(sigma_s**2 - std**2) / sigma_t
        # DDIM eq. 12, eps by x and x_start
        sample, x_start = combined(denoise, x, t, kept, alpha_s - kept * alpha_t)
        if self.eta > 0 and not (isinstance(s, int) and s == CLEAN):
            sample = mix(1.0, sample, std, draw())
        return Stepped(sample, x_start)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        *,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
    ) -> Sample:
        """One step from ``x`` at the chain's steps ``t`` (B,), 0 <= t < steps; the arguments of `sample`."""
        denoise = self.denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        now, next_time = self.times_at(t, x.ndim), self.times_at(t, x.ndim, later=-1)
        return self.step(denoise, x, now, next_time, lambda: noise_like(x, noise)).state

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
    ) -> Sample:
        """One step of the ODE upwards, from ``x`` at the chain's steps ``t`` (B,), 0 <= t < steps, to t + 1.

        Above the last step is pure noise, which is the predicted eps. Clipping makes the step lossy. Raises
        `ArgumentError` unless eta is 0.
        """
        self.check_deterministic()
        denoise = self.denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        x_start, eps = denoise(x, self.times_at(t, x.ndim))
        alpha, sigma = (
            gather(level.to(t.device, widest_dtype(t.device)), t, x) for level in self._levels_above
        )
        return {"sample": mix(alpha, x_start, sigma, eps), "pred_xstart": x_start}

    @cached_property
    def _levels_above(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma (steps,) one step up from each step of the chain."""
        levels = [self.diffusion.level_of_batch(t) for t in self.times[-3::-1]]
        alpha, sigma = zip(*levels, Level(0.0, 1.0), strict=True)
        return torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)

    @torch.no_grad()
    def invert(
        self,
        model: Model,
        x_start: Tensor,
        *,
        clip_denoised: bool = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        guidance: Sequence[Guidance] = (),
    ) -> Tensor:
        """The x_T that deterministic sampling brings back to ``x_start`` (B, ...), up to an error O(1 / steps).

        Naive: each step up takes the eps of where it starts; `perrin.samplers.inversion.FixedPoint` does better.

        Nothing is clipped unless asked, so the grid should leave out noise beyond sigma / alpha = 80, which blows up
        the network's errors: "log-snr" and "karras" do. `round_trip` measures the error. Raises `ArgumentError`
        unless eta is 0.
        """
        self.check_deterministic()
        denoise = self.denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, guidance)
        x = x_start
        for s, t in pairwise(self.times[::-1]):
            (alpha_s, sigma_s), (alpha_t, sigma_t) = denoise.schedule(s), denoise.schedule(t)
            _, eps = denoise(x, t if s == CLEAN else s)  # the network has not seen the data's own level
            ratio = alpha_t / alpha_s
            x = mix(ratio, x, sigma_t - ratio * sigma_s, eps)  # d(x / alpha) = eps d(sigma / alpha)
        return x

    @torch.no_grad()
    def round_trip(
        self,
        model: Model,
        x_start: Tensor,
        *,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        guidance: Sequence[Guidance] = (),
    ) -> RoundTrip:
        """``x_start`` inverted and sampled again, nothing clipped, with the error; twice ``steps`` network calls."""
        noise = self.invert(
            model,
            x_start,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            guidance=guidance,
        )
        sample = self.sample(
            model,
            noise.shape,
            noise=noise,
            clip_denoised=False,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            guidance=guidance,
        )
        return RoundTrip(noise, sample, mean_flat((sample - x_start) ** 2).sqrt())

    def check_deterministic(self) -> None:
        """Raise `ArgumentError` unless eta is 0, as what inverts the sampler needs."""
        if self.eta != 0:
            raise ArgumentError(f"only deterministic sampling can be inverted: eta must be 0, got {self.eta}")
