"""What the commands that edit share: their flags, whose images they edit, and where the results go."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perrin.cli.console import DeviceName, cost_text, many, note, pick_device
from perrin.cli.recipe import Recipe, Way
from perrin.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.build import Run
    from perrin.data import Dataset
    from perrin.editing import SamplingOptions
    from perrin.evaluation.samples import PictureFolder


@dataclass(frozen=True)
class Common:
    """Which model edits, and where the pictures go."""

    label: str | None = None
    """Class, by name or number, of a conditional model; by default that of each image."""
    weights: str | None = None
    """Which weights: `model`, or an average such as `ema-0.9999`; by default the first average."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest."""
    out: Path | None = None
    """A folder; by default one below the run's samples/."""
    device: DeviceName = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""

    def load(self, path: Path) -> Run:
        """The run at ``path``. Raises `RunError` where there is none, `ArgumentError` unless it is one of images."""
        from perrin.build import load_run
        from perrin.evaluation.samples import has_pictures

        if self.out is not None and self.out.suffix == ".npz":
            raise ArgumentError(f"--out must be a folder for pictures, got {self.out}")
        model = load_run(path, weights=self.weights, step=self.checkpoint, device=pick_device(self.device))
        if not has_pictures(model.folder.facts):
            raise ArgumentError(
                f"{path} must be a run of images, which are edited as pictures; its data have the shape "
                f"{model.folder.facts.shape}"
            )
        return model


@dataclass(frozen=True)
class Images:
    """Images to edit, by their places in a data set, and the class of each for the model."""

    dataset: Dataset
    indices: Sequence[int]
    classes: list[int] | None

    @classmethod
    def load(cls, model: Run, way: Way, data: str | None, label: str | None, *, count: int) -> Images:
        """The first ``count`` images of ``data``, or of what the run held out.

        Raises `DataError` for data that do not fit, `ArgumentError` for a ``label`` that there is not.
        """
        from perrin.cli.measure import held_out

        check_label(label, way, model)
        dataset = data_of(model, data, label)
        indices = held_out(model, len(dataset)) if data is None else range(len(dataset))
        return cls.chosen(model, way, dataset, indices[:count], label)

    @classmethod
    def chosen(
        cls, model: Run, way: Way, dataset: Dataset, indices: Sequence[int], label: str | None
    ) -> Images:
        """The images at ``indices`` of ``dataset``, of the class that ``label`` names, or each of its own.

        Raises `ArgumentError` where a classifier is to guide without being told to which class.
        """
        from perrin.build import class_numbers
        from perrin.cli.recipe import drawn_classes

        if label is not None:
            return cls(dataset, indices, drawn_classes(label, way, len(indices), model.folder.path))
        labels = dataset.batch(indices, "cpu")[1]
        numbers = class_numbers(model, dataset, labels)
        if numbers is None and way.class_names is not None:
            raise ArgumentError("--classifier needs --label, the class to guide to")
        return cls(dataset, indices, None if numbers is None else [int(number) for number in numbers])

    def rows(self, model: Run, places: Sequence[int]) -> Tensor:
        """The images at ``places`` of `indices`, (B, C, H, W) on the model's device."""
        return self.dataset.batch([self.indices[i] for i in places], model.device)[0]


def data_of(model: Run, data: str | None, label: str | None) -> Dataset:
    """The data set ``data``, or the run's own, with classes that the model knows unless ``label`` names one for all.

    Raises `DataError` where it does not fit, and tells of --label where that would help.
    """
    from perrin.build import run_data

    try:
        return run_data(model, data, labelled=label is None)
    except DataError as error:
        run_data(model, data, labelled=False)  # raises what no label would help against
        raise DataError(f"{error}: give --label, the class of all of them") from None


def check_label(label: str | None, way: Way, model: Run) -> None:
    """Raise `ArgumentError` for a class that there is not."""
    from perrin.cli.recipe import drawn_classes

    if label is not None:
        drawn_classes(label, way, 1, model.folder.path)


def sampling_options(model: Run, way: Way, classes: Sequence[int] | None, **others: Any) -> SamplingOptions:
    """How ``way`` samples rows of these ``classes``; ``others`` are more of the options."""
    import torch

    from perrin.editing import SamplingOptions

    labels = None if classes is None else torch.tensor(classes, device=model.device)
    return SamplingOptions(
        denoised_fn=way.denoised_fn,
        cond_fn=way.cond_fn(labels),
        model_kwargs=way.told(labels),
        guidance=way.guidance,
        **others,
    )


Edit = Callable[["Tensor", "SamplingOptions"], "Tensor"]
"""From images (B, C, H, W) to ``variations`` of each, (B, variations, C, H, W)."""


