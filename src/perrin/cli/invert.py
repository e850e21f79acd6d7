"""``perrin invert``: the noise that data come from, and how exactly they come back from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from perrin.cli.console import DeviceName, examples, many, note, pick_device, report
from perrin.cli.editing import data_of
from perrin.cli.flags import check_at_least, named_as_flags, parse
from perrin.cli.grids import GridFlag
from perrin.cli.measure import batches, finite, held_out
from perrin.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from perrin.build import Run
    from perrin.data import Dataset
    from perrin.evaluation.latents import Settings
    from perrin.evaluation.round_trips import RoundTrips
    from perrin.samplers.bdia import SamplerBDIA
    from perrin.samplers.ddim import SamplerDDIM
    from perrin.samplers.grids import GridName

Method = Literal["ddim", "fixed-point", "bdia"]
"""The keys of `METHODS`, written out for ``--help``."""

Told = dict[str, Any] | None

DEFAULT_STEPS = 50


@dataclass(frozen=True)
class How:
    """How data are inverted, by which weights, and how many."""

    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 64
    """The first so many examples."""
    grid: GridFlag = "log-snr"
    """Where the steps lie. Nothing is clipped, so that noise beyond sigma / alpha = 80, which log-snr and karras
    leave out, would blow up the network's errors."""
    iterations: int = 30
    """Most network calls of a step of fixed-point."""
    tolerance: float = 1e-5
    """Residual below which a step of fixed-point has converged, as a root mean square of data in [-1, 1]."""
    precision: Literal["auto", "float32", "float64"] = "auto"
    """What to compute in; by default float64 for bdia, else float32."""
    label: str | None = None
    """Class of all examples, by name or number, or -1 for none; by default each has its own."""
    weights: str | None = None
    """Which weights: `model`, or an average such as `ema-0.9999`; by default the first average."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest."""
    batch_size: int = 64
    """Examples in memory at a time; it does not change what they become, up to rounding."""
    device: DeviceName = "auto"
    """Where to compute."""

    def check(self) -> None:
        """Refuse what can be refused before anything is loaded, with `ArgumentError`."""
        check_at_least(self, ("count", "iterations", "batch_size"))
        if not self.tolerance >= 0:
            raise ArgumentError(f"--tolerance must be at least 0, got {self.tolerance}")

    def precision_of(self, method: Method) -> str:
        """``float32`` or ``float64``."""
        return METHODS[method].precision if self.precision == "auto" else self.precision


@dataclass(frozen=True)
class Options:
    """Find the noise x_T that the run's deterministic sampler turns into the given data, and say how exactly it does.

    `ddim` is naive: its error falls as 1 / steps. `fixed-point` solves each step of DDIM and tells what is left, or
    that it did not converge. `bdia` keeps two states, which bring the data back up to rounding.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tyro.conf.Positional[str | None] = None
    """Data of the run's shape and levels; by default the part that the run held out."""
    steps: int | None = None
    """Number of steps, 1 to T; by default 50, or T if fewer."""
    method: Method = "bdia"
    """How to invert."""
    how: How = field(default_factory=How)
    out: Path | None = None
    """.npz file of the latents, which `perrin reconstruct --latents` reads; by default one in the run's folder, such
    as latents-bdia-50-steps-1f0c9a3e.npz, where the last part stands for the data and all settings."""
    json: bool = False
    """Print one JSON object instead of text."""


class Up(NamedTuple):
    """What a batch was inverted to."""

    states: tuple[Tensor, ...]
    """Noisiest first."""
    residuals: Tensor | None
    """The largest of each example, (B,)."""
    calls: int


class Trips(NamedTuple):
    """Examples that went up and came back, on the CPU."""

    states: tuple[Tensor, ...]
    classes: Tensor | None
    figures: RoundTrips
    x: Tensor
    back: Tensor


@dataclass(frozen=True)
class Journey:
    """The way up and back of a run's data."""

    run: Run
    method: Method
    steps: int
    grid: GridName
    precision: str
    iterations: int = How.iterations
    tolerance: float = How.tolerance

    @property
    def dtype(self) -> torch.dtype:
        """What the network and the data are cast to."""
        import torch

        return torch.float64 if self.precision == "float64" else torch.float32

    def up(self, x: Tensor, told: Told) -> Up:
        """``x`` (B, ...) inverted."""
        self.run.network.to(self.dtype)
        return METHODS[self.method].up(self, x.to(self.dtype), told)

    def down(self, states: tuple[Tensor, ...], told: Told) -> Tensor:
        """The data (B, ...) that ``states`` come back to."""
        self.run.network.to(self.dtype)
        return METHODS[self.method].down(self, states, told)

    @property
    def calls_down(self) -> int:
        """Network calls of the way back: of several states, all but one save a call."""
        return self.steps - (METHODS[self.method].states - 1)

    def check(self) -> None:
        """Raise `ArgumentError` for a number of steps that there is not."""
        fewest = METHODS[self.method].states
        if 0 < self.steps < fewest:
            raise ArgumentError(f"--steps must be at least {fewest} for {self.method}, got {self.steps}")
        _ = self.ddim

    @property
    def ddim(self) -> SamplerDDIM:
        """DDIM with these steps."""
        from perrin.samplers.ddim import SamplerDDIM

        return SamplerDDIM(self.run.diffusion, self.steps, grid=self.grid)

    @property
    def bdia(self) -> SamplerBDIA:
        """BDIA with these steps."""
        from perrin.samplers.bdia import SamplerBDIA

        return SamplerBDIA(self.run.diffusion, self.steps, grid=self.grid)


