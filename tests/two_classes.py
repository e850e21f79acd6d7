"""Two classes of Gaussian data, for which guidance of any strength is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perrin import GaussianDiffusion, ModelMeanType
from perrin.oracles import GaussianData, Oracle, normal
from perrin.oracles.networks import signal_of
from perrin.schedules import linear_betas
from perrin.tensors import append_dims

T = 50
Y = torch.tensor([0, 1, 1, 0])
CLASSES = (GaussianData(-0.6, 0.3), GaussianData(0.5, 0.3))


def chain(mean_type: ModelMeanType = ModelMeanType.EPSILON, **options: Any) -> GaussianDiffusion:
    return GaussianDiffusion(betas=linear_betas(T), model_mean_type=mean_type, **options)


def noisy(t: int) -> Tensor:
    """x_t near both classes (4, 3)."""
    return chain().q_sample(0.4 * normal(4, 3, seed=3), t, normal(4, 3, seed=4))


def log_p_classes(x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """log p(y | x_t) (B, 2): the classes are as frequent as each other."""
    return torch.stack([each.log_prob(x_t, alpha, sigma) for each in CLASSES], 1).log_softmax(1)


class Both:
    """The data of both classes; unlike in a `MixtureData` all dimensions of an example are of the same class."""

    def x_start(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        p = log_p_classes(x_t, alpha, sigma).exp()
        parts = [each.x_start(x_t, alpha, sigma) for each in CLASSES]
        return sum(append_dims(p[:, k], x_t.ndim) * part for k, part in enumerate(parts))

    def eps(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - alpha * self.x_start(x_t, alpha, sigma)) / sigma


@dataclass
class Guided:
    """The data of class y, guided by ``weight``: 1 is the class itself, 0 both classes; ``y`` (B,)."""

    y: Tensor
    weight: float = 1.0

    def x_start(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        parts = torch.stack([each.x_start(x_t, alpha, sigma) for each in CLASSES])
        own = parts[self.y, torch.arange(len(x_t))]
        return (1 - self.weight) * Both().x_start(x_t, alpha, sigma) + self.weight * own

    def eps(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - alpha * self.x_start(x_t, alpha, sigma)) / sigma


@dataclass
class Conditional:
    """The ideal network (x, t, y) in the diffusion's mean type, where y = -1 is no class; it keeps what it saw."""

    diffusion: GaussianDiffusion

    def __post_init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append((x, t, y))
        answers = [Oracle(data, self.diffusion)(x, t) for data in (Both(), *CLASSES)]
        return torch.stack(answers)[y + 1, torch.arange(len(x))]


class Posterior(nn.Module):
    """The ideal classifier (x, t) → logits (B, 2), where t is what the diffusion's network is told."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.signal = signal_of(diffusion)[1:]
        self.scale = diffusion.num_timesteps / 1000 if diffusion.rescale_timesteps else 1

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        signal = append_dims(self._signal_at(t), x.ndim)
        return log_p_classes(x, signal.sqrt(), (1 - signal).sqrt()) + 3.0

    def _signal_at(self, t: Tensor) -> Tensor:
        """alpha^2 (B,), between two timesteps linear in log-SNR."""
        if not t.is_floating_point():
            return self.signal[t]
        step, log_snr = t.double() * self.scale, self.signal.logit()
        before = step.floor().long().clamp(max=len(log_snr) - 2)
        return torch.lerp(log_snr[before], log_snr[before + 1], step - before).sigmoid()
