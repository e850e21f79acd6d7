"""What the commands that measure the bound share: which chain, how many draws, and the draws batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perrin.cli.console import DeviceName, examples, note, pick_device
from perrin.cli.flags import check_at_least, flag_of
from perrin.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from perrin.build import Run
    from perrin.cli.progress import Bar
    from perrin.data import Dataset
    from perrin.diffusion import GaussianDiffusion
    from perrin.likelihood import Bound

DEFAULT_TERMS = 16


@dataclass(frozen=True)
class Effort:
    """How much is drawn."""

    terms: int | None = None
    """KL terms per example, drawn by importance, that estimate their sum; by default 16, or all if fewer."""
    exact: bool = False
    """Evaluate the KL terms of all timesteps."""
    decoder_draws: int = 4
    """Draws per example of the decoder's term, that of t = 0."""
    clip: bool = True
    """Clip predictions of x_0 to [-1, 1], as samplers do: it is a bound either way, and better so."""
    limit: int | None = None
    """Measure the first so many examples only."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Examples in memory at a time; it does not change the figures."""

    def check(self) -> None:
        """Raise `ArgumentError` for numbers below 1, and for terms that are both all and some."""
        check_at_least(self, ("terms", "decoder_draws", "limit", "batch_size"))
        if self.exact and self.terms is not None:
            raise ArgumentError(f"--exact takes all terms and --terms {self.terms} some: give one of them")

    def check_terms(self, most: int) -> None:
        """Raise `ArgumentError` for more terms than the ``most`` that a chain has."""
        if self.terms is not None and self.terms > most:
            raise ArgumentError(f"--terms must be from 1 to {most}, the chain's KL terms, got {self.terms}")

    def terms_of(self, chain: GaussianDiffusion) -> int | None:
        """How many KL terms to draw for an example; None is all of them."""
        wanted = DEFAULT_TERMS if self.terms is None else self.terms
        return None if self.exact or wanted >= chain.num_timesteps - 1 else wanted


@dataclass(frozen=True)
class Subject:
    """A run with the chain in which it is measured."""

    run: Run
    chain: GaussianDiffusion
    calibrated: bool = False

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        weights: str | None,
        checkpoint: int | None,
        device: DeviceName,
        steps: int | None = None,
        calibrated: bool = False,
    ) -> Subject:
        """The run at ``path`` as its flags ask for. Raises `RunError` or `ArgumentError` where it cannot be."""
        from perrin.build import load_run, run_chain

        run = load_run(path, weights=weights, step=checkpoint, device=pick_device(device))
        return cls(run, run_chain(run, steps=steps, calibrated=calibrated), calibrated)

    def data(self, path: str | None = None) -> Dataset:
        """The data set at ``path``, or the run's own; says where the network is not told classes that it knows.

        Raises `DataError` where it does not fit, or lacks classes which were never withheld in training.
        """
        from perrin.build import run_data

        dataset = run_data(self.run, path, withheld=True)
        if self.run.folder.config.data.conditional and dataset.labels is None:
            note(f"{path} has no classes: {self.run.folder.path} is told none, as --label-drop trained it")
        return dataset

    def conditional(self, dataset: Dataset) -> bool:
        """Whether the network is told the class of each example."""
        return self.run.folder.config.data.conditional and dataset.labels is not None

    def batch(self, dataset: Dataset, indices: Sequence[int]) -> tuple[Tensor, dict[str, Any] | None]:
        """The examples (B, ...) on the run's device, and what else the network is told."""
        from perrin.build import told_classes

        x, labels = dataset.batch(indices, self.run.device)
        classes = told_classes(self.run, dataset, labels, len(x))
        return x, None if classes is None else {"y": classes}

    @property
    def chain_text(self) -> str:
        """``T = 1000``, ``64 of T = 1000 steps``, with ``, calibrated`` if it is."""
        steps, total = self.chain.num_timesteps, self.run.diffusion.num_timesteps
        text = f"T = {total}" if steps == total else f"{steps} of T = {total} steps"
        return f"{text}, calibrated" if self.calibrated else text


class Calls:
    """Counts the images that networks have seen, and shows them on a bar."""

    def __init__(self) -> None:
        self.images = 0

    @contextmanager
    def counted(self, network: nn.Module, bar: Bar) -> Iterator[None]:
        """Within it, what ``network`` sees is counted."""

        def count(module: object, args: object, output: Tensor) -> None:
            self.images += len(output)
            bar.advance(len(output))

        with network.register_forward_hook(count):
            yield


