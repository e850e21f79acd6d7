"""The weight averages against their closed form."""

import copy

import pytest
import torch
from torch import nn

from perrin.errors import RunError
from perrin.training.ema import EMA, warm_decay

CAP = 0.3


class Tied(nn.Module):
    """One weight under two names, a float and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3, bias=False)
        self.other = nn.Linear(3, 3, bias=False)
        self.other.weight = self.one.weight
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize(("updates", "expected"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (10**6, 0.999)])
def test_decay_warms_up_to_its_rate(updates: int, expected: float) -> None:
    assert warm_decay(0.999, updates) == pytest.approx(expected, rel=1e-12)


def test_every_rate_follows_its_closed_form() -> None:
    network = nn.Linear(2, 1)
    history = [network.weight.detach().clone()]
    ema = EMA(network, (CAP, 0.9999))
    for n in range(20):
        with torch.no_grad():
            network.weight.add_(torch.randn(1, 2))
        history.append(network.weight.detach().clone())
        ema.update(n)
    for rate in (CAP, 0.9999):
        decays = [min(rate, (1 + n) / (10 + n)) for n in range(20)]
        shares = [torch.tensor(decays[k:], dtype=torch.float64).prod() for k in range(21)]
        kept = [1.0] + [1 - decay for decay in decays]  # weight k enters with 1 - decay and is then decayed
        expected = sum(share * new * w.double() for share, new, w in zip(shares, kept, history, strict=True))
        torch.testing.assert_close(ema.state_dict(rate)["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_averages_of_half_precision_weights_are_float32() -> None:
    network = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(network.weight)
    ema = EMA(network, (0.9999,))
    nn.init.constant_(network.weight, 1.0078125)  # the next bfloat16
    ema.update(10**6)
    average = ema.state_dict(0.9999)["weight"]
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(1 + 1e-4 * 0.0078125, abs=1e-7)


def test_buffers_are_copied_and_tied_weights_keep_both_names() -> None:
    network = Tied()
    ema = EMA(network, (0.5,))
    network.mean.fill_(3.0)
    network.count += 7
    nn.init.zeros_(network.one.weight)
    ema.update(100)
    state = ema.state_dict(0.5)
    assert state["mean"].tolist() == [3.0, 3.0]
    assert state["count"].item() == 7
    torch.testing.assert_close(state["one.weight"], state["other.weight"], rtol=0, atol=0)
    copy.deepcopy(network).load_state_dict(state)


def test_restored_averages_go_on_alike() -> None:
    network = nn.Linear(2, 2)
    ema, other = EMA(network, (0.9,)), EMA(nn.Linear(2, 2), (0.9,))
    nn.init.ones_(network.weight)
    ema.update(0)
    other.load_state_dict(0.9, {name: value.clone() for name, value in ema.state_dict(0.9).items()})
    for name, value in other.state_dict(0.9).items():
        torch.testing.assert_close(value, ema.state_dict(0.9)[name], rtol=0, atol=0)


def test_averages_of_another_network_are_refused() -> None:
    state = EMA(nn.Linear(2, 3), (0.9,)).state_dict(0.9)
    with pytest.raises(
        RunError, match=r"rate 0.9 does not fit the network: bias must have shape \(4,\), got \(3,\)"
    ):
        EMA(nn.Linear(2, 4), (0.9,)).load_state_dict(0.9, state)
