"""``perrin interpolate``: pictures from between two samples, or two images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from perrin.cli.console import cost_text, report
from perrin.cli.editing import (
    Common,
    Images,
    check_label,
    data_of,
    keep,
    kept,
    open_folder,
    sampling_options,
    write_rows,
)
from perrin.cli.flags import parse
from perrin.cli.recipe import Recipe, Way
from perrin.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.build import Run
    from perrin.evaluation.samples import PictureFolder


@dataclass(frozen=True)
class Options:
    """Draw pictures from between two samples of a run, or between two images, which are turned into noise by DDIM
    first. The noise is interpolated along an arc, and each picture is what the sampler makes of it; by default ddim
    does."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tyro.conf.Positional[str | None] = None
    """Images of the run's shape and levels, for --between; by default all that the run was made with."""
    seeds: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="A B")] = None
    """Interpolate between the first samples that these seeds give in `perrin sample`."""
    between: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="I J")] = None
    """Interpolate between the images with these numbers in the data, from 0. Unless --grid says else, the steps lie
    log-snr: nothing is clipped on the way up, and pure noise beyond sigma / alpha = 80 would blow up errors."""
    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 8
    """Number of pictures, with both ends."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: Recipe(sampler="ddim"))
    common: Annotated[Common, tyro.conf.arg(name="")] = field(default_factory=Common)


def run(args: Sequence[str]) -> None:
    """Draw the pictures that ``args`` ask for."""
    options = parse(Options, args, command="interpolate")
    check(options)
    model = options.common.load(options.run)
    recipe = options.recipe if options.between is None else inverting(options.recipe)
    way = recipe.way(model)
    check_label(options.common.label, way, model)
    images = None if options.between is None else chosen(options, options.between, model, way)
    classes = one_class(options, model, way, images)
    data = None if images is None else images.dataset.facts.fingerprint
    named = {
        "seeds": options.seeds and list(options.seeds),  # as JSON gives them back
        "between": options.between and list(options.between),
        "data": data,
    }
    store, settings = open_folder(
        "interpolate",
        model,
        way,
        options.common,
        recipe=recipe,
        settings={**named, "count": options.count},
    )
    calls = draw(options, model, way, store, images, classes)
    x = [kept(store, i) for i in range(options.count)]
    grid = write_rows(store, with_ends(x, images, model), model)
    error = None if images is None else ends_error(x, images, model)
    figures = {**settings, "run": str(options.run), "network_calls": calls, "ends_rmse": error}
    figures |= {"pictures": str(store.target), "grid": grid}
    report(figures, describe(figures, model), as_json=options.common.json)


def describe(figures: dict[str, Any], model: Run) -> list[str]:
    """The figures for people."""
    name = "seeds" if figures["seeds"] else "between"
    first, second = figures[name]
    lines = [
        f"{figures['count']} pictures, --{name} {first} {second}: {figures['pictures']}, {figures['grid']}",
        f"{figures['sampler']}{cost_text(figures['network_calls'])}; "
        f"weights {model.weights} of step {model.step}",
    ]
    if figures["ends_rmse"] is not None:
        error = f"{figures['ends_rmse']:.3g} of [-1, 1]"
        lines.append(f"round trip of the images at the ends: root mean square error {error}")
    return lines


def inverting(recipe: Recipe) -> Recipe:
    """``recipe`` with a grid that suits an inversion without clipping, if it says nothing of its own."""
    return recipe if recipe.grid is not None or recipe.calibrated else replace(recipe, grid="log-snr")


def check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded, with `ArgumentError`."""
    recipe = options.recipe
    recipe.check(options.common.label)
    if options.count < 2:
        raise ArgumentError(f"--count must be at least 2, both ends, got {options.count}")
    if (options.seeds is None) == (options.between is None):
        raise ArgumentError("the ends must be given by either --seeds A B or --between I J")
    if options.seeds is not None and options.data is not None:
        raise ArgumentError(f"--seeds needs no data, got {options.data}: give --between I J to use them")
    if options.between is not None and (recipe.sampler != "ddim" or recipe.eta):
        raise ArgumentError(
            f"--between inverts images with ddim and eta 0, got --sampler {recipe.sampler}"
            f"{f' --eta {recipe.eta}' if recipe.eta else ''}"
        )


def chosen(options: Options, between: tuple[int, int], model: Run, way: Way) -> Images:
    """The two images. Raises `ArgumentError` for a number that is not in the data."""
    dataset = data_of(model, options.data, options.common.label)
    if not all(0 <= i < len(dataset) for i in between):
        raise ArgumentError(
            f"--between must name images from 0 to {len(dataset) - 1}, got {between[0]} {between[1]}"
        )
    return Images.chosen(model, way, dataset, between, options.common.label)


def one_class(options: Options, model: Run, way: Way, images: Images | None) -> list[int] | None:
    """The class of each picture, the same for all. Raises `ArgumentError` where it is not known which."""
    from perrin.cli.recipe import drawn_classes

    if options.common.label is not None or way.class_names is None:
        return drawn_classes(options.common.label, way, options.count, model.folder.path)
    classes = None if images is None else images.classes
    if classes is None or classes[0] != classes[1]:
        found = "two seeds" if classes is None else f"images of classes {classes[0]} and {classes[1]}"
        raise ArgumentError(f"--label must name the class of the pictures between {found}")
    return [classes[0]] * options.count


def draw(
    options: Options,
    model: Run,
    way: Way,
    store: PictureFolder,
    images: Images | None,
    classes: list[int] | None,
) -> float | None:
    """Draw the pictures unless ``store`` has all; returns how often a network saw each, None if it has."""
    from perrin.cli.progress import Bar

    if len(store.done()) == options.count:
        return None
    rounds = way.sampler.network_calls * (1 if images is None else 2)
    with (
        Bar("interpolating", rounds) as bar,
        way.counted() as seen,
        model.network.register_forward_hook(lambda *called: bar.advance()),
    ):
        keep(store, 0, pictures(options, model, way, images, classes), model)
    return seen.rows / options.count


def pictures(
    options: Options, model: Run, way: Way, images: Images | None, classes: list[int] | None
) -> Tensor:
    """The pictures (count, C, H, W), in [-1, 1] but for what sampling without clipping leaves."""
    from perrin.editing import interpolate_data, interpolate_seeds
    from perrin.samplers import SamplerDDIM

    if images is not None:
        assert isinstance(way.sampler, SamplerDDIM)
        first, second = images.rows(model, (0, 1))
        how = sampling_options(model, way, classes, clip_denoised=False)
        return interpolate_data(
            way.sampler, way.network, first=first, second=second, count=options.count, options=how
        )
    assert options.seeds is not None
    return interpolate_seeds(
        way.sampler,
        way.network,
        model.folder.facts.shape,
        seeds=options.seeds,
        count=options.count,
        options=sampling_options(model, way, classes),
    )


def ends_error(x: list[Tensor], images: Images, model: Run) -> float:
    """Root mean square of what the first and the last picture of ``x`` miss the images by, in [-1, 1], as written."""
    import torch

    return float((torch.stack([x[0], x[-1]]) - images.rows(model, (0, 1)).cpu()).square().mean().sqrt())


def with_ends(x: list[Tensor], images: Images | None, model: Run) -> Tensor:
    """The row (1, columns, C, H, W) of the pictures, between the images where there are some."""
    import torch

    if images is not None:
        first, second = images.rows(model, (0, 1)).cpu()
        x = [first, *x, second]
    return torch.stack(x)[None]
