"""Training a classifier of noisy images, and measuring it by noise level."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from perrin.config import RunConfig
from perrin.data import Dataset
from perrin.diffusion import GaussianDiffusion
from perrin.errors import DataError, NonFiniteError, RunError
from perrin.files import is_leftover, written_aside
from perrin.likelihood.bands import NoiseBands
from perrin.networks import Encoder
from perrin.randomness import generator_for
from perrin.timestep_sampling import UniformSampler
from perrin.training.checkpoint import STATE_FILE, DamagedFileError, read_state
from perrin.training.classifier import (
    FACTS_FILE,
    BandAccuracy,
    ChainMark,
    ClassifierFacts,
    EncoderConfig,
    is_facts,
    save_classifier,
)
from perrin.training.ema import EMA
from perrin.training.interrupt import Interrupted, Interrupts
from perrin.training.schedule import Budget, Stopwatch, lr_factor
from perrin.training.step import Batches, chunks, seed_dropout

EMA_RATE = 0.999
WARMUP_STEPS = 100
CLIP_NORM = 1.0
LOOK_EVERY = 20
"""Steps between two looks at the loss, for which the device is waited for."""
SAVE_EVERY = 500
MOST_IMAGES = 1000
"""Held-out images that are classified in each band of noise."""


@dataclass(frozen=True)
class ClassifierConfig:
    """What determines a classifier, beside the data, the chain and the budget."""

    encoder: EncoderConfig
    batch_size: int
    lr: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class ClassifierTask:
    """A classifier to be trained: on what, for which chain, and where it is kept."""

    folder: Path
    config: ClassifierConfig
    run: RunConfig
    """Of the run whose chain it is: the same examples are held out, and the same are mirrored."""
    dataset: Dataset
    """With labels that are numbers of ``classes``."""
    classes: tuple[str, ...]
    diffusion: GaussianDiffusion
    device: torch.device

    def mark(self) -> dict[str, Any]:
        """What must be the same for training to go on, as plain values."""
        facts, config = self.dataset.facts, asdict(self.config)
        return {
            **config.pop("encoder"),
            **config,
            "data": facts.fingerprint,
            "classes": list(self.classes),
            "chain": asdict(ChainMark.of(self.diffusion)),
            "held_out": self.run.data.held_out,
            "flip": self.run.data.flip,
        }

    def check(self) -> None:
        """Raise what training would of the data, the network and the folder, before anything is written."""
        self.batches()
        self.network()
        saved_state(self.folder)

    def network(self) -> Encoder:
        """The network with its initial weights, on the CPU."""
        return self.config.encoder.build(self.dataset.facts.shape, len(self.classes), self.config.seed)

    def batches(self) -> Batches:
        """The run's two parts of the data, in batches that tell the classes."""
        if self.dataset.labels is None or len(self.classes) < 2:
            found = "none" if self.dataset.labels is None else str(len(self.classes))
            raise DataError(f"a classifier needs labels of at least 2 classes, and these data have {found}")
        training = replace(
            self.run.training, batch_size=self.config.batch_size, seed=self.config.seed, label_drop=0.0
        )
        told = replace(self.run, data=replace(self.run.data, conditional=True), training=training)
        return Batches(self.dataset, told, self.device)


class ClassifierProgress(NamedTuple):
    """How far training is."""

    step: int
    progress: float
    """Share of the budget, in [0, 1]."""
    eta_seconds: float
    loss: float
    """Mean cross entropy since the last report, in nats."""


def train_classifier(
    task: ClassifierTask, budget: Budget, report: Callable[[ClassifierProgress], None]
) -> ClassifierFacts:
    """Train until the budget is spent, measure and save; goes on where an earlier call in the folder was left.

    The loss is the cross entropy of the class at x_t, t uniform (ADM, arXiv:2105.05233 section 4.1). Randomness
    depends on (seed, step) alone, as in `train`. What is measured and saved is an average of the weights.

    Raises `Interrupted` after Ctrl-C, with the state saved; `NonFiniteError` for a loss that is not finite;
    `RunError` where the folder holds a classifier trained otherwise; `DataError` for data without classes.
    """
    with torch.random.fork_rng([task.device] if task.device.type == "cuda" else []):
        session = _Session(task, budget, report)
        with session.interrupts.handled():
            session.run()
        return session.finish()


