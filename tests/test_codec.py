"""Compression along a chain: every value comes back, the rate is the bound, and what is wrong is refused."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perrin import MLP, GaussianDiffusion, ModelMeanType, ModelVarType
from perrin.codec import Recipe, compress, decompress
from perrin.codec.bitsback import MOST_ROWS, MOST_VALUES, batches, decode, encode
from perrin.codec.coder import random_words
from perrin.codec.container import unpack
from perrin.codec.identity import model_hash
from perrin.codec.kernels import Kernels, _offsets
from perrin.data import Dataset, Facts
from perrin.errors import ArgumentError, DataError, RunError
from perrin.likelihood import bound
from perrin.oracles import GaussianData, OptimalVariance, Oracle, arbitrary
from perrin.schedules import log_snr_linear_betas

RECIPE = Recipe("model", 3)


class Module(nn.Module):
    """A function (x, t) as a network; ``scale`` is its only weight."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * self.function(x, t)


def chain_of(levels=17, steps=5, mean=ModelMeanType.EPSILON, variance=ModelVarType.LEARNED_RANGE):
    return GaussianDiffusion(
        betas=log_snr_linear_betas(steps, 8.0, -6.0),
        levels=levels,
        model_mean_type=mean,
        model_var_type=variance,
    )


def network_of(chain) -> Module:
    return Module(arbitrary(chain.output_channels(1)))


def random_values(levels, shape, seed=0):
    dtype = np.uint8 if levels <= 256 else np.uint16
    return np.random.default_rng(seed).integers(0, levels, shape).astype(dtype)


def dataset_of(values, levels, *, labels=None, class_names=None, names=None) -> Dataset:
    names = names or [str(i) for i in range(len(values))]
    return Dataset(values, labels, names, Facts(values.shape[1:], levels, class_names, len(values)))


def round_trip(chain, network, dataset, classes=None) -> Dataset:
    content = compress(chain, network, dataset, recipe=RECIPE, classes=classes).content
    return decompress(chain, network, unpack(content, "file"), classes=classes)


def assert_same(found: Dataset, expected: Dataset) -> None:
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.values.dtype == expected.values.dtype
    assert list(found.names) == list(expected.names)
    assert found.facts == expected.facts
    if expected.labels is None:
        assert found.labels is None
    else:
        np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.parametrize(
    ("levels", "shape"),
    [
        (2, (3, 5)),
        (17, (20, 1, 8, 8)),
        (256, (4, 3, 8, 8)),
        (256, (30, 11)),
        (300, (2, 2, 6, 6)),
        (65536, (3, 1, 8, 8)),
        (65536, (1, 1)),
    ],
)
def test_random_values_come_back_bit_for_bit(levels, shape):
    chain = chain_of(levels)
    dataset = dataset_of(random_values(levels, shape), levels)
    assert_same(round_trip(chain, network_of(chain), dataset), dataset)


@pytest.mark.parametrize("mean", ModelMeanType)
@pytest.mark.parametrize("variance", ModelVarType)
def test_every_mean_and_variance_type_comes_back(mean, variance):
    chain = chain_of(mean=mean, variance=variance)
    dataset = dataset_of(random_values(17, (5, 6)), 17)
    assert_same(round_trip(chain, network_of(chain), dataset), dataset)


@pytest.mark.parametrize("keep", [[4], [0, 4], [0, 1, 4], [0, 1, 2, 3, 4]])
def test_respaced_chains_come_back(keep):
    chain = chain_of().respaced(keep)
    dataset = dataset_of(random_values(17, (4, 6)), 17)
    assert_same(round_trip(chain, network_of(chain), dataset), dataset)


def test_values_of_few_levels_in_a_wide_type_come_back():
    chain = chain_of()
    dataset = dataset_of(random_values(17, (4, 6)).astype(np.uint16), 17)
    assert_same(round_trip(chain, network_of(chain), dataset), dataset)


def test_a_chain_that_ends_without_signal_comes_back():
    betas = log_snr_linear_betas(4, 8.0, -6.0)
    betas[-1] = 1.0
    chain = GaussianDiffusion(betas=betas, levels=17, model_mean_type=ModelMeanType.START_X)
    dataset = dataset_of(random_values(17, (4, 6)), 17)
    assert_same(round_trip(chain, network_of(chain), dataset), dataset)


def test_names_labels_and_classes_come_back():
    chain = chain_of()
    dataset = dataset_of(
        random_values(17, (3, 6)),
        17,
        labels=np.array([1, 0, 1]),
        class_names=("cat", "dög"),
        names=["dög/1.png", "cat/a.PNG", "dög/2.jpg"],
    )
    assert_same(round_trip(chain, network_of(chain), dataset), dataset)


