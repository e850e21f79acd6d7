"""The run configuration on the command line: short and dotted keys, with defaults from a file or a saved run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import (
    MISSING,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from perrin.cli.flags import flag_of
from perrin.config import DataConfig, DiffusionConfig, MLPConfig, RunConfig, TrainingConfig, UNetConfig
from perrin.errors import ConfigError

NETWORKS = {"unet": UNetConfig, "mlp": MLPConfig}
_SECTIONS: dict[str, tuple[type, ...]] = {
    "data": (DataConfig,),
    "diffusion": (DiffusionConfig,),
    "network": tuple(NETWORKS.values()),
    "training": (TrainingConfig,),
}
_DOTTED = re.compile(rf"(?:--)?({'|'.join(_SECTIONS)})\.([\w-]+)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class ConfigFlags:
    """The run configuration that the flags give, as nested plain values for `config.decode`."""

    values: dict[str, Any]


def short_flags(args: Sequence[str]) -> list[str]:
    """``args`` with ``--training.lr 1e-3`` and ``training.lr=1e-3`` written as ``--lr 1e-3``.

    Raises `ConfigError` for a dotted key that does not exist.
    """
    return [token for arg in args for token in _short(arg)]


def _short(arg: str) -> list[str]:
    match = _DOTTED.fullmatch(arg)
    if match is None or not (arg.startswith("--") or match[3] is not None):
        return [arg]
    section, name, value = match[1], match[2].replace("-", "_"), match[3]
    known = {f.name: f for kind in _SECTIONS[section] for f in fields(kind)}
    if name not in known:
        raise ConfigError(f"unknown key {section}.{name} (expected one of {', '.join(sorted(known))})")
    flag = flag_of(name)
    if (section, name) == ("data", "path"):
        return [] if value is None else [value]
    if value is None:
        return [flag]
    if isinstance(known[name].default, bool):
        return [_switch(f"{section}.{name}", flag, value)]
    several = isinstance(known[name].default, tuple) or "tuple[" in str(known[name].type)
    if several and value.lower() != "none":
        return [flag, *re.findall(r"[^\s,\[\]()]+", value)]
    return [f"{flag}={'None' if value.lower() == 'none' else value}"]


def _switch(key: str, flag: str, value: str) -> str:
    if value.lower() not in ("true", "false"):
        raise ConfigError(f"{key} = {value!r}: expected true or false")
    return flag if value.lower() == "true" else f"--no-{flag[2:]}"


def with_network(config: RunConfig, kind: str | None) -> RunConfig:
    """``config`` with the defaults of network ``kind``, where it has another kind and there is such a one.

    How the network tells levels apart, which all kinds have, stays.
    """
    if kind not in NETWORKS or kind == config.network.kind:
        return config
    old = config.network
    return replace(config, network=NETWORKS[kind](fourier=old.fourier, level_basis=old.level_basis))


def registry(base: RunConfig, *, require_data: bool) -> ConstructorRegistry:
    """Tells tyro to read `ConfigFlags` as the flags of a run configuration whose defaults are ``base``.

    Values are left to `config.decode` to judge, so that its one-line errors are the only ones.
    """
    rules = ConstructorRegistry()

    @rules.struct_rule
    def plain(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type is ConfigFlags:
            sections = tuple(_field(base, f.name, require_data) for f in fields(base))
            return StructConstructorSpec(instantiate=lambda **values: ConfigFlags(values), fields=sections)
        if is_dataclass(info.default) and hasattr(info.type, "__pydantic_fields__"):
            keys = tuple(_field(info.default, f.name, require_data) for f in fields(info.type))
            return StructConstructorSpec(instantiate=dict, fields=keys)
        return None

    return rules


def _field(owner: Any, name: str, require_data: bool) -> StructFieldSpec:
    value, known = getattr(owner, name), type(owner).__pydantic_fields__[name]
    kind: Any = type(value) if is_dataclass(value) else known.annotation
    if name == "kind":
        kind = Literal["unet", "mlp"]
    if isinstance(owner, DataConfig) and name == "path":
        kind = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
        value = MISSING if require_data else value
    return StructFieldSpec(name=name, type=kind, default=value, helptext=known.description)
