"""AUROC of the anomaly score and of the rough bound: MNIST against Fashion-MNIST and rotated digits, and
Fashion-MNIST against MNIST.

Typical are test images, atypical the other set's test images, or other test digits turned by 90 degrees; 10 network
calls each, against a mixture of Gaussians of the run's own training images.

    python benchmarks/anomaly.py --data DATA --mnist RUN --fashion RUN [-n 1000] [--reference-size 3000] [--json]

DATA holds mnist/ and fashion_mnist/ with the original t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz files;
either run may be left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perrin.build import load_run, run_data
from perrin.data import load, split, spread
from perrin.evaluation.anomaly import Errors, Typical, errors, visited
from perrin.evaluation.auroc import AUROC, auroc

BATCH = 100
AMBIGUOUS = (0, 1, 8)
"""Digits that are digits, or a bar, when turned."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    inside: str
    outside: str
    score: AUROC
    rough_bound: AUROC
    n: tuple[int, int]
    calls: int
    below_05: tuple[float, float]
    """Share with p < 0.05 of either group."""
    seconds: float
    """Of scoring both groups, without the reference."""


@dataclass(frozen=True)
class Scored:
    """A group of images after scoring."""

    score: Tensor
    p_value: Tensor
    rough_bpd: Tensor
    seconds: float

    def only(self, rows: Tensor) -> Scored:
        """Some of them."""
        return Scored(self.score[rows], self.p_value[rows], self.rough_bpd[rows], self.seconds)


class Scorer:
    """A run and its reference."""

    def __init__(self, path: Path, size: int) -> None:
        self.run = load_run(path)
        dataset = run_data(self.run)
        halves = split(len(dataset), self.run.folder.config.data.held_out)
        fitted, ranked = (
            self.errors(dataset.batch(spread(half.tolist(), most), "cpu")[0])
            for half, most in zip(halves, (size, size // 2), strict=True)
        )
        self.typical = Typical.fit(fitted, ranked)

    def errors(self, images: Tensor) -> Errors:
        """The errors of ``images`` (N, 1, 28, 28)."""
        found = [
            errors(self.run.diffusion, self.run.network, images[i : i + BATCH])
            for i in range(0, len(images), BATCH)
        ]
        return Errors(*(torch.cat(column) for column in zip(*found, strict=True)))

    def scored(self, images: Tensor) -> Scored:
        """The scores of ``images``."""
        started = time.monotonic()
        found = self.errors(images)
        score = self.typical.score(found)
        return Scored(score, self.typical.p_values(score), found.rough_bpd, time.monotonic() - started)

    def row(self, inside: str, one: Scored, outside: str, other: Scored) -> Row:
        """``one`` against ``other``."""
        return Row(
            inside,
            outside,
            auroc(one.score, other.score),
            auroc(one.rough_bpd, other.rough_bpd),
            (len(one.score), len(other.score)),
            len(visited(self.run.diffusion)),
            (float((one.p_value < 0.05).double().mean()), float((other.p_value < 0.05).double().mean())),
            one.seconds + other.seconds,
        )


def test_images(data: Path, name: str, rows: range) -> Tensor:
    """Test images of MNIST or Fashion-MNIST, (N, 1, 28, 28) in [-1, 1]."""
    return load(data / name / "t10k-images-idx3-ubyte.gz").batch(rows, "cpu")[0]


def test_labels(data: Path, rows: range) -> Tensor:
    """The digits of MNIST's test images."""
    with gzip.open(data / "mnist" / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(labels[rows.start : rows.stop].copy())


def mnist_rows(run: Path, data: Path, count: int, size: int) -> Iterator[Row]:
    """MNIST's test images against Fashion-MNIST's and against others of their own, turned by 90 degrees."""
    scorer, rows = Scorer(run, size), range(count, 2 * count)
    inside = scorer.scored(test_images(data, "mnist", range(count)))
    fashion = scorer.scored(test_images(data, "fashion_mnist", range(count)))
    yield scorer.row("MNIST", inside, "Fashion-MNIST", fashion)
    turned = scorer.scored(torch.rot90(test_images(data, "mnist", rows), 1, (2, 3)))
    yield scorer.row("MNIST", inside, "MNIST turned by 90 degrees", turned)
    clear = ~torch.isin(test_labels(data, rows), torch.tensor(AMBIGUOUS))
    yield scorer.row("MNIST", inside, "the same without 0, 1 and 8", turned.only(clear))


def fashion_rows(run: Path, data: Path, count: int, size: int) -> Iterator[Row]:
    """Fashion-MNIST's test images against MNIST's."""
    scorer = Scorer(run, size)
    inside, outside = (
        scorer.scored(test_images(data, name, range(count))) for name in ("fashion_mnist", "mnist")
    )
    yield scorer.row("Fashion-MNIST", inside, "MNIST", outside)


def line(row: Row) -> str:
    """A row of the table, in Markdown."""
    score, bound = (f"{a.value:.4f} [{a.low:.4f}, {a.high:.4f}]" for a in (row.score, row.rough_bound))
    return (
        f"| {row.inside} | {row.outside} | {row.n[0]} + {row.n[1]} | {score} | {bound} | {row.below_05[0]:.1%} | "
        f"{row.below_05[1]:.1%} | {row.calls} | {row.seconds:.0f} |"
    )


HEADER = """| inside | outside | n | AUROC of the score | of the rough bound | p < 0.05 inside | outside | calls | s |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--reference-size", type=int, default=3000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("" if options.json else HEADER, flush=True)
    for make, run in ((mnist_rows, options.mnist), (fashion_rows, options.fashion)):
        for row in make(run, options.data, options.n, options.reference_size) if run else ():
            print(json.dumps(asdict(row)) if options.json else line(row), flush=True)


if __name__ == "__main__":
    main()
