"""What a checkpoint's files say of their tensors: names, shapes, dtypes and bytes, read from headers alone.

Files are read as if a stranger had written them: nothing is allocated because a file claims it, no byte of weights is
read, and a pickle is never opened. Every error is a ConfigError of one line.

Sources: the safetensors format (huggingface/safetensors README.md, src/tensor.rs) and the GGUF format
(ggml-org/ggml docs/gguf.md), gguf 0.19 constants.py.
"""

from __future__ import annotations

import json
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from memplan.core.errors import ConfigError, printable

_MOST_HEADER = 2**25  # bytes of a safetensors header or index; those of a trillion parameters have 16 MB
_MOST_METADATA = 2**26  # bytes before a GGUF file's tensors, which hold the tokenizer; usual are 5 to 20 MB
_MOST_READ = 2**22  # numbers and texts that are read one by one from a GGUF file; usual are up to a million
_MOST_TENSORS = 2**19
_MOST_SHARDS = 2**12
_MOST_DIMS = 64  # as torch has it
_MOST_SIZE = 2**48  # of a dimension
_MOST_VALUES = 2**14  # of an array of a GGUF file that is kept; of a longer one only its length is
_LONGEST = 200  # letters of a path or name that an error repeats
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# Bits of one element, by safetensors' names. Source: safetensors 0.8 src/tensor.rs Dtype::bitsize.
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


class GgmlType(NamedTuple):
    """A type of ggml: its name, and how many elements share a block of how many bytes."""

    name: str
    elements: int
    bytes: int


# By number. Source: gguf-py constants.py GGMLQuantizationType, GGML_QUANT_SIZES (gguf 0.19; llama-cpp-python 0.3.36).
GGML_TYPES = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 2 + 16),
    3: GgmlType("Q4_1", 32, 2 + 2 + 16),
    6: GgmlType("Q5_0", 32, 2 + 4 + 16),
    7: GgmlType("Q5_1", 32, 2 + 2 + 4 + 16),
    8: GgmlType("Q8_0", 32, 2 + 32),
    9: GgmlType("Q8_1", 32, 4 + 4 + 32),
    10: GgmlType("Q2_K", 256, 2 + 2 + 16 + 64),
    11: GgmlType("Q3_K", 256, 2 + 64 + 32 + 12),
    12: GgmlType("Q4_K", 256, 2 + 2 + 128 + 12),
    13: GgmlType("Q5_K", 256, 2 + 2 + 128 + 32 + 12),
    14: GgmlType("Q6_K", 256, 2 + 128 + 64 + 16),
    15: GgmlType("Q8_K", 256, 4 + 256 + 32),
    16: GgmlType("IQ2_XXS", 256, 2 + 64),
    17: GgmlType("IQ2_XS", 256, 2 + 64 + 8),
    18: GgmlType("IQ3_XXS", 256, 2 + 64 + 32),
    19: GgmlType("IQ1_S", 256, 2 + 32 + 16),
    20: GgmlType("IQ4_NL", 32, 2 + 16),
    21: GgmlType("IQ3_S", 256, 2 + 64 + 32 + 8 + 4),
    22: GgmlType("IQ2_S", 256, 2 + 64 + 16),
    23: GgmlType("IQ4_XS", 256, 2 + 2 + 128 + 4),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 32 + 16 + 8),
    30: GgmlType("BF16", 1, 2),
    34: GgmlType("TQ1_0", 256, 2 + 4 * 13),
    35: GgmlType("TQ2_0", 256, 2 + 64),
    39: GgmlType("MXFP4", 32, 1 + 16),
    40: GgmlType("NVFP4", 64, 4 + 32),
    41: GgmlType("Q1_0", 128, 2 + 16),
    42: GgmlType("Q2_0", 64, 2 + 16),
}


class StoredTensor(NamedTuple):
    """A tensor as a file has it. `dtype` is the file's own word (`BF16`, `F8_E4M3`, `Q4_K`), `shape` is torch's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


class Gguf(NamedTuple):
    """A GGUF file's header. Of a long array in `metadata` only its length is kept, as a `Length`."""

    metadata: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]


class Checkpoint(NamedTuple):
    """What was seen of a model's weights: the tensors of its files, and where; why none, where there are none.

    `kind` is the format of the files, `safetensors` or `gguf`; `remote`: they are on the Hub, `where` is id and commit.
    """

    where: str
    tensors: tuple[StoredTensor, ...] = ()
    kind: str = "safetensors"
    why_not: str = ""
    remote: bool = False


class Length(NamedTuple):
    """How many values an array of a GGUF file has, where they are not kept."""

    number: int


_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", *_PICKLES)  # how files of weights are called


