"""``perrin vary``: images like given ones, by noise and sampling from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from perrin.cli.console import many, report
from perrin.cli.editing import Common, Images, Job, edited, open_folder
from perrin.cli.flags import check_at_least, parse
from perrin.cli.recipe import Recipe
from perrin.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.editing import SamplingOptions


@dataclass(frozen=True)
class Options:
    """Noise images to an intermediate time and sample from there: variations of a photograph, or a picture out of a
    rough drawing. Each image's results are the same for any number of images, and the same command goes on
    where it stopped."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tyro.conf.Positional[str | None] = None
    """Images of the run's shape and levels; by default the part that the run held out."""
    strength: float = 0.5
    """Share of noise in the variance of what sampling begins with, above 0 and at most 1, the same for every sampler:
    at 0.1 details change, at 0.5 there is as much noise as image, at 1 nothing of it is left."""
    variations: int = 4
    """Variations of each image."""
    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 8
    """Number of images, the first of the data."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    seed: int = 0
    """Seed of the noise; variation v has the noise of seed + v."""
    batch_size: int = 64
    """Images at a time; it does not change them."""
    common: Annotated[Common, tyro.conf.arg(name="")] = field(default_factory=Common)


def run(args: Sequence[str]) -> None:
    """Make the variations that ``args`` ask for."""
    options = parse(Options, args, command="vary")
    check(options)
    from perrin.editing import begun_at, time_of_strength, vary

    model = options.common.load(options.run)
    way = options.recipe.way(model)
    images = Images.load(model, way, options.data, options.common.label, count=options.count)
    job = Job("vary", model, way, images, options.variations, options.seed)
    later = begun_at(way.sampler, time_of_strength(way.sampler.diffusion, options.strength))
    settings = {"strength": options.strength, **job.settings}
    store, settings = open_folder(
        "vary", model, way, options.common, recipe=options.recipe, settings=settings
    )

    def edit(x: Tensor, how: SamplingOptions) -> Tensor:
        return vary(
            way.sampler, way.network, x, strength=options.strength, variations=options.variations, options=how
        )

    calls = job.edit(store, edit, calls=later.network_calls, batch_size=options.batch_size)
    grid = job.grid(store, lambda x: [])
    whole = many(len(way.sampler.times) - 1, "step")
    how = f"strength {options.strength:g}, {len(later.times) - 1} of {whole}"
    told = edited(job, options.run, store, settings=settings, calls=calls, how=how, grid=grid)
    report(*told, as_json=options.common.json)


def check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded, with `ArgumentError`."""
    options.recipe.check(options.common.label)
    check_at_least(options, ("count", "variations", "batch_size"))
    if not 0 < options.strength <= 1:
        raise ArgumentError(f"--strength must be above 0 and at most 1, got {options.strength}")
    if options.recipe.calibrated and options.recipe.sampler == "ddpm":
        raise ArgumentError(
            "--calibrated gives ddpm variances for all of its steps and `perrin vary` takes some: "
            "give one of them up, or another --sampler"
        )
