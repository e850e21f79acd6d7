"""A configuration becomes objects here and nowhere else; `load_run` needs only a run's path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from perrin.config import DiffusionConfig, MLPConfig, RunConfig, UNetConfig
from perrin.data import Dataset, Facts, load
from perrin.diffusion import GaussianDiffusion
from perrin.errors import ConfigError, DataError, RunError
from perrin.likelihood.calibration import Calibration
from perrin.losses import LossType
from perrin.networks import MLP, NO_CLASS, LevelPosterior, UNet
from perrin.networks.posterior import CHAIN_TABLES, LEVEL_INPUTS
from perrin.parameterization import ModelMeanType
from perrin.presets import resolved
from perrin.randomness import seed_of
from perrin.schedules import (
    Betas,
    get_named_beta_schedule,
    log_snr_linear_betas,
    space_timesteps,
    zero_terminal_snr,
)
from perrin.training import RunFolder, check_data, check_fit
from perrin.training.schedule import Budget
from perrin.variance import ModelVarType

Value = TypeVar("Value")


@dataclass(frozen=True)
class Run:
    """A trained run, ready to sample from or to measure."""

    folder: RunFolder
    diffusion: GaussianDiffusion
    network: nn.Module
    """In evaluation mode, its parameters without gradients, on ``device``."""
    weights: str
    """Name of the weights in the network: ``model`` or an average such as ``ema-0.9999``."""
    step: int
    """Optimizer steps that the weights have behind them."""
    device: torch.device


@dataclass(frozen=True)
class Session:
    """What training needs: the run's folder and everything that its configuration describes."""

    folder: RunFolder
    dataset: Dataset
    diffusion: GaussianDiffusion
    network: nn.Module
    """Initial weights, determined by ``training.seed``, on the CPU."""


def build_diffusion(config: DiffusionConfig, levels: int | None) -> GaussianDiffusion:
    """The chain of ``config`` for data of ``levels`` grey levels (None: continuous)."""
    if config.zero_terminal_snr and config.mean_type == "epsilon":
        raise ConfigError(
            "diffusion.zero_terminal_snr = True: needs mean_type start-x, velocity or previous-x, got epsilon"
        )
    return GaussianDiffusion(
        betas=_betas(config),
        model_mean_type=ModelMeanType(config.mean_type),
        model_var_type=ModelVarType(config.var_type),
        loss_type=LossType(config.loss),
        rescale_timesteps=config.rescale_timesteps,
        levels=levels,
    )


def _betas(config: DiffusionConfig) -> Betas:
    if config.schedule == "log-snr-linear":
        log_snr_max = _chosen(config.log_snr_max, "diffusion.log_snr_max")
        betas = log_snr_linear_betas(config.num_timesteps, log_snr_max, config.log_snr_min)
    else:
        betas = get_named_beta_schedule(config.schedule, config.num_timesteps)
    return zero_terminal_snr(betas) if config.zero_terminal_snr else betas


def _chosen(value: Value | None, key: str) -> Value:
    if value is None:
        raise ConfigError(f"{key} = None: needs a value, which `presets.resolved` chooses by the data")
    return value


def build_network(
    config: UNetConfig | MLPConfig, facts: Facts, *, learn_sigma: bool, conditional: bool
) -> nn.Module:
    """The network of ``config`` for data such as ``facts`` describe, its weights from torch's generator.

    Raises `ConfigError` where the kind of network does not fit the data's shape, `DataError` where classes
    are asked for and the data have none.
    """
    needed = {1: "mlp", 3: "unet"}.get(len(facts.shape))
    if config.kind != needed:
        raise ConfigError(f"network.kind = {config.kind!r}: data of shape {facts.shape} need {needed!r}")
    num_classes = len(_class_names(facts)) if conditional else None
    channels, *sides = facts.shape
    inputs = LEVEL_INPUTS * channels if config.level_basis else channels
    outputs = channels * (config.level_basis or 1 + learn_sigma)
    if isinstance(config, MLPConfig):
        return _mlp(config, inputs, outputs, num_classes)
    return _unet(config, sides, inputs, outputs, num_classes)


def _mlp(config: MLPConfig, inputs: int, outputs: int, num_classes: int | None) -> MLP:
    return MLP(
        inputs,
        width=config.width,
        depth=config.depth,
        num_classes=num_classes,
        dropout=config.dropout,
        fourier=_chosen(config.fourier, "network.fourier"),
        out_dim=outputs,
    )