def refuse_pickle(path: Path) -> None:
    """Raise ConfigError for a file that only unpickling can read, which runs whatever code the file holds."""
    if path.suffix in _PICKLES:
        raise ConfigError(
            f"model: {_shown(path)} is a pickle, which is never opened; give a folder with config.json, or safetensors",
            "model",
        )


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """What a folder has of `model.safetensors`, or of the shards that its index names; None where it has no weights.

    Weights that are not here (shards that were not downloaded, pointers of Git LFS) and pickles are not read, and the
    checkpoint says so. Raises ConfigError where a file is not what it must be.
    """
    index, single, where = folder / _INDEX, folder / _SINGLE, _shown(folder)
    if single.is_file():
        if _is_pointer(single):
            return Checkpoint(where, why_not=f"{single.name} is a pointer of Git LFS, and not here")
        return Checkpoint(where, read_safetensors(single))
    if index.is_file():
        places = _read(index, _index)
        absent = next((shard for shard in _shards(index, places) if _is_absent(folder / shard)), None)
        if absent is not None:
            return Checkpoint(where, why_not=f"{_named(absent)} is not here")
        return Checkpoint(where, _read_shards(index, places))
    pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
    return Checkpoint(where, why_not=f"{_named(pickled.name)} is a pickle, which is never opened") if pickled else None


