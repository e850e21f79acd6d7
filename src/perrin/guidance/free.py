"""Classifier-free guidance (arXiv:2207.12598), limited to an interval and rescaled if asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perrin.denoiser import DiffusionDenoiser, Time
from perrin.errors import ArgumentError
from perrin.guidance.base import Guidance
from perrin.guidance.contrast import Contrasted, Interval, extrapolated
from perrin.networks import NO_CLASS
from perrin.parameterization import Denoised
from perrin.tensors import Coefficient, append_dims


@dataclass(frozen=True)
class ClassifierFree(Contrasted):
    """A network's conditional prediction extrapolated from its unconditional one; see `classifier_free`.

    Raises `ArgumentError` on top of another guidance, and for a ``rescale`` outside [0, 1].
    """

    unconditional: Mapping[str, Any]
    rescale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.denoiser, DiffusionDenoiser):
            raise ArgumentError(
                "classifier_free calls the network itself and must be the first of the guidances, "
                f"got it after {type(self.denoiser).__name__}"
            )
        if not 0 <= self.rescale <= 1:
            raise ArgumentError(f"rescale must be from 0 to 1, got {self.rescale}")
        _check_told(self.base.model_kwargs or {}, self.unconditional)

    def guided(self, x: Tensor, t: Time, weight: Coefficient) -> Denoised:
        """Both predictions in one call of the network, and the extrapolation."""
        base, rows = self.base, len(x)
        told = {
            name: _doubled(name, value, self.unconditional.get(name, value), rows)
            for name, value in (base.model_kwargs or {}).items()
        }
        times = torch.cat([t, t]) if isinstance(t, Tensor) else t
        output = base.diffusion.output(base.model, torch.cat([x, x]), base.step(times), told)
        strong, weak = (base.diffusion.read(half, x, base.step(t)) for half in output.chunk(2))
        return self._rescaled(extrapolated(weak, strong, weight), strong.x_start, x, t)

    def _rescaled(self, guided: Denoised, conditional: Tensor, x: Tensor, t: Time) -> Denoised:
        """``guided`` with x_start nearer to the spread of the ``conditional`` one (arXiv:2305.08891 eq. 14-16)."""
        if self.rescale == 0:
            return guided
        spread, target = _spread(guided.x_start), _spread(conditional)
        factor = torch.where(spread > 0, target / spread, 1.0)
        x_start = guided.x_start * (self.rescale * factor + 1 - self.rescale)
        diffusion, step = self.base.diffusion, self.base.step(t)
        return replace(
            guided,
            x_start=x_start,
            make_eps=lambda: diffusion.predict_eps_from_xstart(x, step, x_start),
            previous=None,
        )


def classifier_free(
    scale: float,
    *,
    unconditional: Mapping[str, Any] | None = None,
    interval: Interval | None = None,
    rescale: float = 0.0,
) -> Guidance:
    """``eps_u + scale (eps_c - eps_u)``: away from what the network says of x_t when it is not told the class.

    scale: 1 is the plain conditional network, to the bit, and 0 the unconditional one (papers that begin at 0, as
        arXiv:2207.12598, count one less).
    unconditional: what takes the place of entries of ``model_kwargs`` in the unconditional half; each is expanded to
        the shape of what it stands for. By default ``{"y": NO_CLASS}``.
    interval: guide only where low < sigma / alpha <= high (arXiv:2404.07724), elsewhere a plain call does. That is
        the standard deviation of the noise beside data in [-1, 1], so the same interval suits every chain; infinity
        is allowed.
    rescale: phi in [0, 1], by how much the standard deviation of each example's x_start returns to that of the
        conditional one (arXiv:2305.08891 section 3.4, which advises 0.7). There it is taken of the output; here of
        x_start, so that it is the same for every mean type.

    The network is called once for both, with 2B rows: the tensors in ``model_kwargs`` whose first dimension is B are
    concatenated, the rest is passed on. A learned variance is the conditional one. Raises `ArgumentError` for values
    out of range, on top of another guidance, for entries of ``unconditional`` that the network is not told or that do
    not fit, and where there are no classes.
    """
    return partial(
        ClassifierFree,
        scale=scale,
        interval=interval,
        unconditional={"y": NO_CLASS} if unconditional is None else unconditional,
        rescale=rescale,
    )


def _check_told(conditional: Mapping[str, Any], unconditional: Mapping[str, Any]) -> None:
    for name in unconditional:
        if not isinstance(conditional.get(name), Tensor):
            raise ArgumentError(
                f"classifier_free needs a tensor {name!r} in model_kwargs, got {conditional.get(name)!r}"
            )


def _doubled(name: str, value: Any, other: Any, rows: int) -> Any:
    """``value`` and beneath it ``other`` in its shape, where it is a tensor of ``rows`` rows; else itself."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
        if other is value:
            return value
        raise ArgumentError(f"model_kwargs[{name!r}] must have {rows} rows to have an unconditional half")
    try:
        return torch.cat(
            [value, torch.as_tensor(other, dtype=value.dtype, device=value.device).expand_as(value)]
        )
    except (RuntimeError, TypeError, ValueError):
        raise ArgumentError(
            f"unconditional[{name!r}] must expand to the shape {tuple(value.shape)} of the conditional one, "
            f"got {tuple(other.shape) if isinstance(other, Tensor) else repr(other)}"
        ) from None


def _spread(x: Tensor) -> Tensor:
    """The standard deviation of each example, (B, 1, ...)."""
    return append_dims(x.flatten(1).std(dim=1, correction=0), x.ndim)
