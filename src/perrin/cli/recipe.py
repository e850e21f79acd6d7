"""How samples are drawn: the flags that the commands which sample share, and what they become."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from perrin.cli.flags import flag_of, named_as_flags
from perrin.cli.grids import GridOrTimes, grid_text
from perrin.errors import ArgumentError, RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from perrin.build import Run
    from perrin.guidance import Guidance
    from perrin.reverse import CondFn, Model
    from perrin.samplers import Sampler

SamplerName = Literal[
    "ddpm",
    "ddim",
    "heun",
    "dpm-2m",
    "dpm-2s",
    "dpm-3m",
    "dpm-2m-sde",
    "unipc-2",
    "unipc-3",
    "deis",
    "bdia",
]
"""The keys of `perrin.samplers.SAMPLERS`, written out for ``--help``."""

DEFAULT_STEPS: dict[str, int | None] = {"ddim": 50, "ddpm": None}
"""Steps unless asked otherwise, if they are not `FAST_STEPS`; None is all."""
FAST_STEPS = 20

OWNERS = {"eta": "ddim", "churn": "heun"}
"""The samplers to which flags of their own belong."""

AUTOGUIDANCE_SCALE = 2.0

NO_LABEL = -1
"""`perrin.networks.NO_CLASS`."""

MOST = 1e6
"""The largest scale: beyond it float32 overflows."""


@dataclass
class Seen:
    """How many rows networks have seen: a batch of 64 is 64, and guidance may show each twice."""

    rows: int = 0


class Way(NamedTuple):
    """A recipe for one run."""

    network: Model
    sampler: Sampler
    guidance: tuple[Guidance, ...]
    denoised_fn: Callable[[Tensor], Tensor] | None
    weaker: nn.Module | None
    classifier: nn.Module | None
    classifier_scale: float
    class_names: tuple[str, ...] | None
    """Of what samples can be drawn: a conditional run's classes, or the classifier's; None without either."""
    conditional: bool
    withholds: bool
    """Whether the run was trained without its classes, too."""

    def told(self, labels: Tensor | None) -> dict[str, Tensor] | None:
        """What the network is told, for samples of classes ``labels`` (B,)."""
        return {"y": labels} if labels is not None and self.conditional else None

    def cond_fn(self, labels: Tensor | None) -> CondFn | None:
        """The classifier's gradient towards ``labels`` (B,)."""
        from perrin.guidance import classifier_gradient

        if self.classifier is None:
            return None
        return classifier_gradient(self.classifier, self.classifier_scale, y=labels)

    @contextmanager
    def counted(self) -> Iterator[Seen]:
        """Within it, what the networks see is counted."""
        from torch import nn

        seen = Seen()

        def count(module: object, args: object, output: Tensor) -> None:
            seen.rows += len(output)

        networks = (self.network, self.weaker, self.classifier)
        hooks = [
            network.register_forward_hook(count) for network in networks if isinstance(network, nn.Module)
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Recipe:
    """How samples are drawn."""

    sampler: SamplerName = "dpm-2m-sde"
    """Which sampler: ddpm and dpm-2m-sde add noise in each step, and so do ddim with --eta and heun with --churn.
    Below 10 network calls dpm-2m is better than the default."""
    steps: int | None = None
    """Number of steps, 1 to T; by default 20, 50 for ddim, T for ddpm. heun and dpm-2s call the
    network twice a step."""
    grid: GridOrTimes = None
    """Where the steps lie, by name or as falling times from T - 1 to 0, such as 999,500,99.5,0, one for each step; by
    default the sampler's own choice."""
    calibrated: bool = False
    """Use the timesteps of `perrin calibrate`, and for ddpm its variances too; without --steps, as many as gave the
    best bound. They are chosen for the bound, not for the looks."""
    eta: float | None = None
    """Share of fresh noise in each step of ddim, 0 to 1; by default 0."""
    churn: float | None = None
    """Noise that heun adds before its steps, over all of them (EDM's S_churn); by default 0."""
    guidance_scale: float = 1.0
    """Classifier-free guidance towards the class, for a model trained with --label-drop: 1 is none, more is
    stronger."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where sigma / alpha, the noise beside data in [-1, 1], lies between these two; by default
    everywhere."""
    guidance_rescale: float = 0.0
    """Share, 0 to 1, by which guided predictions are brought back to the contrast of plain ones."""
    autoguidance: int | None = None
    """Guide away from the weaker weights of the checkpoint of this step."""
    autoguidance_scale: float | None = None
    """How far from the weaker weights: 1 is none; by default 2."""
    classifier: Path | None = None
    """Guide by this classifier from `perrin train-classifier`."""
    classifier_scale: float | None = None
    """How strongly the classifier pulls; by default 1."""
    threshold: float | None = None
    """Dynamic threshold: the share of values, such as 0.995, that each prediction is scaled to keep within
    the range."""

    def check(self, label: str | None = None) -> None:
        """Refuse what can be refused before anything is loaded, with `ArgumentError`; ``label`` is --label's."""
        for name, owner in OWNERS.items():
            value = getattr(self, name)
            if value is not None and self.sampler != owner:
                raise ArgumentError(
                    f"--{name} belongs to --sampler {owner}, got --sampler {self.sampler} --{name} {value}"
                )
        if self.calibrated and self.grid is not None:
            raise ArgumentError(
                f"--calibrated has timesteps of its own: give --grid {grid_text(self.grid)} or it, not both"
            )
        if self.guidance_scale == 1 and (self.guidance_interval or self.guidance_rescale):
            raise ArgumentError("--guidance-interval and --guidance-rescale need --guidance-scale, got 1")
        for name in ("autoguidance", "classifier"):
            scale = getattr(self, f"{name}_scale")
            if scale is not None and getattr(self, name) is None:
                raise ArgumentError(f"--{name}-scale {scale:g} needs --{name}, which is not given")
        self._check_ranges()
        if label == str(NO_LABEL):
            self._check_guides_to_none()

    def _check_guides_to_none(self) -> None:
        scale = None if self.guidance_scale == 1 else f"{self.guidance_scale:g}"
        for flag, value in {"--guidance-scale": scale, "--classifier": self.classifier}.items():
            if value is not None:
                raise ArgumentError(
                    f"{flag} {value} guides to a class, got --label {NO_LABEL}, which is none: leave out one of them"
                )

    def _check_ranges(self) -> None:
        ranges = {
            "steps": (1, math.inf),
            "eta": (0, 1),
            "churn": (0, MOST),
            "guidance_scale": (-MOST, MOST),
            "guidance_rescale": (0, 1),
            "autoguidance_scale": (-MOST, MOST),
            "classifier_scale": (-MOST, MOST),
            "threshold": (0, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                expected = f"at least {low}" if high == math.inf else f"from {low:g} to {high:g}"
                raise ArgumentError(f"{flag_of(name)} must be {expected}, got {value:g}")
        if self.threshold == 0:
            raise ArgumentError("--threshold must be above 0, got 0")
        if (
            self.guidance_interval is not None
            and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]
        ):
            low, high = self.guidance_interval
            raise ArgumentError(
                f"--guidance-interval must be two rising numbers from 0 on, got {low:g} {high:g}"
            )

    @property
    def takes_all(self) -> bool:
        """Whether every timestep is a step, since nothing else is asked for."""
        unasked = self.steps is None and not self.calibrated and not isinstance(self.grid, tuple)
        return unasked and DEFAULT_STEPS.get(self.sampler, FAST_STEPS) is None

    def way(self, run: Run, *, compile_network: bool = False) -> Way:
        """The recipe for ``run``. Raises `ArgumentError` or `RunError` for what the run cannot do."""
        import torch

        from perrin.guidance import dynamic_threshold

        conditional = run.folder.config.data.conditional
        guide, names = self._classifier(run)
        weaker = self._weaker(run)
        return Way(
            network=torch.compile(run.network) if compile_network else run.network,
            sampler=self.make_sampler(run),
            guidance=self._guidance(run, weaker),
            denoised_fn=None if self.threshold is None else dynamic_threshold(self.threshold),
            weaker=weaker,
            classifier=guide,
            classifier_scale=1.0 if self.classifier_scale is None else self.classifier_scale,
            class_names=run.folder.facts.class_names if conditional else names,
            conditional=conditional,
            withholds=bool(run.folder.config.training.label_drop),
        )

    def _classifier(self, run: Run) -> tuple[nn.Module | None, tuple[str, ...] | None]:
        from perrin.training.classifier import load_classifier

        if self.classifier is None:
            return None, None
        network, facts = load_classifier(self.classifier, run.device)
        own = run.folder.facts
        conditional = run.folder.config.data.conditional
        try:
            facts.check(run.diffusion, own.shape, own.class_names if conditional else None)
        except RunError as error:
            raise RunError(f"--classifier {self.classifier}: {error}") from None
        return network, facts.classes

    def make_sampler(self, run: Run) -> Sampler:
        """The sampler. Raises `ArgumentError` for a number of steps that there is not, `RunError` uncalibrated."""
        from perrin.build import run_chain
        from perrin.samplers import SAMPLERS

        own = {name: getattr(self, name) for name in OWNERS if getattr(self, name) is not None}
        if self.calibrated:
            chain = run_chain(run, steps=self.steps, calibrated=True)
            return SAMPLERS[self.sampler](chain, grid="uniform", **own)
        own |= {} if self.grid is None else {"grid": self.grid}
        with named_as_flags("steps", "grid"):
            return SAMPLERS[self.sampler](run.diffusion, self._steps(run.diffusion.num_timesteps), **own)

    def _steps(self, num_timesteps: int) -> int | None:
        if isinstance(self.grid, tuple):
            return self.steps
        if self.steps is None:
            wanted = DEFAULT_STEPS.get(self.sampler, FAST_STEPS)
            return num_timesteps if wanted is None else min(wanted, num_timesteps)
        if not 1 <= self.steps <= num_timesteps:
            raise ArgumentError(
                f"--steps must lie between 1 and {num_timesteps}, the run's number of timesteps, got {self.steps}"
            )
        return self.steps

    def _weaker(self, run: Run) -> nn.Module | None:
        from perrin.build import load_run

        if self.autoguidance is None:
            return None
        if self.autoguidance >= run.step:
            raise ArgumentError(
                f"--autoguidance must be the step of an earlier checkpoint than the one that samples, {run.step}, "
                f"got {self.autoguidance}"
            )
        weaker = load_run(run.folder.path, weights=run.weights, step=self.autoguidance, device=run.device)
        return weaker.network

    def _guidance(self, run: Run, weaker: nn.Module | None) -> tuple[Guidance, ...]:
        from perrin.guidance import autoguidance, classifier_free

        chosen: list[Guidance] = []
        if self.guidance_scale != 1:
            _check_knows_no_class(run, self.guidance_scale)
            chosen.append(
                classifier_free(
                    self.guidance_scale, interval=self.guidance_interval, rescale=self.guidance_rescale
                )
            )
        if weaker is not None:
            scale = AUTOGUIDANCE_SCALE if self.autoguidance_scale is None else self.autoguidance_scale
            chosen.append(autoguidance(weaker, scale))
        return tuple(chosen)

    def settings(self, run: Run, sampler: Sampler) -> dict[str, Any]:
        """What of the recipe determines a sample; None where a flag is not given."""
        from perrin.training.classifier import weights_hash

        return {
            "sampler": self.sampler,
            "steps": len(sampler.times) - 1,
            "eta": (self.eta or 0.0) if self.sampler == OWNERS["eta"] else None,
            "calibration": calibration_of(run) if self.calibrated else None,
            "classifier": None if self.classifier is None else weights_hash(self.classifier),
            "timestep_grid": list(sampler.times[:-1]) if isinstance(self.grid, tuple) else self.grid,
            **{name: value for name, (value, _) in self._further().items()},
        }

    def _further(self) -> dict[str, tuple[Any, str]]:
        """Settings of newer flags, None where they are at their defaults, and how a folder's name shows them."""
        defaults = Recipe()
        shown = {
            "churn": "churn{:g}",
            "guidance_scale": "scale{:g}",
            "guidance_interval": "from{0[0]:g}to{0[1]:g}",
            "guidance_rescale": "rescale{:g}",
            "autoguidance": "auto{}",
            "autoguidance_scale": "autoscale{:g}",
            "classifier_scale": "classifierscale{:g}",
            "threshold": "threshold{:g}",
        }
        found: dict[str, tuple[Any, str]] = {}
        for name, text in shown.items():
            value = getattr(self, name)
            if value == getattr(defaults, name):
                found[name] = (None, "")
            else:
                as_json = list(value) if isinstance(value, tuple) else value  # as it comes back from a file
                found[name] = (as_json, text.format(value))
        return found

    def name_parts(self, sampler: Sampler) -> list[str]:
        """Parts of a folder's name."""
        parts = [f"{self.sampler}-{len(sampler.times) - 1}steps"]
        parts += ["calibrated"] if self.calibrated else []
        if isinstance(self.grid, tuple):
            parts += [f"times{_short_hash(repr(sampler.times).encode())}"]
        else:
            parts += [self.grid] if self.grid else []
        parts += [f"eta{self.eta:g}"] if self.eta else []
        parts += ["classifier"] if self.classifier else []
        return parts + [text for _, text in self._further().values() if text]


def drawn_classes(label: str | None, way: Way, count: int, run: Path) -> list[int] | None:
    """The class of each of ``count`` samples, in turn unless ``label`` names one; None where there are no classes.

    Raises `ArgumentError` for an unknown class, or where there are none.
    """
    names = way.class_names
    if names is None:
        if label is not None:
            raise ArgumentError(f"--label {label}: the model of {run} has no classes")
        return None
    if label is None:
        return [i % len(names) for i in range(count)]
    if label == str(NO_LABEL) and way.withholds:
        return [NO_LABEL] * count
    if label in names:
        return [names.index(label)] * count
    if label.isdecimal() and int(label) < len(names):
        return [int(label)] * count
    known = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    none = ", or -1 for none" if way.withholds else ""
    raise ArgumentError(f"--label {label}: expected 0 to {len(names) - 1} or a class name ({known}){none}")


def _check_knows_no_class(run: Run, scale: float) -> None:
    config = run.folder.config
    if not config.data.conditional:
        raise ArgumentError(f"--guidance-scale {scale:g}: the model of {run.folder.path} has no classes")
    if not config.training.label_drop:
        raise ArgumentError(
            f"--guidance-scale {scale:g}: the model of {run.folder.path} was trained with its classes always told, "
            "train with --label-drop 0.1 to guide without a classifier"
        )


def calibration_of(run: Run) -> str:
    """A short hash of the calibration of the run's weights, which changes the samples when it is made anew."""
    from perrin.build import run_calibration

    return _short_hash(run_calibration(run)[0].read_bytes())


def _short_hash(content: bytes) -> str:
    return blake2b(content, digest_size=6).hexdigest()