def conditional() -> tuple[GaussianDiffusion, nn.Module]:
    chain = chain_of(variance=ModelVarType.FIXED_SMALL)
    torch.manual_seed(0)
    network = MLP(6, width=8, depth=1, num_classes=2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return chain, network


def test_a_conditional_network_is_told_the_classes():
    chain, network = conditional()
    dataset = dataset_of(random_values(17, (12, 6)), 17)
    classes = torch.arange(12) % 2
    assert_same(round_trip(chain, network, dataset, classes), dataset)
    file = unpack(compress(chain, network, dataset, recipe=RECIPE, classes=classes).content, "file")
    with pytest.raises(DataError, match="does not compute here"):
        decompress(chain, network, file, classes=1 - classes)


def oracle(steps: int) -> tuple[GaussianDiffusion, Module, np.ndarray]:
    """A chain with the ideal network of Gaussian data in 256 levels, and such data."""
    data = GaussianData(0.1, 0.3)
    chain = GaussianDiffusion(
        betas=log_snr_linear_betas(steps, 8.0, -6.0), model_var_type=ModelVarType.LEARNED
    )
    network = Oracle(data, chain, OptimalVariance(data, chain))
    values = ((data.draw(100, 300) + 1) * 127.5).round().clamp(0, 255).numpy().astype(np.uint8)
    return chain, Module(lambda x, t: network(x, t.long())), values


@pytest.mark.parametrize("steps", [3, 12])
def test_the_net_rate_is_the_bound(steps):
    chain, network, values = oracle(steps)
    coded = encode(Kernels(chain, network), values)
    x = torch.from_numpy(2 * values.astype(np.float64) / 255 - 1)
    expected = bound(chain, network, x, indices=range(len(x))).total.mean().item()
    assert coded.net_bits / values.size == pytest.approx(expected, rel=0.01)
    overhead = 8 * len(coded.payload) - coded.net_bits
    assert overhead == pytest.approx(coded.initial_bits, abs=64)  # whole words


def test_the_initial_bits_do_not_grow_with_the_steps():
    per_value = []
    for steps in (4, 16, 64):
        chain, network, values = oracle(steps)
        per_value.append(encode(Kernels(chain, network), values[:1]).initial_bits / values[0].size)
    assert max(per_value) < 14  # two latents of 2 to 3 bits below their deviation, and 2 of a Gaussian's own
    assert max(per_value) - min(per_value) < 3


def test_only_the_first_example_borrows():
    chain, network, values = oracle(6)
    one, many = (encode(Kernels(chain, network), values[:n]) for n in (1, 60))
    assert many.initial_bits == one.initial_bits
    assert many.net_bits > 30 * one.net_bits


def test_every_example_is_in_one_batch_and_batches_grow():
    for count, size in [(1, 5), (9, 5), (1000, 784), (1000, MOST_VALUES)]:
        parts = list(batches(count, size))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
        assert parts[0] == slice(0, 1)
    sizes = [part.stop - part.start for part in batches(3000, 784)]
    assert max(sizes) == MOST_ROWS
    assert sizes[:-1] == sorted(sizes[:-1])
    assert {part.stop - part.start for part in batches(99, MOST_VALUES)} == {1}


def test_progress_is_told_of_every_network_call():
    calls: list[tuple[int, int]] = []
    chain = chain_of()
    network = network_of(chain)
    dataset = dataset_of(random_values(17, (20, 6)), 17)
    made = compress(chain, network, dataset, recipe=RECIPE, advance=lambda *told: calls.append(told))
    expected = [(5 * n, 5 * 18) for n in range(1, 19)]  # sixteen batches of 1 and two of 2
    assert calls == expected
    assert made.coded.network_calls == 5 * 18
    calls.clear()
    decompress(chain, network, unpack(made.content, "file"), advance=lambda *told: calls.append(told))
    assert calls == expected


def coded_with(network, values=None):
    chain = chain_of()
    values = random_values(17, (10, 6)) if values is None else values
    return Kernels(chain, network), encode(Kernels(chain, network_of(chain)), values), values


def test_a_last_digit_that_differs_does_no_harm():
    network = network_of(chain_of())
    noisy = Module(lambda x, t: network(x, t) * (1 + 1e-14))
    kernels, coded, values = coded_with(noisy)
    np.testing.assert_array_equal(decode(kernels, coded.payload, coded.checks, values.shape), values)


def test_a_network_that_computes_something_else_is_refused():
    network = network_of(chain_of())
    kernels, coded, values = coded_with(Module(lambda x, t: network(x, t) * (1 + 1e-4)))
    with pytest.raises(DataError, match="does not compute here"):
        decode(kernels, coded.payload, coded.checks, values.shape)


def test_the_stack_must_come_back_to_what_it_was():
    kernels, coded, values = coded_with(network_of(chain_of()))
    source = random_words()
    *_, next_word = (next(source) for _ in range(coded.initial_bits // 32 + 1))
    more = np.array([next_word], "<u4").tobytes() + coded.payload
    np.testing.assert_array_equal(decode(kernels, more, coded.checks, values.shape), values)
    with pytest.raises(DataError, match="does not compute here"):
        decode(kernels, b"\1\0\0\0" + coded.payload, coded.checks, values.shape)


@pytest.mark.parametrize("payload", [b"", b"\1\0\0\0\0\0\0\0"])
def test_coded_values_without_a_top_are_refused(payload):
    kernels, coded, values = coded_with(network_of(chain_of()))
    with pytest.raises(DataError, match="a word that is not 0"):
        decode(kernels, payload, coded.checks, values.shape)


@pytest.mark.parametrize("count", [0, 9999, 10**18])
def test_a_number_of_examples_that_does_not_fit_the_checks_is_refused(count):
    kernels, coded, _ = coded_with(network_of(chain_of()))
    with pytest.raises(DataError, match="number of checks"):
        decode(kernels, coded.payload, coded.checks, (count, 6))


def test_the_network_is_called_in_float64_and_left_as_it_is():
    network = MLP(6, width=8, depth=1)
    seen = []
    network.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, args[1].dtype)))
    encode(Kernels(chain_of(variance=ModelVarType.FIXED_SMALL), network), random_values(17, (2, 6)))
    assert set(seen) == {(torch.float64, torch.float64)}
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_the_network_sees_every_phase_of_fine_features_at_every_step():
    chain = chain_of(steps=12)
    seen = []
    network = Module(lambda x, t: seen.append(x) or torch.cat([x, x], 1))
    encode(Kernels(chain, network), random_values(17, (1, 2000)))
    assert len(seen) == 12
    for x in seen:
        phase = (64 * x) % 1  # on a bare grid of multiples of 1/64, 0 everywhere
        shares = torch.histc(phase.float(), 8, 0, 1) / x.numel()
        assert shares.min() > 0.09
        assert shares.max() < 0.16