def _unet(
    config: UNetConfig, sides: Sequence[int], inputs: int, outputs: int, num_classes: int | None
) -> UNet:
    height, width = sides
    return UNet(
        (height, width),
        in_channels=inputs,
        channels=config.channels,
        channel_mult=config.channel_mult,
        num_res_blocks=config.num_res_blocks,
        attention_levels=config.attention_levels,
        num_heads=config.num_heads,
        dropout=config.dropout,
        num_classes=num_classes,
        fourier=_chosen(config.fourier, "network.fourier"),
        checkpoint=config.checkpoint,
        patch=_chosen(config.patch, "network.patch"),
        out_channels=outputs,
        input_skip=config.input_skip,
    )


def _with_posterior(body: nn.Module, config: RunConfig, diffusion: GaussianDiffusion) -> LevelPosterior:
    """``body`` as the beliefs of a `LevelPosterior` on ``diffusion``."""
    chain, basis = config.diffusion, _chosen(config.network.level_basis, "network.level_basis")
    if isinstance(config.network, UNetConfig) and config.network.input_skip:
        raise ConfigError(
            f"network.level_basis = {basis}: the output is no image, so input_skip must be False"
        )
    variances = ("learned-range", "fixed-small", "fixed-large")
    if chain.mean_type != "start-x" or chain.var_type not in variances or diffusion.levels is None:
        raise ConfigError(
            f"network.level_basis = {basis}: needs data with levels, mean_type start-x and var_type "
            f"{', '.join(variances)}, got {diffusion.levels} levels, {chain.mean_type} and {chain.var_type}; "
            f"level_basis = 0 does without"
        )
    return LevelPosterior(
        body,
        levels=diffusion.levels,
        basis=basis,
        tables={name: diffusion.get_buffer(name) for name in CHAIN_TABLES},
        time_scale=1000 / chain.num_timesteps if chain.rescale_timesteps else 1.0,
        learn_sigma=chain.var_type == "learned-range",
    )


def _class_names(facts: Facts) -> tuple[str, ...]:
    if facts.class_names is None:
        raise DataError(
            "data.conditional = True: these data have no classes (folders of classes, or labels in a file)"
        )
    return facts.class_names


def build_model(config: RunConfig, facts: Facts) -> tuple[GaussianDiffusion, nn.Module]:
    """The chain and the network, with initial weights determined by ``training.seed``, on the CPU."""
    config = resolved(config, facts.shape, facts.levels)
    diffusion = build_diffusion(config.diffusion, facts.levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("initial weights", config.training.seed))
        network = build_network(
            config.network,
            facts,
            learn_sigma=diffusion.output_channels(1) > 1,
            conditional=config.data.conditional,
        )
    return diffusion, _with_posterior(network, config, diffusion) if config.network.level_basis else network


FACTS = ("shape", "levels", "class_names", "count", "fingerprint")


def start_run(config: RunConfig, out: str | Path) -> Session:
    """The run in ``out``: made if there is none, else resumed under ``config``.

    Raises `RunError` where the saved configuration differs in more than the budget, `DataError` where the data
    have changed since, and for whatever is wrong with the data or the network before anything is written.
    """
    Budget.of(config.training)
    known = RunFolder.open(out) if RunFolder.holds_run(out) else None
    if known is not None:
        config = resolved(config, known.facts.shape, known.facts.levels)
        known.check_revision(config)
    dataset = load(config.data.path, levels=config.data.levels, cache=_cache_folder())
    if known is not None:
        problem = f"{config.data.path} is not, or no longer, what {out} was begun with"
        _check_facts(known.facts, dataset.facts, problem, *FACTS)
    config = resolved(config, dataset.facts.shape, dataset.facts.levels)
    diffusion, network = build_model(config, dataset.facts)
    check_data(dataset, config)
    folder = known.revise(config) if known else RunFolder.create(out, config, dataset.facts)
    return Session(folder, dataset, diffusion, network)


