"""What a sampling step and a training loss cost beside the network: perrin, diffusers, and a loop by hand.

Every case runs once in each round, in one process and one thread, so that a busy moment of the machine falls on
all of them; the figures are medians over the rounds of that thread's CPU time, in which time spent waiting for a
core does not count. The network returns a tensor that it holds, and the time of calling it is measured as a case
of its own and subtracted.

    python benchmarks/overhead.py [--rounds 15] [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from perrin import (
    GaussianDiffusion,
    LossType,
    ModelVarType,
    SamplerDDIM,
    SamplerDDPM,
    __version__,
    get_named_beta_schedule,
)
from perrin.samplers import SampleNoise, Sampler

SHAPE = (16, 3, 32, 32)
T = 1000
STEPS = 200
LOSSES = 20
"""Calls of a loss in one round; a loss with the bound takes as long as many steps."""

SCHEDULERS: Any = diffusers
"""diffusers, whose constructors have no types."""

Network = Callable[[Tensor, Tensor], Tensor]
Loop = Callable[[], int]
"""A case: runs, and says how many steps that was."""


@dataclass(frozen=True)
class Result:
    """Microseconds of CPU per step with the network's own time subtracted: median and quartiles over the rounds."""

    name: str
    median: float
    low: float
    high: float


class Setting:
    """The tensors that all cases share, the networks, and the coefficients of the loops by hand."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(SHAPE, generator=draw)
        self.noise = torch.randn(SHAPE, generator=draw)
        self.x_start = torch.randint(256, SHAPE, generator=draw) / 127.5 - 1
        self.t = torch.randint(T, SHAPE[:1], generator=draw)
        self.eps = torch.randn(SHAPE, generator=draw)
        self.both = torch.cat([self.eps, 0.3 * torch.randn(SHAPE, generator=draw)], 1)
        self.betas = get_named_beta_schedule("linear", T)

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """C channels."""
        return self.eps

    def learned(self, x: Tensor, t: Tensor) -> Tensor:
        """2 C channels."""
        return self.both

    def network_for(self, diffusion: GaussianDiffusion) -> Network:
        return self.network if diffusion.output_channels(1) == 1 else self.learned

    def diffusion(
        self, var_type: ModelVarType = ModelVarType.FIXED_SMALL, loss_type: LossType = LossType.MSE
    ) -> GaussianDiffusion:
        return GaussianDiffusion(betas=self.betas, model_var_type=var_type, loss_type=loss_type)

    @cached_property
    def signal(self) -> Tensor:
        """The cumulative products of 1 - beta, (T,) float64."""
        return torch.cumprod(1 - torch.from_numpy(self.betas), 0)

    def levels(self) -> Iterator[tuple[float, float]]:
        """The signal at each step of a loop by hand and at the next one."""
        visited = [*self.signal[torch.linspace(0, T - 1, STEPS).long()].tolist()[::-1], 1.0]
        return pairwise(visited)


# perrin


def perrin_steps(setting: Setting, sampler: Sampler) -> Loop:
    """The step rule alone, its noise from torch.randn as in the other libraries' steps."""
    denoise = sampler.denoiser(setting.network_for(sampler.diffusion))
    pairs = list(pairwise(sampler.times))

    def draw() -> Tensor:
        return torch.randn(SHAPE)

    @torch.no_grad()
    def loop() -> int:
        x = setting.x
        for t, s in pairs:
            x = sampler.step(denoise, x, t, s, draw).sample
        return STEPS

    return loop


def perrin_sampling(setting: Setting, sampler: Sampler) -> Loop:
    """`Sampler.sample` as a user calls it: its loop, its start, and a stream of noise for each sample."""
    network = setting.network_for(sampler.diffusion)

    def loop() -> int:
        sampler.sample(network, SHAPE, seed=0)
        return STEPS

    return loop


def perrin_loss(setting: Setting, hybrid: bool) -> Loop:
    diffusion = (
        setting.diffusion(ModelVarType.LEARNED_RANGE, LossType.RESCALED_MSE)
        if hybrid
        else setting.diffusion()
    )
    network = setting.network_for(diffusion)

    def loop() -> int:
        for _ in range(LOSSES):
            diffusion.training_losses(network, setting.x_start, setting.t, noise=setting.noise)["loss"].mean()
        return LOSSES

    return loop