def read_safetensors(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of one safetensors file, in the order of their bytes."""
    return _read(path, _safetensors)


def read_gguf(path: Path) -> Gguf:
    """The header of a GGUF file; of one that is split, those of all parts: the first has the metadata."""
    first: Gguf = _read(path, _gguf)
    parts = first.metadata.get("split.count", 1)
    if type(parts) is not int or parts <= 1:
        return first
    stem, found = path.name.rpartition("-of-")[0].rpartition("-")[0], list(first.tensors)
    if not stem or parts > _MOST_SHARDS:
        raise _bad(path, f"says that it is one of {parts} parts, and is not named so")
    names = [path.with_name(f"{stem}-{i:05}-of-{parts:05}.gguf") for i in range(1, parts + 1)]
    if path != names[0]:
        raise ConfigError(f"model: {_shown(path)} is a part of a GGUF file; give the first, {names[0].name}", "model")
    for name in names[1:]:
        found += cast(Gguf, _read(name, _gguf)).tensors
    return Gguf(first.metadata, tuple(_once(path, found)))


def stored_bytes(tensors: Sequence[StoredTensor]) -> dict[str, int]:
    """Bytes by dtype, the most first."""
    found: dict[str, int] = {}
    for tensor in tensors:
        found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def tensors_of(entries: Mapping[str, Any], where: Path) -> tuple[StoredTensor, ...]:
    """The tensors that the JSON of a safetensors header lists, in the order of their bytes, without gaps from 0 on."""
    if len(entries) > _MOST_TENSORS:
        raise _bad(where, f"lists more than {_MOST_TENSORS:,} tensors")
    found: list[tuple[int, StoredTensor]] = []
    for name, entry in entries.items():
        if name != "__metadata__":
            found.append(_entry(name, entry, where))
    found.sort(key=lambda one: (one[0], one[0] + one[1].bytes))
    at = 0
    for start, tensor in found:
        if start != at:
            what = "overlaps the one before" if start < at else "leaves a gap before it"
            raise _bad(where, f"has wrong offsets: {_named(tensor.name)} {what}")
        at += tensor.bytes
    return tuple(tensor for _, tensor in found)


def _entry(name: str, entry: Any, where: Path) -> tuple[int, StoredTensor]:
    """Where a tensor's bytes begin, and the tensor."""
    if not isinstance(entry, dict):
        raise _bad(where, f"says nothing of {_named(name)}'s shape")
    said = cast(dict[str, Any], entry)
    dtype: object = said.get("dtype")
    shape, offsets = cast(Any, said.get("shape")), cast(Any, said.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _bad(where, f"has a dtype that is not known: {dtype!r:.40}, of {_named(name)}")
    if not _whole_numbers(shape, _MOST_DIMS, _MOST_SIZE):
        raise _bad(where, f"has no shape of {_named(name)} but {shape!r:.40}")
    if not _whole_numbers(offsets, 2, 2**63) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(where, f"has no offsets of {_named(name)} but {offsets!r:.40}")
    start, end = cast(tuple[int, int], offsets)
    bits = prod(cast(list[int], shape)) * BITS[dtype]
    if bits != 8 * (end - start):
        raise _bad(where, f"has {end - start:,} bytes of {_named(name)}, {dtype} {shape!r:.60}")
    return start, StoredTensor(name, dtype, tuple(cast(list[int], shape)), bits // 8)


def _whole_numbers(value: Any, most: int, largest: int) -> bool:
    return (
        isinstance(value, list)
        and len(cast(list[Any], value)) <= most
        and all(type(n) is int and 0 <= n <= largest for n in cast(list[Any], value))
    )


def _safetensors(file: BinaryIO, size: int, path: Path) -> tuple[StoredTensor, ...]:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise _bad(path, "ends before its header does")
    if length > _MOST_HEADER:
        raise _bad(path, f"has a header of {length:,} bytes, and {_MOST_HEADER // 2**20} MiB are read at most")
    found = tensors_of(_json(file.read(length), path), path)
    if sum(tensor.bytes for tensor in found) != size - 8 - length:
        raise _bad(path, f"is not as long as its header says: {size:,} bytes")
    return found


def _shards(index: Path, places: Mapping[str, str]) -> list[str]:
    """The files that an index names, each once."""
    shards = list(dict.fromkeys(places.values()))
    if len(shards) > _MOST_SHARDS:
        raise _bad(index, f"names more than {_MOST_SHARDS:,} files")
    wrong = next((name for name in shards if not name.endswith(".safetensors") or name != Path(name).name), None)
    if wrong is not None:
        raise _bad(index, f"names {_named(wrong)}, which is no safetensors file beside it")
    return shards


def _read_shards(index: Path, places: Mapping[str, str]) -> tuple[StoredTensor, ...]:
    found: list[StoredTensor] = []
    for shard in _shards(index, places):
        tensors = read_safetensors(index.parent / shard)
        other = next((tensor.name for tensor in tensors if places.get(tensor.name) != shard), None)
        if other is not None:
            raise _bad(index, f"does not say that {_named(shard)} has {_named(other)}")
        found += tensors
    if len(found) != len(places):
        there = {tensor.name for tensor in found}
        missing = next(name for name in places if name not in there)
        raise _bad(index, f"names {_named(missing)}, which {_named(places[missing])} has not")
    return tuple(found)


def _is_absent(path: Path) -> bool:
    return not path.is_file() or _is_pointer(path)


def _is_pointer(path: Path) -> bool:
    """Whether a file stands for one that Git LFS keeps. Source: git-lfs docs/spec.md, below 1024 bytes."""
    try:
        return path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs")
    except OSError as error:
        raise _bad(path, f"cannot be read ({error.strerror or error})") from None


def _index(file: BinaryIO, size: int, path: Path) -> dict[str, str]:
    if size > _MOST_HEADER:
        raise _bad(path, f"is larger than {_MOST_HEADER // 2**20} MiB")
    places: Any = _json(file.read(_MOST_HEADER), path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in cast(dict[str, Any], places).values()):
        raise _bad(path, "has no weight_map of tensors and the files they are in")
    return cast(dict[str, str], places)


def _json(raw: bytes, path: Path) -> Mapping[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise _bad(path, "names something twice in its header")
        return found

    if raw.count(b"[") + raw.count(b"{") > 4 * _MOST_TENSORS:
        raise _bad(path, f"lists more than {_MOST_TENSORS:,} tensors")
    try:
        said: object = json.loads(raw, object_pairs_hook=once)
    except RecursionError:
        raise _bad(path, "has a header that is nested too deeply") from None
    except ValueError:  # no JSON, no UTF-8, a number of more digits than Python reads
        raise _bad(path, "has a header that is not JSON") from None
    if not isinstance(said, dict):
        raise _bad(path, "has a header that is no JSON object")
    return cast(dict[str, Any], said)


def _read(path: Path, read: Any) -> Any:
    """What `read` makes of the file, once for a file as it is."""
    try:
        seen = path.stat()
        if not stat.S_ISREG(seen.st_mode):  # a pipe, which may never end
            raise _bad(path, "is no file")
        return _cached(path, read, seen.st_size, seen.st_mtime_ns)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"model: {_shown(path)} cannot be read ({reason})", "model") from None


@lru_cache(maxsize=512)
def _cached(path: Path, read: Any, size: int, _: int) -> Any:
    with path.open("rb") as file:
        return read(file, size, path)


# GGUF's types of values, by number, as struct has them. Source: ggml docs/gguf.md gguf_metadata_value_type.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST = 4  # arrays in arrays
_LEAST_INFO = 8 + 4 + 4 + 8  # bytes that the description of a tensor takes at least


class _Reader:
    """Reads a GGUF file's header front to back, as much as there is and no more than `_MOST_METADATA`."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.path = file, path
        self.left, self.at, self.reads = min(size, _MOST_METADATA), 0, 0
        self.whole = size > _MOST_METADATA

    def take(self, n: int) -> bytes:
        if n > self.left:
            if self.whole:
                raise _bad(self.path, f"has a header of more than {_MOST_METADATA // 2**20} MiB")
            raise _bad(self.path, "ends before its header does")
        self.left, self.at, self.reads = self.left - n, self.at + n, self.reads + 1
        if self.reads > _MOST_READ:
            raise _bad(self.path, "has more values in its header than any model needs")
        return self.file.read(n)

    def number(self, code: str) -> Any:
        raw = self.take(struct.calcsize(f"<{code}"))
        try:
            return struct.unpack(f"<{code}", raw)[0]
        except struct.error:  # the file has become shorter
            raise _bad(self.path, "ends before its header does") from None

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _VALUES:
            return self.number(_VALUES[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > _DEEPEST:
            raise _bad(self.path, f"has a value of type {kind}, which is not known" if kind != _ARRAY else "is nested")
        inner, length = self.number("I"), self.number("Q")
        if inner in _VALUES:
            raw = self.take(struct.calcsize(_VALUES[inner]) * length)
            kept = length <= _MOST_VALUES and len(raw) == struct.calcsize(_VALUES[inner]) * length
            return struct.unpack(f"<{length}{_VALUES[inner]}", raw) if kept else Length(length)
        if inner == _STRING:
            for _ in range(length):  # each takes 8 bytes at least, so that a false length ends with the file
                self.take(self.number("Q"))
            return Length(length)
        return tuple(self.value(inner, depth + 1) for _ in range(length))


def _gguf(file: BinaryIO, size: int, path: Path) -> Gguf:
    reader = _Reader(file, size, path)
    if reader.take(4) != b"GGUF":
        raise _bad(path, "is no GGUF file")
    version = reader.number("I")
    if version not in (2, 3):
        raise _bad(path, f"is of GGUF version {version}; 2 and 3 are read, little-endian")
    tensors, pairs = reader.number("Q"), reader.number("Q")
    if tensors > min(_MOST_TENSORS, size // _LEAST_INFO) or pairs > size // 12:
        raise _bad(path, f"claims {tensors:,} tensors and {pairs:,} keys, more than it has room for")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.text()
        if key in metadata:
            raise _bad(path, f"names {_named(key)} twice")
        metadata[key] = reader.value(reader.number("I"))
    infos = [_info(reader) for _ in range(tensors)]
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or not 1 <= align <= 2**20:
        raise _bad(path, f"has an alignment of {align!r:.40}")
    start = -(-reader.at // align) * align
    _check_offsets(infos, size - start, align, path)
    return Gguf(metadata, tuple(_once(path, [tensor for _, tensor in infos])))


def _info(reader: _Reader) -> tuple[int, StoredTensor]:
    """Where a tensor's bytes begin, and the tensor. ggml names the innermost dimension first."""
    name, dims = reader.text(), reader.number("I")
    if dims > _MOST_DIMS:
        raise _bad(reader.path, f"has {dims:,} dimensions of {_named(name)}")
    shape = tuple(reader.number("Q") for _ in range(dims))
    number, offset = reader.number("I"), reader.number("Q")
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise _bad(reader.path, f"has {_named(name)} in ggml's type {number}, which is not known")
    if any(not 1 <= n <= _MOST_SIZE for n in shape) or (shape[0] if shape else 1) % kind.elements:
        raise _bad(reader.path, f"has no shape of {_named(name)} but {list(shape)!r:.60}, in {kind.name}")
    bytes_ = prod(shape) // kind.elements * kind.bytes
    return offset, StoredTensor(name, kind.name, tuple(reversed(shape)), bytes_)


def _check_offsets(infos: Sequence[tuple[int, StoredTensor]], size: int, align: int, path: Path) -> None:
    at = 0
    for offset, tensor in sorted(infos, key=lambda info: (info[0], info[1].bytes)):
        if offset % align or offset < at:
            raise _bad(path, f"has wrong offsets: {_named(tensor.name)} is at {offset:,}, and {at:,} bytes are taken")
        at = offset + tensor.bytes
        if at > size:
            raise _bad(path, f"ends before {_named(tensor.name)} does")


def _once(path: Path, tensors: Sequence[StoredTensor]) -> Iterator[StoredTensor]:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise _bad(path, f"has {_named(tensor.name)} twice")
        seen.add(tensor.name)
        yield tensor


def _shown(path: Path) -> str:
    return printable(str(path), _LONGEST)


def _named(name: str) -> str:
    return printable(name, _LONGEST)


def _bad(path: Path, what: str) -> ConfigError:
    return ConfigError(f"model: {_shown(path)} {what}", "model")
