"""Which timesteps training draws, and the weights that keep the loss unbiased.

Every sampler gives ``(t, weights)`` for a batch; ``mean(weights * loss(t))`` has the expectation of the loss
at a uniformly drawn t. Nothing here talks to other processes: a caller with many gathers its losses first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from perrin.errors import ArgumentError, ShapeError
from perrin.tensors import widest_dtype


class Chain(Protocol):
    """What a sampler needs to know of a diffusion."""

    @property
    def num_timesteps(self) -> int: ...


class TimestepSampler:
    """Draws from ``weights()`` (T,): independently, or with ``stratified`` at low discrepancy.

    Stratified draws put example i at the quantile ``(u + i) / B`` with one u for the batch (VDM appendix I.1):
    still unbiased, and the variance between timesteps falls with the batch size.
    """

    stratified = False

    def __init__(self, diffusion: Chain) -> None:
        self.num_timesteps = diffusion.num_timesteps

    def weights(self) -> Tensor:
        """Unnormalised probabilities of the timesteps, (T,) float64 on the CPU."""
        return torch.ones(self.num_timesteps, dtype=torch.float64)

    def sample(
        self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) int64 and importance weights 1 / (T p_t) (B,) float32, on ``device``.

        ``generator`` must live on ``device``; without one, torch's default is used.
        """
        if batch_size < 1:
            raise ArgumentError(f"batch_size must be at least 1, got {batch_size}")
        size = 1 if self.stratified else batch_size
        dtype = widest_dtype(device)
        u = torch.rand(size, dtype=dtype, device=device, generator=generator)
        if self.stratified:
            u = (u + torch.arange(batch_size, dtype=dtype, device=device)) / batch_size
        p = self.weights().to(device, dtype)
        p = p / p.sum()
        t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update_with_all_losses(self, ts: Tensor | Sequence[int], losses: Tensor | Sequence[float]) -> None:
        """Learn from the losses (B,) of timesteps ``ts`` (B,); samplers with fixed weights ignore them."""

    def state_dict(self) -> dict[str, Tensor]:
        """What has been learned, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises `ShapeError` if it is another sampler's."""
        expected = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if expected != found:
            raise ShapeError(f"timestep sampler state must be {expected}, got {found}")


class UniformSampler(TimestepSampler):
    """Every timestep alike, independently."""


class StratifiedSampler(TimestepSampler):
    """Every timestep alike, at low discrepancy."""

    stratified = True


class LossSecondMomentResampler(TimestepSampler):
    """Draws t in proportion to the root of the loss's second moment (IDDPM eq. 18).

    Uniform until every timestep has ``history_per_term`` losses; then a share ``uniform_prob`` stays uniform.
    """

    def __init__(self, diffusion: Chain, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        super().__init__(diffusion)
        if history_per_term < 1 or not 0 <= uniform_prob <= 1:
            raise ArgumentError(
                "history_per_term must be at least 1 and uniform_prob in [0, 1], "
                f"got {history_per_term} and {uniform_prob}"
            )
        self.uniform_prob = uniform_prob
        self.history = torch.zeros(self.num_timesteps, history_per_term, dtype=torch.float64)
        self.counts = torch.zeros(self.num_timesteps, dtype=torch.int64)

    def weights(self) -> Tensor:
        """Unnormalised probabilities of the timesteps, (T,) float64 on the CPU."""
        if not self.warmed_up():
            return super().weights()
        root = self.history.square().mean(1).sqrt()
        if root.sum() == 0:
            return super().weights()
        return root / root.sum() * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def warmed_up(self) -> bool:
        """Whether every timestep has a full history."""
        return bool((self.counts >= self.history.shape[1]).all())

    def update_with_all_losses(self, ts: Tensor | Sequence[int], losses: Tensor | Sequence[float]) -> None:
        """Put the losses (B,) of timesteps ``ts`` (B,) in the place of the oldest ones; waits for the device.

        Raises `ShapeError` if the two are not vectors of one length, `ArgumentError` for a loss that is not finite.
        """
        ts, losses = torch.as_tensor(ts), torch.as_tensor(losses)
        if ts.ndim != 1 or ts.shape != losses.shape:
            raise ShapeError(f"ts and losses must be (B,), got {tuple(ts.shape)} and {tuple(losses.shape)}")
        if not bool(((ts >= 0) & (ts < self.num_timesteps)).all()) or not bool(losses.isfinite().all()):
            found = ", ".join(f"{loss} at {t}" for t, loss in zip(ts.tolist(), losses.tolist(), strict=True))
            raise ArgumentError(
                f"losses must be finite and ts from 0 to {self.num_timesteps - 1}, got {found}"
            )
        history, counts = self.history.numpy(), self.counts.numpy()  # the same memory, faster to index
        for t, loss in zip(ts.tolist(), losses.detach().double().tolist(), strict=True):
            history[t, counts[t] % history.shape[1]] = loss
            counts[t] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The losses seen last and how many were seen, for a checkpoint."""
        return {"history": self.history.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises `ShapeError` if it is another sampler's."""
        super().load_state_dict(state)
        self.history, self.counts = state["history"].clone(), state["counts"].clone()


class StratifiedImportanceSampler(LossSecondMomentResampler):
    """Loss-second-moment probabilities at low discrepancy: the variance of neither source remains."""

    stratified = True
