"""log p of data by the probability-flow ODE, in bits per dimension.

The model is the ODE's own: y = x / alpha starts as N(0, I) / alpha_T at the noisiest time and flows down to the
noise level s = sigma / alpha where its density is taken for that of the data. A chain without signal at its end
begins at the noisiest timestep that has some. With y_T the end of the path that
begins at the data, in nats,

    log p(y) = log N(alpha_T y_T; 0, I) + D log alpha_T + integral of div_y eps ds

and the density of x_t = alpha y is less by D log alpha. No noise is added to the data: the smoothing by s is part of
the model. For whole levels this density is integrated over each level's bin, through dequantization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perrin.denoiser import Denoiser
from perrin.errors import ArgumentError
from perrin.gaussian import LOG_2PI
from perrin.likelihood.dequantization import Dequantization
from perrin.likelihood.examples import checked
from perrin.likelihood.flow import Flow, Hutchinson, Timeline, Trace, keyed_rows
from perrin.likelihood.solvers import Heun, Solver
from perrin.tensors import widest_dtype

_ONE_PROBE = Hutchinson()
_HUNDRED_STEPS = Heun()


class OdeLikelihood(NamedTuple):
    """-log2 p of each image per dimension, and how it was measured; tensors (B,) float64 on the CPU."""

    bpd: Tensor
    """Of whole levels an upper bound on the model's code length; of continuous data a log density."""
    error: Tensor
    """Standard error over the draws, which have probes of their own, or for continuous data over the probes.

    NaN where there is one alone."""
    probe_error: Tensor
    """The part of it that the probes make: 0 for the exact trace, NaN for a single probe."""
    network_calls: int
    """Evaluations of the network per image, over all draws."""
    vjps: int
    """Vector-Jacobian products per image, each about the work of one or two evaluations."""
    dequantization: str
    """uniform, truncated-normal, or none for continuous data."""
    draws: int
    probes: int
    """Probes per draw; 0 is the exact trace."""
    start: float
    """The noise level sigma / alpha whose density was taken."""


def ode(
    denoise: Denoiser,
    x_start: Tensor,
    *,
    levels: int | None,
    indices: Sequence[int],
    dequantization: Dequantization | None,
    seed: int = 0,
    trace: Trace = _ONE_PROBE,
    solver: Solver = _HUNDRED_STEPS,
) -> OdeLikelihood:
    """Bits per dimension of ``x_start`` (B, ...), whose places in its data set are ``indices``.

    ``levels`` is the number of levels 2 k / (levels - 1) - 1 of the data, with their ``dequantization``; None and
    None are continuous data, whose density is that at the chain's first noise level. What is random of image i
    depends on (seed, i) alone. The network works in the precision of ``x_start``; all else is in float64.

    A denoiser that clips x_0 is not smooth and its ODE slow to converge: give one with clip_denoised=False. Its eps
    must be differentiable in x, and so must a ``cond_fn``, of whose detached part the density would know nothing.

    Raises `ArgumentError` for data that are empty, not finite or not on the levels, for a dequantization that does
    not fit, and where the solver does not end in finite numbers; `ShapeError` for too few indices.
    """
    x = checked(x_start, levels, indices)
    _check_choices(levels, dequantization, trace)
    timeline = Timeline.of(denoise)
    task = _Task(denoise, timeline, dequantization, trace, solver, _start(timeline, dequantization))
    draws = range(1 if dequantization is None else dequantization.draws)
    with torch.no_grad():
        measured = [task.log_p(x, levels, (int(seed), draw), indices) for draw in draws]
    nats = torch.stack([log_p for log_p, _ in measured], 1).cpu().double()  # (B, K, P)
    if not bool(nats.isfinite().all()):
        raise ArgumentError(
            "log p is not finite: the network's output is not, or the solver's steps are too long"
        )
    return task.result(nats, [flow for _, flow in measured], x[0].numel())


