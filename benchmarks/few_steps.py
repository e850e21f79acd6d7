"""How good samples are after few network calls: a Fréchet distance for every sampler and number of calls.

The features are those of a small classifier that this script trains on the same data, so the figures are not FID and
compare with nothing but each other and the floor: the distance of as many real images. The
model is conditional; classes come in turn, as they do in the reference.

    python benchmarks/few_steps.py RUN --data mnist/ --out few-steps [--samplers dpm-2m unipc-3] [--grid karras]

RUN is a run trained on MNIST with --conditional; --data holds MNIST's four idx .gz files. Rows go to few_steps.csv in
--out as they are measured, with --grid to few_steps-karras.csv; the same command goes on where it stopped, then draws
few_steps.png.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perrin import load_run
from perrin.build import Run
from perrin.data import Dataset, load
from perrin.diffusion import GaussianDiffusion
from perrin.evaluation.frechet import Moments, frechet_distance, moments
from perrin.evaluation.plots import figure_of, save_figure
from perrin.samplers import SAMPLERS, GridName, SampleNoise, Sampler

CALLS = (5, 8, 10, 15, 20, 50)
CHUNK = 100
FEATURES = 64
REFERENCE = 10_000
"""Training images that samples are compared with."""


class Classifier(nn.Module):
    """A small classifier (B, 1, 28, 28) → (B, 10), whose 64 penultimate activations are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 49, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """(B, 64)."""
        found: Tensor = self.body(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        logits: Tensor = self.head(self.features(x))
        return logits


def trained_classifier(train: Dataset, path: Path) -> Classifier:
    """The classifier, trained for two passes over ``train``, or as ``path`` keeps it."""
    network = Classifier()
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    torch.manual_seed(0)
    network = Classifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for epoch in range(2):
        order = np.random.default_rng(epoch).permutation(len(train))
        for start in range(0, len(order) - 127, 128):
            x, labels = train.batch(order[start : start + 128], "cpu")
            assert labels is not None  # MNIST's
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(x), labels))
            optimizer.step()
    torch.save(network.state_dict(), path)
    return network.eval()


@torch.no_grad()
def features_of(network: Classifier, data: Dataset, indices: Sequence[int]) -> np.ndarray:
    """Features (N, 64) of the images ``indices``."""
    parts = [
        network.features(data.batch(indices[i : i + 500], "cpu")[0]) for i in range(0, len(indices), 500)
    ]
    return torch.cat(parts).numpy()


@dataclass(frozen=True)
class Row:
    """One cell of the table."""

    sampler: str
    budget: int
    calls: int
    """Network calls that the sampler really makes, at most the budget."""
    distance: float
    agreement: float
    """Share of the samples that the classifier takes for the class they were asked for."""
    seconds: float


@dataclass(frozen=True)
class Judge:
    """What samples are compared with, and how many."""

    classifier: Classifier
    reference: Moments
    count: int


def within(name: str, diffusion: GaussianDiffusion, budget: int, grid: GridName | None) -> Sampler:
    """The sampler with the most steps within ``budget`` network calls."""
    make = SAMPLERS[name] if grid is None else partial(SAMPLERS[name], grid=grid)
    samplers = (make(diffusion, steps) for steps in range(budget, 0, -1))
    return next(sampler for sampler in samplers if sampler.network_calls <= budget)


@torch.no_grad()
def measured(run: Run, name: str, sampler: Sampler, budget: int, judge: Judge) -> Row:
    """Draw as many samples as the judge wants and compare them with the reference."""
    began, count, classifier = time.perf_counter(), judge.count, judge.classifier
    features, right = [], 0

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = run.network(x, t, y)
        return out.float()

    for start in range(0, count, CHUNK):
        indices = range(start, min(start + CHUNK, count))
        noise, shape = SampleNoise(0, indices), (len(indices), *run.folder.facts.shape)
        labels = torch.tensor([i % 10 for i in indices])
        x = sampler.sample(
            network,
            shape,
            noise=noise.initial(shape, "cpu"),
            noise_fn=noise,
            model_kwargs={"y": labels},
        )
        x = ((x + 1) * 127.5).round() / 127.5 - 1  # the levels that a file would hold
        features.append(classifier.features(x).numpy())
        right += int((classifier(x).argmax(1) == labels).sum())
    distance = frechet_distance(moments(np.concatenate(features)), judge.reference)
    return Row(name, budget, sampler.network_calls, distance, right / count, time.perf_counter() - began)


