"""Guidance to a class, against two Gaussian classes whose posterior is a closed form."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, SamplerDDIM, SamplerDDPM
from perrin.denoiser import DiffusionDenoiser, Guidable
from perrin.errors import ArgumentError, ShapeError
from perrin.guidance import (
    Guidance,
    MeanGuided,
    autoguidance,
    classifier,
    classifier_free,
    classifier_gradient,
)
from perrin.oracles import Oracle, arbitrary, normal
from perrin.schedules import cosine_betas, zero_terminal_snr
from two_classes import Both, Conditional, Guided, Posterior, T, Y, chain, noisy

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def plain(diffusion: GaussianDiffusion, y: Tensor = Y, **options: Any) -> DiffusionDenoiser:
    network = Conditional(diffusion)
    return DiffusionDenoiser(diffusion, network, clip_denoised=False, model_kwargs={"y": y}, **options)


def unconditional(diffusion: GaussianDiffusion) -> DiffusionDenoiser:
    return DiffusionDenoiser(diffusion, Oracle(Both(), diffusion), clip_denoised=False)


def check_guided(guided: Guidable, t: int, weight: float, y: Tensor = Y) -> None:
    x, (alpha, sigma) = noisy(t), guided.schedule(t)
    found, expected = guided(x, t), Guided(y, weight)
    assert_close(found.x_start, expected.x_start(x, alpha, sigma), **EXACT)
    assert_close(found.eps, expected.eps(x, alpha, sigma), **EXACT)


@pytest.mark.parametrize("t", [0, 20, T - 1])
@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_classifier_free_is_the_closed_form(mean_type: ModelMeanType, weight: float, t: int) -> None:
    check_guided(classifier_free(weight)(plain(chain(mean_type))), t, weight)


@pytest.mark.parametrize("t", [0, 20, T - 1])
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_a_classifier_is_the_closed_form(mean_type: ModelMeanType, weight: float, t: int) -> None:
    diffusion = chain(mean_type)
    guidance = classifier(Posterior(diffusion), weight, y=Y)
    check_guided(guidance(unconditional(diffusion)), t, weight)


def test_a_gradient_of_ones_own_is_scaled_too() -> None:
    diffusion = chain()
    guidance = classifier(classifier_gradient(Posterior(diffusion), 2.0, y=Y), 1.5)
    check_guided(guidance(unconditional(diffusion)), 20, 3.0)


@pytest.mark.parametrize("t", [0, 20])
def test_guidances_add_up(t: int) -> None:
    diffusion = chain()
    guided = classifier_free(2.0)(plain(diffusion))
    check_guided(classifier(Posterior(diffusion), 1.5)(guided), t, 3.5)
    weak = Oracle(Both(), diffusion)
    away = autoguidance(lambda x, t, y: weak(x, t), 2.0)
    check_guided(away(guided), t, 4.0)
    check_guided(away(classifier(Posterior(diffusion), 0.5)(guided)), t, 5.0)


@pytest.mark.parametrize("steps", [10, T])
def test_guided_ddim_samples_are_those_of_the_guided_oracle(steps: int) -> None:
    diffusion, start = chain(), normal(4, 3)
    draw = partial(SamplerDDIM(diffusion, steps).sample, shape=(4, 3), noise=start, clip_denoised=False)
    for weight in (1.0, 3.0):
        expected = draw(Oracle(Guided(Y, weight), diffusion))
        free = draw(Conditional(diffusion), model_kwargs={"y": Y}, guidance=[classifier_free(weight)])
        gradient = classifier_gradient(Posterior(diffusion), weight, y=Y)
        by_cond_fn = draw(Oracle(Both(), diffusion), cond_fn=gradient)
        by_guidance = draw(Oracle(Both(), diffusion), guidance=[classifier(gradient)])
        for found in (free, by_cond_fn, by_guidance):
            assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("guide", ["free", "classifier", "autoguidance"])
def test_guided_ancestral_samples_are_those_of_the_guided_oracle(
    mean_type: ModelMeanType, guide: str
) -> None:
    diffusion, start = chain(mean_type), normal(4, 3)
    sampler = SamplerDDPM(diffusion)
    draw = partial(sampler.sample, shape=(4, 3), noise=start, clip_denoised=False, seed=0)
    told: dict[str, Any] = {"model": Conditional(diffusion), "model_kwargs": {"y": Y}}
    weak = Oracle(Both(), diffusion)
    arguments = {
        "free": told | {"guidance": [classifier_free(3.0)]},
        "classifier": {"model": weak, "guidance": [classifier(Posterior(diffusion), 3.0, y=Y)]},
        "autoguidance": told | {"guidance": [autoguidance(lambda x, t, y: weak(x, t), 3.0)]},
    }[guide]
    assert_close(draw(**arguments), draw(Oracle(Guided(Y, 3.0), diffusion)), rtol=1e-8, atol=1e-8)


def learned(diffusion: GaussianDiffusion) -> Any:
    """A network with a variance half that depends on the class."""
    inner = Conditional(diffusion)

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([inner(x, t, y), 0.3 * y[:, None] + 0.1 * x], 1)

    return network


@pytest.mark.parametrize("var_type", [ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE])
def test_the_learned_variance_is_the_conditional_one(var_type: ModelVarType) -> None:
    diffusion = chain(model_var_type=var_type)
    network, x = learned(diffusion), noisy(20)
    base = DiffusionDenoiser(diffusion, network, False, model_kwargs={"y": Y})
    weak = autoguidance(network, 3.0, model_kwargs={"y": 1 - Y})
    for guidance in (classifier_free(3.0), weak, classifier(Posterior(diffusion), 2.0)):
        assert torch.equal(guidance(base).raw(x, 20).extra, base.raw(x, 20).extra)
    check_guided(classifier_free(3.0)(base), 20, 3.0)


GUIDANCES: dict[str, Guidance] = {
    "free": classifier_free(1.0, rescale=0.7),
    "free within no time": classifier_free(4.0, interval=(1e3, 1e4)),
    "autoguidance": autoguidance(arbitrary(2), 1.0),
    "autoguidance within no time": autoguidance(arbitrary(2), 4.0, interval=(1e3, 1e4)),
}


@pytest.mark.parametrize("name", GUIDANCES)
@pytest.mark.parametrize("kind", [SamplerDDIM, SamplerDDPM])
@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_without_effect_samples_are_bit_identical(
    name: str, kind: type[SamplerDDIM | SamplerDDPM], mean_type: ModelMeanType
) -> None:
    diffusion, rows = chain(mean_type, model_var_type=ModelVarType.LEARNED_RANGE), []
    network = arbitrary(2)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows.append(len(x))
        return network(x + 0.1 * y[:, None], t)

    draw = partial(kind(diffusion, 10).sample, model, (4, 3), model_kwargs={"y": Y}, seed=5)
    assert torch.equal(draw(guidance=[GUIDANCES[name]]), draw())
    assert set(rows) == {4}


def test_both_branches_are_one_call_with_the_conditional_rows_first() -> None:
    diffusion = chain()
    base = plain(diffusion)
    x, network = noisy(7), base.model
    classifier_free(2.0)(base)(x, 7)
    ((seen, t, y),) = network.seen
    assert torch.equal(seen, torch.cat([x, x]))
    assert torch.equal(t, torch.full((8,), 7))
    assert torch.equal(y, torch.cat([Y, torch.full((4,), -1)]))


def test_a_batch_of_one_and_each_example_at_its_own_time() -> None:
    diffusion, x = chain(), noisy(20)
    times = torch.tensor([0, 7, 20, T - 1])
    together = classifier_free(3.0)(plain(diffusion)).raw(x, times[:, None])
    for i, t in enumerate(times.tolist()):
        alone = classifier_free(3.0)(plain(diffusion, Y[i : i + 1])).raw(x[i : i + 1], t)
        assert_close(together.x_start[i : i + 1], alone.x_start, **EXACT)
        assert_close(together.eps[i : i + 1], alone.eps, **EXACT)


def ratio(diffusion: GaussianDiffusion, t: int) -> float:
    alpha, sigma = diffusion.level_of_batch(t)
    return sigma / alpha


@pytest.mark.parametrize("guidance", [classifier_free, partial(autoguidance, arbitrary(1))])
def test_the_interval_leaves_out_its_lower_end_and_keeps_its_upper(guidance: Any) -> None:
    diffusion, x = chain(), noisy(20)
    network = arbitrary(1)
    base = DiffusionDenoiser(diffusion, lambda x, t, y: network(x + y[:, None], t), model_kwargs={"y": Y})
    arguments = {} if guidance is classifier_free else {"model_kwargs": {}}
    limited = guidance(3.0, interval=(ratio(diffusion, 10), ratio(diffusion, 20)), **arguments)(base)
    whole = guidance(3.0, **arguments)(base)
    for t in (0, 10, 21, T - 1):
        assert torch.equal(limited.raw(x, t).x_start, base.raw(x, t).x_start)
        assert not torch.allclose(limited.raw(x, t).x_start, whole.raw(x, t).x_start, atol=1e-3)
    for t in (11, 20):
        assert torch.equal(limited.raw(x, t).x_start, whole.raw(x, t).x_start)
    times = torch.tensor([10, 11, 20, 21])
    mixed = limited.raw(x, times[:, None])
    for i, t in enumerate(times.tolist()):
        assert_close(mixed.x_start[i], limited.raw(x, t).x_start[i], **EXACT)


def test_an_interval_without_end_reaches_times_without_signal() -> None:
    diffusion = GaussianDiffusion(
        betas=zero_terminal_snr(cosine_betas(T)), model_mean_type=ModelMeanType.START_X
    )
    x, last = normal(4, 3), torch.full((4, 1), T - 1)
    for interval, weight in (((0.5, float("inf")), 3.0), ((0.5, 80.0), 1.0)):
        guided = classifier_free(3.0, interval=interval)(plain(diffusion))
        for t in (T - 1, last):
            expected = Guided(Y, weight).x_start(x, torch.tensor(0.0), torch.tensor(1.0))
            assert_close(guided.raw(x, t).x_start, expected.expand(4, 3), **EXACT)


@pytest.mark.parametrize("phi", [0.3, 1.0])
@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_rescale_returns_the_spread_of_x_start(mean_type: ModelMeanType, phi: float) -> None:
    diffusion, x, inner = chain(mean_type), noisy(20), arbitrary(1)
    base = DiffusionDenoiser(
        diffusion, lambda x, t, y: (1 + 0.4 * y[:, None]) * inner(x, t), model_kwargs={"y": Y}
    )
    conditional = base.raw(x, 20).x_start
    guided = classifier_free(3.0)(base).raw(x, 20).x_start
    assert bool(((guided.std(1) / conditional.std(1) - 1).abs() > 0.02).all())
    found = classifier_free(3.0, rescale=phi)(base)
    expected = (
        phi * guided * conditional.std(1, keepdim=True) / guided.std(1, keepdim=True) + (1 - phi) * guided
    )
    assert_close(found.raw(x, 20).x_start, expected, **EXACT)
    (alpha, sigma), (x_start, eps) = found.schedule(20), found.raw(x, 20)
    assert_close(alpha * x_start + sigma * eps, x, **EXACT)
    mean, _ = diffusion.reverse(found.raw(x, 20), x, 20)
    assert_close(mean, diffusion.posterior_mean(expected, x, 20), **EXACT)


def test_rescale_leaves_alone_what_has_no_spread() -> None:
    diffusion, x = chain(), noisy(20)[:, :1]
    assert_close(
        classifier_free(3.0, rescale=0.7)(plain(diffusion)).raw(x, 20).x_start,
        classifier_free(3.0)(plain(diffusion)).raw(x, 20).x_start,
    )


def test_what_a_network_is_told_is_doubled_by_rows() -> None:
    diffusion, calls = chain(), []

    def network(x: Tensor, t: Tensor, **told: Any) -> Tensor:
        calls.append(told)
        return torch.zeros_like(x)

    text, table = normal(4, 2, 5), normal(3)
    told = {"y": Y, "text": text, "table": table, "gain": torch.tensor(2.0), "mode": "fast"}
    for empty in (0.0, torch.zeros(1, 2, 5), torch.zeros(4, 2, 5)):
        base = DiffusionDenoiser(diffusion, network, model_kwargs=told)
        classifier_free(2.0, unconditional={"text": empty})(base)(normal(4, 3), 5)
        seen = calls.pop()
        assert list(seen) == list(told)
        assert torch.equal(seen["y"], torch.cat([Y, Y]))
        assert torch.equal(seen["text"], torch.cat([text, torch.zeros(4, 2, 5, dtype=text.dtype)]))
        assert seen["table"] is table
        assert seen["gain"] is told["gain"]
        assert seen["mode"] == "fast"


@pytest.mark.parametrize(
    ("told", "arguments", "message"),
    [
        (None, {}, "classifier_free needs a tensor 'y' in model_kwargs, got None"),
        ({"y": 3}, {}, "classifier_free needs a tensor 'y' in model_kwargs, got 3"),
        ({"y": Y}, {"unconditional": {"text": 0}}, "needs a tensor 'text' in model_kwargs, got None"),
        ({"y": Y}, {"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"y": Y}, {"rescale": 1.1}, "rescale must be from 0 to 1, got 1.1"),
        ({"y": Y}, {"interval": (2.0, 1.0)}, r"interval must be 0 <= low < high.* got \(2.0, 1.0\)"),
        ({"y": Y}, {"interval": (-1.0, 1.0)}, r"interval must be 0 <= low < high.* got \(-1.0, 1.0\)"),
    ],
)
def test_classifier_free_refuses_in_one_line(told: Any, arguments: dict[str, Any], message: str) -> None:
    base = DiffusionDenoiser(chain(), arbitrary(1), model_kwargs=told)
    with pytest.raises(ArgumentError, match=message):
        classifier_free(**{"scale": 2.0, **arguments})(base)


@pytest.mark.parametrize(
    ("told", "empty", "message"),
    [
        ({"y": Y[:2]}, {}, r"model_kwargs\['y'\] must have 4 rows"),
        (
            {"y": Y},
            {"unconditional": {"y": Y[:3]}},
            r"unconditional\['y'\] must expand to the shape \(4,\).*\(3,\)",
        ),
        ({"y": Y}, {"unconditional": {"y": None}}, r"unconditional\['y'\] must expand .*got None"),
    ],
)
def test_unconditional_halves_that_do_not_fit_are_refused(told: Any, empty: Any, message: str) -> None:
    base = DiffusionDenoiser(chain(), arbitrary(1), model_kwargs=told)
    with pytest.raises(ArgumentError, match=message):
        classifier_free(2.0, **empty)(base)(normal(4, 3), 5)


def test_classifier_free_must_come_first() -> None:
    diffusion = chain()
    first = classifier(Posterior(diffusion))(plain(diffusion))
    with pytest.raises(ArgumentError, match="first of the guidances, got it after ScoreGuided"):
        classifier_free(2.0)(first)


def test_autoguidance_asks_the_weaker_network_only_where_it_counts() -> None:
    diffusion, told = chain(), []

    def weaker(x: Tensor, t: Tensor, **model_kwargs: Any) -> Tensor:
        told.append(model_kwargs)
        return torch.zeros_like(x)

    base, x = plain(diffusion), noisy(20)
    autoguidance(weaker, 1.0)(base)(x, 20)
    autoguidance(weaker, 2.0, interval=(0.0, ratio(diffusion, 10)))(base)(x, 20)
    assert told == []
    autoguidance(weaker, 2.0)(base)(x, 20)
    autoguidance(weaker, 2.0, model_kwargs={})(base)(x, 20)
    assert told == [{"y": Y}, {}]


def test_autoguidance_refuses_a_network_for_another_diffusion() -> None:
    diffusion = chain(model_var_type=ModelVarType.LEARNED)
    base = DiffusionDenoiser(diffusion, arbitrary(2))
    with pytest.raises(ShapeError, match="LEARNED needs 6 output channels"):
        autoguidance(arbitrary(1), 2.0)(base)(normal(4, 3), 5)


def test_gradients_of_the_mean_add_up() -> None:
    diffusion, x = chain(), noisy(20)
    one = MeanGuided(plain(diffusion), lambda x, t, y: x)
    both = MeanGuided(one, lambda x, t, y: 2 * x)
    assert_close(both.raw(x, 20).gradient, 3 * x)
    free = MeanGuided(classifier_free(2.0)(plain(diffusion)), lambda x, t, y: x)
    assert torch.equal(autoguidance(Conditional(diffusion), 2.0)(free).raw(x, 20).gradient, x)
