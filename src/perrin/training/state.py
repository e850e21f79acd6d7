"""What training changes from step to step, and its way into a checkpoint and back."""

from __future__ import annotations

import copy

import torch
from torch import nn

from perrin.config import TrainingConfig
from perrin.diffusion import GaussianDiffusion
from perrin.timestep_sampling import (
    LossSecondMomentResampler,
    StratifiedImportanceSampler,
    StratifiedSampler,
    TimestepSampler,
    UniformSampler,
)
from perrin.training.checkpoint import Checkpoint
from perrin.training.ema import EMA, check_fit
from perrin.training.folder import ema_name
from perrin.training.metrics import Window
from perrin.training.schedule import Stopwatch
from perrin.training.step import StepRecord


class TrainingState:
    """The network, its averages, the optimizer, the timestep sampler, and how far training is."""

    def __init__(self, network: nn.Module, diffusion: GaussianDiffusion, config: TrainingConfig) -> None:
        self.network, self.config = network, config
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=config.lr,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema = EMA(network, config.ema)
        self.t_sampler = t_sampler_named(config.t_sampler, diffusion)
        self.step = 0
        self.stopwatch = Stopwatch()
        self.window = Window()

    @property
    def age(self) -> tuple[int, float]:
        """Steps taken and seconds of training spent."""
        return self.step, self.stopwatch.seconds

    def apply(self, lr: float, record: StepRecord) -> None:
        """Take the step that ``record`` is of, along the gradient clipped to `clip_norm`."""
        norm = record.figures["grad_norm"]
        torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), self.config.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.ema.update(self.step)
        self.t_sampler.update_with_all_losses(record.t, record.losses)
        self.step += 1

    def averaged_network(self) -> nn.Module:
        """A copy of the network with the weights of the first average, to measure and to sample from."""
        network = copy.deepcopy(self.network).eval().requires_grad_(False)
        network.load_state_dict(self.ema.state_dict(self.config.ema[0]))
        return network

    def checkpoint(self) -> Checkpoint:
        """All of it; the tensors are the live ones."""
        averages = {ema_name(rate): self.ema.state_dict(rate) for rate in self.config.ema}
        rest = {
            "optimizer": self.optimizer.state_dict(),
            "t_sampler": self.t_sampler.state_dict(),
            "seconds": self.stopwatch.seconds,
            "window": self.window.state_dict(),
        }
        return Checkpoint(self.step, {"model": self.network.state_dict(), **averages}, rest)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises `RunError` where it does not fit the network."""
        model = checkpoint.weights["model"]
        check_fit(self.network.state_dict(), model, f"the checkpoint of step {checkpoint.step}")
        self.network.load_state_dict(model)
        for rate in self.config.ema:
            self.ema.load_state_dict(rate, checkpoint.weights[ema_name(rate)])
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        self.t_sampler.load_state_dict(checkpoint.state["t_sampler"])
        self.step = checkpoint.step
        self.stopwatch = Stopwatch(checkpoint.state["seconds"])
        self.window = Window(**checkpoint.state["window"])


def t_sampler_named(name: str, diffusion: GaussianDiffusion) -> TimestepSampler:
    """The timestep sampler that a configuration calls ``name``."""
    kinds: dict[str, type[TimestepSampler]] = {
        "uniform": UniformSampler,
        "stratified": StratifiedSampler,
        "loss-second-moment": LossSecondMomentResampler,
        "stratified-importance": StratifiedImportanceSampler,
    }
    return kinds[name](diffusion)