def _cache_folder() -> Path:
    """Where the decoded images of large folders are kept between commands."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perrin"


def load_run(
    path: str | Path,
    *,
    weights: str | None = None,
    step: int | None = None,
    device: torch.device | str = "cpu",
) -> Run:
    """The run at ``path`` with one set of its weights: by default the first average of the newest checkpoint.

    Raises `RunError` where there is no run, no such checkpoint or weights, or where a file is damaged.
    """
    folder = RunFolder.open(path)
    state, name, found = folder.load_weights(step, weights)
    diffusion, network = build_model(folder.config, folder.facts)
    check_fit(network.state_dict(), state, str(folder.checkpoint_path(found)))
    network.load_state_dict(state)
    network.requires_grad_(False).eval().to(device)
    return Run(folder, diffusion.to(device), network, name, found, torch.device(device))


def run_chain(run: Run, *, steps: int | None = None, calibrated: bool = False) -> GaussianDiffusion:
    """The run's chain: whole, of ``steps`` timesteps evenly spaced, or with the calibrated timesteps and variances.

    A calibrated chain without ``steps`` has as many as were best. Raises `ArgumentError` for steps out of range,
    `RunError` where there is no calibration, or where it was made for other weights than the run's.
    """
    if calibrated:
        return run_calibration(run)[1].chain(run.diffusion, steps)
    if steps is None or steps == run.diffusion.num_timesteps:
        return run.diffusion
    keep = space_timesteps(run.diffusion.num_timesteps, steps)
    return run.diffusion.respaced(keep, convert_learned=True)


def run_calibration(run: Run, path: Path | None = None) -> tuple[Path, Calibration]:
    """What `perrin calibrate` found for the run's weights, and where: the newest, or that at ``path``.

    Raises `RunError` where there is none, or none for these weights.
    """
    others: list[str] = []
    for place in run.folder.calibrations() if path is None else [path]:
        found = Calibration.read(place)
        if (found.weights, found.step) == (run.weights, run.step):
            return place, found
        others.append(f"{place} is for weights {found.weights} of step {found.step}")
    if not others:
        raise RunError(f"{run.folder.path} is not calibrated: `perrin calibrate {run.folder.path}` does it")
    raise RunError(f"{others[0]}, not {run.weights} of step {run.step}: calibrate again")


def run_data(
    run: Run, path: str | Path | None = None, *, labelled: bool = True, withheld: bool = False
) -> Dataset:
    """The data set at ``path``, or what the run was trained on.

    Raises `DataError` where its shape or levels do not fit the run, or, if it is to be ``labelled``, its classes:
    none are needed if they may be ``withheld`` and the run was trained with ``label_drop``; see `told_classes`.
    """
    config, facts = run.folder.config, run.folder.facts
    source = config.data.path if path is None else str(path)
    problem = f"{source} does not fit the run {run.folder.path}"
    stated = config.data.levels if path is None else None
    dataset = load(source, levels=stated, cache=_cache_folder())
    _check_facts(facts, dataset.facts, problem, "shape")
    found, known = dataset.facts.levels, facts.levels
    if found and known and (found > known or (found < known and dataset.guessed)):
        dataset = load(source, levels=known)  # refused where a value says otherwise
    _check_facts(facts, dataset.facts, problem, "levels", *(("count", "fingerprint") if path is None else ()))
    withheld = withheld and config.training.label_drop > 0 and dataset.facts.class_names is None
    if config.data.conditional and labelled and not withheld:
        _check_classes(source, dataset, _class_names(facts))
    return dataset


def _check_classes(source: str, dataset: Dataset, known: tuple[str, ...]) -> None:
    if dataset.facts.class_names is None:
        raise DataError(f"{source} has no classes, which the conditional model needs")
    unknown = [name for name in dataset.facts.class_names if name not in known]
    if unknown:
        raise DataError(f"{source}: class {unknown[0]!r} is none of the run's ({', '.join(known[:10])})")


def class_numbers(run: Run, dataset: Dataset, labels: Tensor | None) -> Tensor | None:
    """The run's numbers (B,) of the data set's ``labels`` (B,), matched by name; None if it is unconditional."""
    if not run.folder.config.data.conditional or labels is None:
        return None
    known = _class_names(run.folder.facts)
    table = [known.index(name) for name in _class_names(dataset.facts)]
    return torch.tensor(table, device=labels.device)[labels]


def told_classes(run: Run, dataset: Dataset, labels: Tensor | None, count: int) -> Tensor | None:
    """What the network is told of ``count`` examples: their `class_numbers`, or `NO_CLASS` without ``labels``."""
    if run.folder.config.data.conditional and labels is None:
        return torch.full((count,), NO_CLASS, device=run.device)
    return class_numbers(run, dataset, labels)


def _check_facts(expected: Facts, found: Facts, problem: str, *names: str) -> None:
    for name in names:
        one, other = getattr(expected, name), getattr(found, name)
        if one != other and one != "":  # a run made before fingerprints has none
            raise DataError(f"{problem}: {name} must be {one}, got {other}")
