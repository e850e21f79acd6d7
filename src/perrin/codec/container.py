"""The file format ``.perrin``: a preamble, a header in JSON, the coded values, and a hash of all of it."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict, FailFast, Field, TypeAdapter, ValidationError, with_config

from perrin.data.levels import MAX_LEVELS
from perrin.errors import DataError

MAGIC = b"\x89PRN\r\n\x1a\n"
"""Like PNG's: what mangles line ends or the eighth bit is found at once."""
VERSION = 1
_PREAMBLE = struct.Struct("<8sHIQ")  # magic, version, lengths of header and payload
_HASH_BYTES = 16
MOST_HEADER_BYTES = 2**28

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Header:
    """What the decoder must know beside the run."""

    model: Digest
    """Of the weights and the chain, see `identity`."""
    weights: str
    """The name of the weights in the run."""
    step: Natural
    """Of the run's checkpoint."""
    steps: Positive
    """Timesteps of the chain."""
    calibrated: bool
    """Whether the chain is the run's calibrated one."""
    shape: Annotated[tuple[Positive, ...], Field(min_length=2, max_length=4)]
    """Of the values, (N, C, H, W) or (N, D)."""
    levels: Annotated[int, Field(ge=2, le=MAX_LEVELS)]
    dtype: Literal["uint8", "uint16"]
    content: Digest
    """Of values, labels, class names and names, see `content_hash`."""
    checks: Annotated[tuple[Digest, ...], FailFast()]
    """Of the frequencies used, see `bitsback`."""
    names: Annotated[tuple[str, ...], FailFast()] = ()
    """The examples' names; none where they are plain numbers."""
    labels: Annotated[tuple[Natural, ...], FailFast()] = ()
    """The examples' labels, if they have any."""
    class_names: Annotated[tuple[str, ...], FailFast()] = ()
    """By label."""


class File(NamedTuple):
    """A ``.perrin`` file, taken apart."""

    header: Header
    payload: bytes


def pack(file: File) -> bytes:
    """The bytes of ``file``. Raises `DataError` where `unpack` would not read them."""
    text = _ADAPTER.dump_json(file.header, exclude_defaults=True)
    if len(text) > MOST_HEADER_BYTES:
        raise DataError(
            f"names and labels take {len(text)} bytes, of at most {MOST_HEADER_BYTES}: compress fewer"
        )
    header = zlib.compress(text, 9)
    content = _PREAMBLE.pack(MAGIC, VERSION, len(header), len(file.payload)) + header + file.payload
    packed = content + _hash(content)
    unpack(packed, "what was compressed")
    return packed


def read(path: Path) -> File:
    """The file at ``path``. Raises `DataError` if it is none, or not whole."""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(MAGIC))
            content = start + stream.read() if start == MAGIC else start
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    return unpack(content, str(path))


def unpack(content: bytes, source: str) -> File:
    """The file whose bytes are ``content``; ``source`` names it in errors.

    Raises `DataError` for another kind of file, another version of the format, a file cut short or with bytes
    behind its end, changed bytes, and a header that contradicts itself.
    """
    if content[: len(MAGIC)] != MAGIC:
        raise DataError(f"{source}: no .perrin file (its first bytes are {content[:8]!r})")
    if len(content) < _PREAMBLE.size:
        raise DataError(f"{source}: cut short after {len(content)} bytes")
    _, version, header_size, payload_size = _PREAMBLE.unpack_from(content)
    if version != VERSION:
        raise DataError(f"{source}: of version {version} of the format, this perrin reads version {VERSION}")
    expected = _PREAMBLE.size + header_size + payload_size + _HASH_BYTES
    if len(content) != expected:
        fault = "cut short" if len(content) < expected else "longer than it says"
        raise DataError(f"{source}: {fault}, expected {expected} bytes, got {len(content)}")
    if _hash(content[:-_HASH_BYTES]) != content[-_HASH_BYTES:]:
        raise DataError(f"{source}: damaged, its content does not match its hash")
    middle = _PREAMBLE.size + header_size
    header = _header(content[_PREAMBLE.size : middle], source)
    payload = content[middle:-_HASH_BYTES]
    if len(payload) % 4:
        raise DataError(
            f"{source}: the coded values must be whole words of 4 bytes, got {len(payload)} bytes"
        )
    return File(header, payload)


def content_hash(values: np.ndarray, *others: object) -> str:
    """A digest of what a file restores: the values with their shape and type, and ``others`` by their repr."""
    digest = blake2b(repr((values.shape, values.dtype.name, others)).encode(), digest_size=_HASH_BYTES)
    digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=_HASH_BYTES).digest()


def _header(packed: bytes, source: str) -> Header:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, MOST_HEADER_BYTES)
        if not unpacker.eof or unpacker.unused_data:
            raise DataError(f"{source}: its header is not whole")
        header = _ADAPTER.validate_json(text, strict=True)
    except zlib.error as error:
        raise DataError(f"{source}: its header cannot be unpacked ({error})") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise DataError(f"{source}: its header is wrong: {place}: {fault['msg']}") from None
    _check(header, source)
    return header


def _check(header: Header, source: str) -> None:
    """Raise `DataError` where fields contradict each other."""
    count = header.shape[0]
    if len(header.shape) == 3:
        raise DataError(
            f"{source}: its header is wrong: shape {header.shape} is neither (N, C, H, W) nor (N, D)"
        )
    if header.dtype == "uint8" and header.levels > 256:
        raise DataError(f"{source}: its header is wrong: {header.levels} levels do not fit {header.dtype}")
    for name, found in (("names", header.names), ("labels", header.labels)):
        if found and len(found) != count:
            raise DataError(f"{source}: its header is wrong: {len(found)} {name} for {count} examples")
    if bool(header.labels) != bool(header.class_names) or max(header.labels, default=-1) >= len(
        header.class_names
    ):
        raise DataError(
            f"{source}: its header is wrong: {len(header.class_names)} class names do not fit its labels"
        )
    if math.prod(header.shape[1:]) >= 2**31:
        raise DataError(f"{source}: its header is wrong: shape {header.shape} is too large")


_ADAPTER = TypeAdapter(Header)
