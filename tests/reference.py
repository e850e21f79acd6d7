"""The engine once more, slowly: one example at one timestep, numpy in float64, each formula as its paper prints it.

Nothing here shares code or algebra with the package: betas come from the marginals, x_0 from each mean type's own
formula, likelihoods from differences of log CDFs. A network is ``network(x, time) -> output`` on arrays (C, ...).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

Array = NDArray[np.float64]
Network = Callable[[Array, float], Array]


def chain_alpha_bar(betas: Array) -> Array:
    """DDPM, below eq. 3: the running product of 1 - beta."""
    return np.array([np.prod(1 - betas[: t + 1]) for t in range(len(betas))])


def kl_nats(mean1: Array, variance1: Array, mean2: Array, variance2: Array) -> Array:
    """KL of two scalar Gaussians, from its definition."""
    return np.log(np.sqrt(variance2 / variance1)) + (variance1 + (mean1 - mean2) ** 2) / (2 * variance2) - 0.5


def decoder_log_likelihood(x: Array, mean: Array, sigma: Array, levels: int | None) -> Array:
    """DDPM eq. 13, or the normal density for continuous data."""
    if levels is None:
        return -((x - mean) ** 2) / (2 * sigma**2) - np.log(sigma) - 0.5 * np.log(2 * np.pi)
    level = np.rint((x + 1) / 2 * (levels - 1))
    half = 1 / (levels - 1)
    lower = np.where(level == 0, -np.inf, (x - half - mean) / sigma)
    upper = np.where(level == levels - 1, np.inf, (x + half - mean) / sigma)
    flip = lower + upper > 0  # work on the side where both CDFs are small
    lower, upper = np.where(flip, -upper, lower), np.where(flip, -lower, upper)
    with np.errstate(invalid="ignore"):
        difference = np.where(np.isinf(lower), -np.inf, log_ndtr(lower) - log_ndtr(upper))
    return log_ndtr(upper) + np.log(-np.expm1(difference))


@dataclass
class Reference:
    """A chain with ``betas``, of which the network sees only the timesteps ``keep``; kinds by their values."""

    betas: Array
    mean_type: str
    var_type: str
    loss_type: str = "mse"
    rescale: bool = False
    levels: int | None = 256
    keep: list[int] | None = None

    def __post_init__(self) -> None:
        self.full = chain_alpha_bar(self.betas)
        self.steps = list(range(len(self.betas))) if self.keep is None else sorted(self.keep)
        self.alpha_bar = self.full[self.steps]
        self.T = len(self.steps)

    def bar(self, t: int) -> float:
        """alpha_bar of the shortened chain; t = -1 is the data."""
        return 1.0 if t < 0 else float(self.alpha_bar[t])

    def beta(self, t: int) -> float:
        return 1 - self.bar(t) / self.bar(t - 1)

    def q_sample(self, x0: Array, t: int, noise: Array) -> Array:
        """DDPM eq. 4."""
        return np.sqrt(self.bar(t)) * x0 + np.sqrt(1 - self.bar(t)) * noise

    def posterior(self, x0: Array, xt: Array, t: int) -> Array:
        """The mean of DDPM eq. 7."""
        return self.posterior_of(x0, xt, self.bar(t), self.bar(t - 1))

    @staticmethod
    def posterior_of(x0: Array, xt: Array, bar: float, bar_before: float) -> Array:
        beta = 1 - bar / bar_before
        first = np.sqrt(bar_before) * beta / (1 - bar)
        second = np.sqrt(1 - beta) * (1 - bar_before) / (1 - bar)
        return first * x0 + second * xt

    def posterior_variance(self, t: int) -> float:
        """DDPM eq. 7."""
        return (1 - self.bar(t - 1)) / (1 - self.bar(t)) * self.beta(t)

    def clipped_variance(self, t: int) -> float:
        """The posterior variance; at the first step, where it is 0, that of the second (beta in a chain of one)."""
        if t > 0:
            return self.posterior_variance(t)
        return self.posterior_variance(1) if self.T > 1 else self.beta(0)

    def training_bars(self, t: int) -> tuple[float, float]:
        """alpha_bar at the training timestep of t and at the one before it."""
        step = self.steps[t]
        return float(self.full[step]), float(self.full[step - 1]) if step else 1.0

    def call(self, network: Network, x: Array, t: int) -> tuple[Array, Array | None]:
        time = self.steps[t] * (1000 / len(self.betas) if self.rescale else 1)
        output = network(x, time)
        if self.var_type.startswith("learned"):
            half = len(output) // 2
            return output[:half], output[half:]
        return output, None

    def target(self, x0: Array, xt: Array, t: int, noise: Array) -> Array:
        bar = self.bar(t)
        return {
            "epsilon": lambda: noise,
            "start-x": lambda: x0,
            "velocity": lambda: np.sqrt(bar) * noise - np.sqrt(1 - bar) * x0,
            "previous-x": lambda: self.posterior_of(x0, xt, *self.training_bars(t)),
        }[self.mean_type]()

    def read_x0(self, out: Array, xt: Array, t: int) -> Array:
        bar = self.bar(t)

        def from_previous() -> Array:
            now, before = self.training_bars(t)
            beta = 1 - now / before
            rest = out - np.sqrt(1 - beta) * (1 - before) / (1 - now) * xt
            return rest * (1 - now) / (np.sqrt(before) * beta)

        return {
            "epsilon": lambda: (xt - np.sqrt(1 - bar) * out) / np.sqrt(bar),
            "start-x": lambda: out,
            "velocity": lambda: np.sqrt(bar) * xt - np.sqrt(1 - bar) * out,
            "previous-x": from_previous,
        }[self.mean_type]()

    def log_variance(self, extra: Array | None, t: int, like: Array) -> Array:
        small, large = np.log(self.clipped_variance(t)), np.log(self.beta(t))
        if self.var_type == "learned":
            return extra
        if self.var_type == "learned-range":  # IDDPM eq. 15
            share = (extra + 1) / 2
            return share * large + (1 - share) * small
        fixed = small if self.var_type == "fixed-small" or t == 0 else large
        return np.full_like(like, fixed)

    def variance(self, log_variance: Array, t: int) -> Array:
        if self.var_type == "fixed-small":
            return np.full_like(log_variance, self.posterior_variance(t))
        return np.exp(log_variance)

    def p_mean_variance(
        self,
        network: Network,
        x: Array,
        t: int,
        clip: bool = True,
        denoised_fn: Callable[[Array], Array] | None = None,
    ) -> dict[str, Array]:
        return self.p_of(self.call(network, x, t), x, t, clip, denoised_fn)

    def p_of(
        self,
        output: tuple[Array, Array | None],
        x: Array,
        t: int,
        clip: bool,
        denoised_fn: Callable[[Array], Array] | None = None,
    ) -> dict[str, Array]:
        out, extra = output
        x0 = self.read_x0(out, x, t)
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        if clip:
            x0 = np.clip(x0, -1, 1)
        raw_is_mean = self.mean_type == "previous-x" and len(self.betas) == self.T
        log_variance = self.log_variance(extra, t, x)
        return {
            "mean": out if raw_is_mean else self.posterior(x0, x, t),
            "variance": self.variance(log_variance, t),
            "log_variance": log_variance,
            "pred_xstart": x0,
        }

    def vb_bits(
        self, output: tuple[Array, Array | None], x0: Array, xt: Array, t: int, clip: bool
    ) -> tuple[float, Array]:
        """One term of the bound in bits per dimension (IDDPM eq. 5, 6), and the prediction of x_0."""
        p = self.p_of(output, xt, t, clip)
        scale = np.exp(p["log_variance"] / 2)
        if t == 0:
            nats = -decoder_log_likelihood(x0, p["mean"], scale, self.levels)
        else:
            nats = kl_nats(self.posterior(x0, xt, t), self.posterior_variance(t), p["mean"], scale**2)
        return float(np.mean(nats) / np.log(2)), p["pred_xstart"]

    def prior_bits(self, x0: Array) -> float:
        bar = self.bar(self.T - 1)
        return float(np.mean(kl_nats(np.sqrt(bar) * x0, 1 - bar, 0.0, 1.0)) / np.log(2))

    def training_losses(self, network: Network, x0: Array, t: int, noise: Array) -> dict[str, float]:
        xt = self.q_sample(x0, t, noise)
        output = self.call(network, xt, t)
        vb = self.vb_bits(output, x0, xt, t, clip=False)[0]
        if self.loss_type in ("kl", "rescaled-kl"):
            return {"loss": vb * (self.T if self.loss_type == "rescaled-kl" else 1)}
        mse = float(np.mean((self.target(x0, xt, t, noise) - output[0]) ** 2))
        if output[1] is None:
            return {"loss": mse, "mse": mse}
        weighted = vb * (self.T / 1000 if self.loss_type == "rescaled-mse" else 1)
        return {"loss": mse + weighted, "mse": mse, "vb": weighted}

    def bound(self, network: Network, x0: Array, noises: list[Array]) -> dict[str, Array | float]:
        """The whole bound with the noise of each step, from the last down; terms as rows (T,)."""
        rows = []
        for t, noise in zip(reversed(range(self.T)), noises, strict=True):
            xt = self.q_sample(x0, t, noise)
            vb, pred = self.vb_bits(self.call(network, xt, t), x0, xt, t, clip=True)
            eps = (xt - np.sqrt(self.bar(t)) * pred) / np.sqrt(1 - self.bar(t))
            rows.append((vb, np.mean((pred - x0) ** 2), np.mean((eps - noise) ** 2)))
        vb, xstart_mse, mse = np.array(rows).T
        prior = self.prior_bits(x0)
        return {
            "total_bpd": vb.sum() + prior,
            "prior_bpd": prior,
            "vb": vb,
            "xstart_mse": xstart_mse,
            "mse": mse,
        }
