"""Which timesteps training draws: unbiased with their weights, stratified where promised, restorable."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from perrin.errors import ArgumentError, ShapeError
from perrin.timestep_sampling import (
    LossSecondMomentResampler,
    StratifiedImportanceSampler,
    StratifiedSampler,
    TimestepSampler,
    UniformSampler,
)


@dataclass
class Chain:
    num_timesteps: int = 20


def loss_at(t: Tensor) -> Tensor:
    """A loss that falls steeply in t, as the bound's terms do."""
    return 5.0 / (t.double() + 1) ** 2


def warmed(kind: type[LossSecondMomentResampler], **options: float) -> LossSecondMomentResampler:
    sampler = kind(Chain(), **options)
    every = torch.arange(20).repeat(sampler.history.shape[1])
    sampler.update_with_all_losses(every, loss_at(every))
    return sampler


def every_sampler() -> list[TimestepSampler]:
    return [
        UniformSampler(Chain()),
        StratifiedSampler(Chain()),
        LossSecondMomentResampler(Chain()),
        warmed(LossSecondMomentResampler),
        warmed(StratifiedImportanceSampler),
    ]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("index", range(5))
def test_the_weighted_loss_is_unbiased(index: int) -> None:
    sampler, draws = every_sampler()[index], generator()
    estimates = torch.stack(
        [
            (loss_at(t) * weights.double()).mean()
            for t, weights in (sampler.sample(16, "cpu", draws) for _ in range(4000))
        ]
    )
    truth = loss_at(torch.arange(20)).mean()
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - truth) < 4 * error + 1e-6
    assert error < 0.03 * truth


@pytest.mark.parametrize("index", range(5))
def test_frequencies_follow_the_weights(index: int) -> None:
    sampler = every_sampler()[index]
    p = sampler.weights() / sampler.weights().sum()
    t, weights = sampler.sample(200_000, "cpu", generator())
    frequency = torch.bincount(t, minlength=20).double() / len(t)
    torch.testing.assert_close(frequency, p, rtol=0, atol=0.005)
    torch.testing.assert_close(weights, (1 / (20 * p[t])).float())
    assert t.dtype is torch.int64
    assert weights.dtype is torch.float32
    assert t.shape == weights.shape == (200_000,)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 60])
