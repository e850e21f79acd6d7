"""What a sampling step costs beside the network: perrin, diffusers, and loops by hand.

Every case runs once in each round, in one process and one thread, so that a busy moment of the machine falls on
all of them; the figures are medians over the rounds of that thread's CPU time, in which time spent waiting for a
core does not count. The network returns a tensor that it holds, and the time of calling it is measured as a case
of its own and subtracted.

    python benchmarks/overhead.py [--rounds 15] [--json]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from typing import Any

import diffusers
import torch
from torch import Tensor

from perrin import (
    GaussianDiffusion,
    LossType,
    ModelVarType,
    SamplerDDIM,
    SamplerDDPM,
    get_named_beta_schedule,
)
from perrin.samplers import SAMPLERS, Memory, SampleNoise, Sampler, SamplerDPM
from timing import NETWORK, Loop, Result, machine, measure, table

SMALL, LARGE = (16, 3, 32, 32), (4, 3, 256, 256)
T = 1000
STEPS = {SMALL: 200, LARGE: 50}

SCHEDULERS: Any = diffusers
"""diffusers, whose constructors have no types."""

Shape = tuple[int, ...]
Network = Callable[[Tensor, Tensor], Tensor]


class Setting:
    """The tensors that all cases share, the networks, and the levels of the loops by hand."""

    def __init__(self, shape: Shape, steps: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.shape, self.steps = shape, steps
        self.x = torch.randn(shape, generator=draw)
        self.noise = torch.randn(shape, generator=draw)
        self.x_start = torch.randint(256, shape, generator=draw) / 127.5 - 1
        self.t = torch.randint(T, shape[:1], generator=draw)
        self.eps = torch.randn(shape, generator=draw)
        self.both = torch.cat([self.eps, 0.3 * torch.randn(shape, generator=draw)], 1)
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
        visited = [*self.signal[torch.linspace(0, T - 1, self.steps).long()].tolist()[::-1], 1.0]
        return pairwise(visited)


# perrin


def perrin_steps(setting: Setting, sampler: Sampler, clip: bool = True, read: bool = False) -> Loop:
    """The step rule alone, its noise from torch.randn as in the other libraries' steps; x_0 too with ``read``."""
    pairs, network = list(pairwise(sampler.times)), setting.network_for(sampler.diffusion)

    def draw() -> Tensor:
        return torch.randn(setting.shape)

    @torch.no_grad()
    def loop() -> int:
        denoise, x, memory = sampler.denoiser(network, clip), setting.x, Memory()
        for t, s in pairs:
            stepped = sampler.step(denoise, x, t, s, draw, memory)
            if read:
                _ = stepped.pred_xstart
            x, memory = stepped.sample, stepped.memory
            del stepped  # which holds what makes x_0
        return len(pairs)

    return loop


def perrin_sampling(setting: Setting, sampler: Sampler) -> Loop:
    """`Sampler.sample` as a user calls it: its loop, its start, and a stream of noise for each sample."""
    network = setting.network_for(sampler.diffusion)

    def loop() -> int:
        sampler.sample(network, setting.shape, seed=0)
        return setting.steps

    return loop


# diffusers


def diffusers_ddim(setting: Setting) -> Loop:
    return _diffusers_loop(setting, SCHEDULERS.DDIMScheduler(T, trained_betas=setting.betas), setting.network)


def diffusers_2m(setting: Setting) -> Loop:
    scheduler = SCHEDULERS.DPMSolverMultistepScheduler(T, trained_betas=setting.betas)
    return _diffusers_loop(setting, scheduler, setting.network)


def diffusers_ddpm(setting: Setting, variance_type: str) -> Loop:
    scheduler = SCHEDULERS.DDPMScheduler(T, trained_betas=setting.betas, variance_type=variance_type)
    network = setting.learned if variance_type == "learned_range" else setting.network
    return _diffusers_loop(setting, scheduler, network)


def _diffusers_loop(setting: Setting, fresh: Any, network: Network) -> Loop:
    fresh.set_timesteps(setting.steps)

    @torch.no_grad()
    def loop() -> int:
        x, scheduler = setting.x, copy.deepcopy(fresh)  # a scheduler counts its steps
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        return len(scheduler.timesteps)

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
        return setting.steps

    return loop


def hand_ddim_in_place(setting: Setting) -> Loop:
    """The same x_s without an x_0 in memory: what is clipped is alpha x_0, and x_s takes its place."""
    coefficients = [
        (
            now**0.5,
            -((1 - now) ** 0.5),
            ratio := ((1 - then) / (1 - now)) ** 0.5,
            (then / now) ** 0.5 - ratio,
        )
        for now, then in setting.levels()
    ]

    @torch.no_grad()
    def loop() -> int:
        x = setting.x
        for alpha, v, p, q in coefficients:
            scaled = torch.add(x, setting.network(x, setting.t), alpha=v).clamp_(-alpha, alpha)
            x = scaled.mul_(q).add_(x, alpha=p)
        return setting.steps

    return loop


def hand_2m(setting: Setting) -> Loop:
    # x_0 = u x + v eps; x_s = p x + q x_0 + r (the x_0 before)
    ratio, coefficients = 0.0, []
    for now, then in setting.levels():
        kept = ((1 - then) / (1 - now)) ** 0.5
        gained = then**0.5 - kept * now**0.5
        change = 0.5 * ratio * gained if then < 1 else 0.0
        coefficients.append((now**-0.5, -(((1 - now) / now) ** 0.5), kept, gained + change, -change))
        ratio = 1.0  # how much longer this step is than the one before: of no matter to the time it takes

    @torch.no_grad()
    def loop() -> int:
        x = before = setting.x
        for u, v, p, q, r in coefficients:
            x_start = (x * u).add_(setting.network(x, setting.t), alpha=v)
            x, before = (x * p).add_(x_start, alpha=q).add_(before, alpha=r), x_start
        return setting.steps

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
            x = (x * p).add_(x_start, alpha=q).addcmul_(std, torch.randn(setting.shape))
        return setting.steps

    return loop


