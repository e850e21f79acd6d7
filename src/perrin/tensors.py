"""Tensors by shape: means over examples, and tables of coefficients that are looked up by timestep."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from perrin.errors import ArgumentError

Coefficient = float | Tensor
"""One number for the whole batch, or a float64 tensor that broadcasts against it."""

# x scaled by a number is added to this: torch wraps the number of a product in a tensor, which costs as much again
# as the whole call, but takes the alpha of a sum as it is.
_ZERO = torch.zeros(())
_FULL = (torch.float32, torch.float64)

Value = TypeVar("Value")


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all dimensions but the first: (B, ...) to (B,)."""
    return tensor.flatten(1).mean(1) if tensor.ndim > 1 else tensor


def append_dims(tensor: Tensor, ndim: int) -> Tensor:
    """``tensor`` with dimensions of size 1 appended until it has ``ndim`` of them."""
    return tensor.reshape(tensor.shape + (1,) * (ndim - tensor.ndim))


def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries ``t`` (B,) of a table (T,), in the table's dtype and shaped (B, 1, ...) against ``like`` (B, ...)."""
    return append_dims(table[t], like.ndim)


def in_dtype_of(a: Coefficient, x: Tensor) -> Coefficient:
    """``a`` as it enters arithmetic with ``x``: a tensor in the dtype of ``x``, a float as it is."""
    return a.to(x.dtype) if isinstance(a, Tensor) else a


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, in float32 if it is in half precision, where noising would lose the first timesteps.

    Raises `ArgumentError` for whole numbers, which are not yet data in [-1, 1].
    """
    if x.dtype in _FULL:
        return x
    if not x.is_floating_point():
        raise ArgumentError(f"x must be floating-point values, data in [-1, 1], got {x.dtype}")
    return x.float()


def scale(a: Coefficient, x: Tensor) -> Tensor:
    """``a x`` in the dtype of ``x``, at least float32; always a new tensor."""
    x = at_least_float32(x)
    return x * a.to(x.dtype) if isinstance(a, Tensor) else torch.add(_ZERO, x, alpha=a)


def scale_(a: float, x: Tensor) -> Tensor:
    """``x`` times ``a``, in its own memory."""
    return x.mul_(a) if x.requires_grad else torch.add(_ZERO, x, alpha=a, out=x)  # gradients know no out


def affine(a: Coefficient, x: Tensor, c: Coefficient) -> Tensor:
    """``a x + c`` in the dtype of ``x``, at least float32; always a new tensor."""
    scaled = scale(a, x)
    return scaled.add_(in_dtype_of(c, scaled))


def mix(a: Coefficient, x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
    """``a x + b y`` in the dtype of ``x``, at least float32; always a new tensor.

    Floats take the fewest passes over memory, which is what a sampler's step costs, and a float of exactly 0
    drops its term.
    """
    if x.dtype not in _FULL:
        return mix(a, at_least_float32(x), b, y)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return scale(a, x).addcmul_(y.to(x.dtype), torch.as_tensor(b, dtype=x.dtype, device=x.device))
    if a == 0.0 or b == 0.0:
        return scale(a, x) if b == 0.0 else scale(b, y)
    return torch.add(x, y, alpha=b) if a == 1.0 else torch.add(_ZERO, x, alpha=a).add_(y, alpha=b)


def root(square: Coefficient) -> Coefficient:
    """The square root, of 0 where rounding has left ``square`` negative."""
    return square.clamp(min=0).sqrt() if isinstance(square, Tensor) else math.sqrt(max(square, 0.0))


def widest_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on a device that has none (MPS)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


class Remembered(dict[float, Value], Generic[Value]):
    """``make(t)`` for each number t that is asked for, made once; all are forgotten when there are too many."""

    def __init__(self, make: Callable[[float], Value], most: int = 4096) -> None:
        super().__init__()
        self.make, self.most = make, most

    def __missing__(self, t: float) -> Value:
        if len(self) >= self.most:
            self.clear()
        self[t] = value = self.make(t)
        return value


class Tables(nn.Module):
    """Named tables of shape (T,), held in float64 whatever precision the module is cast to.

    Each is a non-persistent buffer that moves with the module, or to where the timesteps are that it is asked for,
    and a list of Python floats for the steps that take one number for a whole batch. ``.half()`` leaves the tables
    alone; on a device without float64 (MPS) the buffers are float32.
    """

    def __init__(self, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.floats: dict[str, list[float]] = {}
        self.constants: dict[str, float] = {}
        self.add_tables(tables)

    def add_tables(self, tables: dict[str, Tensor]) -> None:
        """Hold ``tables`` too, in the place of those that have the same name."""
        for name, table in tables.items():
            self.floats[name] = values = table.tolist()
            self.constants.pop(name, None)
            if all(value == values[0] for value in values):
                self.constants[name] = values[0]
            self.register_buffer(name, table.detach().double().clone(), persistent=False)

    def shallow_copy(self) -> Self:
        """Another module with the same tables, to which tables can be added without changing this one."""
        other = copy.copy(self)
        for name in ("_buffers", "_non_persistent_buffers_set", "_modules", "floats", "constants"):
            other.__dict__[name] = copy.copy(self.__dict__[name])
        return other

    def at(self, name: str, t: int | Tensor, like: Tensor) -> Coefficient:
        """Entry ``t`` of table ``name``: a float for an int, else gathered (B, 1, ...) for ``like`` (B, ...).

        A table of one number everywhere gives that number: then nothing is gathered, and `mix` can drop a term.
        """
        if isinstance(t, Tensor):
            constant = self.constants.get(name)
            return gather(self.table(name, t.device), t, like) if constant is None else constant
        return self.number(name, t)

    def number(self, name: str, t: int) -> float:
        """Entry ``t`` of table ``name``. Raises `ArgumentError` unless 0 <= t < T."""
        numbers = self.floats[name]
        if not 0 <= t < len(numbers):
            raise ArgumentError(f"t must be from 0 to {len(numbers) - 1}, got {t}")
        return numbers[t]

    def table(self, name: str, device: torch.device) -> Tensor:
        """The table ``name`` on ``device``, to which all of them move if they are elsewhere: they follow their t."""
        if self._buffers[name].device != device:  # type: ignore[union-attr]  # no table is None
            self.to(device)
        return self.get_buffer(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for child in self.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        device = fn(torch.zeros((), dtype=torch.float32)).device
        dtype = widest_dtype(device)
        for name, values in self.floats.items():
            self._buffers[name] = torch.tensor(values, dtype=dtype, device=device)
        return self
