"""The typed configuration of a run: what the flags, a TOML file and a run's ``config.json`` all mean.

Frozen dataclasses, checked by pydantic: an unknown key or a value out of range is a `ConfigError` that
names the key, the value and what is allowed. Nothing here imports torch, so that ``--help`` is instant.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from perrin.errors import ConfigError

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Frequencies = tuple[Annotated[int, Field(ge=0, le=16)], ...]
Basis = Annotated[int, Field(ge=0, le=256)]
Schedule = Literal["linear", "cosine", "sqrt-linear", "sigmoid", "log-snr-linear"]
MeanType = Literal["epsilon", "start-x", "velocity", "previous-x"]
VarType = Literal["fixed-small", "fixed-large", "learned", "learned-range"]
Loss = Literal["mse", "rescaled-mse", "kl", "rescaled-kl"]


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """What is trained on."""

    path: str = "digits"
    """`digits`, a folder of images, an .npz or .npy file, or one of MNIST's idx .gz files."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the examples that is never trained on and is measured instead."""
    levels: Annotated[int, Field(ge=2, le=65536)] | None = None
    """Number of grey levels per channel; read from the data when absent."""
    conditional: bool = False
    """Whether the network is told the class (a folder of class folders, or labels in the file)."""
    flip: bool = False
    """Whether training mirrors images left to right at random; measuring never does."""


@dataclass(frozen=True, config=_STRICT)
class DiffusionConfig:
    """The chain, what the network predicts, and the loss."""

    schedule: Schedule = "cosine"
    """Noise schedule."""
    num_timesteps: Positive = 1000
    """Number of steps T of the chain."""
    log_snr_max: float | None = 13.3
    """Log signal-to-noise ratio at the first step (log-snr-linear only); None: by the number of levels."""
    log_snr_min: float = -5.0
    """Log signal-to-noise ratio at the last step (log-snr-linear only)."""
    zero_terminal_snr: bool = False
    """Whether the schedule is rescaled to end in pure noise (not with epsilon)."""
    mean_type: MeanType = "epsilon"
    """What the network predicts."""
    var_type: VarType = "learned-range"
    """Variance of the reverse step."""
    loss: Loss = "rescaled-mse"
    """Loss: with a learned variance, rescaled-mse is the hybrid of Improved DDPM."""
    rescale_timesteps: bool = False
    """Whether the network sees times on a scale of 0 to 1000 whatever T is."""


