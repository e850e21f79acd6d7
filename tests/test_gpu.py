"""The same figures on a CUDA device as on the CPU; run with ``pytest -m gpu``."""

from collections.abc import Callable

import pytest
import torch

from perrin import (
    GaussianDiffusion,
    LossType,
    ModelVarType,
    UNet,
    get_named_beta_schedule,
)
from perrin.gaussian import discretized_gaussian_log_likelihood
from perrin.samplers import SAMPLERS, Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def pair() -> tuple[GaussianDiffusion, UNet]:
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(
        betas=get_named_beta_schedule("cosine", 50),
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.RESCALED_MSE,
    )
    return diffusion, UNet(image_size=8, in_channels=1, channels=16, learn_sigma=True).eval()


def test_training_losses_agree() -> None:
    diffusion, network = pair()
    x, noise, t = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 25, 49])
    here = diffusion.training_losses(network, x, t, noise=noise)["loss"]
    there = diffusion.training_losses(network.cuda(), x.cuda(), t.cuda(), noise=noise.cuda())["loss"]
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_samples_agree(make: Callable[..., Sampler]) -> None:
    diffusion, network = pair()
    start, steps = torch.randn(2, 1, 8, 8), torch.randn(10, 2, 1, 8, 8)
    samples = []
    for device in ("cpu", "cuda"):
        noises = iter(steps.to(device))
        sampler = make(diffusion.to(device), 10)
        sample = sampler.sample(
            network.to(device), start.shape, noise=start.to(device), noise_fn=lambda x, t, n=noises: next(n)
        )
        samples.append(sample.cpu())
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-2, atol=1e-3)


def test_the_decoder_agrees() -> None:
    x = 2 * torch.arange(256) / 255 - 1
    means, log_scales = torch.linspace(-1.5, 1.5, 256), torch.linspace(-8, 3, 256)
    here = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    there = discretized_gaussian_log_likelihood(x.cuda(), means=means.cuda(), log_scales=log_scales.cuda())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-6)
