"""The denoiser that knows its data exactly at any time: what the ODE's likelihood is held against."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perrin import GaussianDiffusion, get_named_beta_schedule
from perrin.denoiser import DiffusionDenoiser
from perrin.likelihood.flow import Timeline
from perrin.likelihood.ode import OdeLikelihood, ode
from perrin.likelihood.solvers import Heun, Solver
from perrin.oracles import GaussianData, MixtureData, arbitrary
from perrin.parameterization import Denoised
from perrin.schedules import log_snr_linear_betas

GAUSSIAN, MIXTURE = GaussianData(0.2, 0.5), MixtureData()
LN2 = math.log(2)


def chain(name: str = "cosine", total: int = 100, **options: object) -> GaussianDiffusion:
    return GaussianDiffusion(betas=get_named_beta_schedule(name, total), levels=None, **options)


FINE = GaussianDiffusion(betas=log_snr_linear_betas(200, 9.0, -14.0), levels=None)


@dataclass
class Ideal:
    """The denoiser that knows ``data``, at any time in full precision; it counts its calls."""

    data: GaussianData | MixtureData
    diffusion: GaussianDiffusion = FINE
    calls: int = 0

    def __call__(self, x: Tensor, t: float) -> Denoised:
        self.calls += 1
        alpha, sigma = self.schedule(t)
        x_start = self.data.x_start(x, alpha, sigma)
        return Denoised(x_start, lambda: (x - alpha * x_start) / sigma)

    def schedule(self, t: float) -> tuple[float, float]:
        return DiffusionDenoiser(self.diffusion, arbitrary(1)).schedule(t)


def noisy_nll_bpd(data: GaussianData | MixtureData, x: Tensor, s: float) -> Tensor:
    """-log2 p per dimension of ``data`` with N(0, s^2) added, by its definition."""
    means = [data.mean] if isinstance(data, GaussianData) else data.means
    parts = [torch.distributions.Normal(mean, math.hypot(data.std, s)).log_prob(x) for mean in means]
    nats = torch.stack(parts).logsumexp(0) - math.log(len(parts))
    return -nats.flatten(1).mean(1) / LN2


def flow_nll_bpd(diffusion: GaussianDiffusion, x: Tensor) -> Tensor:
    """What an exact solver finds for ``GAUSSIAN``: its flow is known, and ends in a density that is not its own."""
    (alpha, sigma), end = diffusion.level_of_batch(0), diffusion.level_of_batch(diffusion.num_timesteps - 1)
    x_end = GAUSSIAN.flow(alpha * x, (alpha, sigma), end)
    growth = 0.5 * math.log(GAUSSIAN.total_variance(*end) / GAUSSIAN.total_variance(alpha, sigma))
    nats = -0.5 * (x_end**2 + math.log(2 * math.pi)) + growth + math.log(alpha)
    return -nats.flatten(1).mean(1) / LN2


def first_noise(denoise: Ideal) -> float:
    """sigma / alpha at the first timestep."""
    return math.exp(Timeline.of(denoise).first)


def measure(denoise: object, x: Tensor, solver: Solver | None = None, **options: object) -> OdeLikelihood:
    arguments = {"levels": None, "dequantization": None, "indices": range(len(x))} | options
    return ode(denoise, x, solver=solver or Heun(40), **arguments)