def pilot(
    model: Subject, dataset: Dataset, first: Sequence[int], effort: Effort, calls: Calls
) -> Tensor | None:
    """Probabilities (T,) of the timesteps, from the examples ``first``; None where every term is evaluated."""
    from perrin.cli.progress import Bar
    from perrin.likelihood import term_probabilities
    from perrin.likelihood.bound import PILOT_IMAGES, PILOT_TIMES

    if effort.terms_of(model.chain) is None:
        return None
    x, told = model.batch(dataset, first[:PILOT_IMAGES])
    with Bar("pilot", 2 * PILOT_TIMES * len(x)) as bar, calls.counted(model.run.network, bar):
        return term_probabilities(
            model.chain,
            model.run.network,
            x,
            seed=effort.seed,
            clip_denoised=effort.clip,
            model_kwargs=told,
        )


def batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """``indices`` in order, ``size`` at a time."""
    return (indices[i : i + size] for i in range(0, len(indices), size))


def bound_of(
    model: Subject, dataset: Dataset, batch: Sequence[int], effort: Effort, probabilities: Tensor | None
) -> Bound:
    """The bound of the examples ``batch``."""
    from perrin.likelihood import bound

    x, told = model.batch(dataset, batch)
    return bound(
        model.chain,
        model.run.network,
        x,
        indices=batch,
        seed=effort.seed,
        terms=effort.terms_of(model.chain),
        decoder_draws=effort.decoder_draws,
        probabilities=probabilities,
        clip_denoised=effort.clip,
        model_kwargs=told,
    )


def calls_per_example(model: Subject, effort: Effort) -> int:
    """Network calls for one example, without the pilot's."""
    terms = effort.terms_of(model.chain)
    return (model.chain.num_timesteps - 1 if terms is None else terms) + effort.decoder_draws


def mean_with_errors(values: Tensor, errors: Tensor) -> tuple[float, float, float]:
    """The mean of ``values`` (n,) with Monte-Carlo ``errors`` (n,), its standard error, and its Monte-Carlo error.

    The standard error is that over the examples, which holds the Monte-Carlo noise, or the Monte-Carlo error where
    that is larger: few examples can lie closer together than their noise by chance, and the noise of terms of unlike
    size is overrated, which errs to the safe side. It is NaN for a single example.
    """
    from perrin.likelihood import mean_and_error

    mean, error = mean_and_error(values)
    noise = float(errors.square().sum().sqrt()) / len(errors)
    return mean, noise if noise > error else error, noise


def held_out(run: Run, count: int) -> list[int]:
    """The places in the run's data set, of ``count`` examples, that it was not trained on."""
    from perrin.data import split

    return [int(i) for i in split(count, run.folder.config.data.held_out)[1]]


def trained_on(run: Run, dataset: Dataset, indices: Sequence[int]) -> int | None:
    """How many of the examples ``indices`` the run was trained on; None where ``dataset`` is not its own."""
    own = run.folder.facts
    if not own.fingerprint or own.fingerprint != dataset.facts.fingerprint:
        return None
    return len(set(indices) - set(held_out(run, len(dataset))))


def flattered_text(name: str, trained: int | None, count: int) -> str | None:
    """A warning where ``name`` was trained on some of ``count`` examples that are measured."""
    if not trained:
        return None
    return f"{name} was trained on {trained} of these {examples(count)}, which flatters it"


def given_class_text(conditional: bool) -> str:
    """What follows the name of a likelihood where the network was told the class."""
    return " of each example given its class" if conditional else ""


def told_alike(datasets: Sequence[Dataset]) -> list[Dataset]:
    """The ``datasets``, all without their classes if one has none, so that the network is told as much of each."""
    if all(one.labels is not None for one in datasets):
        return list(datasets)
    return [replace(one, labels=None, facts=replace(one.facts, class_names=None)) for one in datasets]


def marks(weights: str | None, checkpoint: int | None, limit: int | None) -> str:
    """What the name of a default table says of the flags that were given: ``-model-step-400-first-10``."""
    found = {f"-{weights}": weights, f"-step-{checkpoint}": checkpoint, f"-first-{limit}": limit}
    return "".join(mark for mark, flag in found.items() if flag is not None)


def replacing(paths: Iterable[Path | None]) -> None:
    """Say which of ``paths``, whose names nobody chose, hold an earlier measurement."""
    for path in paths:
        if path is not None and path.exists():
            note(f"replacing {path}")


def given(options: object, names: Sequence[str]) -> list[str]:
    """Which of the fields ``names`` differ from their default, as flags."""
    known = {field.name: field.default for field in fields(options)}  # type: ignore[arg-type]  # a dataclass
    return [flag_of(name) for name in names if getattr(options, name) != known[name]]


def finite(value: float) -> float | None:
    """``value``, or None where it is not known."""
    return value if isfinite(value) else None
