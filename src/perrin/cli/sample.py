"""``perrin sample``: images from a run, as PNGs and a grid, or an .npz file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from perrin.cli.console import DeviceName, note, pick_device, report
from perrin.cli.flags import parse
from perrin.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.build import Run
    from perrin.evaluation.samples import Store
    from perrin.samplers import SamplerDDIM, SamplerDDPM

DEFAULT_DDIM_STEPS = 50


@dataclass(frozen=True)
class Options:
    """Draw samples from a run. Sample i is the same for any batch size; the same command again goes on where it
    stopped."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 64
    """Number of samples."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """Which sampler."""
    steps: int | None = None
    """Number of steps, 1 to T; by default 50 (or T, if fewer) for ddim and T for ddpm."""
    calibrated: bool = False
    """Use the timesteps of `perrin calibrate`, and for ddpm its variances too; without --steps, as many as gave the
    best bound. They are chosen for the bound, not for the looks."""
    eta: float | None = None
    """Share of fresh noise in each step of ddim, 0 to 1; by default 0."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Samples drawn at a time; it does not change them."""
    weights: str | None = None
    """Which weights: `model`, or an average such as `ema-0.9999`; by default the first average."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest."""
    label: str | None = None
    """Class, by name or number, of a conditional model; by default the samples take the classes in turn."""
    out: Path | None = None
    """A folder, or a file ending in .npz; by default a folder below the run's samples/."""
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
    sampler = make_sampler(options, model)
    steps = len(sampler.times) - 1
    classes = class_labels(options.label, model, options.count)
    out = options.out or model.folder.samples_dir / default_name(options, model, steps)
    settings = settings_of(options, model, steps=steps, out=out)
    store = open_store(out, settings, model.folder.facts)
    done = store.done()
    if out.suffix == ".npz" and done and max(done) >= options.count:
        raise ArgumentError(
            f"{out} holds {max(done) + 1} samples, asked for {options.count}: choose another file"
        )
    missing = sorted(set(range(options.count)) - done)
    note(f"sampling with weights {model.weights} of step {model.step} into {out}")
    draw(options, model, sampler, store=store, missing=missing, classes=classes)
    paths = store.finish(options.count, classes)
    kept = options.count - len(missing)
    figures = {**settings, "run": str(options.run), "count": options.count, "kept": kept, **paths}
    how = (
        f"{options.sampler}, {steps}{' calibrated' if options.calibrated else ''} steps, seed {options.seed}"
    )
    lines = [
        f"{options.count} samples{f', {kept} of them kept from before' if kept else ''}: {', '.join(paths.values())}",
        f"{how}; weights {model.weights} of step {model.step}",
    ]
    report(figures, lines, as_json=options.json)