def test_stratified_draws_fill_every_stratum(batch_size: int) -> None:
    sampler = StratifiedSampler(Chain())
    for seed in range(50):
        t, weights = sampler.sample(batch_size, "cpu", generator(seed))
        low = torch.arange(batch_size) * 20 / batch_size
        assert (t >= low.floor()).all()
        assert (t < low + 20 / batch_size).all()
        torch.testing.assert_close(weights, torch.ones(batch_size))
        if batch_size % 20 == 0:
            assert torch.bincount(t, minlength=20).tolist() == [batch_size // 20] * 20


def test_every_stratified_timestep_is_reachable_and_alike() -> None:
    sampler, draws = StratifiedSampler(Chain()), generator()
    counts = torch.zeros(20, dtype=torch.int64)
    for _ in range(4000):
        counts += torch.bincount(sampler.sample(3, "cpu", draws)[0], minlength=20)
    torch.testing.assert_close(counts / counts.sum(), torch.full((20,), 0.05), rtol=0, atol=0.006)


def test_strata_reduce_the_variance_of_the_estimate() -> None:
    spread = {}
    for sampler in (
        UniformSampler(Chain()),
        StratifiedSampler(Chain()),
        warmed(LossSecondMomentResampler),
        warmed(StratifiedImportanceSampler),
    ):
        draws = generator()
        estimates = []
        for _ in range(500):
            t, weights = sampler.sample(16, "cpu", draws)
            estimates.append((loss_at(t) * (1 + t % 2) * weights.double()).mean())
        spread[type(sampler).__name__] = torch.stack(estimates).var().item()
    assert spread["StratifiedSampler"] < spread["UniformSampler"] / 5
    assert spread["LossSecondMomentResampler"] < spread["UniformSampler"] / 5
    assert spread["StratifiedImportanceSampler"] < spread["LossSecondMomentResampler"] / 2


def test_uniform_until_every_timestep_has_its_history() -> None:
    sampler = LossSecondMomentResampler(Chain(), history_per_term=3)
    every = torch.arange(20)
    for _ in range(2):
        sampler.update_with_all_losses(every, loss_at(every))
    sampler.update_with_all_losses(every[:-1], loss_at(every[:-1]))
    assert not sampler.warmed_up()
    assert sampler.weights().unique().numel() == 1
    sampler.update_with_all_losses(every[-1:], loss_at(every[-1:]))
    assert sampler.warmed_up()
    assert sampler.weights().argmax() == 0


def test_weights_are_the_root_second_moment_with_a_uniform_floor() -> None:
    sampler = LossSecondMomentResampler(Chain(2), history_per_term=2, uniform_prob=0.1)
    sampler.update_with_all_losses(torch.tensor([0, 0, 1, 1]), torch.tensor([3.0, 4.0, 1.0, 1.0]))
    first, second = 12.5**0.5, 1.0
    expected = torch.tensor([first, second], dtype=torch.float64) / (first + second) * 0.9 + 0.05
    torch.testing.assert_close(sampler.weights(), expected, rtol=1e-12, atol=0)
    assert sampler.weights().sum().item() == pytest.approx(1)


def test_the_oldest_loss_leaves_first() -> None:
    sampler = LossSecondMomentResampler(Chain(1), history_per_term=3)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        sampler.update_with_all_losses(torch.tensor([0]), torch.tensor([loss]))
    assert sorted(sampler.history[0].tolist()) == [3.0, 4.0, 5.0]
    sampler.update_with_all_losses(torch.tensor([0, 0]), torch.tensor([6.0, 7.0]))
    assert sorted(sampler.history[0].tolist()) == [5.0, 6.0, 7.0]


def test_the_default_floor_is_a_thousandth() -> None:
    sampler = LossSecondMomentResampler(Chain(2))
    assert sampler.history.shape == (2, 10)
    t = torch.tensor([0, 1]).repeat(10)
    sampler.update_with_all_losses(t, t.double())  # the loss at 0 is 0
    torch.testing.assert_close(
        sampler.weights(), torch.tensor([0.0005, 0.9995], dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_a_timestep_without_probability_is_never_drawn() -> None:
    sampler = LossSecondMomentResampler(Chain(4), history_per_term=1, uniform_prob=0.0)
    sampler.update_with_all_losses(torch.arange(4), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    t, weights = sampler.sample(5000, "cpu", generator())
    assert set(t.tolist()) == {1, 3}
    torch.testing.assert_close(weights, torch.full((5000,), 0.5))


def test_losses_of_zero_everywhere_leave_it_uniform() -> None:
    sampler = LossSecondMomentResampler(Chain(4), history_per_term=1)
    sampler.update_with_all_losses(torch.arange(4), torch.zeros(4))
    assert sampler.weights().tolist() == [1.0] * 4


def test_a_loss_with_a_graph_is_let_go() -> None:
    sampler = LossSecondMomentResampler(Chain(2), history_per_term=1)
    losses = torch.tensor([1.0, 2.0], requires_grad=True) * 1.0
    sampler.update_with_all_losses(torch.tensor([0, 1]), losses)
    assert not sampler.history.requires_grad


def test_state_round_trip_continues_the_same_draws() -> None:
    sampler = warmed(StratifiedImportanceSampler, history_per_term=2)
    state = {name: value.clone() for name, value in sampler.state_dict().items()}
    other = StratifiedImportanceSampler(Chain(), history_per_term=2)
    other.load_state_dict(sampler.state_dict())
    more = torch.tensor([3, 3, 4])
    for each in (sampler, other):
        each.update_with_all_losses(more, torch.tensor([9.0, 8.0, 7.0]))
    torch.testing.assert_close(other.sample(9, "cpu", generator()), sampler.sample(9, "cpu", generator()))
    torch.testing.assert_close(other.history, sampler.history, rtol=0, atol=0)
    assert not torch.equal(state["history"], sampler.history)  # what was given out is a copy


def test_a_loaded_state_is_not_shared() -> None:
    state = warmed(LossSecondMomentResampler, history_per_term=1).state_dict()
    before = {name: value.clone() for name, value in state.items()}
    sampler = LossSecondMomentResampler(Chain(), history_per_term=1)
    sampler.load_state_dict(state)
    sampler.update_with_all_losses(torch.tensor([0]), torch.tensor([99.0]))
    torch.testing.assert_close(state, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [UniformSampler, StratifiedSampler])
def test_samplers_without_memory_have_no_state(kind: type[TimestepSampler]) -> None:
    sampler = kind(Chain())
    sampler.update_with_all_losses(torch.tensor([0]), torch.tensor([9.0]))
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})
    assert sampler.weights().tolist() == [1.0] * 20


def test_the_state_of_another_sampler_is_refused() -> None:
    sampler = LossSecondMomentResampler(Chain(), history_per_term=2)
    with pytest.raises(ShapeError, match="timestep sampler state must be"):
        sampler.load_state_dict({})
    with pytest.raises(ShapeError, match=r"\(20, 2\).*got.*\(20, 3\)"):
        sampler.load_state_dict(LossSecondMomentResampler(Chain(), history_per_term=3).state_dict())
    with pytest.raises(ShapeError):
        UniformSampler(Chain()).load_state_dict(sampler.state_dict())


@pytest.mark.parametrize("index", range(5))
def test_draws_depend_on_the_generator_alone(index: int) -> None:
    sampler = every_sampler()[index]
    torch.manual_seed(0)
    first = sampler.sample(8, "cpu", generator(5))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = sampler.sample(8, "cpu", generator(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], sampler.sample(8, "cpu", generator(6))[0]) or sampler.stratified


def test_without_a_generator_the_global_seed_counts() -> None:
    sampler = UniformSampler(Chain())
    torch.manual_seed(3)
    first = sampler.sample(8, "cpu")[0]
    second = sampler.sample(8, "cpu")[0]
    torch.manual_seed(3)
    assert torch.equal(sampler.sample(8, "cpu")[0], first)
    assert not torch.equal(first, second)


def test_a_chain_of_one_timestep() -> None:
    for sampler in (
        UniformSampler(Chain(1)),
        StratifiedSampler(Chain(1)),
        LossSecondMomentResampler(Chain(1)),
    ):
        t, weights = sampler.sample(5, "cpu")
        assert t.tolist() == [0] * 5
        assert weights.tolist() == [1.0] * 5


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="batch_size must be at least 1, got 0"):
        UniformSampler(Chain()).sample(0, "cpu")
    for options in ({"history_per_term": 0}, {"uniform_prob": -0.1}, {"uniform_prob": 1.1}):
        with pytest.raises(ArgumentError, match="history_per_term must be at least 1 and uniform_prob in"):
            LossSecondMomentResampler(Chain(), **options)
    sampler = LossSecondMomentResampler(Chain())
    for ts, losses in ((torch.zeros(2), torch.zeros(3)), (torch.zeros(2, 1), torch.zeros(2, 1))):
        with pytest.raises(ShapeError, match=r"ts and losses must be \(B,\)"):
            sampler.update_with_all_losses(ts.long(), losses)


def test_a_draw_of_exactly_zero_belongs_to_the_first_possible_timestep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.zeros(size, dtype=torch.float64))
    assert StratifiedSampler(Chain(4)).sample(4, "cpu")[0].tolist() == [0, 1, 2, 3]
    sampler = LossSecondMomentResampler(Chain(4), history_per_term=1, uniform_prob=0.0)
    sampler.update_with_all_losses(torch.arange(4), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert sampler.sample(2, "cpu")[0].tolist() == [1, 1]


def test_losses_may_be_plain_lists() -> None:
    sampler = LossSecondMomentResampler(Chain(2), history_per_term=1)
    sampler.update_with_all_losses([0, 1], [3.0, 1.0])
    ratio = sampler.weights()[0] / sampler.weights()[1]
    torch.testing.assert_close(ratio, torch.tensor(3.0, dtype=torch.float64), rtol=0.01, atol=0)


@pytest.mark.parametrize(("ts", "losses"), [([0], [float("nan")]), ([-1], [1.0]), ([20], [1.0])])
def test_losses_that_would_poison_the_history_are_refused(ts: list[int], losses: list[float]) -> None:
    with pytest.raises(ArgumentError, match="losses must be finite and ts from 0 to 19"):
        LossSecondMomentResampler(Chain()).update_with_all_losses(ts, losses)
