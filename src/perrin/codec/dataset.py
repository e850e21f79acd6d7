"""Data sets to the bytes of a ``.perrin`` file and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from perrin.codec.bitsback import Advance, Encoded, decode, encode
from perrin.codec.container import File, Header, content_hash, pack
from perrin.codec.identity import model_hash
from perrin.codec.kernels import Kernels
from perrin.data import Dataset, Facts
from perrin.data.decode import SUFFIXES
from perrin.data.levels import level_dtype
from perrin.diffusion import GaussianDiffusion
from perrin.errors import DataError


class Recipe(NamedTuple):
    """How the decoder finds the chain and the weights in a run."""

    weights: str
    step: int
    calibrated: bool = False


class Compressed(NamedTuple):
    """A file, and how its values were coded."""

    content: bytes
    coded: Encoded


def compress(
    chain: GaussianDiffusion,
    network: nn.Module,
    dataset: Dataset,
    *,
    recipe: Recipe,
    classes: Tensor | None = None,
    advance: Advance = lambda calls, total: None,
) -> Compressed:
    """The file of ``dataset``, whose levels are the chain's; ``classes`` (N,) for a conditional network.

    Raises `ArgumentError` for continuous data, `DataError` for values that do not fit the chain's levels, and
    `RunError` where the network gives values that are not finite.
    """
    kernels = Kernels(chain, network)
    values = _checked(np.asarray(dataset.values), kernels.levels)
    named = any(name.lower().endswith(SUFFIXES) for name in dataset.names)
    names = tuple(map(str, dataset.names)) if named else ()
    labels = () if dataset.labels is None else tuple(dataset.labels.tolist())
    class_names = tuple(map(str, dataset.facts.class_names or ())) if labels else ()
    _check_words((*names, *class_names))
    coded = encode(kernels, values, classes=classes, advance=advance)
    header = Header(
        model=model_hash(chain, network),
        weights=recipe.weights,
        step=recipe.step,
        steps=chain.num_timesteps,
        calibrated=recipe.calibrated,
        shape=values.shape,
        levels=kernels.levels,
        dtype=values.dtype.name,  # type: ignore[arg-type]  # checked above
        content=content_hash(values, labels, class_names, names),
        checks=coded.checks,
        names=names,
        labels=labels,
        class_names=class_names,
    )
    return Compressed(pack(File(header, coded.payload)), coded)


def decompress(
    chain: GaussianDiffusion,
    network: nn.Module,
    file: File,
    *,
    classes: Tensor | None = None,
    advance: Advance = lambda calls, total: None,
) -> Dataset:
    """The data set in ``file``, bit for bit what `compress` was given.

    Raises `DataError` for a file of another model, and where what is decoded is not what was compressed.
    """
    header = file.header
    if not fits(header, chain, network):
        raise DataError(other_model(header))
    kernels = Kernels(chain, network)
    found = decode(kernels, file.payload, header.checks, header.shape, classes=classes, advance=advance)
    values = found.astype(header.dtype)
    if content_hash(values, header.labels, header.class_names, header.names) != header.content:
        raise DataError("what was decoded is not what was compressed: its hash differs")
    return dataset_of(header, values)


def fits(header: Header, chain: GaussianDiffusion, network: nn.Module) -> bool:
    """Whether this is the model that the file of ``header`` was compressed with."""
    return header.levels == chain.levels and header.model == model_hash(chain, network)


def other_model(header: Header) -> str:
    """What is wrong where no model `fits`."""
    again = ", or the run was calibrated again since" if header.calibrated else ""
    return (
        "the file was compressed with another model: its weights, chain or levels are not those of this run"
        + again
    )


def dataset_of(header: Header, values: np.ndarray | None = None) -> Dataset:
    """``values`` (none: an empty array) with the names, labels and classes of ``header``."""
    count, *shape = header.shape
    names = header.names or tuple(str(index) for index in range(count))
    labels = np.array(header.labels, np.int64) if header.labels else None
    facts = Facts(tuple(shape), header.levels, header.class_names or None, count)
    return Dataset(np.empty(0) if values is None else values, labels, names, facts)


def _check_words(words: tuple[str, ...]) -> None:
    """A file's name need not be UTF-8, the header is."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise DataError(f"the name {word!r} is not UTF-8: rename it") from None


def _checked(values: np.ndarray, levels: int) -> np.ndarray:
    """``values`` in a type that holds the ``levels``."""
    if values.dtype.name not in ("uint8", "uint16") or values.ndim not in (2, 4) or not values.size:
        raise DataError(
            f"expected level indices (N, C, H, W) or (N, D) as uint8 or uint16, got {values.dtype} {values.shape}"
        )
    if values.max() >= levels:
        raise DataError(f"values must lie in 0..{levels - 1}, the largest is {values.max()}")
    return values.astype(np.promote_types(values.dtype, level_dtype(levels)), copy=False)
