"""A trained classifier of noisy images on disk: its weights, and a JSON file that says what they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.errors import DataError, PerrinError, RunError
from perrin.files import write_text, written_aside
from perrin.networks import Encoder
from perrin.randomness import seed_of
from perrin.training.ema import check_fit

FACTS_FILE = "classifier.json"
PLACES = 16
"""Of how many timesteps the log-SNR is kept, to know the chain again."""
FARTHEST = 80.0
"""Log-SNRs beyond this count as this: a chain may end without signal."""
NEAR = 1e-3
"""Log-SNRs that differ by less are those of one chain, computed on two machines."""


@dataclass(frozen=True)
class EncoderConfig:
    """The arguments of an `Encoder` that the data do not determine."""

    channels: int
    channel_mult: tuple[int, ...] | None
    num_res_blocks: int
    attention_levels: tuple[int, ...] | None
    num_heads: int
    dropout: float
    patch: int

    def build(self, shape: Sequence[int], num_classes: int, seed: int = 0) -> Encoder:
        """The network for images of ``shape`` (C, H, W), its initial weights determined by ``seed``, on the CPU.

        Raises `DataError` for data that are no images, else as `Encoder` does.
        """
        if len(shape) != 3:
            raise DataError(f"a classifier needs images (C, H, W), got data of shape {tuple(shape)}")
        channels, height, width = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("classifier", seed))
            return Encoder((height, width), channels, num_classes=num_classes, **asdict(self))


@dataclass(frozen=True)
class ChainMark:
    """What a classifier must know of a chain: which noise level belongs to the time that it is told."""

    num_timesteps: int
    rescale_timesteps: bool
    log_snr: tuple[float, ...]
    """At `PLACES` timesteps from the first to the last, evenly spaced."""

    @classmethod
    def of(cls, diffusion: GaussianDiffusion) -> ChainMark:
        """The mark of a whole chain."""
        last = diffusion.num_timesteps - 1
        places = [round(i * last / (PLACES - 1)) for i in range(PLACES)]
        found = (diffusion.level_of_batch(t).log_snr for t in places)
        kept = tuple(round(min(max(value, -FARTHEST), FARTHEST), 6) for value in found)
        return cls(diffusion.num_timesteps, diffusion.rescale_timesteps, kept)

    def same(self, other: ChainMark) -> bool:
        """Whether the same time means the same level in both."""
        if (self.num_timesteps, self.rescale_timesteps) != (other.num_timesteps, other.rescale_timesteps):
            return False
        return all(abs(a - b) < NEAR for a, b in zip(self.log_snr, other.log_snr, strict=True))


@dataclass(frozen=True)
class BandAccuracy:
    """How many held-out images are classified rightly in one band of noise."""

    band: str
    timesteps: int
    """How many of the chain's lie in it."""
    accuracy: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class ClassifierFacts:
    """Everything that is needed to use a classifier, and what it reached."""

    shape: tuple[int, ...]
    classes: tuple[str, ...]
    chain: ChainMark
    encoder: EncoderConfig
    step: int
    bands: Annotated[tuple[BandAccuracy, ...], Field(min_length=1)]
    """From the least noise to the most."""
    weights: str
    """Name of the file beside this one."""

    @property
    def accuracy(self) -> float:
        """Share of the held-out images classified rightly at uniform times."""
        total = sum(band.timesteps for band in self.bands)
        return sum(band.accuracy * band.timesteps for band in self.bands) / total

    def check(
        self, diffusion: GaussianDiffusion, shape: Sequence[int], classes: Sequence[str] | None = None
    ) -> None:
        """Raise `RunError` where the classifier cannot guide samples of ``shape`` along the whole chain.

        ``classes`` are the names of a conditional network's; None for an unconditional one, which may be guided to
        any.
        """
        if self.shape != tuple(shape):
            raise RunError(f"the classifier is for data of shape {self.shape}, the run has {tuple(shape)}")
        if classes is not None and self.classes != tuple(classes):
            known, asked = (", ".join(names[:10]) for names in (self.classes, tuple(classes)))
            raise RunError(f"the classifier knows the classes {known}, the run has {asked}")
        mark = ChainMark.of(diffusion)
        if not self.chain.same(mark):
            one, other = (_ends(chain) for chain in (self.chain, mark))
            raise RunError(f"the classifier is for another chain: {one}, the run has {other}")


_FACTS = TypeAdapter(ClassifierFacts)


def _ends(chain: ChainMark) -> str:
    rescaled = ", rescaled times" if chain.rescale_timesteps else ""
    low, high = chain.log_snr[-1], chain.log_snr[0]
    return f"T = {chain.num_timesteps}, log-SNR {high:.3f} to {low:.3f}{rescaled}"


def save_classifier(folder: Path, facts: ClassifierFacts, weights: dict[str, Tensor]) -> None:
    """Write both files; the JSON, last, is what makes the new weights count. Raises `RunError` where it cannot."""
    file = folder / FACTS_FILE
    before = _read_facts(file).weights if is_facts(file) else facts.weights
    try:
        with written_aside(folder / facts.weights) as hidden:
            # safetensors' own way to write a file lets nobody else read it.
            hidden.write_bytes(save({name: value.cpu().contiguous() for name, value in weights.items()}))
        write_text(file, _FACTS.dump_json(facts, indent=2).decode() + "\n")
        if before != facts.weights:
            (folder / before).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: the classifier cannot be written: {error}") from None


def load_classifier(path: str | Path, device: torch.device | str = "cpu") -> tuple[Encoder, ClassifierFacts]:
    """The classifier in the folder ``path``, in evaluation mode and without gradients of its own, and its facts.

    `ClassifierFacts.check` tells whether it fits a run. Raises `RunError` where there is none, or it is damaged.
    """
    folder = Path(path)
    file = folder / FACTS_FILE
    if not file.exists():
        raise RunError(f"{folder} holds no classifier: `perrin train-classifier RUN` trains one")
    facts = _read_facts(file)
    try:
        network = facts.encoder.build(facts.shape, len(facts.classes))
    except PerrinError as error:
        raise RunError(f"{file} is damaged ({error}); train it again") from None
    try:
        state = load_file(folder / facts.weights)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder / facts.weights} is missing or damaged ({error}); train it again") from None
    check_fit(network.state_dict(), state, str(folder / facts.weights))
    network.load_state_dict(state)
    return network.requires_grad_(False).eval().to(device), facts


def weights_hash(path: str | Path) -> str:
    """A short hash of the weights that `load_classifier` finds in ``path``; another path does not change it."""
    folder = Path(path)
    weights = folder / _read_facts(folder / FACTS_FILE).weights
    return blake2b(weights.read_bytes(), digest_size=6).hexdigest()


def is_facts(file: Path) -> bool:
    """Whether ``file`` is the JSON file of a classifier."""
    try:
        _read_facts(file)
    except (OSError, RunError):
        return False
    return True


def _read_facts(file: Path) -> ClassifierFacts:
    try:
        return _FACTS.validate_json(file.read_bytes())
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise RunError(f"{file} is damaged ({where}: {fault['msg']}); train it again") from None
