"""The expected terms of the bound for every jump between timesteps, in closed form from `Statistics`.

With SNR = alpha^2 / sigma^2, the divergence of a jump from t to s per dimension is

    KL = ((1 / r - 1 + log r) + (SNR_s - SNR_t) (x_0 - pred)^2 / r) / 2,    r = variance / posterior variance,

because ``posterior_mean_coef1^2 / posterior_variance`` of the jump is SNR_s - SNR_t (VDM, arXiv:2107.00630, eq. 14,
with a variance of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perrin.forward import ForwardProcess
from perrin.likelihood.covariance import Covariance, analytic, per_state, scalar
from perrin.likelihood.predictions import Histogram
from perrin.likelihood.statistics import Statistics

MOST_ELEMENTS = 4_000_000
"""Numbers of one temporary, 32 MB."""


class Jumps(NamedTuple):
    """Jumps from t to s < t, all of shape S + (1,) but t, which is S."""

    t: Tensor
    snr_gain: Tensor
    """SNR_s - SNR_t."""
    stretch: Tensor
    """log(sigma_t^2 / sigma_s^2), which is log(beta / posterior variance) of the jump."""


@dataclass(frozen=True, eq=False)
class Levels:
    """The noise levels of a chain, (T,) float64 on the CPU."""

    snr: Tensor
    log_noise: Tensor

    @classmethod
    def of(cls, chain: ForwardProcess) -> Levels:
        """Those of ``chain``."""
        log_signal, log_noise = (
            torch.tensor(chain.floats[name], dtype=torch.float64)
            for name in ("log_alphas_cumprod", "log_one_minus_alphas_cumprod")
        )
        return cls(1 / torch.expm1(-log_signal), log_noise)

    def jumps(self, s: Tensor, t: Tensor) -> Jumps:
        """The jumps from ``t`` to ``s``, which broadcast."""
        s, t = torch.broadcast_tensors(s, t)  # type: ignore[no-untyped-call]  # torch's own gap
        return Jumps(
            t, (self.snr[s] - self.snr[t])[..., None], (self.log_noise[t] - self.log_noise[s])[..., None]
        )


LogRatio = Callable[[Jumps, Tensor], Tensor]
"""The log of variance / posterior variance of each jump, broadcasting against its places S + (bins,)."""


class Rule(NamedTuple):
    """A variance for every jump, and the decoder at the end."""

    log_ratio: LogRatio
    by_state: bool = False
    """Whether it depends on the network's variance output."""
    decoder: str = "calibrated"


def fixed_small(jumps: Jumps, places: Tensor) -> Tensor:
    """The posterior variance."""
    return torch.zeros_like(jumps.stretch)


def fixed_large(jumps: Jumps, places: Tensor) -> Tensor:
    """Beta of the jump."""
    return jumps.stretch


def learned(jumps: Jumps, places: Tensor) -> Tensor:
    """What the network learned: the place between the two, in log-variance."""
    return jumps.stretch * places


def optimal(covariance: Covariance) -> LogRatio:
    """The variance that is best where Var[x_0 | x_t] is ``covariance``."""

    def log_ratio(jumps: Jumps, places: Tensor) -> Tensor:
        return torch.log1p(jumps.snr_gain * covariance.log_at(jumps.t, places).exp())

    return log_ratio


def fitted_covariances(statistics: Statistics, levels: Levels) -> dict[str, Covariance]:
    """Var[x_0 | x_t] by kind: ``analytic``, ``calibrated``, and ``per-state`` where the network has a variance."""
    found = {
        "analytic": analytic(statistics.eps_gain, levels.snr),
        "calibrated": scalar(statistics.squared_error.mean(0)),
    }
    return found | ({"per-state": per_state(*statistics.histograms)} if statistics.learned else {})


def depends_on_state(kind: str) -> bool:
    """Whether the variances of a ``kind`` of `fitted_covariances` follow the network's variance output."""
    return kind == "per-state"


def rules(covariances: Mapping[str, Covariance]) -> dict[str, Rule]:
    """Every variance by name; those of the network's own output only where it has one."""
    found = {"fixed-small": Rule(fixed_small), "fixed-large": Rule(fixed_large)}
    if "per-state" in covariances:
        found["learned"] = Rule(learned, by_state=True)
    for kind, covariance in covariances.items():
        by_state = depends_on_state(kind)
        found[kind] = Rule(optimal(covariance), by_state, kind if by_state else "calibrated")
    return found


def kl_nats(rule: Rule, jumps: Jumps, histograms: Histogram) -> Tensor:
    """The expected divergence of each jump per dimension, in nats, of errors in ``histograms`` (T, bins): shape S."""
    shares, errors, places = (column[jumps.t] for column in histograms)
    log_ratio = rule.log_ratio(jumps, places)
    inverse = torch.exp(-log_ratio)
    return ((torch.expm1(-log_ratio) + log_ratio + jumps.snr_gain * errors * inverse) * shares).sum(-1) / 2


def pooled(statistics: Statistics) -> Histogram:
    """The errors of all states as one, for variances that do not tell them apart."""
    error = statistics.squared_error.mean(0)[:, None]
    return Histogram(torch.ones_like(error), error, torch.ones_like(error))


def cost_matrix(statistics: Statistics, levels: Levels, rule: Rule) -> Tensor:
    """(T, T) float64: entry [t, s + 1] is the expected divergence of the jump from t to s, [t, 0] the decoder's cost.

    Nats per dimension (Watson et al., arXiv:2106.03802, eq. 16); infinite where s is not below t.
    """
    total = statistics.num_timesteps
    histograms = statistics.histograms if rule.by_state else pooled(statistics)
    costs = torch.full((total, total), torch.inf, dtype=torch.float64)
    costs[:, 0] = statistics.decoder[rule.decoder].mean(0)
    rows = max(1, MOST_ELEMENTS // (total * histograms.shares.shape[1]))
    for begin in range(1, total, rows):
        t = torch.arange(begin, min(begin + rows, total))[:, None]
        s = torch.arange(int(t[-1]))
        block = kl_nats(rule, levels.jumps(s.minimum(t - 1), t), histograms)
        costs[t[:, 0], 1 : len(s) + 1] = torch.where(s < t, block, torch.inf)
    return costs


def path_nats(statistics: Statistics, levels: Levels, rule: Rule, timesteps: Sequence[int]) -> Tensor:
    """The terms (K,) of the chain over ``timesteps``, ascending, in nats per dimension: the decoder's, the jumps'."""
    t = torch.tensor(timesteps)
    histograms = statistics.histograms if rule.by_state else pooled(statistics)
    decoder = statistics.decoder[rule.decoder][:, timesteps[0]].mean()
    return torch.cat([decoder[None], kl_nats(rule, levels.jumps(t[:-1], t[1:]), histograms)])


def image_nats(statistics: Statistics, levels: Levels, rule: Rule, timesteps: Sequence[int]) -> Tensor:
    """The bound of each image (N,), nats per dimension, for a ``rule`` that does not depend on the state."""
    t = torch.tensor(timesteps)
    jumps = levels.jumps(t[:-1], t[1:])
    error = statistics.squared_error[:, t[1:]]
    log_ratio = rule.log_ratio(jumps, torch.ones(1, dtype=torch.float64))[:, 0]
    terms = torch.expm1(-log_ratio) + log_ratio + jumps.snr_gain[:, 0] * error * torch.exp(-log_ratio)
    return statistics.prior + statistics.decoder[rule.decoder][:, timesteps[0]] + terms.sum(1) / 2
