"""The likelihood by the probability-flow ODE as figures and a table."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from perrin.cli.console import many, measured_text
from perrin.cli.flags import check_at_least
from perrin.cli.measure import (
    Calls,
    Effort,
    Subject,
    batches,
    flattered_text,
    given,
    given_class_text,
    mean_with_errors,
    trained_on,
)
from perrin.errors import ArgumentError

if TYPE_CHECKING:
    from perrin.data import Dataset
    from perrin.diffusion import GaussianDiffusion
    from perrin.likelihood.dequantization import Dequantization
    from perrin.likelihood.flow import Trace
    from perrin.likelihood.ode import OdeLikelihood
    from perrin.likelihood.solvers import Solver

DEFAULT_STEPS = 100
DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class OdeOptions:
    """How to solve the ODE of --ode."""

    solver: Literal["heun", "adaptive"] | None = None
    """heun with even steps in the log of the noise level (the default), or adaptive with steps for each example."""
    ode_steps: int | None = None
    """Steps of heun, of two network calls each; by default 100, or the run's own timesteps where its network, one of
    previous-x, knows no others."""
    tolerance: float | None = None
    """Error allowed in a step of adaptive, in x and in log p per dimension; by default 1e-4."""
    probes: int | None = None
    """Random probes of the divergence; by default 1."""
    exact_trace: bool = False
    """Compute the divergence without probes, for at most 1024 dimensions."""
    dequantization: Literal["truncated-normal", "uniform"] | None = None
    """How levels become points of a density; by default truncated-normal."""
    draws: int | None = None
    """Draws of the dequantization per example, whose bounds are averaged; by default 1."""

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its steps by itself."""
        return self.solver == "adaptive"

    def check(self, *, wanted: bool) -> None:
        """Raise `ArgumentError` for flags that do not go together, or at all where the ODE is not ``wanted``."""
        flags = given(self, [field.name for field in fields(self)])
        if flags and not wanted:
            raise ArgumentError(f"{flags[0]} needs --ode")
        if self.adaptive and self.ode_steps is not None:
            raise ArgumentError("--ode-steps belongs to --solver heun, got --solver adaptive")
        if not self.adaptive and self.tolerance is not None:
            raise ArgumentError("--tolerance needs --solver adaptive")
        if self.exact_trace and self.probes is not None:
            raise ArgumentError("--exact-trace has no --probes: give one of them")
        check_at_least(self, ("ode_steps", "probes", "draws"))
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ArgumentError(f"--tolerance must be above 0 and finite, got {self.tolerance}")

    def check_times(self, chain: GaussianDiffusion) -> None:
        """Raise `ArgumentError` for steps between timesteps where the network of ``chain`` knows whole ones only."""
        if whole_times_only(chain) and (self.adaptive or self.ode_steps is not None):
            flag = "--solver adaptive" if self.adaptive else f"--ode-steps {self.ode_steps}"
            raise ArgumentError(
                f"the network predicts previous-x and knows whole timesteps only: expected heun at all of them, got "
                f"{flag}"
            )

    def solver_of(self, chain: GaussianDiffusion) -> Solver:
        """The solver, which for a network that knows whole timesteps only takes all of ``chain``."""
        from perrin.likelihood.solvers import Adaptive, Heun

        if whole_times_only(chain):
            return Heun(None)
        if self.adaptive:
            tolerance = DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance
            return Adaptive(rtol=tolerance, atol=tolerance)
        return Heun(DEFAULT_STEPS if self.ode_steps is None else self.ode_steps)

    def trace_of(self, dimensions: int) -> Trace:
        """How the divergence is computed. Raises `ArgumentError` for the exact trace of too many dimensions."""
        from perrin.likelihood.flow import MAX_EXACT_DIMENSIONS, Exact, Hutchinson

        if self.exact_trace and dimensions > MAX_EXACT_DIMENSIONS:
            raise ArgumentError(
                f"--exact-trace is for at most {MAX_EXACT_DIMENSIONS} dimensions, the data have {dimensions}"
            )
        return Exact() if self.exact_trace else Hutchinson(self.probes or 1)

    def dequantization_of(self, levels: int | None) -> Dequantization | None:
        """The dequantization, None for continuous data. Raises `ArgumentError` where one is asked for them."""
        from perrin.likelihood.dequantization import TruncatedNormal, Uniform

        if levels is None:
            flags = given(self, ("dequantization", "draws"))
            if flags:
                raise ArgumentError(f"{flags[0]} is for data with levels, these are continuous")
            return None
        return (Uniform if self.dequantization == "uniform" else TruncatedNormal)(draws=self.draws or 1)

    def solver_text(self, chain: GaussianDiffusion) -> str:
        """``heun with 100 steps``."""
        if whole_times_only(chain):
            return "heun at the run's own timesteps"
        if self.adaptive:
            return f"adaptive with tolerance {self.tolerance or DEFAULT_TOLERANCE:g}"
        return f"heun with {self.ode_steps or DEFAULT_STEPS} steps"


def whole_times_only(chain: GaussianDiffusion) -> bool:
    """Whether the network of ``chain`` says nothing between its timesteps."""
    from perrin.parameterization import ModelMeanType

    return chain.model_mean_type is ModelMeanType.PREVIOUS_X