# diffusers


def diffusers_ddim(setting: Setting) -> Loop:
    scheduler = SCHEDULERS.DDIMScheduler(T, trained_betas=setting.betas)
    scheduler.set_timesteps(STEPS)
    return _diffusers_loop(setting, scheduler, setting.network)


def diffusers_ddpm(setting: Setting, variance_type: str) -> Loop:
    scheduler = SCHEDULERS.DDPMScheduler(T, trained_betas=setting.betas, variance_type=variance_type)
    scheduler.set_timesteps(STEPS)
    network = setting.learned if variance_type == "learned_range" else setting.network
    return _diffusers_loop(setting, scheduler, network)


def _diffusers_loop(setting: Setting, scheduler: Any, network: Network) -> Loop:
    @torch.no_grad()
    def loop() -> int:
        x = setting.x
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        return STEPS

    return loop


def diffusers_loss(setting: Setting) -> Loop:
    scheduler = SCHEDULERS.DDPMScheduler(T, trained_betas=setting.betas)

    def loop() -> int:
        for _ in range(LOSSES):
            x_t = scheduler.add_noise(setting.x_start, setting.noise, setting.t)
            mse_loss(setting.network(x_t, setting.t), setting.noise)
        return LOSSES

    return loop


# By hand: the same arithmetic in the fewest torch calls, its coefficients Python floats made beforehand


def hand_ddim(setting: Setting) -> Loop:
    # x_0 = u x + v eps, clipped; x_s = p x + q x_0
    coefficients = [
        (
            now**-0.5,
            -(((1 - now) / now) ** 0.5),
            ratio := ((1 - then) / (1 - now)) ** 0.5,
            then**0.5 - ratio * now**0.5,
        )
        for now, then in setting.levels()
    ]

    @torch.no_grad()
    def loop() -> int:
        x = setting.x
        for u, v, p, q in coefficients:
            x_start = (x * u).add_(setting.network(x, setting.t), alpha=v).clamp_(-1, 1)
            x = (x * p).add_(x_start, alpha=q)
        return STEPS

    return loop


def hand_ddpm(setting: Setting) -> Loop:
    # x_0 as above; mean = p x + q x_0; log std = r v + w
    coefficients = []
    for now, then in setting.levels():
        beta = 1 - now / then
        small = torch.tensor(max(beta * (1 - then) / (1 - now), 1e-20)).log().item()
        large = torch.tensor(beta).log().item()
        coefficients.append(
            (
                now**-0.5,
                -(((1 - now) / now) ** 0.5),
                (1 - then) * (1 - beta) ** 0.5 / (1 - now),
                beta * then**0.5 / (1 - now),
                (large - small) / 4,
                (large + small) / 4,
            )
        )

    @torch.no_grad()
    def loop() -> int:
        x = setting.x
        for u, v, p, q, r, w in coefficients:
            eps, extra = setting.learned(x, setting.t).chunk(2, dim=1)
            x_start = (x * u).add_(eps, alpha=v).clamp_(-1, 1)
            std = (extra * r).add_(w).exp_()
            x = (x * p).add_(x_start, alpha=q).addcmul_(std, torch.randn(SHAPE))
        return STEPS

    return loop


def hand_loss(setting: Setting) -> Loop:
    alphas, sigmas = setting.signal.sqrt().float(), (1 - setting.signal).sqrt().float()

    def loop() -> int:
        for _ in range(LOSSES):
            alpha, sigma = alphas[setting.t, None, None, None], sigmas[setting.t, None, None, None]
            x_t = (alpha * setting.x_start).addcmul_(setting.noise, sigma)
            (setting.noise - setting.network(x_t, setting.t)).square_().mean()
        return LOSSES

    return loop


# What none of them can save


def network_alone(setting: Setting) -> Loop:
    def loop() -> int:
        for _ in range(STEPS):
            setting.network(setting.x, setting.t)
        return STEPS

    return loop