@dataclass(frozen=True)
class Job:
    """Edits of a run's images, and the folder in which picture ``place * variations + v`` is edit v of an image."""

    command: str
    model: Run
    way: Way
    images: Images
    variations: int
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """What determines picture i, beside what the command does."""
        data = self.images.dataset.facts.fingerprint
        return {
            "variations": self.variations,
            "seed": self.seed,
            "data": data,
            "first": self.images.indices[0],
        }

    def edit(self, store: PictureFolder, edit: Edit, *, calls: float, batch_size: int) -> float | None:
        """Make the pictures that ``store`` lacks, a batch of images at a time; ``calls`` are expected for each.

        Returns how often a network saw each, None where nothing was missing.
        """
        from perrin.cli.progress import Bar

        done, each = store.done(), range(self.variations)
        missing = [
            i for i in range(len(self.images.indices)) if any(self.number(i, v) not in done for v in each)
        ]
        made = len(missing) * self.variations
        with (
            Bar(self.command, made * calls) as bar,
            self.way.counted() as seen,
            self.model.network.register_forward_hook(
                lambda *called: bar.update(min(seen.rows, made * calls))
            ),
        ):
            for start in range(0, len(missing), batch_size):
                places = missing[start : start + batch_size]
                results = edit(self.images.rows(self.model, places), self.options(places))
                for place, row in zip(places, results, strict=True):
                    keep(store, self.number(place, 0), row, self.model)
        return seen.rows / made if made else None

    def number(self, place: int, variation: int) -> int:
        """The number of a picture."""
        return place * self.variations + variation

    def options(self, places: Sequence[int]) -> SamplingOptions:
        """How the images at ``places`` are sampled: the noise of each is that of its place in the data set."""
        classes = self.images.classes
        return sampling_options(
            self.model,
            self.way,
            None if classes is None else [classes[i] for i in places],
            seed=self.seed,
            indices=[self.images.indices[i] for i in places],
        )

    def grid(self, store: PictureFolder, before: Callable[[Tensor], Sequence[Tensor]]) -> str:
        """Draw ``grid.png``: a row an image, first what ``before`` makes of the images, then the edits."""
        import torch

        from perrin.evaluation.samples import MAX_IN_GRID

        places = range(min(len(self.images.indices), max(1, MAX_IN_GRID // (self.variations + 2))))
        x = self.images.rows(self.model, places).cpu()
        rows = [torch.stack([kept(store, self.number(i, v)) for v in range(self.variations)]) for i in places]
        columns = torch.cat([torch.stack([x, *before(x)], 1), torch.stack(rows)], 1)
        return write_rows(store, columns, self.model)


def open_folder(
    command: str, model: Run, way: Way, common: Common, *, recipe: Recipe, settings: dict[str, Any]
) -> tuple[PictureFolder, dict[str, Any]]:
    """The folder of ``command``'s pictures, and what determines them; by default one named after that.

    Raises `RunError` where the folder holds something else.
    """
    from perrin.evaluation.samples import PictureFolder, open_store

    whole = {
        "command": command,
        "step": model.step,
        "weights": model.weights,
        "label": common.label,
        **settings,
        **recipe.settings(model, way.sampler),
    }
    digest = blake2b(json.dumps(whole).encode(), digest_size=4).hexdigest()
    name = "-".join([command, recipe.name_parts(way.sampler)[0], digest])
    out = common.out or model.folder.samples_dir / name
    store = open_store(out, {"run": os.path.relpath(model.folder.path, out), **whole}, model.folder.facts)
    if not isinstance(store, PictureFolder):
        raise ArgumentError(f"--out must be a folder for pictures, got {out}")
    note(f"{command} with weights {model.weights} of step {model.step} into {out}")
    return store, whole


def keep(store: PictureFolder, first: int, x: Tensor, model: Run) -> None:
    """Write the pictures ``x`` (N, C, H, W) under the numbers from ``first`` on."""
    from perrin.data import to_levels

    for number, values in enumerate(to_levels(x, model.folder.facts.levels), first):
        store.write(number, values)


def kept(store: PictureFolder, number: int) -> Tensor:
    """The picture ``number`` (C, H, W), in [-1, 1]."""
    from perrin.data import to_unit
    from perrin.data.decode import decode

    pixels, levels = decode(store.target / f"{number:05d}.png")
    return to_unit(pixels, levels)


def write_rows(store: PictureFolder, x: Tensor, model: Run) -> str:
    """Draw the pictures ``x`` (rows, columns, C, H, W) as ``grid.png``; returns its path."""
    from perrin.data import to_levels, write_grid

    path = store.target / "grid.png"
    levels = model.folder.facts.levels
    write_grid(path, to_levels(x.flatten(0, 1), levels), levels, columns=x.shape[1])
    return str(path)


def edited(
    job: Job,
    path: Path,
    store: PictureFolder,
    *,
    settings: dict[str, Any],
    calls: float | None,
    how: str,
    grid: str,
) -> tuple[dict[str, Any], list[str]]:
    """What ``job`` has made of the run at ``path``, as figures and as lines."""
    count = len(job.images.indices)
    figures = {**settings, "run": str(path), "count": count, "network_calls": calls}
    lines = [
        f"{many(count * job.variations, 'picture')} of {many(count, 'image')}: {store.target}, {grid}",
        f"{how}{cost_text(calls)}, {settings['sampler']}, seed {job.seed}; "
        f"weights {job.model.weights} of step {job.model.step}",
    ]
    return figures | {"pictures": str(store.target), "grid": grid}, lines
