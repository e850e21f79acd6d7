"""What a checkpoint holds, and its files: safetensors for weights, one file that runs no code for the rest."""

from __future__ import annotations

import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE = "state.pt"


class DamagedFileError(Exception):
    """A file of a checkpoint that is missing or cannot be read; `RunFolder` says what to do about it."""

    def __init__(self, path: Path, error: Exception) -> None:
        # torch and safetensors go on at length.
        reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__
        super().__init__(f"{path} is missing" if not path.exists() else f"{path} is damaged ({reason})")


@dataclass(frozen=True)
class Checkpoint:
    """The state of training after ``step`` optimizer steps."""

    step: int
    weights: dict[str, dict[str, Tensor]]
    """State dicts of the network by name: ``model``, ``ema-0.999``."""
    state: dict[str, Any]
    """Everything else, as tensors and plain values: optimizer, seconds of training, timestep sampler."""

    def write(self, folder: Path) -> None:
        """Write the files into ``folder``. Raises `OSError` or `SafetensorError` where the disk does."""
        torch.save({"step": self.step, **self.state}, folder / STATE_FILE)
        for name, tensors in self.weights.items():
            save_file(_portable(tensors), weights_file(folder, name))
            # safetensors lets nobody else read.
            shutil.copymode(folder / STATE_FILE, weights_file(folder, name))


def weights_file(folder: Path, name: str) -> Path:
    """Where a checkpoint folder keeps the weights called ``name``."""
    return folder / f"{name}.safetensors"


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights called ``name``, on the CPU. Raises `DamagedFileError`, or `PermissionError`."""
    path = weights_file(folder, name)
    try:
        path.open("rb").close()  # safetensors does not tell a missing permission from a missing file
        return load_file(path)
    except PermissionError:
        raise
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(path, error) from None


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides weights, tensors on the CPU. Raises `DamagedFileError`."""
    path = folder / STATE_FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise DamagedFileError(path, error) from None
    return state


def _portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the CPU's memory, none sharing it with another: tied weights are written once per name."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