def rows_in(path: Path) -> list[Row]:
    """The rows that are measured."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Row(
                row["sampler"],
                int(row["budget"]),
                int(row["calls"]),
                *(float(row[key]) for key in ("distance", "agreement", "seconds")),
            )
            for row in csv.DictReader(file)
        ]


def append(path: Path, row: Row) -> None:
    """Add one row to the file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["sampler", "budget", "calls", "distance", "agreement", "seconds"])
        writer.writerow(
            [row.sampler, row.budget, row.calls, f"{row.distance:.4f}", row.agreement, f"{row.seconds:.1f}"]
        )


def plot(rows: list[Row], floor: float, path: Path) -> None:
    """The distance against the number of calls."""
    figure = figure_of(1)
    axes = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(row.sampler for row in rows)):
        found = sorted((row.calls, row.distance) for row in rows if row.sampler == name)
        axes.plot(*zip(*found, strict=True), "o-" if i < 7 else "s--", ms=3, label=name)
    axes.axhline(floor, color="black", ls=":", lw=1, label="real images")
    axes.set(xlabel="network calls", ylabel="Fréchet distance (small classifier)", xscale="log", yscale="log")
    axes.set_xticks(CALLS, [str(calls) for calls in CALLS])
    axes.minorticks_off()
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    save_figure(figure, path, "perrin few steps")


def table(rows: list[Row]) -> Iterator[str]:
    """The distances as a Markdown table, the real number of calls in brackets where it is not the budget."""
    yield "| sampler | " + " | ".join(map(str, CALLS)) + " |"
    yield "|---|" + "---:|" * len(CALLS)
    for name in dict.fromkeys(row.sampler for row in rows):
        cells = {row.budget: row for row in rows if row.sampler == name}
        shown = ["" if calls not in cells else _cell(cells[calls]) for calls in CALLS]
        yield f"| {name} | " + " | ".join(shown) + " |"


def _cell(row: Row) -> str:
    return f"{row.distance:.2f}" + (f" ({row.calls})" if row.calls != row.budget else "")


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=[*SAMPLERS])
    parser.add_argument("--grid", choices=get_args(GridName))
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then print the table and draw the picture."""
    options = options_of()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    run = load_run(options.run)
    train, test = (load(options.data / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k"))
    classifier = trained_classifier(train, options.out / "classifier.pt")
    reference = moments(features_of(classifier, train, range(REFERENCE)))
    judge = Judge(classifier, reference, options.count)
    path = options.out / f"few_steps{f'-{options.grid}' if options.grid else ''}.csv"
    done = {(row.sampler, row.budget) for row in rows_in(path)}
    for budget, name in product(options.calls, options.samplers):
        if (name, budget) not in done:
            sampler = within(name, run.diffusion, budget, options.grid)
            row = measured(run, name, sampler, budget, judge)
            append(path, row)
            print(row, flush=True)
    rows = sorted(rows_in(path), key=lambda row: [*SAMPLERS].index(row.sampler))
    print(*table(rows), sep="\n")
    floors = floors_of(judge, train, range(REFERENCE, len(train)))
    plot(rows, float(np.mean(floors)), path.with_suffix(".png"))
    for name, found in (("training", floors), ("test", floors_of(judge, test, range(len(test))))):
        print(
            f"floor: {options.count} other {name} images {np.mean(found):.2f} ± {np.std(found):.2f} (spread)"
        )
    print(f"the classifier is right on {accuracy(classifier, test):.2%} of the test images")


def floors_of(judge: Judge, data: Dataset, among: range) -> list[float]:
    """The distances of ten random sets of real images, each as many as there are samples."""
    chosen = np.random.default_rng(0).permutation(among)[: 10 * judge.count].reshape(10, -1)
    parts = (features_of(judge.classifier, data, rows.tolist()) for rows in chosen)
    return [frechet_distance(moments(part), judge.reference) for part in parts]


@torch.no_grad()
def accuracy(classifier: Classifier, test: Dataset) -> float:
    """Share of the test images that the classifier knows."""
    x, labels = test.batch(range(len(test)), "cpu")
    return float((classifier(x).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