class _Session:
    def __init__(
        self, task: ClassifierTask, budget: Budget, report: Callable[[ClassifierProgress], None]
    ) -> None:
        self.task, self.budget, self.report = task, budget, report
        self.batches, self.diffusion = task.batches(), task.diffusion.to(task.device)
        self.network = task.network().to(task.device).train()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=task.config.lr, weight_decay=task.config.weight_decay
        )
        self.ema = EMA(self.network, (EMA_RATE,))
        self.step, self.stopwatch = 0, Stopwatch()
        self.losses: list[Tensor] = []
        self.interrupts = Interrupts()
        self._restore()
        self.began = self.step, self.stopwatch.seconds

    def run(self) -> None:
        """Train to the end of the budget, or to Ctrl-C."""
        while self.budget.progress(self.step, self.stopwatch.seconds) < 1:
            with self.stopwatch:
                self.advance()
            if self.step % LOOK_EVERY == 0:
                self.look()
            if self.step % SAVE_EVERY == 0:
                self.save()
            try:
                self.interrupts.check()
            except KeyboardInterrupt:
                self.save()
                raise Interrupted(self.step) from None
        if self.step > self.began[0]:
            self.save()

    def advance(self) -> None:
        """One step of the optimizer."""
        config = self.task.config
        draw = self.batches.draw(self.step, UniformSampler(self.diffusion))
        seed_dropout(self.task.device, config.seed, self.step)
        x = self.diffusion.q_sample(draw.x_start, draw.t, draw.noise)
        labels = cast(Tensor, draw.labels)  # `ClassifierTask.batches` tells them
        loss = F.cross_entropy(self.network(x, self.diffusion.network_time(draw.t, x)), labels)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(self.step, 0.0, warmup_steps=WARMUP_STEPS, decay="constant")
        self.optimizer.step()
        self.ema.update(self.step)
        self.losses.append(loss.detach())
        self.step += 1

    def look(self) -> None:
        """Wait for the device, report, and raise `NonFiniteError` if the loss since the last look is not finite."""
        if not self.losses:
            return
        loss = float(torch.stack(self.losses).mean())
        self.losses.clear()
        if not math.isfinite(loss):
            raise NonFiniteError(f"step {self.step}: the classifier's loss is not finite; try a lower --lr")
        seconds = self.stopwatch.seconds
        speed = (self.step - self.began[0]) / max(seconds - self.began[1], 1e-9)
        self.report(
            ClassifierProgress(
                self.step,
                self.budget.progress(self.step, seconds),
                self.budget.eta(self.step, seconds, speed),
                loss,
            )
        )

    def save(self) -> None:
        """Write the state that another call goes on from."""
        self.look()
        state = {
            "mark": json.dumps(self.task.mark()),
            "step": self.step,
            "seconds": self.stopwatch.seconds,
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict(EMA_RATE),
            "optimizer": self.optimizer.state_dict(),
        }
        with written_aside(self.task.folder / STATE_FILE) as hidden:
            torch.save(state, hidden)

    def finish(self) -> ClassifierFacts:
        """Measure the average of the weights and save it."""
        network = copy.deepcopy(self.network).eval().requires_grad_(False)
        network.load_state_dict(self.ema.state_dict(EMA_RATE))
        facts = ClassifierFacts(
            shape=tuple(self.task.dataset.facts.shape),
            classes=self.task.classes,
            chain=ChainMark.of(self.diffusion),
            encoder=self.task.config.encoder,
            step=self.step,
            bands=band_accuracies(network, self.diffusion, self.batches),
            weights=f"weights-{self.step:08d}.safetensors",
        )
        save_classifier(self.task.folder, facts, network.state_dict())
        return facts

    def _restore(self) -> None:
        state = saved_state(self.task.folder)
        if state is None:
            return
        self._check_same(json.loads(state["mark"]))
        self.network.load_state_dict(state["model"])
        self.ema.load_state_dict(EMA_RATE, state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.stopwatch = state["step"], Stopwatch(state["seconds"])

    def _check_same(self, saved: dict[str, Any]) -> None:
        for name, asked in json.loads(json.dumps(self.task.mark())).items():
            if name != "chain" and saved[name] != asked:
                flag = name.replace("_", "-")
                raise RunError(
                    f"{self.task.folder} holds a classifier with {flag} {saved[name]}, asked for {asked}: "
                    "choose another --out"
                )
        chain = saved["chain"]
        mark = ChainMark(**{**chain, "log_snr": tuple(chain["log_snr"])})
        if not mark.same(ChainMark.of(self.diffusion)):
            raise RunError(f"{self.task.folder} holds a classifier for another chain: choose another --out")


def saved_state(folder: Path) -> dict[str, Any] | None:
    """What training in ``folder`` goes on from; None where it begins.

    Raises `RunError` where the folder holds something that `train_classifier` did not make, or its state is damaged.
    """
    foreign = RunError(f"{folder} exists and was not made by perrin train-classifier: choose another place")
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise foreign
    finished = is_facts(folder / FACTS_FILE)
    if not (folder / STATE_FILE).exists():
        if not finished and not all(is_leftover(path) for path in folder.iterdir()):
            raise foreign
        return None
    try:
        state = read_state(folder)
    except DamagedFileError as error:
        raise (RunError(f"{error}; delete it to start again") if finished else foreign) from None
    if not isinstance(state, dict) or "mark" not in state:
        raise foreign
    return state


@torch.no_grad()
def band_accuracies(
    network: Encoder, diffusion: GaussianDiffusion, batches: Batches
) -> tuple[BandAccuracy, ...]:
    """The accuracy on the first `MOST_IMAGES` held-out images in each band of noise, t uniform within it."""
    bands = NoiseBands.of(diffusion)
    places, images = torch.tensor(bands.places), batches.held_out[:MOST_IMAGES]
    found = []
    for band, name in enumerate(bands.names):
        times = (places == band).nonzero().flatten()
        generator = generator_for(batches.device, "classifier accuracy", band)
        right = 0
        for rows in chunks(len(images), 256):
            x_start, labels = batches.dataset.batch(images[rows], batches.device)
            drawn = torch.randint(len(times), (len(x_start),), generator=generator, device=batches.device)
            noise = torch.randn(x_start.shape, generator=generator, device=batches.device)
            t = times.to(batches.device)[drawn]
            x = diffusion.q_sample(x_start, t, noise)
            right += int((network(x, diffusion.network_time(t, x)).argmax(1) == labels).sum())
        share = right / len(images)
        error = math.sqrt(share * (1 - share) / len(images))
        found.append(BandAccuracy(name, len(times), share, error, len(images)))
    return tuple(found)
