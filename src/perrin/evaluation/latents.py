"""The file that `perrin invert` leaves: latents, and what is needed to come back from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from perrin.data.arrays import write_npz
from perrin.errors import ArgumentError, DataError
from perrin.files import claim

STATES = ("latest", "before")
"""The arrays' names: x at the noisiest time, and for BDIA at the second one."""


@dataclass(frozen=True)
class Settings:
    """How the latents were made."""

    method: str
    steps: int
    grid: str
    precision: str
    weights: str
    step: int
    model: str
    """A hash of the weights and the chain, `perrin.codec.identity.model_hash`."""


@dataclass(frozen=True, eq=False)
class Latents:
    """Inverted examples."""

    settings: Settings
    states: tuple[Tensor, ...]
    """One or two of (N, ...), as in `STATES`."""
    indices: Sequence[int]
    """N places in the data set."""
    classes: Tensor | None
    """The run's class numbers (N,), for a conditional one."""

    def write(self, path: Path) -> None:
        """Put them into the .npz file at ``path``."""
        arrays: dict[str, Any] = {
            name: state.cpu().numpy() for name, state in zip(STATES, self.states, strict=False)
        }
        arrays["indices"] = np.asarray(self.indices, dtype=np.int64)
        if self.classes is not None:
            arrays["labels"] = self.classes.cpu().numpy()
        arrays["settings"] = np.array(json.dumps(asdict(self.settings)))
        write_npz(path, arrays)

    @classmethod
    def read(cls, path: Path) -> Latents:
        """Those in the file at ``path``. Raises `DataError` where it was not written by `write`."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
            settings = _SETTINGS.validate_json(str(arrays["settings"]))
            states = tuple(torch.from_numpy(arrays[name]) for name in STATES if name in arrays)
            indices = arrays["indices"].tolist()
            labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
        except OSError as error:
            if error.filename is not None:  # the file cannot be opened, which says so itself
                raise
            raise DataError(f"{path} is damaged: {error}") from None
        except (
            ValueError,
            LookupError,
            TypeError,
            EOFError,
            BadZipFile,
            AttributeError,
            NotImplementedError,
        ):
            raise DataError(f"{path} holds no latents of perrin invert") from None
        counts = [len(states[0]) if states and states[0].ndim else 0, len(indices)]
        counts += [] if labels is None else [labels.numel()]
        if len({state.shape for state in states}) != 1 or len(set(counts)) > 1:
            raise DataError(f"{path} is damaged: its arrays do not fit together")
        if not all(state.is_floating_point() and bool(torch.isfinite(state).all()) for state in states):
            raise DataError(f"{path} is damaged: it holds values that are no finite numbers")
        return cls(settings, states, indices, labels)


_SETTINGS = TypeAdapter(Settings)


def claim_latents(path: Path) -> None:
    """Make sure, before long work, that latents can be written to ``path`` and overwrite nothing else.

    Raises `ArgumentError` for another ending and where something else is there, `OSError` where it cannot be.
    """
    if path.suffix != ".npz":
        raise ArgumentError(f"the name of a file of latents must end in .npz, got {path}")
    if path.exists():
        try:
            Latents.read(path)
        except DataError:
            raise ArgumentError(f"{path} exists and holds no latents: choose another file") from None
    claim(path)
