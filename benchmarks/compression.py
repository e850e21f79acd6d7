"""Bits per value and CPU seconds of PNG, WebP, LZMA and `perrin compress`, which is held against the model's bound.

PNG and WebP are one file per image, LZMA one stream over all values, perrin one file without labels or names, whose
decoded values are compared with the original's. WebP has no grey images of its own: grey ones are RGB to it.

    python benchmarks/compression.py RUN [DATA] [--steps 16 64] [--calibrated] [--limit 200] [--json]
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from perrin.build import Run, class_numbers, load_run, run_chain, run_data
from perrin.codec import Recipe, compress, decompress
from perrin.codec.container import unpack
from perrin.data import Dataset, split
from perrin.likelihood import bound, mean_and_error


@dataclass(frozen=True)
class Row:
    """One way to compress: bits per value, CPU seconds for all examples; what is not known is None."""

    name: str
    file_bpd: float
    encode_seconds: float
    decode_seconds: float | None = None
    net_bpd: float | None = None
    initial_bits: int | None = None
    bound_bpd: float | None = None
    bound_se: float | None = None
    file_bytes: int = 0


class Settings(NamedTuple):
    """What is compared."""

    run: Run
    dataset: Dataset
    calibrated: bool


def of_files(name: str, dataset: Dataset, coded: Callable[[np.ndarray], bytes]) -> Row:
    """The row of a format that takes one image (C, H, W) at a time."""
    started = time.process_time()
    size = sum(len(coded(image)) for image in dataset.values)
    return Row(name, 8 * size / dataset.values.size, time.process_time() - started, file_bytes=size)


def picture(image: np.ndarray) -> Image.Image:
    """An image (C, H, W) as it is, levels for grey values."""
    return Image.fromarray(np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)))


def png(image: np.ndarray) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    picture(image).save(file, "PNG", optimize=True)
    return file.getvalue()


def webp(image: np.ndarray) -> bytes:
    """A lossless WebP file."""
    file = io.BytesIO()
    picture(image).convert("RGB").save(file, "WEBP", lossless=True, quality=100, method=6)
    return file.getvalue()


def known_formats(dataset: Dataset) -> Iterator[Row]:
    """PNG and WebP for images that they can hold, LZMA for all data."""
    is_image = dataset.values.ndim == 4 and dataset.values.shape[1] in (1, 3)
    if is_image and (dataset.values.itemsize == 1 or dataset.values.shape[1] == 1):
        yield of_files("PNG", dataset, png)
    if is_image and dataset.values.itemsize == 1:
        yield of_files("WebP", dataset, webp)
    started = time.process_time()
    size = len(lzma.compress(dataset.values.tobytes(), preset=9 | lzma.PRESET_EXTREME))
    yield Row("LZMA", 8 * size / dataset.values.size, time.process_time() - started, file_bytes=size)


def of_perrin(settings: Settings, steps: int) -> Row:
    """The row of the run's chain of ``steps`` timesteps."""
    run, dataset, calibrated = settings
    chain = run_chain(run, steps=steps, calibrated=calibrated)
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels)
    classes = class_numbers(run, dataset, labels)
    bare = replace(dataset, labels=None, names=[str(i) for i in range(len(dataset))])
    recipe = Recipe(run.weights, run.step, calibrated)
    started = time.process_time()
    made = compress(chain, run.network, bare, recipe=recipe, classes=classes)
    encoded = time.process_time()
    back = decompress(chain, run.network, unpack(made.content, "the file"), classes=classes)
    decoded = time.process_time()
    if back.values.dtype != bare.values.dtype or not np.array_equal(back.values, bare.values):
        raise SystemExit(f"{steps} steps: the values did not come back")
    expected, error = bound_of(settings, steps)
    return Row(
        f"perrin, {chain.num_timesteps} steps{', calibrated' if calibrated else ''}",
        8 * len(made.content) / bare.values.size,
        encoded - started,
        decoded - encoded,
        made.coded.net_bits / bare.values.size,
        made.coded.initial_bits,
        expected,
        error,
        len(made.content),
    )


def bound_of(settings: Settings, steps: int) -> tuple[float, float]:
    """The bound with all terms at ``steps`` timesteps, bits per dimension, and its standard error."""
    run, dataset, calibrated = settings
    chain = run_chain(run, steps=steps, calibrated=calibrated)
    totals = []
    for start in range(0, len(dataset), 64):
        indices = range(start, min(start + 64, len(dataset)))
        x, labels = dataset.batch(indices, run.device)
        classes = class_numbers(run, dataset, labels)
        told = None if classes is None else {"y": classes}
        totals.append(bound(chain, run.network, x, indices=indices, model_kwargs=told).total)
    return mean_and_error(torch.cat(totals))


def chosen(run: Run, data: str | None, limit: int | None) -> Dataset:
    """The first ``limit`` examples of ``data``, by default of the part that the run held out."""
    dataset = run_data(run, data)
    rows = np.arange(len(dataset))
    if data is None:
        rows = split(len(dataset), run.folder.config.data.held_out)[1]
    rows = rows[:limit]
    labels = None if dataset.labels is None else dataset.labels[rows]
    return replace(dataset, values=dataset.values[rows], labels=labels, names=[str(i) for i in rows])


def line(row: Row, examples: int) -> str:
    """The row for people."""
    cells = [f"{row.name:<28} {row.file_bpd:>7.3f} {row.file_bytes:>9d}"]
    if row.net_bpd is not None and row.bound_bpd is not None and row.bound_se is not None:
        within = "within" if abs(row.net_bpd - row.bound_bpd) <= 1.96 * row.bound_se else "outside"
        cells.append(f"{row.net_bpd:>7.3f} {row.bound_bpd:>7.3f} ± {row.bound_se:.3f}")
        cells.append(f"{row.net_bpd / row.bound_bpd - 1:>+7.2%} {within:<8} {row.initial_bits:>8d}")
    else:
        cells.append(" " * 44)
    decode = "" if row.decode_seconds is None else f"{1e3 * row.decode_seconds / examples:>9.1f}"
    return " ".join([*cells, f"{1e3 * row.encode_seconds / examples:>9.1f}", decode])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("data", nargs="?", help="data to compress (default: what the run held out)")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 64], help="timesteps (default 16 64)")
    parser.add_argument("--calibrated", action="store_true", help="use the run's calibrated chain")
    parser.add_argument("--limit", type=int, help="the first so many examples only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = load_run(arguments.run)
    dataset = chosen(run, arguments.data, arguments.limit)
    settings = Settings(run, dataset, arguments.calibrated)
    rows = [*known_formats(dataset), *(of_perrin(settings, steps) for steps in arguments.steps)]
    n = len(dataset)
    if arguments.json:
        print(json.dumps({"run": arguments.run, "n": n, "rows": [asdict(row) for row in rows]}))
        return
    shape = "x".join(str(size) for size in dataset.facts.shape)
    print(f"{n} examples of {shape}, {dataset.facts.levels} levels; milliseconds of CPU per example\n")
    print(
        f"{'':<28} {'file':>7} {'bytes':>9} {'net':>7} {'bound':>15} {'net/bound':>16} {'initial':>8} "
        f"{'ms enc':>9} {'ms dec':>9}"
    )
    for row in rows:
        print(line(row, n))


if __name__ == "__main__":
    main()
