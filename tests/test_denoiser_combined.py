"""Steps along x_start: the same sums where no x_start is made."""

import weakref

import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, SamplerDDIM, get_named_beta_schedule
from perrin.denoiser import DiffusionDenoiser, Time, combined
from perrin.errors import ArgumentError
from perrin.guidance import autoguidance
from perrin.oracles import arbitrary, normal
from perrin.samplers import Sampler
from perrin.schedules import zero_terminal_snr
from perrin.tensors import mix

T = 40
WHOLE = [0, 1, 17, T - 1]


def chain(mean_type: ModelMeanType = ModelMeanType.EPSILON, **options: object) -> GaussianDiffusion:
    return GaussianDiffusion(betas=get_named_beta_schedule("cosine", T), model_mean_type=mean_type, **options)


def made(x_start: object) -> Tensor:
    return x_start() if callable(x_start) else x_start


def through_x_start(denoise: DiffusionDenoiser, x: Tensor, t: Time, kept: float, gained: float) -> Tensor:
    return mix(gained, denoise(x, t).x_start, kept, x).to(torch.promote_types(x.dtype, torch.float32))


def check_same(sample: Tensor, expected: Tensor) -> None:
    """Up to rounding of terms that may be larger than their sum: where there is hardly any signal 1 / alpha is."""
    assert sample.dtype is expected.dtype
    tolerance = 64 * torch.finfo(sample.dtype).eps
    torch.testing.assert_close(sample, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("shares", [(0.7, 0.2), (0.7, -0.2), (0.0, 1.0), (0.4, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_is_that_through_x_start(
    mean_type: ModelMeanType, clip: bool, shares: tuple[float, float], dtype: torch.dtype
) -> None:
    denoise, x = DiffusionDenoiser(chain(mean_type), arbitrary(1), clip), normal(3, 4, 5, dtype=dtype)
    fractional = [] if mean_type is ModelMeanType.PREVIOUS_X else [0.5, 17.25]
    for t in (*WHOLE, *fractional):
        sample, x_start = combined(denoise, x, t, *shares)
        expected = through_x_start(denoise, x, t, *shares)
        check_same(sample, expected)
        assert shares != (0.0, 1.0) or torch.equal(sample, made(x_start))
        assert torch.equal(made(x_start), denoise(x, t).x_start)
        assert not clip or made(x_start).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network_dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_precision_changes_no_dtype(
    dtype: torch.dtype, network_dtype: torch.dtype
) -> None:
    network, x = arbitrary(1), normal(3, 4, dtype=torch.float32).to(dtype)
    denoise = DiffusionDenoiser(chain(), lambda x, t: network(x, t).to(network_dtype))
    sample, x_start = combined(denoise, x, 17, 0.7, 0.2)
    expected = through_x_start(denoise, x, 17, 0.7, 0.2)
    assert sample.dtype is expected.dtype is torch.float32
    check_same(sample, expected)
    assert torch.equal(made(x_start), denoise(x, 17).x_start)


def test_no_signal_at_all_is_read_as_elsewhere() -> None:
    betas = zero_terminal_snr(get_named_beta_schedule("linear", T))
    diffusion = GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.VELOCITY)
    denoise, x = DiffusionDenoiser(diffusion, arbitrary(1)), normal(3, 4)
    sample, _ = combined(denoise, x, T - 1, 0.7, 0.2)
    check_same(sample, through_x_start(denoise, x, T - 1, 0.7, 0.2))


def test_x_start_goes_through_denoised_fn() -> None:
    denoise = DiffusionDenoiser(chain(), arbitrary(1), denoised_fn=lambda x_start: 0 * x_start + 0.25)
    sample, x_start = combined(denoise, torch.ones(2, 3), 17, 0.5, 1.0)
    torch.testing.assert_close(sample, torch.full((2, 3), 0.75))
    torch.testing.assert_close(made(x_start), torch.full((2, 3), 0.25))


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.LEARNED])
@pytest.mark.parametrize("shares", [(0.7, 0.2), (0.0, 1.0)])
def test_neither_x_nor_the_output_is_changed_or_lent(
    mean_type: ModelMeanType, var_type: ModelVarType, shares: tuple[float, float]
) -> None:
    diffusion, x = chain(mean_type, model_var_type=var_type), normal(3, 2, 4)
    output = normal(3, diffusion.output_channels(2), 4, seed=1)
    before = x.clone(), output.clone()
    for t in WHOLE:
        sample, x_start = combined(DiffusionDenoiser(diffusion, lambda x, t: output), x, t, *shares)
        sample.fill_(9.0)
        made(x_start).fill_(9.0)
    assert torch.equal(x, before[0])
    assert torch.equal(output, before[1])


@pytest.mark.parametrize("clip", [True, False])
def test_gradients_flow_as_through_x_start(clip: bool) -> None:
    denoise, gradients = DiffusionDenoiser(chain(), arbitrary(1), clip), []
    for way in (lambda *given: combined(*given)[0], through_x_start):
        x = normal(3, 4).requires_grad_()
        way(denoise, x, 17, 0.7, 0.2).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_levels_that_are_kept_are_those_of_the_diffusion() -> None:
    diffusion = chain()
    denoise = DiffusionDenoiser(diffusion, arbitrary(1))
    for t in (*WHOLE, 17.25, *WHOLE, 17.25):
        assert denoise.schedule(t) == diffusion.level_of_batch(t)


def test_a_chain_made_of_another_remembers_nothing_of_it() -> None:
    x, output = normal(3, 4), normal(3, 4, seed=1)
    whole = chain(ModelMeanType.VELOCITY)
    other = whole.respaced(range(0, T, 2))
    fresh = chain(ModelMeanType.VELOCITY).respaced(range(0, T, 2))
    for t in (1, 7, 7.5):
        _ = (
            whole.level_of_batch(t),
            whole.x_start(output, x, t),
            whole.network_time(t, x),
        )  # may be remembered
        assert other.level_of_batch(t) == fresh.level_of_batch(t) != whole.level_of_batch(t)
        assert torch.equal(other.network_time(t, x), fresh.network_time(t, x))
        assert torch.equal(other.x_start(output, x, t), fresh.x_start(output, x, t))
        assert not torch.equal(other.x_start(output, x, t), whole.x_start(output, x, t))


@pytest.mark.parametrize("t", [-2, -0.5, T - 0.5, T])
def test_there_is_no_level_outside_the_chain(t: float) -> None:
    with pytest.raises(ArgumentError, match=f"t must be from 0 to {T - 1}, got {t}"):
        chain().level_of_batch(t)


def test_guidance_without_effect_at_a_time_leaves_the_sum_to_what_is_beneath() -> None:
    base, x = DiffusionDenoiser(chain(), arbitrary(1)), normal(3, 4)
    ratio = [base.schedule(t)[1] / base.schedule(t)[0] for t in (10, 20)]
    guided = autoguidance(lambda x, t: x, 3.0, interval=(ratio[0], ratio[1]))(base)
    twice = autoguidance(lambda x, t: x, 1.0)(guided)
    for t, inert in ((10, True), (20, False), (21, True)):
        for denoise in (guided, twice):
            sample, _ = combined(denoise, x, t, 0.7, 0.2)
            plain, _ = combined(base, x, t, 0.7, 0.2)
            assert torch.equal(sample, plain) == inert


# Sampling


@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_samples_are_the_last_of_the_states_that_lead_to_them(eta: float) -> None:
    sampler = SamplerDDIM(chain(), 8, eta)
    *_, last = sampler.sample_progressive(arbitrary(1), (2, 3), seed=1)
    assert torch.equal(last["sample"], sampler.sample(arbitrary(1), (2, 3), seed=1))


def test_predictions_of_x_0_are_those_of_the_network() -> None:
    sampler, seen = SamplerDDIM(chain(), 8), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, int(t[0])))
        return arbitrary(1)(x, t)

    states = list(sampler.sample_progressive(network, (2, 3), seed=1))
    assert len(states) == 8
    denoise = sampler.denoiser(arbitrary(1))
    for (x, t), state in zip(seen, states, strict=True):
        assert torch.equal(state["pred_xstart"], denoise(x, t).x_start)
        assert not state["pred_xstart"].requires_grad