def _naive(journey: Journey, x: Tensor, told: Told) -> Up:
    return Up((journey.ddim.invert(journey.run.network, x, model_kwargs=told),), None, journey.steps)


def _solved(journey: Journey, x: Tensor, told: Told) -> Up:
    from perrin.samplers.inversion import FixedPoint

    search = FixedPoint(journey.ddim, journey.iterations, journey.tolerance)
    found = search.invert(journey.run.network, x, model_kwargs=told)
    return Up((found.noise,), found.residuals.amax(0), found.network_calls)


def _paired(journey: Journey, x: Tensor, told: Told) -> Up:
    states = journey.bdia.invert(journey.run.network, x, model_kwargs=told)
    return Up(tuple(states), None, journey.steps)


def _sampled(journey: Journey, states: tuple[Tensor, ...], told: Told) -> Tensor:
    (noise,) = states
    return journey.ddim.sample(
        journey.run.network, noise.shape, noise=noise, clip_denoised=False, model_kwargs=told
    )


def _sampled_from_pair(journey: Journey, states: tuple[Tensor, ...], told: Told) -> Tensor:
    from perrin.samplers.bdia import BDIAState

    return journey.bdia.sample_from(journey.run.network, BDIAState(*states), model_kwargs=told)


class Inverter(NamedTuple):
    """A method: the way up, the way down, and what they need."""

    up: Callable[[Journey, Tensor, Told], Up]
    down: Callable[[Journey, tuple[Tensor, ...], Told], Tensor] = _sampled
    states: int = 1
    """How many are kept of an example, each at a time of its own: there are no fewer steps."""
    precision: str = "float32"
    """By default."""
    searches: bool = False
    """Whether the latents depend on how long and how closely they are searched for."""


METHODS: dict[str, Inverter] = {
    "ddim": Inverter(_naive),
    "fixed-point": Inverter(_solved, searches=True),
    "bdia": Inverter(_paired, _sampled_from_pair, states=2, precision="float64"),
}


