"""Faults to put into the engine, each with the checks of `perrin verify` that it must turn red."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from perrin import diffusion, reverse, samplers, schedules
from perrin.evaluation.verify import bench, bounds, process
from perrin.forward import ForwardProcess
from perrin.likelihood import predictions, solvers
from perrin.likelihood.dequantization import TruncatedNormal, Uniform
from perrin.likelihood.flow import Exact, Flow, Hutchinson
from perrin.likelihood.timesteps import BestTimesteps
from perrin.reverse import ReverseProcess
from perrin.samplers import SamplerBDIA, SamplerDDIM, SamplerDEIS, bdia, ddim, dpm, heun, inversion, multistep
from perrin.variance import VARIANCES, FixedVariance, ModelVarType, RangedVariance

Fault = Callable[[pytest.MonkeyPatch], None]


def scaled(function: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: factor * function(*args, **kwargs)


def wrong_schedule(patch: pytest.MonkeyPatch) -> None:
    original = bench.get_named_beta_schedule
    patch.setattr(bench, "get_named_beta_schedule", lambda *args: 0.999 * original(*args))


def wrong_noising(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ForwardProcess, "q_sample", scaled(ForwardProcess.q_sample, 1.00001))


def wrong_posterior_coefficient(patch: pytest.MonkeyPatch) -> None:
    original = ForwardProcess.posterior_mean
    patch.setattr(
        ForwardProcess,
        "posterior_mean",
        lambda self, x_start, x_t, t: original(self, 1.0001 * x_start, x_t, t),
    )


def wrong_posterior_variance(patch: pytest.MonkeyPatch) -> None:
    original = schedules.tables_from_logs

    def tables(log_alphas: Tensor) -> dict[str, Tensor]:
        found = original(log_alphas)
        return found | {"posterior_variance": found["betas"]}

    patch.setattr(schedules, "tables_from_logs", tables)


def wrong_prior(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ForwardProcess, "prior_bpd", scaled(ForwardProcess.prior_bpd, 1.0001))


def closed_ends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        process,
        "discretized_gaussian_log_likelihood",
        lambda x, *, means, log_scales, levels: torch.log(
            torch.special.ndtr((x + 1 / (levels - 1) - means) / log_scales.exp())
            - torch.special.ndtr((x - 1 / (levels - 1) - means) / log_scales.exp())
        ),
    )


def tanh_decoder(patch: pytest.MonkeyPatch) -> None:
    original = process.discretized_gaussian_log_likelihood
    patch.setattr(
        process,
        "discretized_gaussian_log_likelihood",
        lambda x, **options: original(x, approximation="tanh", **options),
    )


def time_off_by_one(patch: pytest.MonkeyPatch) -> None:
    original = ReverseProcess.network_time

    def later(self: ReverseProcess, t: object, x: Tensor) -> Tensor:
        time = original(self, t, x)
        return (time + 1).clamp(max=self.original_num_timesteps - 1)

    patch.setattr(ReverseProcess, "network_time", later)


def truncated_spacing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(schedules, "_even_timesteps", lambda total, count: set(range(0, total, total // count)))


def respaced_one_off(patch: pytest.MonkeyPatch) -> None:
    original = reverse.respaced_tables
    patch.setattr(
        reverse,
        "respaced_tables",
        lambda logs, keep: original(logs, [max(t - 1, i) for i, t in enumerate(keep)]),
    )


def small_variance_for_large(patch: pytest.MonkeyPatch) -> None:
    large = FixedVariance("posterior_variance", "posterior_log_variance_clipped")
    patch.setitem(VARIANCES, ModelVarType.FIXED_LARGE, large)


def large_variance_for_small(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(VARIANCES, ModelVarType.FIXED_SMALL, FixedVariance("betas", "log_betas"))


def learned_range_upside_down(patch: pytest.MonkeyPatch) -> None:
    original = RangedVariance.log_variance
    patch.setattr(RangedVariance, "log_variance", lambda self, extra, lookup: original(self, -extra, lookup))


def learned_as_a_deviation(patch: pytest.MonkeyPatch) -> None:
    learned = type(VARIANCES[ModelVarType.LEARNED])
    patch.setattr(learned, "log_variance", lambda self, extra, lookup: 2 * extra)


def learned_variance_of_a_short_step_for_a_long_one(patch: pytest.MonkeyPatch) -> None:
    learned = type(VARIANCES[ModelVarType.LEARNED])
    patch.setattr(learned, "of_jumps", property(lambda self: self))


def previous_mean_of_a_longer_step(patch: pytest.MonkeyPatch) -> None:
    original = ReverseProcess.reverse

    def reverse(self: ReverseProcess, denoised: object, x: Tensor, t: object) -> tuple[object, object]:
        mean, log_variance = original(self, denoised, x, t)
        return (mean if denoised.previous is None else denoised.previous), log_variance

    patch.setattr(ReverseProcess, "reverse", reverse)


def variance_for_deviation_in_ddim(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ddim, "root", lambda square: square)


def ddim_keeps_too_much(patch: pytest.MonkeyPatch) -> None:
    original = SamplerDDIM.step

    def step(
        self: SamplerDDIM, denoise: object, x: Tensor, t: object, s: object, draw: object, memory: object
    ) -> object:
        return original(self, denoise, 1.001 * x, t, s, draw, memory)

    patch.setattr(SamplerDDIM, "step", step)


def inversion_stops_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SamplerDDIM, "invert", scaled(SamplerDDIM.invert, 0.98))


def noise_of_the_batch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        samplers.base,
        "normal_rows",
        lambda like, generators: torch.randn(like.shape[::-1], generator=next(iter(generators))).T,
    )


def noise_too_large(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(samplers.base, "normal_rows", scaled(samplers.base.normal_rows, 1.05))


def wrong_kl(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(diffusion, "normal_kl", scaled(diffusion.normal_kl, 1.0001))


def bound_without_decoder(patch: pytest.MonkeyPatch) -> None:
    original = bounds.bound

    def bound(*args: object, **options: object) -> object:
        found = original(*args, **options)
        return found._replace(total=found.prior + found.vb)

    patch.setattr(bounds, "bound", bound)


def error_too_small(patch: pytest.MonkeyPatch) -> None:
    original = bounds.mean_and_error

    def mean_and_error(values: Tensor) -> tuple[float, float]:
        mean, error = original(values)
        return mean, error / 3

    patch.setattr(bounds, "mean_and_error", mean_and_error)


def scale_term_left_out(patch: pytest.MonkeyPatch) -> None:
    original = Flow.alpha
    patch.setattr(Flow, "alpha", lambda self, u: 1.01 * original(self, u))


def no_divergence(patch: pytest.MonkeyPatch) -> None:
    for trace in (Hutchinson, Exact):
        original = trace.divergence

        def divergence(
            self: object,
            like: Tensor,
            key: object,
            indices: object,
            original: Callable[..., object] = original,
        ) -> Callable[[object], Tensor]:
            exact = original(self, like, key, indices)
            return lambda vjp: 0.99 * exact(vjp)

        patch.setattr(trace, "divergence", divergence)


def euler_for_heun(patch: pytest.MonkeyPatch) -> None:
    original, seen = Flow.eps_and_growth, []

    def eps_and_growth(self: Flow, y: Tensor, u: float) -> tuple[Tensor, Tensor]:
        seen.append(original(self, y, u))
        return seen[-1]

    patch.setattr(Flow, "eps_and_growth", eps_and_growth)
    patch.setattr(Flow, "eps", lambda self, y, u: seen[-1][0])


def no_error_control(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(solvers, "_ERROR", (0.0,) * 7)


def free_dequantization(patch: pytest.MonkeyPatch) -> None:
    for kind in (Uniform, TruncatedNormal):
        original = kind.offset

        def offset(self: object, *args: object, original: Callable[..., object] = original) -> object:
            found = original(self, *args)
            return found._replace(log_density=found.log_density - 0.4)

        patch.setattr(kind, "offset", offset)


def wrong_squared_error(patch: pytest.MonkeyPatch) -> None:
    exact = predictions.Prediction.squared_error.fget
    patch.setattr(predictions.Prediction, "squared_error", property(lambda self: 1.2 * exact(self)))


def even_for_best(patch: pytest.MonkeyPatch) -> None:
    def even(self: BestTimesteps, steps: int) -> list[int]:
        return sorted(schedules.space_timesteps(len(self._costs), steps))

    patch.setattr(BestTimesteps, "timesteps", even)


def nothing_extrapolated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(multistep, "mean_weights", lambda visited, now, then: [1.0, *[0.0] * (len(visited) - 1)])


def no_second_slope(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(heun, "weighted", lambda tensors, weights: tensors[0])


def moments_of_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SamplerDEIS, "_moments", lambda self, *step: [1.0] * self.order)


def leap_too_short(patch: pytest.MonkeyPatch) -> None:
    original = bdia._ddim
    patch.setattr(bdia, "_ddim", lambda denoised, level: 0.99 * original(denoised, level))


def leap_too_long(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SamplerBDIA, "_leap", scaled(SamplerBDIA._leap, 1.0001))


def content_at_once(patch: pytest.MonkeyPatch) -> None:
    original = inversion._Step.tried

    def tried(self: inversion._Step, z: Tensor) -> inversion._Trial:
        return original(self, z)._replace(residual=torch.zeros(len(z)))

    patch.setattr(inversion._Step, "tried", tried)


def ode_for_sde(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dpm, "_sde_shares", multistep.ode_shares)


FAULTS: list[tuple[Fault, tuple[str, ...]]] = [
    (wrong_schedule, ("schedule: *",)),
    (wrong_noising, ("forward: noising",)),
    (
        wrong_posterior_coefficient,
        ("forward: posterior mean", "ddpm: *, mean", "ddpm: whole chain, variance", "bound: entropy*"),
    ),
    (wrong_posterior_variance, ("forward: posterior variance",)),
    (wrong_prior, ("forward: prior",)),
    (closed_ends, ("decoder: *levels*",)),
    (tanh_decoder, ("decoder: log-probabilities", "decoder: gradient")),
    (time_off_by_one, ("reading: *", "ddpm: *network, *", "bound: gap*", "bound: entropy, learned variance")),
    (truncated_spacing, ("respacing: timesteps",)),
    (respaced_one_off, ("respacing: marginals", "ddpm: fixed*, variance", "bound: gap of beta at ?? steps")),
    (large_variance_for_small, ("ddpm: fixed-small, variance",)),
    (small_variance_for_large, ("ddpm: fixed-large, variance", "ddpm: *network, variance")),
    (
        learned_range_upside_down,
        ("ddpm: learned-range, variance", "bound: entropy at*", "ddpm: whole*, variance"),
    ),
    (learned_as_a_deviation, ("bound: entropy, learned variance",)),
    (
        learned_variance_of_a_short_step_for_a_long_one,
        ("ddpm: learned, variance", "bound: entropy, converted variance"),
    ),
    (previous_mean_of_a_longer_step, ("ddpm: previous-x network, *",)),
    (variance_for_deviation_in_ddim, ("ddim: eta 0.5, variance", "ddim: eta 1, variance")),
    (
        ddim_keeps_too_much,
        (
            "ddim: eta *, mean",
            "ddim: eta 0, variance",
            "ddim: order",
            "ddim: round trip, order",
        ),
    ),
    (nothing_extrapolated, ("solver: order of dpm*", "solver: order of unipc*")),
    (no_second_slope, ("solver: order of heun",)),
    (moments_of_the_end, ("solver: order of deis",)),
    (leap_too_short, ("solver: order of bdia",)),
    (leap_too_long, ("inversion: bdia, round trip",)),
    (content_at_once, ("inversion: fixed point, round trip",)),
    (ode_for_sde, ("solver: variance of dpm-2m-sde",)),
    (inversion_stops_early, ("ddim: inversion, order", "ddim: round trip, order")),
    (noise_of_the_batch, ("seeded: *another batch size",)),
    (noise_too_large, ("seeded: *, variance",)),
    (wrong_kl, ("bound: entropy*", "bound: gap*")),
    (bound_without_decoder, ("bound: by image", "bound: estimate")),
    (error_too_small, ("bound: stated error", "bound: coverage")),
    (scale_term_left_out, ("ode: Gaussian*", "ode: correlated, exact*", "ode: mixture, adaptive")),
    (no_divergence, ("ode: Gaussian*", "ode: correlated*", "ode: mixture, adaptive", "ode: uniform*")),
    (euler_for_heun, ("ode: order of Heun", "ode: Gaussian, Heun")),
    (no_error_control, ("ode: *adaptive", "ode: correlated, exact*")),
    (free_dequantization, ("ode: uniform*", "ode: truncated*")),
    (wrong_squared_error, ("calibration: Var*", "calibration: variance", "calibration: bound of all steps")),
    (even_for_best, ("calibration: best timesteps", "calibration: other spacings")),
]