@pytest.mark.parametrize("progressive", [False, True])
def test_x_0_is_made_only_where_it_is_the_sample_or_yielded(
    progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, made_at, make = SamplerDDIM(chain(), 8), [], GaussianDiffusion.x_start

    def counted(self: GaussianDiffusion, output: Tensor, x: Tensor, t: int, **options: bool) -> Tensor:
        made_at.append(t)
        return make(self, output, x, t, **options)

    monkeypatch.setattr(GaussianDiffusion, "x_start", counted)
    if progressive:
        assert len(list(sampler.sample_progressive(arbitrary(1), (2, 3), seed=1))) == 8
    else:
        sampler.sample(arbitrary(1), (2, 3), seed=1)
    assert made_at == (list(sampler.times[:-1]) if progressive else [0])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_step_lets_go_of_the_x_of_the_step_before(progressive: bool) -> None:
    sampler, held = SamplerDDIM(chain(), 8), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        held.append(weakref.ref(x))
        assert sum(earlier() is not None for earlier in held[1:]) <= 1  # the first is the caller's
        return arbitrary(1)(x, t)

    if progressive:
        for _ in sampler.sample_progressive(network, (2, 3), noise=normal(2, 3)):
            pass
    else:
        sampler.sample(network, (2, 3), noise=normal(2, 3))
    assert len(held) == 8


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_sample_i_is_the_same_for_any_batch_size_where_rows_end_amid_a_vector(
    mean_type: ModelMeanType,
) -> None:
    sampler: Sampler = SamplerDDIM(chain(mean_type), 5)

    def network(x: Tensor, t: Tensor) -> Tensor:  # whose own arithmetic is exact
        return x.sign() * 0.5

    whole, one = (sampler.sample(network, (size, 3, 5, 5), seed=3) for size in (7, 1))
    assert torch.equal(whole[:1], one)
