"""Every sampler × mean type × variance type × guidance, on two classes whose guided data are known exactly.

The mean types say the same in other words, so samples must agree between them; the variance is ancestral sampling's
alone. Guidance by the exact posterior at scale 1 must give the samples of the class, any guidance alone those of the
guided data, a rule without noise the flow's end, and calibrated variances the data's spread.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, get_named_beta_schedule
from perrin.guidance import (
    Guidance,
    autoguidance,
    classifier,
    classifier_free,
    classifier_gradient,
    dynamic_threshold,
)
from perrin.likelihood.calibration import Calibration, Fit
from perrin.networks import NO_CLASS
from perrin.oracles import GaussianData, Oracle
from perrin.samplers import SAMPLERS, Grid, GridName, Sampler
from two_classes import CLASSES, Conditional, Guided, Posterior

T, STEPS = 40, 6
START = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 1])
BETAS = get_named_beta_schedule("linear", T)


def chain(mean_type: ModelMeanType, var_type: ModelVarType) -> GaussianDiffusion:
    return GaussianDiffusion(betas=BETAS, model_mean_type=mean_type, model_var_type=var_type)


def with_variance(network: Callable[..., Tensor], diffusion: GaussianDiffusion) -> Callable[..., Tensor]:
    """``network`` with the second half that the variance type asks for: within LEARNED_RANGE, a log-variance else."""
    if diffusion.output_channels(1) == 1:
        return network
    ranged = diffusion.model_var_type is ModelVarType.LEARNED_RANGE

    def both(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([network(x, t, y), torch.full_like(x, 0.3 if ranged else -2.0)], 1)

    return both


class Guides:
    """Each guidance by name, as arguments of ``sample``; all but the last three end in the class's own data."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        network = with_variance(Conditional(diffusion), diffusion)
        self.diffusion, posterior = diffusion, Posterior(diffusion)
        nobody = torch.full_like(Y, NO_CLASS)
        self.network = network
        self.arguments: dict[str, dict[str, Any]] = {
            "none": {"model_kwargs": {"y": Y}},
            "classifier": {"model_kwargs": {"y": nobody}, "guidance": [classifier(posterior, y=Y)]},
            "cond_fn": {"model_kwargs": {"y": nobody}, "cond_fn": classifier_gradient(posterior, y=Y)},
            "classifier-free 1": {"model_kwargs": {"y": Y}, "guidance": [classifier_free(1.0)]},
            "autoguidance": {"model_kwargs": {"y": Y}, "guidance": [self._away(2.0)]},
            "classifier-free rescaled": {
                "model_kwargs": {"y": Y},
                "guidance": [classifier_free(2.0, interval=(0.1, 9.0), rescale=0.7)],
            },
            "everything": {
                "model_kwargs": {"y": Y},
                "guidance": [classifier_free(2.0), self._away(1.5), classifier(posterior, 0.5, y=Y)],
                "cond_fn": classifier_gradient(posterior, 0.3, y=Y),
                "denoised_fn": dynamic_threshold(0.9),
                "clip_denoised": True,
            },
        }

    def _away(self, scale: float) -> Guidance:
        """From the data of both classes."""
        ideal = Conditional(self.diffusion)
        weaker = with_variance(lambda x, t, y: ideal(x, t, torch.full_like(y, NO_CLASS)), self.diffusion)
        return autoguidance(weaker, scale, model_kwargs={"y": Y})


GUIDES = list(Guides(chain(ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL)).arguments)


def drawn(sampler: Sampler, network: Callable[..., Tensor], **arguments: Any) -> Tensor:
    arguments = {"clip_denoised": False, "noise": START, "seed": 1} | arguments
    return sampler.sample(network, arguments["noise"].shape, **arguments)


@cache
def samples(
    name: str,
    mean_type: ModelMeanType,
    var_type: ModelVarType = ModelVarType.FIXED_SMALL,
    guide: str = "none",
    grid: Grid = "uniform",
) -> Tensor:
    diffusion = chain(mean_type, var_type)
    guides = Guides(diffusion)
    sampler = SAMPLERS[name](diffusion, STEPS, grid=grid)
    return drawn(sampler, guides.network, **guides.arguments[guide])


def assert_agree(
    found: Tensor, expected: Tensor, name: str, mean_type: ModelMeanType, atol: float = 1e-8
) -> None:
    """The middle of a step of dpm-2s is rounded to a whole time for networks that know no other."""
    assert found.isfinite().all()
    rounded = name == "dpm-2s" and mean_type is ModelMeanType.PREVIOUS_X
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0.05 if rounded else atol)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("var_type", ModelVarType)
@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_how_the_network_says_it(
    name: str, mean_type: ModelMeanType, var_type: ModelVarType, guide: str
) -> None:
    told = var_type if name == "ddpm" else ModelVarType.FIXED_SMALL
    found = samples(name, mean_type, var_type, guide)
    expected = samples(name, ModelMeanType.EPSILON, told, guide)
    assert_agree(found, expected, name, mean_type)