def check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded, with `ArgumentError`."""
    if options.count < 1:
        raise ArgumentError(f"--count must be at least 1, got {options.count}")
    if options.batch_size < 1:
        raise ArgumentError(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.eta is not None and options.sampler != "ddim":
        raise ArgumentError(
            f"--eta belongs to --sampler ddim, got --sampler {options.sampler} --eta {options.eta}"
        )
    if options.eta is not None and not 0 <= options.eta <= 1:
        raise ArgumentError(f"--eta must lie between 0 and 1, got {options.eta}")


def number_of_steps(options: Options, num_timesteps: int) -> int:
    """How many steps to take. Raises `ArgumentError` for a number outside 1 to T."""
    if options.steps is None:
        return num_timesteps if options.sampler == "ddpm" else min(DEFAULT_DDIM_STEPS, num_timesteps)
    if not 1 <= options.steps <= num_timesteps:
        raise ArgumentError(
            f"--steps must lie between 1 and {num_timesteps}, the run's number of timesteps, got {options.steps}"
        )
    return options.steps


def make_sampler(options: Options, model: Run) -> SamplerDDIM | SamplerDDPM:
    """The sampler. Raises `ArgumentError` for a number of steps that there is not, `RunError` without calibration."""
    from perrin.build import run_chain
    from perrin.samplers import SamplerDDIM, SamplerDDPM

    if options.calibrated:
        chain = run_chain(model, steps=options.steps, calibrated=True)
        steps = chain.num_timesteps
    else:
        chain = model.diffusion
        steps = number_of_steps(options, chain.num_timesteps)
    if options.sampler == "ddpm":
        return SamplerDDPM(chain, steps)
    return SamplerDDIM(chain, steps, eta=options.eta or 0.0)


def class_labels(label: str | None, model: Run, count: int) -> list[int] | None:
    """The class of each sample; None for an unconditional model. Raises `ArgumentError` for an unknown class."""
    names = model.folder.facts.class_names
    if not model.folder.config.data.conditional or names is None:
        if label is not None:
            raise ArgumentError(f"--label {label}: the model of {model.folder.path} has no classes")
        return None
    if label is None:
        return [i % len(names) for i in range(count)]
    if label in names:
        return [names.index(label)] * count
    if label.isdecimal() and int(label) < len(names):
        return [int(label)] * count
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    raise ArgumentError(f"--label {label}: expected 0 to {len(names) - 1} or a class name ({shown})")


def settings_of(options: Options, model: Run, *, steps: int, out: Path) -> dict[str, Any]:
    """What determines sample i; the run is named as seen from ``out``, so that both may move together."""
    return {
        "run": os.path.relpath(model.folder.path, out),
        "step": model.step,
        "weights": model.weights,
        "sampler": options.sampler,
        "steps": steps,
        "eta": eta_of(options),
        "seed": options.seed,
        "label": options.label,
        "calibration": calibration_of(model) if options.calibrated else None,
    }


def calibration_of(model: Run) -> str:
    """A short hash of the run's calibration, which changes the samples when it is made anew."""
    return blake2b(model.folder.calibration_path.read_bytes(), digest_size=6).hexdigest()


def eta_of(options: Options) -> float | None:
    """The eta of ddim, None for ddpm."""
    return None if options.sampler == "ddpm" else options.eta or 0.0


def default_name(options: Options, model: Run, steps: int) -> str:
    """A name made of the settings, for a folder, or for a file of what is not an image."""
    from perrin.evaluation.samples import has_pictures

    parts = [f"{options.sampler}{steps}", model.weights, f"step{model.step}"]
    parts += ["calibrated"] if options.calibrated else []
    parts += [f"eta{options.eta:g}"] if options.eta else []
    parts += [f"label-{options.label}"] if options.label is not None else []
    name = "-".join([*parts, f"seed{options.seed}"])
    return name if has_pictures(model.folder.facts) else f"{name}.npz"


def draw(
    options: Options,
    model: Run,
    sampler: SamplerDDIM | SamplerDDPM,
    *,
    store: Store,
    missing: list[int],
    classes: list[int] | None,
) -> None:
    """Draw the samples numbered ``missing``, a batch at a time, and keep each as soon as it is there."""
    from perrin.cli.progress import Bar
    from perrin.data import to_levels

    batches = [missing[i : i + options.batch_size] for i in range(0, len(missing), options.batch_size)]
    with Bar("sampling", len(batches) * (len(sampler.times) - 1)) as bar:
        hook = model.network.register_forward_hook(lambda *_: bar.advance())
        for indices in batches:
            x = sample_batch(model, sampler, indices=indices, classes=classes, seed=options.seed)
            for i, values in zip(indices, to_levels(x, model.folder.facts.levels), strict=True):
                store.write(i, values)
        hook.remove()


def sample_batch(
    model: Run,
    sampler: SamplerDDIM | SamplerDDPM,
    *,
    indices: list[int],
    classes: list[int] | None,
    seed: int,
) -> Tensor:
    """The samples numbered ``indices``, (B, *shape) in [-1, 1]."""
    import torch

    from perrin.samplers import SampleNoise

    shape, device = (len(indices), *model.folder.facts.shape), model.device
    noise = SampleNoise(seed, indices)
    labels = None if classes is None else torch.tensor([classes[i] for i in indices], device=device)
    return sampler.sample(
        model.network,
        shape,
        noise=noise.initial(shape, device),
        noise_fn=noise,
        model_kwargs=None if labels is None else {"y": labels},
    )
