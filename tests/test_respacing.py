"""A chain that visits fewer timesteps: the same marginals, the same network."""

import pytest
import torch
from torch import Tensor

from chains import chain, ideal_eps, images, signs
from perrin import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, space_timesteps
from perrin.errors import ArgumentError
from perrin.schedules import get_named_beta_schedule, linear_betas
from perrin.variance import FixedVariance


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sqrt-linear", "sigmoid", "log-snr-linear"])
@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 100, 1000])
def test_a_respaced_chain_keeps_the_marginals(schedule: str, num_timesteps: int) -> None:
    """Also where its betas round to 1, as in a linear chain of 10 steps."""
    full = GaussianDiffusion(betas=get_named_beta_schedule(schedule, num_timesteps))
    for steps in {1, 2, max(num_timesteps // 3, 1), num_timesteps}:
        if steps > num_timesteps:
            continue
        keep = sorted(space_timesteps(num_timesteps, steps))
        for respaced in (full.respaced(keep), full.respaced(set(keep)), full.respaced(keep[::-1])):
            assert respaced.num_timesteps == steps
            for name in ("alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
                torch.testing.assert_close(
                    respaced.get_buffer(name), full.get_buffer(name)[keep], rtol=1e-12, atol=0
                )
            assert all(table.isfinite().all() for table in respaced.buffers())


def test_a_respaced_chain_has_the_tables_of_its_betas() -> None:
    respaced = chain().respaced([0, 10, 50, 80])
    fresh = GaussianDiffusion(betas=respaced.betas)
    for name, table in fresh.named_buffers():
        if name != "timestep_map" and not name.startswith("trained_"):  # those of the whole chain
            torch.testing.assert_close(respaced.get_buffer(name), table, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("rescale", [False, True])
def test_the_network_sees_the_training_timestep(rescale: bool) -> None:
    whole = chain(rescale_timesteps=rescale)
    diffusion = whole.respaced([3, 10, 99]).respaced([1, 2])
    scale = 10 if rescale else 1
    expected = [scale * 10, scale * 99]
    for times in (
        diffusion.network_time(torch.tensor([0, 1]), torch.zeros(2, 1)),
        diffusion.network_time(1, torch.zeros(2, 1)),
    ):
        assert times.dtype is (torch.float32 if rescale else torch.int64)
    assert diffusion.network_time(torch.tensor([0, 1]), torch.zeros(2, 1)).tolist() == expected
    assert diffusion.network_time(1, torch.zeros(3, 1)).tolist() == [expected[1]] * 3
    amid = whole.time_of((whole.log_snr(10) + whole.log_snr(99)) / 2)
    assert diffusion.network_time(0.5, torch.zeros(1, 1)).tolist() == [pytest.approx(scale * amid, rel=1e-6)]
    assert diffusion.num_timesteps == 2


def test_every_call_of_a_network_gets_that_time_and_the_keywords() -> None:
    seen: list[tuple[list[int], str]] = []

    def network(x: Tensor, t: Tensor, *, word: str) -> Tensor:
        seen.append((t.tolist(), word))
        return x

    diffusion, x, t = chain().respaced([3, 10, 99]), images(2, 3), torch.tensor([1, 2])
    kwargs = {"word": "hello"}
    diffusion.p_mean_variance(network, x, t, model_kwargs=kwargs)
    diffusion.vb_terms_bpd(network, x, x, t, model_kwargs=kwargs)
    diffusion.training_losses(network, x, t, model_kwargs=kwargs)
    assert seen == [([10, 99], "hello")] * 3
    seen.clear()
    diffusion.calc_bpd_loop(network, x, model_kwargs=kwargs)
    assert seen == [([99, 99], "hello"), ([10, 10], "hello"), ([3, 3], "hello")]


def test_a_previous_x_network_works_on_a_respaced_chain() -> None:
    """It still says the mean of the training chain's step before; what it knows of x_0 must carry over."""
    full = chain(ModelMeanType.PREVIOUS_X, levels=None)
    eps = ideal_eps(full, 0.1, 0.5)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return full.posterior_mean(full.predict_xstart_from_eps(x, t, eps(x, t)), x, t)

    other = chain(ModelMeanType.EPSILON, levels=None)
    x, noise = signs(0.1, 0.5)
    for keep in (range(100), [0, 9, 40, 70, 90]):
        found = full.respaced(keep).calc_bpd_loop(network, x, False, noise_fn=lambda x, t: noise)
        expected = other.respaced(keep).calc_bpd_loop(eps, x, False, noise_fn=lambda x, t: noise)
        torch.testing.assert_close(found["total_bpd"], expected["total_bpd"], rtol=1e-9, atol=1e-9)


def test_a_respaced_chain_keeps_its_kinds() -> None:
    diffusion = GaussianDiffusion(
        betas=linear_betas(20),
        model_mean_type=ModelMeanType.VELOCITY,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.RESCALED_KL,
        rescale_timesteps=True,
        levels=17,
    )
    respaced = diffusion.respaced([4, 9])
    names = "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps", "levels"
    for name in names:
        assert getattr(respaced, name) == getattr(diffusion, name)
    assert diffusion.num_timesteps == 20
    assert len(diffusion.betas) == 20


@pytest.mark.parametrize("keep", [[], [-1, 3], [0, 100]])
def test_timesteps_outside_the_chain_are_refused(keep: list[int]) -> None:
    with pytest.raises(ArgumentError, match="keep must hold timesteps from 0 to 99, got"):
        chain().respaced(keep)


def test_a_chain_with_a_variance_of_its_own_keeps_its_steps() -> None:
    full = GaussianDiffusion(betas=linear_betas(20))
    tables = {"mine": full.betas, "log_mine": full.betas.log()}
    chain = full.respaced(range(0, 20, 2)).with_variance(
        FixedVariance("mine", "log_mine"), {name: table[:10] for name, table in tables.items()}
    )
    assert chain.respaced(range(10)).floats["mine"] == chain.floats["mine"]
    with pytest.raises(ArgumentError, match="keeps all of its 10 steps, got 5: respace first"):
        chain.respaced(range(5))


def test_another_variance_must_fit_the_network_and_the_chain() -> None:
    full = GaussianDiffusion(betas=linear_betas(20))
    with pytest.raises(ArgumentError, match="variance must expect 0 extra channels per data channel, got 1"):
        full.with_variance(FixedVariance("betas", "log_betas", 1), {})
    with pytest.raises(ArgumentError, match=r"tables must have shape \(20,\), got"):
        full.with_variance(FixedVariance("mine", "mine"), {"mine": torch.ones(3)})