@pytest.mark.parametrize("guide", ["none", "everything"])
@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("name", SAMPLERS)
def test_nor_does_it_between_timesteps(name: str, mean_type: ModelMeanType, guide: str) -> None:
    kind = ModelVarType.FIXED_SMALL
    times = SAMPLERS[name](chain(mean_type, kind), STEPS, grid="karras").times[:-1]
    found = samples(name, mean_type, kind, guide, "karras")
    expected = samples(name, ModelMeanType.EPSILON, kind, guide, times)
    assert_agree(found, expected, name, mean_type, atol=1e-6)  # networks are told fractional times in float32


@pytest.mark.parametrize("grid", ["uniform", "karras"])
@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"ddpm", "dpm-2m-sde"}))
def test_without_noise_a_sample_is_the_end_of_the_flow(
    name: str, mean_type: ModelMeanType, grid: GridName
) -> None:
    diffusion = chain(mean_type, ModelVarType.FIXED_SMALL)
    sampler = SAMPLERS[name](diffusion, T, grid=grid)
    found = drawn(sampler, Conditional(diffusion), model_kwargs={"y": Y})
    start, end = (diffusion.level_of_batch(t)[:2] for t in (sampler.times[0], sampler.times[-2]))
    for x, x_t, data in zip(found, START, (CLASSES[y] for y in Y), strict=True):
        exact = data.x_start(data.flow(x_t, start, end), *end)
        coarse = name == "ddim" or mean_type is ModelMeanType.PREVIOUS_X or grid == "uniform"
        torch.testing.assert_close(x, exact, rtol=0, atol=0.06 if coarse else 0.01)


@pytest.mark.parametrize("guide", ["classifier", "cond_fn", "classifier-free 1"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_by_the_exact_posterior_gives_the_class(name: str, guide: str) -> None:
    if (name, guide) == ("ddpm", "cond_fn"):
        pytest.skip("the mean is moved by the gradient at x_t, which is first order only (ADM algorithm 1)")
    kind = ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL
    found, expected = samples(name, *kind, guide), samples(name, *kind, "none")
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    if guide == "classifier-free 1":
        assert torch.equal(found, expected)
    assert not torch.allclose(samples(name, *kind, "everything"), expected, atol=1e-3)


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("name", SAMPLERS)
def test_autoguidance_alone_gives_the_guided_data(name: str, mean_type: ModelMeanType) -> None:
    diffusion = chain(ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL)
    guided = Oracle(Guided(Y, 2.0), diffusion)
    expected = drawn(SAMPLERS[name](diffusion, STEPS, grid="uniform"), guided)
    assert_agree(samples(name, mean_type, guide="autoguidance"), expected, name, mean_type)


@dataclass
class Thresholded:
    """``data`` of which each prediction is thresholded."""

    data: Guided
    threshold: Callable[[Tensor], Tensor]

    def x_start(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.threshold(self.data.x_start(x_t, alpha, sigma))

    def eps(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - alpha * self.x_start(x_t, alpha, sigma)) / sigma


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_threshold_alone_is_that_of_each_prediction(name: str, mean_type: ModelMeanType) -> None:
    data, threshold = Guided(Y, 6.0), dynamic_threshold(0.9)
    told, ideal = (chain(kind, ModelVarType.FIXED_SMALL) for kind in (mean_type, ModelMeanType.EPSILON))
    sampler, other = (SAMPLERS[name](each, STEPS, grid="uniform") for each in (told, ideal))
    found = drawn(sampler, Oracle(data, told), denoised_fn=threshold)
    assert_agree(found, drawn(other, Oracle(Thresholded(data, threshold), ideal)), name, mean_type)
    assert not torch.allclose(found, drawn(other, Oracle(data, ideal)), atol=1e-3)


def calibrated(diffusion: GaussianDiffusion, data: GaussianData) -> GaussianDiffusion:
    levels = [diffusion.level_of_batch(t)[:2] for t in range(T)]
    known = Fit((0.0,) * T, tuple(math.log(data.remaining_variance(*level)) for level in levels))
    paths = [SAMPLERS["ddpm"](diffusion, steps).times[-2::-1] for steps in range(1, STEPS + 1)]
    found = Calibration(
        weights="model",
        step=0,
        num_timesteps=T,
        levels=diffusion.levels,
        images=1,
        seed=0,
        kind="calibrated",
        covariances={"calibrated": known},
        decoders={"calibrated": known},
        paths=tuple(paths),
        curve=(0.0,) * STEPS,
    )
    return found.chain(diffusion, STEPS)


@pytest.mark.parametrize(
    "mean_type", [kind for kind in ModelMeanType if kind is not ModelMeanType.PREVIOUS_X]
)
def test_ancestral_sampling_by_calibrated_variances_has_the_spread_of_the_data(
    mean_type: ModelMeanType,
) -> None:
    data, diffusion = CLASSES[1], chain(mean_type, ModelVarType.FIXED_SMALL)
    known = calibrated(diffusion, data)
    n, end = 20_000, diffusion.level_of_batch(0)[:2]
    start = torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = drawn(SAMPLERS["ddpm"](known), Oracle(data, diffusion), noise=start[:, None])
    explained = data.std**2 - data.remaining_variance(*end)  # of x_0, by what it is read from at the end
    assert float(found.mean()) == pytest.approx(data.mean, abs=4 * data.std / n**0.5)
    assert float(found.var()) == pytest.approx(explained, rel=4 * (2 / n) ** 0.5)
