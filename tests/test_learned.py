"""The facade with a learned variance."""

import pytest
import torch
from torch import Tensor, nn

from perrin import (
    GaussianDiffusion,
    LearnedGaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SamplerDDIM,
    SamplerDDPM,
    get_named_beta_schedule,
)
from perrin.errors import ArgumentError, ShapeError
from perrin.oracles import normal

T = 20
LEARNED = [ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE]


class Halves(nn.Module):
    """Two separate weights: one for the mean half, one for the variance half."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.variance = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        shift = 0.0 if y is None else y.reshape((-1,) + (1,) * (x.ndim - 1))
        return torch.cat([self.mean * x + shift, self.variance * torch.cos(x)], 1)


def facade(**options: object) -> LearnedGaussianDiffusion:
    return LearnedGaussianDiffusion(Halves(), timesteps=T, **options)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images (4, 2, 3, 3), timesteps with both ends, noise."""
    return normal(4, 2, 3, 3).clamp(-1, 1), torch.tensor([0, 3, 11, T - 1]), normal(4, 2, 3, 3, seed=1)


@pytest.mark.parametrize("var_type", LEARNED)
@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("levels", [256, 17, None])
def test_the_default_weight_is_the_rescaled_mse_loss(
    mean_type: ModelMeanType, var_type: ModelVarType, schedule: str, levels: int | None
) -> None:
    model = facade(beta_schedule=schedule, model_mean_type=mean_type, model_var_type=var_type, levels=levels)
    diffusion = GaussianDiffusion(
        betas=get_named_beta_schedule(schedule, T),
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=LossType.RESCALED_MSE,
        levels=levels,
    )
    images, t, noise = batch()
    loss = model(images, t=t, noise=noise)
    assert loss.shape == ()
    expected = diffusion.training_losses(model.model, images, t, noise=noise)["loss"].mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("weight", [0.0, 0.001, 0.5, 1.0])
def test_the_weight_is_a_share_of_the_whole_bound(weight: float) -> None:
    images, t, noise = batch()
    bound_only = GaussianDiffusion(
        betas=get_named_beta_schedule("cosine", T),
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.RESCALED_KL,
    )
    plain, weighed = facade(vb_loss_weight=0.0), facade(vb_loss_weight=weight)
    whole = bound_only.training_losses(plain.model, images, t, noise=noise)["loss"].mean()
    mse = plain(images, t=t, noise=noise)
    torch.testing.assert_close(weighed(images, t=t, noise=noise), mse + weight * whole)


def test_the_bound_trains_the_variance_alone() -> None:
    images, t, noise = batch()
    gradients = []
    for weight in (0.0, 0.001, 0.002):
        model = facade(vb_loss_weight=weight)
        model(images, t=t, noise=noise).backward()
        gradients.append((model.model.mean.grad, model.model.variance.grad))
    (mean, none), (same_mean, variance), (still_mean, double) = gradients
    assert torch.equal(mean, same_mean)
    assert torch.equal(mean, still_mean)
    assert float(none) == 0
    assert float(variance) != 0
    torch.testing.assert_close(double, 2 * variance)


def test_timesteps_are_uniform_and_noise_is_drawn_where_none_is_given() -> None:
    seen: list[Tensor] = []

    class Recorder(Halves):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            seen.append(t)
            return super().forward(x, t, y)

    model = LearnedGaussianDiffusion(Recorder(), timesteps=T)
    torch.manual_seed(0)
    first, second = (model(torch.zeros(4000, 1)).item() for _ in range(2))
    assert first != second
    counts = torch.bincount(torch.cat(seen), minlength=T)
    assert len(counts) == T
    assert float(((counts - 400) ** 2 / 400).sum()) < 44  # chi-squared with 19 degrees: 0.1% lie above


def test_labels_reach_the_network_in_loss_and_samples() -> None:
    images, t, noise = batch()
    model, labels = facade(), torch.tensor([0.0, 1.0, 2.0, 3.0])
    losses = model(images, t=t, noise=noise, model_kwargs={"y": labels}), model(images, t=t, noise=noise)
    assert abs((losses[0] - losses[1]).item()) > 0.1
    samples = (
        model.sample((4, 2, 3, 3), seed=0, model_kwargs={"y": labels}),
        model.sample((4, 2, 3, 3), seed=0),
    )
    assert torch.equal(samples[0][0], samples[1][0])
    assert not torch.allclose(samples[0][1], samples[1][1], atol=1e-3)


@pytest.mark.parametrize("var_type", LEARNED)
@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("steps", [None, 5])
def test_it_samples_as_the_samplers_do(
    mean_type: ModelMeanType, var_type: ModelVarType, steps: int | None
) -> None:
    model = facade(model_mean_type=mean_type, model_var_type=var_type)
    shape = (3, 2, 4)
    ancestral = model.sample(shape, steps=steps, seed=1)
    assert torch.equal(ancestral, SamplerDDPM(model.diffusion, steps).sample(model.model, shape, seed=1))
    for eta in (0.0, 0.5):
        sampled = model.sample(shape, steps=steps, eta=eta, seed=1)
        assert torch.equal(
            sampled, SamplerDDIM(model.diffusion, steps, eta).sample(model.model, shape, seed=1)
        )
        assert not torch.equal(sampled, ancestral)


def test_samples_are_clipped_unless_asked_otherwise() -> None:
    model = facade(model_mean_type=ModelMeanType.START_X)
    model.model.mean.data.fill_(5.0)
    assert float(model.sample((2, 50), eta=0.0, seed=0).abs().max()) <= 1
    assert float(model.sample((2, 50), eta=0.0, seed=0, clip_denoised=False).abs().max()) > 1


def test_its_state_is_that_of_the_model() -> None:
    model = facade()
    assert set(model.state_dict()) == {"model.mean", "model.variance"}
    assert len(list(model.parameters())) == 2


@pytest.mark.parametrize("weight", [-0.001, float("nan")])
def test_a_negative_weight_is_refused(weight: float) -> None:
    with pytest.raises(ArgumentError, match="vb_loss_weight must not be negative"):
        facade(vb_loss_weight=weight)


@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
def test_a_fixed_variance_is_refused(var_type: ModelVarType) -> None:
    with pytest.raises(ArgumentError, match=f"must be LEARNED or LEARNED_RANGE, got {var_type.name}"):
        facade(model_var_type=var_type)


def test_a_network_without_a_variance_half_is_refused() -> None:
    model = LearnedGaussianDiffusion(nn.Identity(), timesteps=T)
    model.model.forward = lambda x, t: x
    with pytest.raises(ShapeError, match="LEARNED_RANGE needs 4 output channels"):
        model(batch()[0])