@dataclass(frozen=True)
class OdeFigures:
    """What was measured, and how; an error that is not known is NaN."""

    ode_bpd: float
    ode_bpd_se: float
    """Standard error over the examples, which holds the noise of probes and dequantization; at least that noise."""
    ode_bpd_mc_se: float
    """That noise alone."""
    n: int
    dequantization: str
    draws: int
    probes: int
    """0 is the exact trace."""
    solver: str
    start_noise: float
    """sigma / alpha where the density was taken."""
    network_calls: float
    """Per example, a mean."""
    vector_jacobian_products: float
    """Per example, a mean."""
    seconds: float
    num_timesteps: int
    seed: int
    levels: int | None
    conditional: bool
    """Whether the network was told the class of each example."""
    trained_on: int | None
    """How many of the examples it was trained on; None where that is not known: its data are others."""
    clip_denoised: bool
    weights: str
    step: int
    table: str

    def lines(self) -> list[str]:
        """The figures for people."""
        bound = "log density" if self.levels is None else f"bound with {self.dequantization} dequantization"
        trace = many(self.probes, "Rademacher probe") if self.probes else "exact trace"
        remedy = "--probes 2" if self.levels is None else "--draws 2"
        flattered = flattered_text("the run", self.trained_on, self.n)
        return [
            measured_text(self.ode_bpd, self.ode_bpd_se, self.ode_bpd_mc_se, count=self.n, remedy=remedy),
            *([flattered] if flattered else []),
            f"probability-flow ODE{given_class_text(self.conditional)}, {bound}, {many(self.draws, 'draw')}; not the "
            "variational bound",
            f"{self.solver}, {trace}; density at sigma/alpha = {self.start_noise:.4g}; predictions not clipped",
            f"T = {self.num_timesteps}; weights {self.weights} of step {self.step}; seed {self.seed}; "
            f"{self.seconds:.1f} s",
            f"{self.network_calls:.4g} network calls and {self.vector_jacobian_products:.4g} "
            "vector-Jacobian products per example",
            f"one row per example: {self.table}",
        ]


def measure_ode(
    model: Subject, dataset: Dataset, indices: list[int], *, effort: Effort, how: OdeOptions, out: Path
) -> OdeFigures:
    """-log2 p per dimension of the examples ``indices`` by the ODE; writes the table ``out``."""
    import torch

    from perrin.evaluation.tables import write_table

    started = time.monotonic()
    found = _measured(model, dataset, indices, effort, how)
    bpd, errors = (torch.cat(parts) for parts in ([one.bpd for one in found], [one.error for one in found]))
    names = [dataset.names[i] for i in indices]
    write_table(out, {"index": indices, "name": names, "bpd": bpd.tolist(), "error_bpd": errors.tolist()})
    mean, error, noise = mean_with_errors(bpd, errors)
    sizes = [len(one.bpd) / len(indices) for one in found]
    return OdeFigures(
        ode_bpd=mean,
        ode_bpd_se=error,
        ode_bpd_mc_se=noise,
        n=len(indices),
        dequantization=found[0].dequantization,
        draws=found[0].draws,
        probes=found[0].probes,
        solver=how.solver_text(model.chain),
        start_noise=found[0].start,
        network_calls=sum(share * one.network_calls for share, one in zip(sizes, found, strict=True)),
        vector_jacobian_products=sum(share * one.vjps for share, one in zip(sizes, found, strict=True)),
        seconds=time.monotonic() - started,
        num_timesteps=model.chain.num_timesteps,
        seed=effort.seed,
        levels=dataset.facts.levels,
        conditional=model.conditional(dataset),
        trained_on=trained_on(model.run, dataset, indices),
        clip_denoised=False,
        weights=model.run.weights,
        step=model.run.step,
        table=str(out),
    )


def _measured(
    model: Subject, dataset: Dataset, indices: list[int], effort: Effort, how: OdeOptions
) -> list[OdeLikelihood]:
    """The likelihoods, batch by batch."""
    from perrin.cli.progress import Bar
    from perrin.denoiser import DiffusionDenoiser
    from perrin.likelihood.ode import ode

    levels, solver = dataset.facts.levels, how.solver_of(model.chain)
    dequantization, trace = how.dequantization_of(levels), how.trace_of(math.prod(dataset.facts.shape))
    each = calls_for_example(model, solver, 1 if dequantization is None else dequantization.draws)
    found = []
    with (
        Bar("measuring", len(indices) * (each or 1)) as bar,
        Calls().counted(model.run.network, bar) if each else nullcontext(),
    ):
        for batch in batches(indices, effort.batch_size):
            x, told = model.batch(dataset, batch)
            denoise = DiffusionDenoiser(
                model.chain, model.run.network, clip_denoised=False, model_kwargs=told
            )
            found.append(
                ode(
                    denoise,
                    x,
                    levels=levels,
                    indices=batch,
                    dequantization=dequantization,
                    seed=effort.seed,
                    trace=trace,
                    solver=solver,
                )
            )
            if each is None:
                bar.advance(len(batch))
    return found


def calls_for_example(model: Subject, solver: Solver, draws: int) -> int | None:
    """Network calls for an example with so many ``draws``; None where each finds its own number."""
    from perrin.denoiser import DiffusionDenoiser
    from perrin.likelihood.flow import Timeline
    from perrin.likelihood.solvers import Heun

    if not isinstance(solver, Heun):
        return None
    return draws * solver.calls(Timeline.of(DiffusionDenoiser(model.chain, model.run.network)))