def randn(setting: Setting) -> Loop:
    def loop() -> int:
        for _ in range(STEPS):
            torch.randn(SHAPE)
        return STEPS

    return loop


def sample_noise(setting: Setting) -> Loop:
    noise = SampleNoise(0, range(SHAPE[0]))
    noise.initial(SHAPE, "cpu")

    def loop() -> int:
        for _ in range(STEPS):
            noise(setting.x)
        return STEPS

    return loop


def cases(setting: Setting) -> dict[str, Loop]:
    """Every case by name."""
    ddim = SamplerDDIM(setting.diffusion(), STEPS)
    fixed = SamplerDDPM(setting.diffusion(), STEPS)
    learned = SamplerDDPM(setting.diffusion(ModelVarType.LEARNED_RANGE), STEPS)
    return {
        "network": network_alone(setting),
        "noise draw, torch.randn": randn(setting),
        "noise draw, a stream per sample": sample_noise(setting),
        "DDIM step, perrin": perrin_steps(setting, ddim),
        "DDIM step, diffusers": diffusers_ddim(setting),
        "DDIM step, by hand": hand_ddim(setting),
        "DDIM sampling per step, perrin": perrin_sampling(setting, ddim),
        "DDPM step fixed, perrin": perrin_steps(setting, fixed),
        "DDPM step fixed, diffusers": diffusers_ddpm(setting, "fixed_small"),
        "DDPM step learned, perrin": perrin_steps(setting, learned),
        "DDPM step learned, diffusers": diffusers_ddpm(setting, "learned_range"),
        "DDPM step learned, by hand": hand_ddpm(setting),
        "DDPM sampling per step, perrin": perrin_sampling(setting, learned),
        "MSE loss, perrin": perrin_loss(setting, hybrid=False),
        "MSE loss, diffusers": diffusers_loss(setting),
        "MSE loss, by hand": hand_loss(setting),
        "hybrid loss, perrin": perrin_loss(setting, hybrid=True),
    }


def measure(loops: dict[str, Loop], rounds: int) -> list[Result]:
    """Each case once in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(rounds + 1):
        for name, loop in loops.items():
            start = time.thread_time()
            steps = loop()
            if round_ > 0:
                times[name].append((time.thread_time() - start) / steps * 1e6)
    network = statistics.median(times.pop("network"))
    results = [Result("network (subtracted)", network, network, network)]
    for name, values in times.items():
        own = 0.0 if name.startswith("noise") else network
        low, median, high = (value - own for value in statistics.quantiles(values, n=4))
        results.append(Result(name, median, low, high))
    return results


def verdicts(results: list[Result]) -> list[str]:
    """The goals, and whether this run meets them."""
    took = {result.name: result.median for result in results}
    ddim, theirs = took["DDIM step, perrin"], took["DDIM step, diffusers"]
    learned, draw = took["DDPM step learned, perrin"], took["noise draw, torch.randn"]
    limit = 1.3 * draw + 120
    return [
        f"DDIM step {ddim:.1f} us, at most 45 us or a quarter of diffusers' ({theirs / 4:.1f} us): "
        + ("met" if ddim <= max(45, theirs / 4) else "missed"),
        f"DDPM step with learned variance {learned:.1f} us, at most 1.3 noise draws + 120 us ({limit:.1f} us): "
        + ("met" if learned <= limit else "missed"),
    ]


def machine() -> dict[str, str]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": str(len(models)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "perrin": __version__,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each case runs (default 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {arguments.rounds}")
    torch.set_num_threads(1)
    results = measure(cases(Setting()), arguments.rounds)
    if arguments.json:
        print(json.dumps({"machine": machine(), "us": [asdict(result) for result in results]}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"{SHAPE} float32, one thread, {arguments.rounds} rounds of {STEPS} steps or {LOSSES} losses\n")
    print(f"{'':<34} {'median us':>10} {'quartiles':>19}")
    for result in results:
        print(f"{result.name:<34} {result.median:>10.1f} {result.low:>9.1f} {result.high:>9.1f}")
    print("", *verdicts(results), sep="\n")


if __name__ == "__main__":
    main()