def test_the_offsets_are_those_of_version_1_of_the_format():
    assert (_offsets(3, 3) * 2**16).tolist() == [25436, 44695, 46373]


def test_an_output_that_is_not_finite_is_refused():
    chain = chain_of()
    network = Module(lambda x, t: torch.cat([x, x], 1) * math.nan)
    with pytest.raises(RunError, match="not finite"):
        compress(chain, network, dataset_of(random_values(17, (1, 6)), 17), recipe=RECIPE)


def test_continuous_data_are_refused():
    chain = chain_of(levels=None)
    with pytest.raises(ArgumentError, match="continuous"):
        compress(chain, network_of(chain), dataset_of(random_values(17, (1, 6)), 17), recipe=RECIPE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 6), np.float32), "uint8 or uint16, got float32"),
        (np.zeros((0, 6), np.uint8), r"got uint8 \(0, 6\)"),
        (np.zeros((2, 6, 6), np.uint8), r"got uint8 \(2, 6, 6\)"),
        (np.full((2, 6), 17, np.uint8), "in 0..16, the largest is 17"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, message):
    chain = chain_of()
    with pytest.raises(DataError, match=message):
        compress(chain, network_of(chain), dataset_of(values, 17), recipe=RECIPE)


def test_another_model_is_refused():
    chain = chain_of()
    network = network_of(chain)
    file = unpack(
        compress(chain, network, dataset_of(random_values(17, (1, 6)), 17), recipe=RECIPE).content, ""
    )
    other = copy.deepcopy(network)
    nn.init.constant_(other.scale, 1.0000001)
    for wrong_chain, wrong_network in [
        (chain, other),
        (chain.respaced([0, 1, 2, 4]), network),
        (chain_of(levels=18), network),
        (chain_of(mean=ModelMeanType.VELOCITY), network),
        (chain_of(variance=ModelVarType.LEARNED), network),
    ]:
        assert model_hash(wrong_chain, wrong_network) != file.header.model
        with pytest.raises(DataError, match="another model"):
            decompress(wrong_chain, wrong_network, file)
    assert model_hash(chain.respaced(range(5)), copy.deepcopy(network)) == file.header.model