@dataclass(frozen=True, config=_STRICT)
class UNetConfig:
    """The U-Net of Improved DDPM, for images."""

    kind: Literal["unet"] = "unet"
    """Which network."""
    channels: Positive = 64
    """Width of the first level."""
    channel_mult: tuple[Positive, ...] | None = None
    """Width of each level, in multiples of `channels`; each further level halves the image. By size if absent."""
    num_res_blocks: Positive = 2
    """Residual blocks per level."""
    attention_levels: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Levels (0 is full size) with self-attention; those of at most 16 x 16 pixels if absent."""
    num_heads: Positive = 4
    """Attention heads."""
    dropout: Share = 0.0
    """Share of activations dropped in training."""
    fourier: Frequencies | None = ()
    """Input Fourier features: the n of sin and cos of 2 pi 2^n x; 6 turns half round per 8-bit level. None: by the
    number of levels, or none with level_basis, which does without."""
    checkpoint: bool = False
    """Whether activations are computed again in the backward pass, to save memory."""
    patch: Positive | None = 1
    """Side of the squares of pixels that the first level takes as one position; 2 is four times as fast. None: 2 for
    images with even sides from 16 pixels on, else 1."""
    input_skip: bool = False
    """Whether the noisy input is added to the mean part of the output."""
    level_basis: Basis | None = 0
    """Functions over the levels by which the network states its beliefs, from which Bayes' rule makes the mean and
    the variance; with mean_type start-x. 0: it predicts directly. None: 16, where the data have few enough levels."""


@dataclass(frozen=True, config=_STRICT)
class MLPConfig:
    """A residual multilayer perceptron, for vectors."""

    kind: Literal["mlp"] = "mlp"
    """Which network."""
    width: Positive = 256
    """Width of the hidden layers."""
    depth: Positive = 4
    """Number of residual blocks."""
    dropout: Share = 0.0
    """Share of activations dropped in training."""
    fourier: Frequencies | None = ()
    """Input Fourier features: the n of sin and cos of 2 pi 2^n x. None: by the number of levels, or none with
    level_basis, which does without."""
    level_basis: Basis | None = 0
    """Functions over the levels by which the network states its beliefs, from which Bayes' rule makes the mean and
    the variance; with mean_type start-x. 0: it predicts directly. None: 16, where the data have few enough levels."""


def _kind(network: object) -> object:
    return network.get("kind", "unet") if isinstance(network, dict) else getattr(network, "kind", None)


Network = Annotated[
    Annotated[UNetConfig, Tag("unet")] | Annotated[MLPConfig, Tag("mlp")],
    Discriminator(_kind, custom_error_type="kind", custom_error_message="kind must be unet or mlp"),
]
"""One of the networks, told apart by ``kind``; a table without it describes a `UNetConfig`."""


@dataclass(frozen=True, config=_STRICT)
class TrainingConfig:
    """How the network is trained."""

    steps: Positive | None = 20_000
    """Budget in optimizer steps."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Budget in minutes of training; whichever of the two ends first."""
    batch_size: Positive = 64
    """Examples per optimizer step."""
    microbatch: Positive | None = None
    """Examples per forward and backward pass, to save memory; it does not change the gradient."""
    lr: Annotated[float, Field(gt=0)] = 4e-4
    """Learning rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    """Steps over which the learning rate rises from zero."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to zero over the budget."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of AdamW."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Decay of AdamW's second moment."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    label_drop: Share = 0.0
    """Share of the classes that are withheld, so that a conditional network learns to do without too: then samples
    can be guided without a classifier."""
    ema: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.9999, 0.999)
    """Rates of the weight averages; the first one is sampled from and measured."""
    t_sampler: Literal["uniform", "stratified", "loss-second-moment", "stratified-importance"] = "stratified"
    """How training draws its timesteps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the network in training; losses are always at least fp32."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights, the order of the data and the noise."""
    log_every: Positive = 50
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Positive = 1000
    """Steps between held-out bits per dimension and sample grids."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    keep: Positive = 2
    """Number of the newest checkpoints that are kept."""


RESUMABLE = ("steps", "minutes", "log_every", "evaluate_every", "checkpoint_every", "keep")
"""The fields of `TrainingConfig` that may differ when a run is resumed."""


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Everything that determines a run."""

    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    network: Network = field(default_factory=UNetConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


_ADAPTER = TypeAdapter(RunConfig)


def decode(values: object, source: str) -> RunConfig:
    """The configuration that nested ``values`` describe; absent keys take their defaults.

    ``source`` names where they came from in the error.
    """
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_fault(error)}") from None


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in fault["loc"] if part not in ("unet", "mlp"))
    if fault["type"] == "unexpected_keyword_argument":
        return f"unknown key {key}"
    return f"{key} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def encode(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values, which `decode` reads back."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


def read_toml(path: Path, base: RunConfig | None = None) -> RunConfig:
    """The configuration in a TOML file, whose absent keys are those of ``base``, by default the defaults.

    Raises `ConfigError` when it cannot be read.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return decode(values if base is None else _over(values, encode(base)), str(path))


def _over(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """``values`` with the keys of ``base`` that they lack; a network of another kind is all its own."""
    merged = {}
    for section in values.keys() | base.keys():
        one, other = values.get(section, {}), base.get(section, {})
        mixed = isinstance(one, dict) and one.get("kind", other.get("kind")) == other.get("kind")
        merged[section] = {**other, **one} if mixed else one
    return merged


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """``key is A, asked for B`` for each value that differs and that a resumed run may not change."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in values.items():
            nested = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            result.update(nested)
        return result

    one, other = flat(encode(saved)), flat(encode(asked))
    # What lies at the path is compared itself.
    free = {"data.path"} | {f"training.{name}" for name in RESUMABLE}
    return [
        f"{key} is {one.get(key)!r}, asked for {other.get(key)!r}"
        for key in sorted((one.keys() | other.keys()) - free)
        if one.get(key) != other.get(key)
    ]
