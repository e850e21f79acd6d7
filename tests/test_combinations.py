"""Every sampler × mean type × variance type × guidance, on two classes whose guided data are known exactly.

The mean types say the same in other words, so samples must agree between them; the variance is ancestral sampling's
alone. Guidance by the exact posterior at scale 1 must give the samples of the class.
"""

from collections.abc import Callable, Sequence
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
from perrin.networks import NO_CLASS
from perrin.samplers import SAMPLERS
from two_classes import Conditional, Posterior

T, STEPS = 40, 6
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
    """Each guidance by name, as arguments of ``sample``; all but the last two end in the class's own data."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        network = with_variance(Conditional(diffusion), diffusion)
        posterior = Posterior(diffusion)
        nobody = torch.full_like(Y, NO_CLASS)
        self.network = network
        self.arguments: dict[str, dict[str, Any]] = {
            "none": {"model_kwargs": {"y": Y}},
            "classifier": {"model_kwargs": {"y": nobody}, "guidance": [classifier(posterior, y=Y)]},
            "cond_fn": {"model_kwargs": {"y": nobody}, "cond_fn": classifier_gradient(posterior, y=Y)},
            "classifier-free 1": {"model_kwargs": {"y": Y}, "guidance": [classifier_free(1.0)]},
            "classifier-free rescaled": {
                "model_kwargs": {"y": Y},
                "guidance": [classifier_free(2.0, interval=(0.1, 9.0), rescale=0.7)],
            },
            "everything": {
                "model_kwargs": {"y": Y},
                "guidance": self._everything(diffusion, posterior),
                "cond_fn": classifier_gradient(posterior, 0.3, y=Y),
                "denoised_fn": dynamic_threshold(0.9),
                "clip_denoised": True,
            },
        }

    def _everything(self, diffusion: GaussianDiffusion, posterior: Posterior) -> Sequence[Guidance]:
        ideal = Conditional(diffusion)
        weaker = with_variance(lambda x, t, y: ideal(x, t, torch.full_like(y, NO_CLASS)), diffusion)
        return [
            classifier_free(2.0),
            autoguidance(weaker, 1.5, model_kwargs={"y": Y}),
            classifier(posterior, 0.5, y=Y),
        ]


GUIDES = list(Guides(chain(ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL)).arguments)


@cache
def samples(name: str, mean_type: ModelMeanType, var_type: ModelVarType, guide: str) -> Tensor:
    diffusion = chain(mean_type, var_type)
    guides = Guides(diffusion)
    start = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = SAMPLERS[name](diffusion, STEPS, grid="uniform")
    return sampler.sample(
        guides.network,
        start.shape,
        noise=start,
        seed=1,
        **{"clip_denoised": False} | guides.arguments[guide],
    )


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
    assert found.isfinite().all()
    rounded = (
        name == "dpm-2s" and mean_type is ModelMeanType.PREVIOUS_X
    )  # the middle of a step, to a whole time
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0.05 if rounded else 1e-8)


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
