"""A calibration: the variances and timesteps with which a network, as it is, has the best bound."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError, RunError
from perrin.files import write_text
from perrin.likelihood.costs import Levels, Rule, cost_matrix, depends_on_state
from perrin.likelihood.covariance import Covariance, least_decoder_variance
from perrin.likelihood.predictions import place_range
from perrin.likelihood.statistics import Statistics
from perrin.likelihood.timesteps import MOST_STEPS, BestTimesteps
from perrin.variance import FixedVariance, StateVariance

Kind = Literal["calibrated", "per-state"]
"""One variance for all dimensions of a timestep, or one that follows the network's variance output."""

_STRICT = ConfigDict(extra="forbid", strict=True)
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=_STRICT)
class Fit:
    """Var[x_0 | x_t] of a dimension with place u: ``exp(log_scale) u^power``; one number per timestep each."""

    power: tuple[_Finite, ...]
    log_scale: tuple[_Finite, ...]

    @classmethod
    def of(cls, covariance: Covariance) -> Self:
        """``covariance`` as plain numbers."""
        return cls(tuple(covariance.power.tolist()), tuple(covariance.log_scale.tolist()))


@dataclass(frozen=True, config=_STRICT)
class Calibration:
    """What `perrin calibrate` found for one set of weights, and how."""

    weights: str
    step: Annotated[int, Field(ge=0)]
    """Optimizer steps that the weights have behind them."""
    num_timesteps: _Count
    levels: _Count | None
    images: _Count
    """How many it was fitted to."""
    seed: int
    kind: Kind
    """Which variance `chain` has."""
    covariances: dict[str, Fit]
    """Var[x_0 | x_t] by kind."""
    decoders: dict[str, Fit]
    """The variance of p(x_0 | x_t) where a chain ends at t, by kind."""
    paths: tuple[tuple[int, ...], ...]
    """The best K timesteps, ascending, for K = 1, 2, ..."""
    curve: tuple[_Finite, ...]
    """The bound on the images of the fit for each K, in bits per dimension."""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(problem)

    def _problem(self) -> str | None:
        """What does not go together; None if nothing."""
        for name, fits in (("covariances", self.covariances), ("decoders", self.decoders)):
            if self.kind not in fits:
                return f"{name} has no kind {self.kind}"
            if any({len(f.power), len(f.log_scale)} != {self.num_timesteps} for f in fits.values()):
                return f"{name} must hold {self.num_timesteps} numbers each"
        if not self.paths or len(self.paths) != len(self.curve):
            return "paths and curve must be of one length, at least 1"
        for steps, path in enumerate(self.paths, start=1):
            ascending = all(s < t for s, t in pairwise((-1, *path)))
            if len(path) != steps or not ascending or path[-1] != self.num_timesteps - 1:
                return f"path {steps} must be {steps} ascending timesteps up to {self.num_timesteps - 1}"
        return None

    @property
    def best_steps(self) -> int:
        """The K with the best bound on the images of the fit."""
        return min(range(len(self.curve)), key=self.curve.__getitem__) + 1

    @property
    def x_start_variance(self) -> list[float]:
        """(T,): mean squared error of the network's x_0, per dimension."""
        return [math.exp(log) for log in self.covariances["calibrated"].log_scale]

    def timesteps(self, steps: int | None = None) -> list[int]:
        """The best ``steps`` timesteps, ascending; None: as many as were best. `ArgumentError` out of range."""
        steps = self.best_steps if steps is None else steps
        if not 1 <= steps <= len(self.paths):
            raise ArgumentError(f"a calibrated chain has from 1 to {len(self.paths)} steps, got {steps}")
        return list(self.paths[steps - 1])

    def chain(self, diffusion: GaussianDiffusion, steps: int | None = None) -> GaussianDiffusion:
        """``diffusion`` over the best ``steps`` timesteps with the calibrated variances, as `timesteps` takes them.

        Raises `ArgumentError` for steps out of range, `RunError` where ``diffusion`` is not what was calibrated.
        """
        for name in ("num_timesteps", "levels"):
            expected, found = getattr(self, name), getattr(diffusion, name)
            if expected != found:
                raise RunError(f"the calibration is for a chain with {name} = {expected}, not {found}")
        places, timesteps = self._places(diffusion), self.timesteps(steps)
        fits = self.covariances[self.kind], self.decoders[self.kind]
        return with_covariance(diffusion.respaced(timesteps), _along(timesteps, *fits), places, timesteps)

    def _places(self, diffusion: GaussianDiffusion) -> tuple[Tensor, Tensor] | None:
        """What the variance for each state needs to know of the network's output; None for the other kind."""
        if not depends_on_state(self.kind):
            return None
        places = place_range(diffusion)
        if places is None:
            raise RunError(
                f"the calibration is for a learned variance, not {diffusion.model_var_type.name}: calibrate again"
            )
        return places

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "calibration") -> Self:
        """What `to_json` wrote. Raises `RunError`, which names ``source``, where it is damaged."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, fault["loc"][:3]))
            reason = f"{place}: {fault['msg']}" if place else fault["msg"]
            raise RunError(f"{source} is damaged ({reason}); `perrin calibrate` makes it anew") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The calibration in a file. Raises `RunError` where it cannot be read or is damaged."""
        try:
            return cls.from_json(path.read_bytes(), str(path))
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}; `perrin calibrate` makes it") from None

    def write(self, path: Path) -> None:
        """Put the calibration into the file at ``path`` at one stroke."""
        write_text(path, self.to_json())


