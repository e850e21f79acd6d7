"""``perrin inpaint``: a part of images drawn anew to fit the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from perrin.cli.console import many, report
from perrin.cli.editing import Common, Edit, Images, Job, edited, open_folder
from perrin.cli.flags import check_at_least, named_as_flags, parse
from perrin.cli.recipe import Recipe, Way
from perrin.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.build import Run
    from perrin.editing import SamplingOptions

Box = tuple[int, int, int, int]

MOST_STEPS = 100
"""Steps unless asked otherwise: resampling takes each of them several times."""


@dataclass(frozen=True)
class Options:
    """Draw a part of images anew to fit the rest, which is kept to the bit (RePaint). The model needs no training for
    it. By default ddpm in at most 100 steps. Each image's results are the same for any number of images, and the same
    command goes on where it stopped."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tyro.conf.Positional[str | None] = None
    """Images of the run's shape and levels; by default the part that the run held out."""
    mask: Path | None = None
    """What to fill: a picture, white where to fill (colours above half of the highest level on average, whatever the
    alpha), or an .npy array (H, W), not 0 where to fill."""
    box: Annotated[Box | None, tyro.conf.arg(metavar="TOP LEFT HEIGHT WIDTH")] = None
    """What to fill: a box, by the pixels above it and left of it, its height and its width."""
    resamples: int = 10
    """How often each step is taken: the more, the better the new part fits the rest."""
    jump: int = 1
    """Steps taken between going back; more than 1 fits worse at the same cost."""
    variations: int = 1
    """Results for each image."""
    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 8
    """Number of images, the first of the data."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: Recipe(sampler="ddpm"))
    seed: int = 0
    """Seed of the noise; variation v has the noise of seed + v."""
    batch_size: int = 64
    """Images at a time; it does not change them."""
    common: Annotated[Common, tyro.conf.arg(name="")] = field(default_factory=Common)


def run(args: Sequence[str]) -> None:
    """Fill what ``args`` ask for."""
    options = parse(Options, args, command="inpaint")
    check(options)
    import torch

    from perrin.editing import inpainting_moves

    model = options.common.load(options.run)
    fill = region(options, model)
    recipe = with_fewer_steps(options.recipe, model)
    way = recipe.way(model)
    with named_as_flags("jump"):
        moves = sum(s < t for t, s in inpainting_moves(way.sampler.times, options.resamples, options.jump))
    images = Images.load(model, way, options.data, options.common.label, count=options.count)
    job = Job("inpaint", model, way, images, options.variations, options.seed)
    settings = {
        "resamples": options.resamples,
        "jump": options.jump,
        "fill": fingerprint(fill),
        **job.settings,
    }
    store, settings = open_folder("inpaint", model, way, options.common, recipe=recipe, settings=settings)
    each = way.sampler.network_calls / (len(way.sampler.times) - 1)
    calls = job.edit(store, filling(options, way, fill), calls=moves * each, batch_size=options.batch_size)
    grid = job.grid(store, lambda x: [torch.where(fill.cpu(), 0.0, x)])
    how = f"{many(options.resamples, 'resample')}, jump {options.jump}"
    told = edited(job, options.run, store, settings=settings, calls=calls, how=how, grid=grid)
    report(*told, as_json=options.common.json)


def filling(options: Options, way: Way, fill: Tensor) -> Edit:
    """What fills images, as often as ``options`` ask for."""
    import torch

    from perrin.editing import inpaint

    def edit(x: Tensor, how: SamplingOptions) -> Tensor:
        results = [
            inpaint(
                way.sampler,
                way.network,
                x,
                fill=fill,
                resamples=options.resamples,
                jump=options.jump,
                options=replace(how, seed=how.seed + v),
            )
            for v in range(options.variations)
        ]
        return torch.stack(results, 1)

    return edit


def check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded, with `ArgumentError`."""
    options.recipe.check(options.common.label)
    check_at_least(options, ("resamples", "jump", "count", "variations", "batch_size"))
    if (options.mask is None) == (options.box is None):
        found = "neither" if options.mask is None else "both"
        raise ArgumentError(
            f"what to fill must be said by either --mask FILE or --box TOP LEFT HEIGHT WIDTH, got {found}"
        )


def with_fewer_steps(recipe: Recipe, model: Run) -> Recipe:
    """``recipe`` with a number of steps of its own, if it has none and would take all."""
    if not recipe.takes_all:
        return recipe
    return replace(recipe, steps=min(MOST_STEPS, model.diffusion.num_timesteps))


def region(options: Options, model: Run) -> Tensor:
    """Where to fill, (H, W) of bool on the model's device.

    Raises `ArgumentError` for a box or mask that does not fit the images, or leaves nothing to fill or to keep.
    """
    height, width = model.folder.facts.shape[1:]
    if options.mask is not None:
        return from_mask(options.mask, height, width).to(model.device)
    assert options.box is not None
    return from_box(options.box, height, width).to(model.device)


def from_box(box: Box, height: int, width: int) -> Tensor:
    """Where ``box`` lies, (H, W) of bool. Raises `ArgumentError` unless it lies within the image and leaves some."""
    import torch

    top, left, tall, wide = box
    if min(top, left) < 0 or min(tall, wide) < 1 or top + tall > height or left + wide > width:
        raise ArgumentError(
            f"--box {top} {left} {tall} {wide} (TOP LEFT HEIGHT WIDTH) must lie within the images, "
            f"{height} x {width} pixels (height x width)"
        )
    if tall == height and wide == width:
        raise ArgumentError(
            f"--box {top} {left} {tall} {wide} must leave some pixels to keep, got the whole image, "
            f"{height} x {width} pixels (height x width)"
        )
    fill = torch.zeros(height, width, dtype=torch.bool)
    fill[top : top + tall, left : left + wide] = True
    return fill


def from_mask(path: Path, height: int, width: int) -> Tensor:
    """What the mask in ``path`` marks, (H, W) of bool. Raises `ArgumentError` for another size, or all or nothing."""
    import torch

    from perrin.data.masks import load_mask, rule_of

    fill = torch.from_numpy(load_mask(path))
    if fill.shape != (height, width):
        raise ArgumentError(
            f"--mask {path} must be of the images' size, {height} x {width} pixels (height x width), "
            f"got {fill.shape[0]} x {fill.shape[1]}"
        )
    if not fill.any() or fill.all():
        found = "all of them to fill" if fill.any() else "all of them to keep"
        raise ArgumentError(
            f"--mask {path} must leave some pixels to fill and some to keep, got {found} ({rule_of(path)})"
        )
    return fill


def fingerprint(fill: Tensor) -> str:
    """A short hash of what is filled."""
    return blake2b(bytes(fill.flatten().tolist()), digest_size=6).hexdigest()