# What none of them can save


def repeated(setting: Setting, call: Callable[[], object]) -> Loop:
    def loop() -> int:
        for _ in range(setting.steps):
            call()
        return setting.steps

    return loop


def deterministic_cases(setting: Setting) -> dict[str, Loop]:
    """DDIM and 2M by name."""
    ddim, dpm = (
        SamplerDDIM(setting.diffusion(), setting.steps),
        SamplerDPM(setting.diffusion(), setting.steps),
    )
    return {
        NETWORK: repeated(setting, lambda: setting.network(setting.x, setting.t)),
        "DDIM step, perrin": perrin_steps(setting, ddim),
        "DDIM step and its x_0, perrin": perrin_steps(setting, ddim, read=True),
        "DDIM step, diffusers": diffusers_ddim(setting),
        "DDIM step, by hand": hand_ddim(setting),
        "DDIM step, by hand without x_0": hand_ddim_in_place(setting),
        "DDIM sampling per step, perrin": perrin_sampling(setting, ddim),
        "2M step, perrin": perrin_steps(setting, dpm, clip=False),
        "2M step clipped, perrin": perrin_steps(setting, dpm),
        "2M step, diffusers": diffusers_2m(setting),
        "2M step, by hand": hand_2m(setting),
    }


def ancestral_cases(setting: Setting) -> dict[str, Loop]:
    """DDPM by name, and the noise that it draws."""
    fixed = SamplerDDPM(setting.diffusion(), setting.steps)
    learned = SamplerDDPM(setting.diffusion(ModelVarType.LEARNED_RANGE), setting.steps)
    noise = SampleNoise(0, range(setting.shape[0]))
    noise.initial(setting.shape, "cpu")
    return {
        "noise draw, torch.randn": repeated(setting, lambda: torch.randn(setting.shape)),
        "noise draw, a stream per sample": repeated(setting, lambda: noise(setting.x)),
        "DDPM step fixed, perrin": perrin_steps(setting, fixed),
        "DDPM step fixed, diffusers": diffusers_ddpm(setting, "fixed_small"),
        "DDPM step learned, perrin": perrin_steps(setting, learned),
        "DDPM step learned, diffusers": diffusers_ddpm(setting, "learned_range"),
        "DDPM step learned, by hand": hand_ddpm(setting),
        "DDPM sampling per step, perrin": perrin_sampling(setting, learned),
    }


def all_samplers(setting: Setting) -> dict[str, Loop]:
    """A step of every sampler, clipped, on its own grid."""
    made = {name: make(setting.diffusion(), setting.steps) for name, make in SAMPLERS.items()}
    return {f"{name} step": perrin_steps(setting, sampler) for name, sampler in made.items()}


def ratios(shape: Shape, results: list[Result]) -> list[str]:
    """The goals, and whether this run meets them."""
    took = {result.name: result.median for result in results}
    goals = [
        ("DDIM step", "DDIM step, perrin", "DDIM step, diffusers", 1 / 4),
        ("2M step", "2M step, perrin", "2M step, diffusers", 1 / 2),
        ("2M step clipped", "2M step clipped, perrin", "2M step, diffusers", 1 / 2),
    ]
    lines = [
        f"{shape} {name}: {took[ours] / took[theirs]:.3f} of diffusers', at most {goal}: "
        + ("met" if took[ours] <= goal * took[theirs] else "missed")
        for name, ours, theirs, goal in goals
    ]
    if "noise draw, torch.randn" in took:
        learned, limit = took["DDPM step learned, perrin"], 1.3 * took["noise draw, torch.randn"] + 120
        lines.append(
            f"{shape} DDPM step with learned variance: {learned:.1f} us, at most 1.3 noise draws + 120 us "
            f"({limit:.1f} us): " + ("met" if learned <= limit else "missed")
        )
    return lines


def options(doc: str) -> argparse.Namespace:
    """``rounds`` and ``json``; one thread from here on."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each case runs (default 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {given.rounds}")
    torch.set_num_threads(1)
    return given


def report(measured: dict[Shape, list[Result]], lines: list[str], *, as_json: bool) -> None:
    """Print what was measured, by shape, and ``lines`` after it."""
    if as_json:
        us = {str(shape): [asdict(result) for result in results] for shape, results in measured.items()}
        print(json.dumps({"machine": machine(), "us": us}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()), "\n")
    for shape, results in measured.items():
        print(table(str(shape), results))
    print(*lines, sep="\n")


def main() -> None:
    """Measure and print."""
    given = options(__doc__ or "")
    small, large = (Setting(shape, STEPS[shape]) for shape in (SMALL, LARGE))
    measured: dict[Shape, list[Result]] = {
        SMALL: measure(
            deterministic_cases(small) | ancestral_cases(small) | all_samplers(small), given.rounds
        ),
        LARGE: measure(deterministic_cases(large), given.rounds),
    }
    lines = [line for shape, results in measured.items() for line in ratios(shape, results)]
    report(measured, lines, as_json=given.json)


if __name__ == "__main__":
    main()
