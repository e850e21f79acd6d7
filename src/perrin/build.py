"""A configuration becomes objects here and nowhere else; `load_run` needs only a run's path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from perrin.config import DiffusionConfig, MLPConfig, RunConfig, UNetConfig
from perrin.data import Dataset, Facts, load
from perrin.diffusion import GaussianDiffusion
from perrin.errors import ConfigError, DataError
from perrin.losses import LossType
from perrin.networks import MLP, UNet
from perrin.parameterization import ModelMeanType
from perrin.randomness import seed_of
from perrin.schedules import Betas, get_named_beta_schedule, log_snr_linear_betas, zero_terminal_snr
from perrin.training import RunFolder, check_data, check_fit
from perrin.training.schedule import Budget
from perrin.variance import ModelVarType


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
        betas = log_snr_linear_betas(config.num_timesteps, config.log_snr_max, config.log_snr_min)
    else:
        betas = get_named_beta_schedule(config.schedule, config.num_timesteps)
    return zero_terminal_snr(betas) if config.zero_terminal_snr else betas


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
    if isinstance(config, MLPConfig):
        return MLP(
            facts.shape[0],
            width=config.width,
            depth=config.depth,
            learn_sigma=learn_sigma,
            num_classes=num_classes,
            dropout=config.dropout,
            fourier=config.fourier,
        )
    channels, height, width = facts.shape
    return UNet(
        (height, width),
        in_channels=channels,
        channels=config.channels,
        channel_mult=config.channel_mult,
        num_res_blocks=config.num_res_blocks,
        attention_levels=config.attention_levels,
        num_heads=config.num_heads,
        dropout=config.dropout,
        num_classes=num_classes,
        learn_sigma=learn_sigma,
        fourier=config.fourier,
        checkpoint=config.checkpoint,
    )


def _class_names(facts: Facts) -> tuple[str, ...]:
    if facts.class_names is None:
        raise DataError(
            "data.conditional = True: these data have no classes (folders of classes, or labels in a file)"
        )
    return facts.class_names


def build_model(config: RunConfig, facts: Facts) -> tuple[GaussianDiffusion, nn.Module]:
    """The chain and the network, with initial weights determined by ``training.seed``, on the CPU."""
    diffusion = build_diffusion(config.diffusion, facts.levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("initial weights", config.training.seed))
        network = build_network(
            config.network,
            facts,
            learn_sigma=diffusion.output_channels(1) > 1,
            conditional=config.data.conditional,
        )
    return diffusion, network


FACTS = ("shape", "levels", "class_names", "count", "fingerprint")


def start_run(config: RunConfig, out: str | Path) -> Session:
    """The run in ``out``: made if there is none, else resumed under ``config``.

    Raises `RunError` where the saved configuration differs in more than the budget, `DataError` where the data
    have changed since, and for whatever is wrong with the data or the network before anything is written.
    """
    Budget.of(config.training)
    known = RunFolder.open(out) if RunFolder.holds_run(out) else None
    if known is not None:
        known.check_revision(config)
    dataset = load(config.data.path, levels=config.data.levels, cache=_cache_folder())
    if known is not None:
        problem = f"{config.data.path} is not, or no longer, what {out} was begun with"
        _check_facts(known.facts, dataset.facts, problem, *FACTS)
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


def run_data(run: Run, path: str | Path | None = None) -> Dataset:
    """The data set at ``path``, or what the run was trained on.

    Raises `DataError` where its shape, levels or classes do not fit the run.
    """
    config, facts = run.folder.config, run.folder.facts
    source = config.data.path if path is None else str(path)
    problem = f"{source} does not fit the run {run.folder.path}"
    stated = config.data.levels if path is None else None
    dataset = load(source, levels=stated, cache=_cache_folder())
    _check_facts(facts, dataset.facts, problem, "shape")
    if facts.levels is not None and dataset.facts.levels is not None and dataset.facts.levels > facts.levels:
        dataset = load(source, levels=facts.levels)  # refused where a value says otherwise
    _check_facts(facts, dataset.facts, problem, "levels", *(("count", "fingerprint") if path is None else ()))
    if config.data.conditional:
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


def _check_facts(expected: Facts, found: Facts, problem: str, *names: str) -> None:
    for name in names:
        one, other = getattr(expected, name), getattr(found, name)
        if one != other and one != "":  # a run made before fingerprints has none
            raise DataError(f"{problem}: {name} must be {one}, got {other}")
