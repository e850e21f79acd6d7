"""The layer table of the package: a module imports only from lower layers, and this file is where the table is."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "perrin"

LAYERS = (
    {"errors"},
    {"tensors", "gaussian", "noise", "randomness", "terms", "files"},
    {
        "config",
        "schedules",
        "losses",
        "parameterization",
        "variance",
        "timestep_sampling",
        "networks",
        "data",
    },
    {"forward", "presets"},
    {"reverse"},
    {"diffusion"},
    {"denoiser", "oracles"},
    {"guidance", "samplers.grids"},
    {"samplers.base"},
    {"samplers", "likelihood"},
    {"learned", "training", "evaluation", "codec", "editing", "interop"},
    {"build"},
    {"cli"},
    {"__main__"},
)
"""Lowest first. A package stands for its modules, unless they are listed by themselves."""

LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}

NUMPY = ("codec", "data", "evaluation", "interop", "schedules")


def sources() -> dict[str, str]:
    """The text of every module by its name within the package; packages by their own name."""
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for path in sorted(SOURCE.rglob("*.py"))
        if path != SOURCE / "__init__.py"  # the facade, which loads names on first use
    }


@cache
def nodes(text: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(text)))


def imports(text: str) -> Iterator[str]:
    """Every module or name that ``text`` imports, also inside functions and for type checking."""
    for node in nodes(text):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def home(name: str, known: dict[str, str]) -> str:
    """The module of the package that the imported ``name`` (without "perrin.") is or comes from."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def level(module: str) -> int | None:
    """The layer of ``module``: its own entry of the table, or that of a package around it."""
    while module and module not in LEVELS:
        module = module.rpartition(".")[0]
    return LEVELS.get(module)


def package(module: str) -> str:
    return module.split(".")[0]


def dependencies(module: str, known: dict[str, str]) -> set[str]:
    """The modules of the package that ``module`` imports."""
    names = (name.removeprefix("perrin.") for name in imports(known[module]) if name.startswith("perrin."))
    return {home(name, known) for name in names if name != "__version__"}


def faults(known: dict[str, str]) -> list[str]:
    """What breaks the table, one line each."""
    found = []
    for module, text in known.items():
        own = level(module)
        if own is None:
            found.append(f"{module} is not in the layer table")
            continue
        for used in sorted(dependencies(module, known)):
            other = level(used)
            inside = package(used) == package(module) and other == own
            if other is None or not (other < own or inside):
                found.append(f"{module} (layer {own}) imports {used or 'perrin'} (layer {other})")
        found += [f"{module} imports {name}" for name in imports(text) if not allowed(module, name)]
        if package(module) != "cli" and "print" in called(text):
            found.append(f"{module} prints")
    graph = {module: dependencies(module, known) - {module, ""} for module in known}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"cycle: {' -> '.join(error.args[1])}")
    return found


def allowed(module: str, name: str) -> bool:
    """Whether ``module`` may import ``name`` as far as other packages go."""
    if name.startswith("."):
        return False  # relative imports would hide from this test
    if name == "numpy" or name.startswith("numpy."):
        return package(module) in NUMPY
    if name == "torch.distributed" or name.startswith("torch.distributed."):
        return False  # one process, so far
    return name != "argparse" or package(module) == "cli"


def called(text: str) -> set[str]:
    """The names that ``text`` calls as functions."""
    return {
        node.func.id for node in nodes(text) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def test_every_module_keeps_to_the_layer_table() -> None:
    assert faults(sources()) == []


def test_no_module_reaches_torch_distributed_as_an_attribute() -> None:
    reached = [
        module
        for module, text in sources().items()
        for node in nodes(text)
        if isinstance(node, ast.Attribute) and node.attr == "distributed"
    ]
    assert reached == []


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("noise", "from perrin.diffusion import GaussianDiffusion", "noise (layer 1) imports diffusion"),
        ("losses", "import perrin.variance", "losses (layer 2) imports variance (layer 2)"),
        ("noise", "def f():\n    from perrin import forward", "noise (layer 1) imports forward (layer 3)"),
        ("samplers.base", "from perrin.samplers.ddim import SamplerDDIM", "samplers.base (layer 8) imports"),
        ("likelihood.bound", "from perrin.samplers import Sampler", "likelihood.bound (layer 9) imports"),
        ("networks.layers", "from perrin.networks.unet import UNet", "cycle: "),
        ("noise", "from . import tensors", "noise imports ."),
        ("novelty", "", "novelty is not in the layer table"),
        ("forward", "import numpy as np", "forward imports numpy"),
        ("training.loop", "from torch import distributed", "training.loop imports torch.distributed"),
        ("training.loop", "def f():\n    print(1)", "training.loop prints"),
        ("build", "import argparse", "build imports argparse"),
        ("build", "from perrin import GaussianDiffusion", "build (layer 11) imports perrin (layer None)"),
    ],
)
def test_the_check_finds_a_made_up_fault(module: str, text: str, complaint: str) -> None:
    known = sources()
    found = faults(known | {module: known.get(module, "") + "\n" + text})
    assert any(complaint in fault for fault in found), found


def test_the_table_names_no_module_twice() -> None:
    assert len(LEVELS) == sum(len(names) for names in LAYERS)
