"""``perrin sample``: images from a run, as PNGs and a grid, or an .npz file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from perrin.cli.console import DeviceName, cost_text, note, pick_device, report
from perrin.cli.flags import check_at_least, parse
from perrin.cli.recipe import Recipe, Way, drawn_classes
from perrin.cli.trajectory import check_trajectory, claim_trajectory, shown, write_trajectory
from perrin.errors import ArgumentError

if TYPE_CHECKING:
    from perrin.build import Run
    from perrin.evaluation.samples import Store
    from perrin.samplers import Sample, SampleNoise, Sampler


@dataclass(frozen=True)
class Options:
    """Draw samples from a run. Sample i is the same for any batch size; the same command again goes on where it
    stopped."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 64
    """Number of samples."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Samples drawn at a time; it does not change them."""
    weights: str | None = None
    """Which weights: `model`, or an average such as `ema-0.9999`; by default the first average."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest."""
    label: str | None = None
    """Class, by name or number, of a conditional model, -1 for none if it was trained with --label-drop; by default
    the samples take the classes in turn."""
    out: Path | None = None
    """A folder, or a file ending in .npz; by default a folder below the run's samples/."""
    trajectory: Path | None = None
    """Also write how the first samples come about: a .png strip of x_t and the predicted x_0, or a .gif or .webp."""
    compile: bool = False
    """Compile the network first (torch.compile), which pays off for many samples on a GPU."""
    device: DeviceName = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(args: Sequence[str]) -> None:
    """Draw the samples that ``args`` ask for."""
    options = parse(Options, args, command="sample")
    check(options)
    from perrin.build import load_run
    from perrin.evaluation.samples import open_store

    model = load_run(
        options.run, weights=options.weights, step=options.checkpoint, device=pick_device(options.device)
    )
    way = options.recipe.way(model, compile_network=options.compile)
    classes = drawn_classes(options.label, way, options.count, model.folder.path)
    job = Job(options, model, way, classes)
    out = options.out or model.folder.samples_dir / job.name
    if options.trajectory is not None:
        claim_trajectory(options.trajectory, out, model.folder.facts)
    settings = job.settings(out)
    store = open_store(out, settings, model.folder.facts)
    done = store.done()
    if out.suffix == ".npz" and done and max(done) >= options.count:
        raise ArgumentError(
            f"{out} holds {max(done) + 1} samples, asked for {options.count}: choose another file"
        )
    missing = sorted(set(range(options.count)) - done)
    if options.compile:
        note("compiling the network: the first batch takes a minute or so longer")
    note(f"sampling with weights {model.weights} of step {model.step} into {out}")
    calls = job.draw(store, missing)
    paths = store.finish(options.count, classes) | job.write_trajectory()
    kept = options.count - len(missing)
    figures = {**settings, "run": str(options.run), "count": options.count, "kept": kept, **paths}
    report(figures | {"network_calls": calls}, job.lines(paths, kept, calls), as_json=options.json)


def check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded, with `ArgumentError`."""
    check_at_least(options, ("count", "batch_size"))
    if options.trajectory is not None:
        check_trajectory(options.trajectory)
    options.recipe.check(options.label)


@dataclass(frozen=True)
class Job:
    """What the command draws."""

    options: Options
    model: Run
    way: Way
    classes: list[int] | None

    @property
    def sampler(self) -> Sampler:
        """The sampler."""
        return self.way.sampler

    def settings(self, out: Path) -> dict[str, Any]:
        """What determines sample i; the run is named as seen from ``out``, so that both may move together."""
        return {
            "command": "sample",
            "run": os.path.relpath(self.model.folder.path, out),
            "step": self.model.step,
            "weights": self.model.weights,
            "seed": self.options.seed,
            "label": self.options.label,
            **self.options.recipe.settings(self.model, self.sampler),
        }

    @property
    def name(self) -> str:
        """A name made of the settings, for a folder, or for a file of what is not an image."""
        from perrin.evaluation.samples import has_pictures

        options, model = self.options, self.model
        first, *further = options.recipe.name_parts(self.sampler)
        parts = [first, model.weights, f"step{model.step}", *further]
        parts += [f"label-{options.label}"] if options.label is not None else []
        name = "-".join([*parts, f"seed{options.seed}"])
        return name if has_pictures(model.folder.facts) else f"{name}.npz"

    def draw(self, store: Store, missing: list[int]) -> float | None:
        """Draw the samples numbered ``missing``, a batch at a time, and keep each as soon as it is there.

        Returns how often a network saw each, None where there is nothing to draw.
        """
        import torch

        from perrin.cli.progress import Bar
        from perrin.data import to_levels

        size, levels = self.options.batch_size, self.model.folder.facts.levels
        with Bar("sampling", len(missing) * (len(self.sampler.times) - 1)) as bar, self.way.counted() as seen:
            for start in range(0, len(missing), size):
                indices = missing[start : start + size]
                x = torch.empty(0)
                for state in self.states(indices, self.start(indices)):
                    x = state["sample"]
                    bar.advance(len(indices))
                for i, values in zip(indices, to_levels(x, levels), strict=True):
                    store.write(i, values)
        return seen.rows / len(missing) if missing else None

    def start(self, indices: Sequence[int]) -> SampleNoise:
        """The noise of the samples numbered ``indices``."""
        from perrin.samplers import SampleNoise

        return SampleNoise(self.options.seed, indices)

    def states(self, indices: Sequence[int], noise: SampleNoise) -> Iterator[Sample]:
        """What the samples numbered ``indices`` go through, each state (B, *shape) in [-1, 1] at its end."""
        import torch

        shape, device = (len(indices), *self.model.folder.facts.shape), self.model.device
        classes = self.classes
        labels = None if classes is None else torch.tensor([classes[i] for i in indices], device=device)
        return self.way.sampler.sample_progressive(
            self.way.network,
            shape,
            noise=noise.initial(shape, device),
            noise_fn=noise,
            denoised_fn=self.way.denoised_fn,
            cond_fn=self.way.cond_fn(labels),
            guidance=self.way.guidance,
            model_kwargs=self.way.told(labels),
        )

    def write_trajectory(self) -> dict[str, str]:
        """Draw the first samples again for the picture of how they come about, if that is asked for."""
        path = self.options.trajectory
        if path is None:
            return {}
        indices = range(shown(path, self.options.count))
        states = list(self.states(indices, self.start(indices)))
        shape = (len(indices), *self.model.folder.facts.shape)
        write_trajectory(
            path, self.start(indices).initial(shape, self.model.device), states, self.model.folder.facts
        )
        return {"trajectory": str(path)}

    def lines(self, paths: dict[str, str], kept: int, calls: float | None) -> list[str]:
        """What the command says at its end."""
        options, model = self.options, self.model
        before = f", {kept} of them kept from before" if kept else ""
        count = len(self.sampler.times) - 1
        steps = f"{count}{' calibrated' * options.recipe.calibrated} step{'s' * (count > 1)}"
        return [
            f"{options.count} sample{'s' * (options.count > 1)}{before}: {', '.join(paths.values())}",
            f"{options.recipe.sampler}, {steps}{cost_text(calls)}, seed {options.seed}; "
            f"weights {model.weights} of step {model.step}",
        ]
