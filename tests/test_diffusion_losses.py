"""What each loss trains, in which precision, and how losses relate to the bound."""

import pytest
import torch
from torch import Tensor

from chains import chain, images, normal
from perrin import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from perrin.schedules import linear_betas

LEARNED_TYPES = [ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE]


@pytest.mark.parametrize("mean", ModelMeanType)
@pytest.mark.parametrize("var", LEARNED_TYPES)
@pytest.mark.parametrize("loss", [LossType.MSE, LossType.RESCALED_MSE])
def test_the_hybrid_loss_trains_each_half_by_its_own_term(
    mean: ModelMeanType, var: ModelVarType, loss: LossType
) -> None:
    diffusion, x, t = chain(mean, var, loss), images(3, 2, 4), torch.tensor([0, 1, 50])
    output = (0.1 * normal(3, 4, 4)).requires_grad_()
    terms = diffusion.training_losses(lambda x, t: output, x, t, noise=normal(3, 2, 4, seed=3))
    (by_vb,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    (by_mse,) = torch.autograd.grad(terms["mse"].sum(), output, retain_graph=True)
    (by_loss,) = torch.autograd.grad(terms["loss"].sum(), output)
    assert (by_vb[:, :2] == 0).all()
    assert (by_vb[:, 2:] != 0).all()
    assert (by_mse[:, 2:] == 0).all()
    assert (by_mse[:, :2] != 0).all()
    torch.testing.assert_close(by_loss, by_vb + by_mse, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mean", ModelMeanType)
@pytest.mark.parametrize("var", ModelVarType)
@pytest.mark.parametrize("loss", [LossType.KL, LossType.RESCALED_KL])
def test_the_bound_as_loss_reaches_the_mean(mean: ModelMeanType, var: ModelVarType, loss: LossType) -> None:
    diffusion, x, t = chain(mean, var, loss), images(3, 2, 4), torch.tensor([0, 1, 50])
    output = (0.1 * normal(3, diffusion.output_channels(2), 4)).requires_grad_()
    terms = diffusion.training_losses(lambda x, t: output, x, t, noise=normal(3, 2, 4, seed=3))
    assert terms.keys() == {"loss"}
    (gradient,) = torch.autograd.grad(terms["loss"].sum(), output)
    assert (gradient != 0).all()
    assert gradient.isfinite().all()


def test_a_loss_of_uniform_timesteps_estimates_the_bound() -> None:
    """RESCALED_KL, averaged over all t, is the bound without its prior; RESCALED_MSE's vb a thousandth of it."""
    x, noise = images(2, 3), normal(2, 3, seed=5)
    curve = chain(var=ModelVarType.LEARNED).calc_bpd_loop(
        lambda x, t: torch.cat([x, x - 3], 1), x, clip_denoised=False, noise_fn=lambda x, t: noise
    )
    bound = curve["total_bpd"] - curve["prior_bpd"]
    for loss, key, share in ((LossType.RESCALED_KL, "loss", 1.0), (LossType.RESCALED_MSE, "vb", 1e-3)):
        diffusion = chain(var=ModelVarType.LEARNED, loss=loss)
        terms = [
            diffusion.training_losses(lambda x, t: torch.cat([x, x - 3], 1), x, t, noise=noise)[key]
            for t in range(100)
        ]
        torch.testing.assert_close(torch.stack(terms).mean(0), share * bound, rtol=1e-11, atol=0)


def test_kl_terms_are_never_negative_and_vanish_for_the_truth() -> None:
    diffusion, x = chain(ModelMeanType.START_X), images(99, 3)
    t = torch.arange(1, 100)
    x_t = diffusion.q_sample(x, t, normal(99, 3))
    assert (diffusion.vb_terms_bpd(lambda x, t: -x, x, x_t, t)["output"] > 0).all()
    truth = diffusion.vb_terms_bpd(lambda _, t: x, x, x_t, t)["output"]
    torch.testing.assert_close(truth, torch.zeros(99, dtype=torch.float64), rtol=0, atol=1e-25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_noised_in_float32(dtype: torch.dtype) -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return x.to(dtype)

    diffusion = GaussianDiffusion(betas=linear_betas(1000))
    x, noise = torch.zeros(4, 20000, dtype=dtype), normal(4, 20000).to(dtype)
    loss = diffusion.training_losses(network, x, torch.arange(4), noise=noise)["loss"]
    assert loss.dtype is torch.float32
    assert seen[0].dtype is torch.float32
    sigma = diffusion.sqrt_one_minus_alphas_cumprod[:4]
    torch.testing.assert_close(seen[0].std(1).double(), sigma, rtol=0.02, atol=0)
    curve = diffusion.respaced([0, 999]).calc_bpd_loop(network, x[:1])
    assert {value.dtype for value in curve.values()} == {torch.float32}
    assert seen[-1].dtype is torch.float32


def test_autocast_changes_nothing_outside_the_network() -> None:
    diffusion = chain(var=ModelVarType.LEARNED_RANGE, loss=LossType.RESCALED_MSE)
    x, noise, t = images(3, 4).float(), normal(3, 4).float(), torch.tensor([0, 1, 70])
    output = normal(3, 8).float() * 0.1
    plain = diffusion.training_losses(lambda x, t: output, x, t, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = diffusion.training_losses(lambda x, t: output, x, t, noise=noise)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_a_float64_network_on_float32_images_is_read_in_float64() -> None:
    diffusion, x = chain(), images(2, 3).float()
    found = diffusion.p_mean_variance(lambda x, t: x.double(), x, torch.tensor([1, 50]))
    assert found["mean"].dtype is torch.float64


def test_noise_is_drawn_once_from_the_default_generator() -> None:
    diffusion, x, t = chain(), images(2, 3), torch.tensor([5, 50])
    torch.manual_seed(0)
    noise = torch.randn_like(x)
    torch.manual_seed(0)
    drawn = diffusion.training_losses(lambda x, t: x, x, t)["loss"]
    torch.testing.assert_close(
        drawn, diffusion.training_losses(lambda x, t: x, x, t, noise=noise)["loss"], rtol=0, atol=0
    )
    torch.manual_seed(0)
    torch.testing.assert_close(diffusion.q_sample(x, t), diffusion.q_sample(x, t, noise), rtol=0, atol=0)


def test_arguments_are_not_modified() -> None:
    diffusion = chain(var=ModelVarType.LEARNED_RANGE)
    tensors = images(2, 3), normal(2, 3), torch.tensor([0, 50])
    before = [tensor.clone() for tensor in tensors]
    x, noise, t = tensors
    output = torch.cat([x * 3, x], 1)
    kept = output.clone()
    diffusion.training_losses(lambda x, t: output, x, t, noise=noise)
    diffusion.p_mean_variance(lambda x, t: output, x, t)
    diffusion.calc_bpd_loop(lambda x, t: output, x, noise_fn=lambda x, t: noise)
    torch.testing.assert_close([*tensors, output], [*before, kept], rtol=0, atol=0)
