"""One step of training: what it draws, its gradient, and the smallest parts that a run can be made of."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perrin.config import DataConfig, DiffusionConfig, RunConfig, TrainingConfig
from perrin.data import Dataset, Facts
from perrin.diffusion import GaussianDiffusion
from perrin.errors import ConfigError, DataError
from perrin.losses import LossType
from perrin.networks import NO_CLASS
from perrin.schedules import get_named_beta_schedule
from perrin.timestep_sampling import LossSecondMomentResampler, UniformSampler
from perrin.training import RunFolder
from perrin.training.event import TrainEvent
from perrin.training.loop import train
from perrin.training.step import Batches, Draw, StepRecord, backward, chunks, network_call, seed_dropout
from perrin.variance import ModelVarType

CPU = torch.device("cpu")
TIMESTEPS = 8


class Net(nn.Module):
    """The smallest network with a variance part, dropout, times, classes and a buffer; remembers its inputs."""

    def __init__(self, classes: int | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        self.time = nn.Embedding(TIMESTEPS, 4)
        self.label = nn.Embedding(classes or 1, 4)
        self.enter, self.drop = nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(dropout)
        self.exit = nn.Conv2d(4, 2, 3, padding=1)
        self.register_buffer("seen", torch.zeros(()))
        self.inputs: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.inputs.append((x, t, y))
        self.seen += self.training
        told = self.time(t) if y is None else self.time(t) + self.label(y)
        out: Tensor = self.exit(self.drop(torch.tanh(self.enter(x) + told[:, :, None, None])))
        return out


def network(**kwargs: Any) -> Net:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Net(**kwargs)


def diffusion(timesteps: int = TIMESTEPS) -> GaussianDiffusion:
    return GaussianDiffusion(
        betas=get_named_beta_schedule("cosine", timesteps),
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.RESCALED_MSE,
        levels=17,
    )


def dataset(*, labels: bool = True) -> Dataset:
    values = np.random.default_rng(0).integers(0, 17, (40, 1, 4, 4), dtype=np.uint8)
    values[:, 0, 0, 0] = np.arange(40) % 17
    facts = Facts((1, 4, 4), 17, ("even", "odd") if labels else None, 40)
    return Dataset(values, np.arange(40) % 2 if labels else None, [str(i) for i in range(40)], facts)


def config(*, flip: bool = False, conditional: bool = False, **training: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "steps": 12, "batch_size": 8, "lr": 1e-2, "warmup_steps": 3, "decay": "linear", "ema": (0.99, 0.5),
        "log_every": 4, "evaluate_every": 1000, "checkpoint_every": 1000, "keep": 3,
    }  # fmt: skip
    return RunConfig(
        data=DataConfig(held_out=0.2, flip=flip, conditional=conditional),
        diffusion=DiffusionConfig(num_timesteps=TIMESTEPS),
        training=TrainingConfig(**defaults | training),
    )


@dataclass
class Trial:
    """A run in a folder of its own, trained by as many sessions as a test likes."""

    path: Path
    config: RunConfig
    data: Dataset = field(default_factory=dataset)
    network: nn.Module = field(default_factory=network)
    events: list[TrainEvent] = field(default_factory=list)

    def folder(self) -> RunFolder:
        if RunFolder.holds_run(self.path):
            return RunFolder.open(self.path).revise(self.config)
        return RunFolder.create(self.path, self.config, self.data.facts)

    def session(
        self, stop_at: int | None = None, report: Callable[[TrainEvent], None] | None = None
    ) -> TrainEvent:
        return train(
            self.folder(),
            diffusion=diffusion(),
            network=self.network,
            dataset=self.data,
            device="cpu",
            report=report or self.events.append,
            stop_at=stop_at,
        )


def draw(step: int = 0, **kwargs: Any) -> Draw:
    return Batches(dataset(), config(**kwargs), CPU).draw(step, UniformSampler(diffusion()))


def gradient(microbatch: int | None, weights: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    net = network(classes=2, dropout=0.0)
    batch = draw(conditional=True)._replace(weights=weights)
    terms = backward(diffusion(), network_call(net, "fp32", CPU), batch, microbatch)
    return [p.grad for p in net.parameters() if p.grad is not None], terms


@pytest.mark.parametrize("microbatch", [1, 2, 3, 7])
def test_microbatches_give_the_gradient_of_the_whole_batch(microbatch: int) -> None:
    weights = torch.linspace(0.1, 3.0, 8)
    whole, parts = gradient(None, weights), gradient(microbatch, weights)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_that_of_the_weighted_mean_loss() -> None:
    weights = torch.linspace(0.1, 3.0, 8)
    net, batch = network(classes=2, dropout=0.0), draw(conditional=True)
    losses = diffusion().training_losses(
        net, batch.x_start, batch.t, model_kwargs={"y": batch.labels}, noise=batch.noise
    )
    expected = torch.autograd.grad((losses["loss"] * weights).mean(), list(net.parameters()))
    torch.testing.assert_close(gradient(3, weights)[0], list(expected), rtol=1e-5, atol=1e-7)


def test_chunks_cover_everything_once() -> None:
    assert [list(range(8))[rows] for rows in chunks(8, 3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    torch.manual_seed(1)
    one = draw(5)
    torch.manual_seed(2)
    torch.testing.assert_close(one, draw(5), rtol=0, atol=0)
    assert not torch.equal(one.noise, draw(6).noise)
    assert not torch.equal(one.noise, draw(5, seed=1).noise)


def test_only_the_training_part_is_drawn() -> None:
    batches = Batches(dataset(), config(), CPU)
    held_out, _ = batches.dataset.batch(batches.held_out, CPU)
    seen = torch.cat([batches.draw(step, UniformSampler(diffusion())).x_start for step in range(12)])
    assert not (seen[:, None] == held_out[None]).flatten(2).all(2).any()


def test_flips_mirror_about_half_of_the_images_and_nothing_else() -> None:
    mirrored = []
    for step in range(20):
        plain, flipped = draw(step).x_start, draw(step, flip=True).x_start
        same = (plain == flipped).flatten(1).all(1)
        turned = (plain.flip(-1) == flipped).flatten(1).all(1)
        assert (same | turned).all()
        mirrored += turned.tolist()
    assert 0.35 < sum(mirrored) / len(mirrored) < 0.65


def test_flips_do_not_change_the_noise() -> None:
    torch.testing.assert_close(draw(3).noise, draw(3, flip=True).noise, rtol=0, atol=0)


def test_labels_are_those_of_the_images() -> None:
    batch = draw(conditional=True)
    images, labels = dataset().batch(range(40), CPU)
    assert labels is not None
    label_of = {tuple(row.tolist()): int(label) for row, label in zip(images.flatten(1), labels, strict=True)}
    assert batch.labels is not None
    assert batch.labels.tolist() == [label_of[tuple(row.tolist())] for row in batch.x_start.flatten(1)]
    assert draw(conditional=False).labels is None


def test_a_share_of_the_labels_is_withheld_and_nothing_else_changes() -> None:
    told, withheld = 0, 0
    for step in range(20):
        plain, some = draw(step, conditional=True), draw(step, conditional=True, label_drop=0.3)
        assert plain.labels is not None
        assert some.labels is not None
        kept = some.labels != NO_CLASS
        assert torch.equal(plain.labels[kept], some.labels[kept])
        assert torch.equal(plain.noise, some.noise)
        told, withheld = told + int(kept.sum()), withheld + int((~kept).sum())
    assert withheld / (told + withheld) == pytest.approx(0.3, abs=4 * (0.21 / (told + withheld)) ** 0.5)


def test_labels_are_withheld_from_conditional_networks_only() -> None:
    with pytest.raises(ConfigError, match=r"label_drop = 0.1: needs data.conditional = true, got false"):
        Batches(dataset(), config(label_drop=0.1), CPU)


def test_classes_without_labels_and_flipped_vectors_are_refused() -> None:
    with pytest.raises(DataError, match="conditional = true needs labels"):
        Batches(dataset(labels=False), config(conditional=True), CPU)
    vectors = Dataset(np.zeros((9, 3), np.float32), None, ["0"] * 9, Facts((3,), None, None, 9))
    with pytest.raises(ConfigError, match=r"flip = true needs images, got vectors of shape \(3,\)"):
        Batches(vectors, config(flip=True), CPU)


def test_dropout_depends_on_seed_and_step_alone() -> None:
    def mask(seed: int, step: int) -> Tensor:
        seed_dropout(CPU, seed, step)
        return nn.functional.dropout(torch.ones(64))

    with torch.random.fork_rng([]):
        assert torch.equal(mask(0, 1), mask(0, 1))
        assert not torch.equal(mask(0, 1), mask(0, 2))
        assert not torch.equal(mask(0, 1), mask(1, 1))


def test_bf16_runs_the_network_in_bf16_and_gives_float32() -> None:
    net = network()
    seen: list[torch.dtype] = []
    net.enter.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0, 5])
    for precision in ("bf16", "fp32"):
        assert network_call(net, precision, CPU)(x, t).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32]


def record(**changes: Tensor) -> StepRecord:
    net = network(dropout=0.0)
    batch = draw()
    terms = backward(diffusion(), network_call(net, "fp32", CPU), batch, None)
    return StepRecord.of(7, batch, terms, net)._replace(**changes)


def test_figures_of_a_step_are_weighted_means_and_the_gradient_norm() -> None:
    net, batch = network(dropout=0.0), draw()._replace(weights=torch.linspace(0, 2, 8))
    terms = backward(diffusion(), network_call(net, "fp32", CPU), batch, None)
    figures = StepRecord.of(1, batch, terms, net).figures
    assert set(figures) == {"loss", "mse", "vb", "grad_norm"}
    torch.testing.assert_close(figures["loss"], (terms["loss"] * batch.weights).mean())
    grads = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(figures["grad_norm"], grads.norm())


def test_a_fault_names_the_timesteps_of_the_losses_that_are_not_finite() -> None:
    losses = torch.ones(8)
    losses[[1, 2]] = torch.tensor([float("nan"), float("inf")])
    broken = record(losses=losses, t=torch.tensor([0, 7, 3, 0, 0, 0, 0, 0]))
    assert broken.fault() == "step 7: the loss is not finite at t = 3, 7"


def test_a_fault_names_the_first_parameter_whose_gradient_is_not_finite() -> None:
    norms = record().gradient_norms.clone()
    norms[2:4] = float("nan")
    fault = record(gradient_norms=norms, t=torch.arange(100, 140)).fault()
    assert fault.startswith("step 7: the gradient of enter.bias is not finite; the batch had t = 100, 101,")
    assert fault.endswith(" … 139")


def test_a_fault_names_the_norm_where_only_it_overflows() -> None:
    assert "the norm of the gradient is not finite" in record().fault()


def test_loss_second_moment_weights_reach_the_draw() -> None:
    sampler = LossSecondMomentResampler(diffusion(), history_per_term=1)
    sampler.update_with_all_losses(torch.arange(TIMESTEPS), torch.arange(1.0, TIMESTEPS + 1))
    batch = Batches(dataset(), replace(config()), CPU).draw(0, sampler)
    expected = (sampler.weights().sum() / (TIMESTEPS * sampler.weights()[batch.t])).float()
    torch.testing.assert_close(batch.weights, expected)