class _Task(NamedTuple):
    denoise: Denoiser
    timeline: Timeline
    dequantization: Dequantization | None
    trace: Trace
    solver: Solver
    start: float

    def log_p(
        self, x: Tensor, levels: int | None, key: tuple[int, int], indices: Sequence[int]
    ) -> tuple[Tensor, Flow]:
        """log p of ``x`` by one draw, (B, P) in nats, and the flow that counted the calls."""
        noise = math.exp(self.start)
        y, price = _point(x, levels, self.dequantization, noise=noise, key=key, indices=indices)
        divergence = self.trace.divergence(x, ("ode probe", *key), indices)
        flow = Flow(self.denoise, self.timeline, divergence, x.dtype)
        return _log_density(flow, self.solver, y, self.start) + price[:, None], flow

    def result(self, nats: Tensor, flows: Sequence[Flow], dimensions: int) -> OdeLikelihood:
        """What ``nats`` (B, draws, P) come to."""
        weighted = self.dequantization is not None and self.dequantization.weighted
        log_p, error, probe_error = (_weighted if weighted else _averaged)(nats)
        if self.trace.probes == 0:
            probe_error = torch.zeros_like(log_p)
        bits = 1 / (dimensions * math.log(2))
        return OdeLikelihood(
            -bits * log_p,
            bits * (probe_error if self.dequantization is None else error),
            bits * probe_error,
            network_calls=sum(flow.calls for flow in flows),
            vjps=sum(flow.divergences for flow in flows) * self.trace.vjps(dimensions),
            dequantization="none" if self.dequantization is None else self.dequantization.name,
            draws=len(flows),
            probes=self.trace.probes,
            start=math.exp(self.start),
        )


def _log_density(flow: Flow, solver: Solver, y: Tensor, start: float) -> Tensor:
    """log p(y) (B, P) at noise level ``start``, in nats."""
    end = solver.solve(flow, y, start)
    alpha, dimensions = flow.alpha(flow.timeline.last), y[0].numel()
    squares = (alpha * end.y).square().flatten(1).sum(1)
    normal = -0.5 * (squares + dimensions * LOG_2PI) + dimensions * math.log(alpha)
    return normal[:, None] + end.growth


def _check_choices(levels: int | None, dequantization: Dequantization | None, trace: Trace) -> None:
    if (levels is None) != (dequantization is None):
        raise ArgumentError(
            f"dequantization must be {'None for continuous data' if levels is None else 'chosen for levels'}, "
            f"got {dequantization} for levels = {levels}"
        )
    if dequantization is not None and dequantization.weighted and trace.probes:
        raise ArgumentError("weighted draws need the exact trace: an estimated one flatters the model")


def _start(timeline: Timeline, dequantization: Dequantization | None) -> float:
    """log(sigma / alpha) where the density is taken."""
    if dequantization is None or dequantization.start is None:
        return timeline.first
    low, high = math.exp(timeline.first), math.exp(timeline.last)
    if not low <= dequantization.start < high:
        raise ArgumentError(
            f"start must be a sigma/alpha of the chain, from {low:.4g} to {high:.4g}, got {dequantization.start}"
        )
    return max(math.log(dequantization.start), timeline.first)


def _point(
    x: Tensor,
    levels: int | None,
    dequantization: Dequantization | None,
    *,
    noise: float,
    key: tuple[int, int],
    indices: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The point y (B, ...) where the density is taken, and what its choice adds to log p, (B,) in nats."""
    state = x.to(widest_dtype(x.device))
    if levels is None or dequantization is None:
        return state, torch.zeros(len(x), dtype=state.dtype, device=x.device)
    middle = state.add(1).mul((levels - 1) / 2).round().mul(2 / (levels - 1)).sub(1)
    uniform = keyed_rows(
        state, lambda row, generator: row.uniform_(generator=generator), ("dequantization", *key), indices
    )
    offset = dequantization.offset(uniform, 1 / (levels - 1), noise)
    return middle + offset.value, -offset.log_density


def _averaged(nats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard error and the probes' part of it, (B,), of ``nats`` (B, draws, probes)."""
    draws, probes = nats.shape[1:]
    by_draw = nats.mean(2)
    probe_error = _spread(nats, 2).square().mean(1).div(draws * probes).sqrt()
    return by_draw.mean(1), _spread(by_draw, 1) / math.sqrt(draws), probe_error


def _weighted(nats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log of the mean of exp(``nats``) (B, draws, 1), its standard error, and 0 for the probes' part."""
    draws, log_weights = nats.shape[1], nats[:, :, 0]
    log_p = log_weights.logsumexp(1) - math.log(draws)
    relative = _spread((log_weights - log_p[:, None]).exp(), 1)  # delta method: the weights' mean is 1
    return log_p, relative / math.sqrt(draws), torch.zeros_like(log_p)


def _spread(values: Tensor, dim: int) -> Tensor:
    """The standard deviation along ``dim``, NaN of a single value."""
    if values.shape[dim] == 1:
        return torch.full_like(values.select(dim, 0), math.nan)
    return values.std(dim)