@dataclass(frozen=True)
class Given:
    """Examples to invert: places in a data set, and the class that the network is told for each."""

    run: Run
    dataset: Dataset
    indices: Sequence[int]
    label: int | None

    @classmethod
    def load(cls, run: Run, data: str | None, how: How) -> Given:
        """Those of ``data``, or held out by the run. Raises `DataError` or `ArgumentError` where they do not fit."""
        label = None if how.label is None else class_number(how.label, run)
        dataset = data_of(run, data, how.label)
        indices = held_out(run, len(dataset)) if data is None else range(len(dataset))
        return cls(run, dataset, indices[: how.count], label)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The examples (B, ...) at ``indices`` and their classes (B,)."""
        import torch

        from perrin.build import class_numbers

        x, labels = self.dataset.batch(indices, self.run.device)
        if self.label is not None:
            return x, torch.full((len(x),), self.label, device=x.device)
        return x, class_numbers(self.run, self.dataset, labels)

    def travel(self, journey: Journey, batch_size: int) -> Trips:
        """All examples up and back, a batch at a time."""
        import torch

        from perrin.cli.progress import Bar
        from perrin.evaluation.round_trips import round_trips

        xs, backs, residuals, states, classes, calls = [], [], [], [], [], 0
        with Bar(f"{journey.method}, {many(journey.steps, 'step')}", len(self.indices)) as bar:
            for indices in batches(self.indices, batch_size):
                x, labels = self.batch(indices)
                found = journey.up(x, told(labels))
                xs.append(x.cpu())
                backs.append(journey.down(found.states, told(labels)).cpu())
                states.append([state.cpu() for state in found.states])
                residuals.append(
                    x.new_full((len(x),), torch.nan) if found.residuals is None else found.residuals
                )
                classes += [] if labels is None else [labels.cpu()]
                calls = max(calls, found.calls + journey.calls_down)
                bar.advance(len(x))
        x, back = torch.cat(xs), torch.cat(backs)
        figures = round_trips(
            journey.method,
            journey.steps,
            x,
            back,
            levels=self.run.folder.facts.levels,
            residuals=torch.cat(residuals).cpu(),
            tolerance=journey.tolerance,
            network_calls=calls,
        )
        together = tuple(torch.cat(parts) for parts in zip(*states, strict=True))
        return Trips(together, torch.cat(classes) if classes else None, figures, x, back)


def run(args: Sequence[str]) -> None:
    """Invert what ``args`` ask for."""
    options = parse(Options, args, command="invert")
    options.how.check()
    from perrin.evaluation.latents import Latents, claim_latents

    run = load(options.run, options.how)
    steps = min(DEFAULT_STEPS, run.diffusion.num_timesteps) if options.steps is None else options.steps
    journey = journey_of(run, options.method, steps, options.how)
    given = Given.load(run, options.data, options.how)
    settings = settings_of(journey)
    out = options.out or run.folder.path / default_name(settings, journey, given)
    claim_latents(out)
    note(f"inverting {examples(len(given.indices))} with weights {run.weights} of step {run.step}")
    trips = given.travel(journey, options.how.batch_size)
    Latents(settings, trips.states, list(given.indices), trips.classes).write(out)
    figures = asdict(settings) | asdict(trips.figures) | {"tolerance": journey.tolerance, "latents": str(out)}
    report(figures, [*describe(trips.figures, journey.tolerance), f"latents: {out}"], as_json=options.json)


def default_name(settings: Settings, journey: Journey, given: Given) -> str:
    """A name made of all that determines the latents: other data or settings have another."""
    search = [journey.iterations, journey.tolerance] if METHODS[journey.method].searches else []
    data = [given.dataset.facts.fingerprint, list(given.indices), given.label]
    digest = blake2b(json.dumps([asdict(settings), search, data]).encode(), digest_size=4).hexdigest()
    return f"latents-{settings.method}-{settings.steps}-steps-{digest}.npz"


def load(path: Path, how: How) -> Run:
    """The run at ``path`` as the flags ask for."""
    from perrin.build import load_run

    return load_run(path, weights=how.weights, step=how.checkpoint, device=pick_device(how.device))


def journey_of(run: Run, method: Method, steps: int, how: How) -> Journey:
    """The way of ``method``. Raises `ArgumentError` for a number of steps that there is not."""
    journey = Journey(run, method, steps, how.grid, how.precision_of(method), how.iterations, how.tolerance)
    with named_as_flags("steps"):
        journey.check()
    return journey


def settings_of(journey: Journey) -> Settings:
    """What `perrin.evaluation.latents` keeps of ``journey``."""
    import torch

    from perrin.codec.identity import model_hash
    from perrin.evaluation.latents import Settings

    run = journey.run
    return Settings(
        method=journey.method,
        steps=journey.steps,
        grid=journey.grid,
        precision=journey.precision,
        weights=run.weights,
        step=run.step,
        model=model_hash(run.diffusion, run.network.to(torch.float32)),
    )


def told(classes: Tensor | None) -> Told:
    """What the network is told beside x and t."""
    return None if classes is None else {"y": classes}


def class_number(label: str, run: Run) -> int:
    """The class that ``label`` names, -1 for none. Raises `ArgumentError` where the run has not got it."""
    config, names = run.folder.config, run.folder.facts.class_names or ()
    if not config.data.conditional:
        raise ArgumentError(f"--label {label}: the model of {run.folder.path} has no classes")
    if label in names:
        return names.index(label)
    if label == "-1" and config.training.label_drop > 0:
        return -1
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    none = ", or -1" if config.training.label_drop > 0 else ""
    raise ArgumentError(f"--label {label}: expected a class name, 0 to {len(names) - 1}{none}")


def describe(found: RoundTrips, tolerance: float) -> list[str]:
    """The figures for people."""
    in_levels = finite(found.rmse_levels)
    size = f"{found.rmse:.3g} of [-1, 1]" + ("" if in_levels is None else f", {in_levels:.3g} levels")
    lines = [
        f"{found.method}, {many(found.steps, 'step')}, {examples(found.n)}, "
        f"{many(found.network_calls, 'network call')}",
        f"round trip: root mean square error {size}; largest {found.largest_error:.3g}",
    ]
    if finite(found.exact_share) is not None:
        lines.append(f"exactly restored: {found.exact_share:.2%} of the values")
    if finite(found.largest_residual) is not None:
        verdict = "converged" if found.converged == found.n else "NOT CONVERGED"
        count = f"{found.converged:g} of {found.n} examples" if found.converged < found.n else "all examples"
        lines.append(f"{verdict}: {count} to {tolerance:g}; largest residual {found.largest_residual:.3g}")
    return lines
