"""``perrin likelihood``: bits per dimension with a standard error, and a table with one row per example."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from perrin.cli.console import DeviceName, note, pick_device, report, with_error
from perrin.cli.flags import parse
from perrin.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.build import Run
    from perrin.data import Dataset

COLUMNS = ("index", "name", "bpd", "prior_bpd", "vb_bpd", "decoder_bpd")


@dataclass(frozen=True)
class Options:
    """Measure bits per dimension: total = prior + sum of KL terms + decoder, an upper bound on the true code length.

    Nothing is augmented, and the noise depends only on the seed, the example and the timestep."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tyro.conf.Positional[str | None] = None
    """Data of the run's shape and levels; by default the part that the run held out."""
    limit: int | None = None
    """Measure the first so many examples only."""
    terms: int | None = None
    """Estimate the sum of KL terms from so many timesteps per example instead of all T."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Examples measured at a time; it does not change the figures."""
    weights: str | None = None
    """Which weights: `model`, or an average such as `ema-0.9999`; by default the first average."""
    out: Path | None = None
    """CSV table to write; by default likelihood.csv, or likelihood-DATA.csv, in the run's folder."""
    device: DeviceName = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Figures:
    """What was measured, and how."""

    bpd: float
    bpd_se: float
    n: int
    prior_bpd: float
    vb_bpd: float
    decoder_bpd: float
    network_calls: int
    """Per example."""
    seconds: float
    num_timesteps: int
    terms: int | None
    levels: int | None
    clip_denoised: bool
    weights: str
    step: int
    csv: str


def run(args: Sequence[str]) -> None:
    """Measure what ``args`` ask for."""
    options = parse(Options, args, command="likelihood")
    check(options)
    from perrin.build import load_run, run_data
    from perrin.data import split

    model = load_run(options.run, weights=options.weights, device=pick_device(options.device))
    dataset = run_data(model, options.data)
    indices = list(range(len(dataset)))
    if options.data is None:
        indices = split(len(dataset), model.folder.config.data.held_out)[1].tolist()
    indices = indices[: options.limit]
    out = options.out or model.folder.likelihood_path(options.data)
    claim(out)
    most = model.diffusion.num_timesteps - 1
    if options.terms is not None and not 1 <= options.terms <= most:
        raise ArgumentError(f"--terms must be from 1 to {most}, got {options.terms}")
    note(f"measuring {len(indices)} examples with weights {model.weights} of step {model.step}")
    figures = measure(
        model,
        dataset,
        indices,
        out=out,
        terms=options.terms,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    report(asdict(figures), describe(figures), as_json=options.json)


def check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded, with `ArgumentError`."""
    for name in ("limit", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def claim(out: Path) -> None:
    """Make sure, before a long measurement, that the table can be written to ``out`` and overwrites nothing else."""
    from perrin.files import aside

    if out.is_dir() or (out.exists() and _first_line(out) != ",".join(COLUMNS)):
        raise ArgumentError(f"--out {out} exists and is no table of likelihoods: choose another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside(out).touch()
    aside(out).unlink()


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().strip()


def measure(
    model: Run,
    dataset: Dataset,
    indices: list[int],
    *,
    out: Path,
    terms: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Figures:
    """Bits per dimension of the examples ``indices`` of ``dataset``; writes the table ``out``."""
    from perrin.likelihood import mean_and_error

    started = time.monotonic()
    table, calls = _bounds(model, dataset, indices, terms=terms, seed=seed, batch_size=batch_size)
    bpd, error = mean_and_error(table[:, 0])
    _write_table(out, dataset, indices, table)
    _, prior, vb, decoder = table.mean(0).tolist()
    return Figures(
        bpd=bpd,
        bpd_se=error,
        n=len(indices),
        prior_bpd=prior,
        vb_bpd=vb,
        decoder_bpd=decoder,
        network_calls=calls,
        seconds=time.monotonic() - started,
        num_timesteps=model.diffusion.num_timesteps,
        terms=terms,
        levels=dataset.facts.levels,
        clip_denoised=True,
        weights=model.weights,
        step=model.step,
        csv=str(out),
    )


def _bounds(
    model: Run, dataset: Dataset, indices: list[int], *, terms: int | None, seed: int, batch_size: int
) -> tuple[Tensor, int]:
    """(total, prior, vb, decoder) of each example, (N, 4) float64, and the network calls per example."""
    import torch

    from perrin.build import class_numbers
    from perrin.cli.progress import Bar
    from perrin.likelihood import bound

    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    rows, calls = [], 0
    per_batch = model.diffusion.num_timesteps if terms is None else terms + 1
    with Bar("measuring", per_batch * len(batches)) as bar:
        hook = model.network.register_forward_hook(lambda *_: bar.advance())
        for batch in batches:
            x, labels = dataset.batch(batch, model.device)
            classes = class_numbers(model, dataset, labels)
            terms_of_batch = bound(
                model.diffusion,
                model.network,
                x,
                indices=batch,
                seed=seed,
                terms=terms,
                model_kwargs=None if classes is None else {"y": classes},
            )
            rows.append(torch.stack(terms_of_batch[:4], 1))
            calls = terms_of_batch.network_calls
        hook.remove()
    return torch.cat(rows), calls


def _write_table(out: Path, dataset: Dataset, indices: list[int], table: Tensor) -> None:
    from perrin.files import written_aside

    with written_aside(out) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for index, row in zip(indices, table.tolist(), strict=True):
            writer.writerow([index, dataset.names[index], *(f"{round(value, 6) + 0.0:.6f}" for value in row)])


def describe(figures: Figures) -> list[str]:
    """The figures for people."""
    levels = "continuous data" if figures.levels is None else f"{figures.levels} levels"
    calls = f"{figures.network_calls} network calls per example"
    if figures.terms is not None:
        calls = f"estimate with {figures.terms}+1 calls per example"
    return [
        f"{with_error(figures.bpd, figures.bpd_se)} (mean and standard error of n = {figures.n})",
        f"  = {figures.prior_bpd:.4f} prior + {figures.vb_bpd:.3f} sum of KL + {figures.decoder_bpd:.3f} decoder",
        f"variational bound at T = {figures.num_timesteps}, {levels}, predictions clipped to [-1, 1]",
        f"weights {figures.weights} of step {figures.step}; {calls}; {figures.seconds:.1f} s",
        f"one row per example: {figures.csv}",
    ]