def _along(timesteps: list[int], jumps: Fit, ends: Fit) -> Covariance:
    """The tables of a chain over ``timesteps``: the decoder's at its first one, the jumps' at the others."""
    first, others = timesteps[0], timesteps[1:]
    return Covariance(
        *(
            torch.tensor([end[first], *(jump[t] for t in others)], dtype=torch.float64)
            for jump, end in ((jumps.power, ends.power), (jumps.log_scale, ends.log_scale))
        )
    )


def with_covariance(
    chain: GaussianDiffusion,
    covariance: Covariance,
    places: tuple[Tensor, Tensor] | None,
    timesteps: list[int],
) -> GaussianDiffusion:
    """``chain`` with the variance that is best where Var[x_0 | x_t] is ``covariance`` at its steps.

    With ``places``, low end and span of the network's variance output (T,), it is a variance for each state, and
    ``timesteps`` are those of the chain; else the network's variance output, if it has one, is not looked at.
    """
    coef1, posterior = (
        torch.tensor(chain.floats[name], dtype=torch.float64)
        for name in ("posterior_mean_coef1", "posterior_variance")
    )
    posterior[0] = least_decoder_variance(chain.levels)  # of the decoder, which has no posterior
    if places is not None:
        low, span = (end[timesteps] for end in places)
        tables = {"state_power": covariance.power, "state_log_scale": covariance.log_scale}
        tables["state_least"] = posterior
        return chain.with_variance(StateVariance(), tables | {"state_low": low, "state_span": span})
    variance = posterior + coef1**2 * covariance.log_scale.exp()
    kind = FixedVariance("calibrated_variance", "calibrated_log_variance", chain.variance.extra_channels)
    tables = {"calibrated_variance": variance, "calibrated_log_variance": variance.log()}
    return chain.with_variance(kind, tables)


class Plan(NamedTuple):
    """The best timesteps for one variance."""

    paths: list[list[int]]
    """For K = 1, 2, ..., ascending."""
    curve: list[float]
    """The bound on the images of the fit, in bits per dimension."""


def plan(statistics: Statistics, levels: Levels, rule: Rule, most: int = MOST_STEPS) -> Plan:
    """The timesteps with the best bound under ``rule``, for every K up to ``most`` and T."""
    best = BestTimesteps(cost_matrix(statistics, levels, rule), most)
    totals = (best.totals + statistics.prior.mean()) / math.log(2)
    return Plan([best.timesteps(k + 1) for k in range(best.most)], totals.tolist())
