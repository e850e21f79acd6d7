"""Exponential averages of a network's weights, at several rates at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perrin.errors import RunError


def warm_decay(rate: float, updates: int) -> float:
    """The decay after ``updates`` earlier ones: ``min(rate, (1 + n) / (10 + n))``.

    Without this warm-up the initial weights would still hold 37 % of a 0.9999 average after 10,000 steps.
    """
    return min(rate, (1 + updates) / (10 + updates))


class EMA:
    """For each rate, a float32 average of the parameters, whatever their dtype; buffers are copied.

    Starts from the network's present weights and lives on their device.
    """

    def __init__(self, network: nn.Module, rates: Sequence[float]) -> None:
        self.network = network
        self.parameters = list(network.parameters())
        self.averages = {rate: [_float32(weight).clone() for weight in self.parameters] for rate in rates}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take the present weights into every average; ``updates`` is how often that was done before."""
        weights = [_float32(weight) for weight in self.parameters]
        for rate, averages in self.averages.items():
            torch._foreach_lerp_(averages, weights, 1 - warm_decay(rate, updates))

    def state_dict(self, rate: float) -> dict[str, Tensor]:
        """One average under the names of the network's own state dict, with its buffers as they are."""
        return dict(self._entries(rate))

    def load_state_dict(self, rate: float, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; buffers stay the network's. `RunError` if it does not fit."""
        entries = self._entries(rate)
        check_fit(entries, state, f"the average of rate {rate}")
        for name, value in entries.items():
            value.copy_(state[name])

    def _entries(self, rate: float) -> dict[str, Tensor]:
        average_of = {id(w): a for w, a in zip(self.parameters, self.averages[rate], strict=True)}
        tensors = self.network.state_dict(keep_vars=True)
        return {name: average_of.get(id(tensor), tensor.detach()) for name, tensor in tensors.items()}


def _float32(weight: Tensor) -> Tensor:
    return weight.detach().float()


def check_fit(expected: dict[str, Tensor], found: dict[str, Tensor], source: str) -> None:
    """Raise `RunError` naming the first tensor of ``found`` that is missing, unknown or of another shape."""
    for name in sorted(expected.keys() | found.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (expected, found)]
        if shapes[0] != shapes[1]:
            raise RunError(
                f"{source} does not fit the network: {name} must have shape {shapes[0]}, got {shapes[1]}"
            )
