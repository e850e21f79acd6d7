"""Anomaly scores: how unlike a model's training data an example is, from its errors at a few noise levels.

The bound itself is no such score: it measures texture first, so that plain images of another kind are often the more
likely ones. Here what a network gets wrong of an example, where and at which noise level, is compared together with
the example itself to reference examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError, DataError, NonFiniteError
from perrin.evaluation.mixture import Gaussian, Mixture
from perrin.forward import ForwardProcess
from perrin.likelihood.examples import checked
from perrin.randomness import generator_for, normal_rows
from perrin.reverse import Model, ModelKwargs

MOST_LOG_SNR = 20.0
"""Beyond which, on either side, levels of noise count as one: a chain may end without signal."""
LOG_SNRS = (MOST_LOG_SNR, 9.0, 5.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0)
"""Where a network is called, in nats of log(alpha^2 / sigma^2): at t = 0 for the bound, then texture to shape."""
NEARLY = 1e-6
"""By how much a chain may end short of a level that it was made to end at."""
GRID = 7
"""Cells per side of an image, or as many squared of a vector, over which errors are averaged."""
IMAGE_GRID = 14
"""The same for the example itself."""
SMALLEST_ERROR = 1e-4
"""Squared error of x_0, to which all below is rounded: 1.3 of 256 levels."""
BANDS_WEIGHT = 0.2
"""Of the distance of the bands in the score: on turned MNIST digits it adds 0.000 to 0.004 to the AUROC."""
FEWEST = 8
"""Reference examples on either side of the fit."""


class Errors(NamedTuple):
    """What `errors` measures; float64 on the CPU."""

    bands: Tensor
    """(B, S): log of the mean squared error of x_0 at each visited timestep."""
    features: Tensor
    """(B, F): the example and its errors, averaged over the cells of a grid, and logs of root mean squares there."""
    rough_bpd: Tensor
    """(B,): a rough, biased estimate of the bound from the same calls, bits per dimension."""


def visited(diffusion: ForwardProcess) -> list[int]:
    """The timesteps nearest in log-SNR to `LOG_SNRS`, each once, ascending; all of a chain of fewer.

    Targets beyond the chain's ends are left out; in their place come, one by one, the timesteps of log-SNR above the
    last target that are farthest from all others.
    """
    log_snr = _log_snr(diffusion)
    inside = log_snr.clamp(min=LOG_SNRS[-1])
    taken = torch.zeros(len(log_snr), dtype=torch.bool)
    taken[0] = True
    for target in LOG_SNRS[1 : len(log_snr)]:
        away = (log_snr - target).abs()
        if away.argmin() > 0 and target > log_snr[-1] - NEARLY:
            taken[away.where(~taken, torch.inf).argmin()] = True
    while taken.sum() < min(len(log_snr), len(LOG_SNRS)):
        nearest = (inside[:, None] - inside[taken]).abs().amin(1)
        taken[nearest.where(~taken, -1.0).argmax()] = True
    return [int(t) for t in taken.nonzero().flatten()]


def _log_snr(diffusion: ForwardProcess) -> Tensor:
    levels = [diffusion.level_of_batch(t).log_snr for t in range(diffusion.num_timesteps)]
    return torch.tensor(levels, dtype=torch.float64).clamp(-MOST_LOG_SNR, MOST_LOG_SNR)


def errors(
    diffusion: GaussianDiffusion,
    model: Model,
    x_start: Tensor,
    *,
    seed: int = 0,
    model_kwargs: ModelKwargs = None,
) -> Errors:
    """The errors of predicting ``x_start`` (B, C, H, W) or (B, D) at the `visited` timesteps, one network call each.

    The noise depends on (seed, timestep) alone and is the same for every example, so that examples differ by what
    they are and not by where they stand; the rough bound shares it too, so that its mean over many examples keeps the
    error of one draw, besides its bias. Predictions are clipped to [-1, 1]. Raises `NonFiniteError` where they or the
    bound's terms are not finite; `ShapeError` for no examples; `ArgumentError` for values that are not finite or not
    on the diffusion's levels.
    """
    x_start = checked(x_start, diffusion.levels)
    times = visited(diffusion)
    maps, terms = [], []
    with torch.no_grad():
        for t in times:
            x_t = diffusion.q_sample(x_start, t, _noise(diffusion, x_start, t, seed))
            found = diffusion.vb_terms_bpd(model, x_start, x_t, t, True, model_kwargs)
            maps.append(x_start - found["pred_xstart"])
            terms.append(found["output"].double().cpu())
    bands = torch.stack([_log(error.flatten(1).double().square().mean(1)) for error in maps], 1).cpu()
    _check_finite(bands + torch.stack(terms, 1), times)
    cells = [_pooled(x_start, IMAGE_GRID), *(_pooled(error, GRID) for error in maps)]
    logs = [_log(_pooled(error.square(), GRID)) / 2 for error in maps]
    prior = diffusion.prior_bpd(x_start).double().cpu()
    rough = prior + torch.stack(terms, 1) @ term_weights(diffusion, times)
    return Errors(bands, torch.cat([*cells, *logs], 1).double().cpu(), rough)


def _check_finite(values: Tensor, times: Sequence[int]) -> None:
    """Raise `NonFiniteError` unless ``values`` (B, S), whose columns are of ``times``, are finite."""
    for t, finite in zip(times, values.isfinite().all(0).tolist(), strict=True):
        if not finite:
            raise NonFiniteError(f"the network's output at timestep {t} is not finite, or far out of range")


def _noise(diffusion: GaussianDiffusion, x_start: Tensor, t: int, seed: int) -> Tensor:
    time = int(diffusion.number("timestep_map", t))
    draw = normal_rows(x_start[:1], [generator_for(x_start.device, "anomaly", seed, time)])
    return draw.expand(x_start.shape)


def _log(squares: Tensor) -> Tensor:
    return (squares + SMALLEST_ERROR).log()


def _pooled(values: Tensor, grid: int) -> Tensor:
    """The means (B, cells) over a grid of at most ``grid`` x ``grid`` cells, of each channel."""
    if values.ndim == 2:
        return adaptive_avg_pool1d(values[:, None], min(grid**2, values.shape[1])).flatten(1)
    height, width = (min(grid, side) for side in values.shape[2:])
    return adaptive_avg_pool2d(values, (height, width)).flatten(1)


def term_weights(diffusion: ForwardProcess, times: Sequence[int]) -> Tensor:
    """How often the bound's term at each of ``times`` counts when all T are estimated from them, (S,) float64.

    A term that is not visited is taken from the nearest log-SNR, in proportion to its step in log-SNR and, below 0,
    to its SNR: a KL term is half the step in SNR times the squared error of x_0, which hardly grows any more where
    there is little signal. That is biased where terms bend otherwise: by +0.03 to +0.15 bits/dim on three trained
    networks of images, and by +0.06 to +0.32 without the SNR. The decoder's term, t = 0, counts once where visited.
    """
    log_snr = _log_snr(diffusion)
    steps = torch.cat([log_snr.new_ones(1), (log_snr[:-1] - log_snr[1:]).clamp(min=1e-9)])
    kept = torch.tensor(times)
    known = kept[kept > 0]
    weights = (kept == 0).double()
    if len(known):
        nearest = (log_snr[1:, None] - log_snr[known]).abs().argmin(1)
        fall = log_snr.clamp(max=0)
        ratios = steps[1:] / steps[known][nearest] * (fall[1:] - fall[known][nearest]).exp()
        weights[kept > 0] = torch.zeros(len(known), dtype=torch.float64).index_add(0, nearest, ratios)
    return weights


@dataclass(frozen=True)
class Typical:
    """What is typical: densities of reference errors, and the scores of other reference examples, not fitted."""

    features: Mixture
    bands: Gaussian
    scores: Tensor
    """(n,) ascending: the examples among which p-values rank."""

    @classmethod
    def fit(cls, fitted: Errors, ranked: Errors) -> Typical:
        """The densities of the examples ``fitted``, and the scores of ``ranked``.

        Raises `DataError` for fewer than `FEWEST` examples of either, `ArgumentError` for errors that are not finite.
        """
        for use, found in (("fit", fitted), ("rank among", ranked)):
            if len(found.bands) < FEWEST:
                count = len(found.bands)
                raise DataError(f"at least {FEWEST} reference examples to {use} are needed, got {count}")
            _check_features(found)
        bare = cls(Mixture.fit(fitted.features), Gaussian.fit(fitted.bands), fitted.rough_bpd.new_empty(0))
        return replace(bare, scores=bare.score(ranked).sort().values)

    def score(self, found: Errors) -> Tensor:
        """The distance of the features plus `BANDS_WEIGHT` that of the bands, (B,).

        Of the features most are signed errors, of which an example quieter than is typical has less: the
        bands, which are logs, tell such examples too. Raises `ArgumentError` for errors that are not finite.
        """
        _check_features(found)
        return self.features.distance(found.features) + BANDS_WEIGHT * self.bands.distance(found.bands)

    def p_values(self, scores: Tensor) -> Tensor:
        """(1 + how many reference scores are at least as high) / (1 + n), (B,).

        For an example like those ranked, p is at most u with probability at most u, whatever was fitted.
        """
        count = len(self.scores)
        return (1 + count - torch.searchsorted(self.scores, scores)).double() / (1 + count)


def _check_features(found: Errors) -> None:
    if not bool(found.features.isfinite().all()):
        raise ArgumentError("the network's predictions of x_0 must be finite, but some are not")
