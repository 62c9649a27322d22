"""Names, shapes, dtypes and bytes of a checkpoint's tensors, read from the headers of its files.

Files are untrusted: no size that a file claims is allocated unchecked, no weights are read, and pickles are never
opened. Every error is a one-line ConfigError.

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
from typing import Any, BinaryIO, cast

from memplan.core.errors import ConfigError, printable
from memplan.core.records import NamedTuple

_MAX_HEADER = 2**25  # bytes of a safetensors header or index; a model of a trillion parameters has 16 MB
_MAX_METADATA = 2**26  # bytes before a GGUF file's tensors, including the tokenizer; usually 5 to 20 MB
_MAX_READS = 2**22  # values read one by one from a GGUF file; usually at most a million
_MAX_TENSORS = 2**19
_MAX_SHARDS = 2**12
_MAX_DIMS = 64  # torch's limit
_MAX_SIZE = 2**48  # of one dimension
_MAX_VALUES = 2**14  # longest array of a GGUF file whose values are kept; of a longer one only the length is
_MAX_SHOWN = 200  # characters of a path or name that an error message repeats
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# Bits per element of safetensors' dtypes. Source: safetensors 0.8 src/tensor.rs Dtype::bitsize.
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


class GgmlType(NamedTuple):
    """A ggml type: its name, and the elements and bytes of one block."""

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
    """A tensor in a file. `dtype` is the format's own name (`BF16`, `F8_E4M3`, `Q4_K`), `shape` is in torch's order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


class Gguf(NamedTuple):
    """A GGUF file's header. Long arrays in `metadata` are replaced by their `ArrayLength`."""

    metadata: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]


class Checkpoint(NamedTuple):
    """The tensors in the files of a model's weights.

    where    folder or file; on the Hub, id and commit
    tensors  headers of all tensors
    kind     file format: `safetensors` or `gguf`
    why_not  reason why there are no tensors
    remote   whether the files are on the Hub
    """

    where: str
    tensors: tuple[StoredTensor, ...] = ()
    kind: str = "safetensors"
    why_not: str = ""
    remote: bool = False


class ArrayLength(NamedTuple):
    """The length of a GGUF file's array whose values are not kept."""

    number: int


_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", *_PICKLES)  # endings of weights files


def refuse_pickle(path: Path) -> None:
    """Raise ConfigError for a pickle, because unpickling runs whatever code the file holds."""
    if path.suffix in _PICKLES:
        raise ConfigError(
            f"model: {_shown(path)} is a pickle, which is never opened; give a folder with config.json, or safetensors",
            "model",
        )


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint of a folder: its `model.safetensors`, or its index's shards. None if it has no weights.

    Pickles and incomplete downloads (missing shards, Git LFS pointers) are not read; `why_not` says so. Raises
    ConfigError for an invalid file.
    """
    index, single, where = folder / _INDEX, folder / _SINGLE, _shown(folder)
    if single.is_file():
        if _is_pointer(single):
            return Checkpoint(where, why_not=f"{single.name} is a Git LFS pointer, whose file was not downloaded")
        return Checkpoint(where, read_safetensors(single))
    if index.is_file():
        places = _read(index, _index)
        absent = next((shard for shard in _shards(index, places) if _is_absent(folder / shard)), None)
        if absent is not None:
            return Checkpoint(where, why_not=f"{_shown_name(absent)} is not here")
        return Checkpoint(where, _read_shards(index, places))
    pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
    if pickled is None:
        return None
    return Checkpoint(where, why_not=f"{_shown_name(pickled.name)} is a pickle, which is never opened")


def read_safetensors(path: Path) -> tuple[StoredTensor, ...]:
    """Return the tensors of one safetensors file, by offset."""
    return _read(path, _safetensors)


def read_gguf(path: Path) -> Gguf:
    """Return the header of a GGUF file. Of a split file, `path` is the first part, and the tensors are those of all."""
    first: Gguf = _read(path, _gguf)
    parts = first.metadata.get("split.count", 1)
    if type(parts) is not int or parts <= 1:
        return first
    stem, tensors = path.name.rpartition("-of-")[0].rpartition("-")[0], list(first.tensors)
    if not stem or parts > _MAX_SHARDS:
        raise _invalid(path, f"claims to be one of {parts} parts, but its name has no part number")
    names = [path.with_name(f"{stem}-{i:05}-of-{parts:05}.gguf") for i in range(1, parts + 1)]
    if path != names[0]:
        raise ConfigError(f"model: {_shown(path)} is a part of a GGUF file; give the first, {names[0].name}", "model")
    for name in names[1:]:
        tensors += cast(Gguf, _read(name, _gguf)).tensors
    return Gguf(first.metadata, tuple(_unique(path, tensors)))


def stored_bytes(tensors: Sequence[StoredTensor]) -> dict[str, int]:
    """Return the bytes of each dtype, largest first."""
    by_dtype: dict[str, int] = {}
    for tensor in tensors:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.bytes
    return dict(sorted(by_dtype.items(), key=lambda item: -item[1]))


def tensors_of(entries: Mapping[str, Any], where: Path) -> tuple[StoredTensor, ...]:
    """Return the tensors of a safetensors header's JSON, by offset.

    Raises ConfigError unless their offsets start at 0 and have no gaps.
    """
    if len(entries) > _MAX_TENSORS:
        raise _invalid(where, f"lists more than {_MAX_TENSORS:,} tensors")
    placed: list[tuple[int, StoredTensor]] = []
    for name, entry in entries.items():
        if name != "__metadata__":
            placed.append(_entry(name, entry, where))
    placed.sort(key=lambda item: (item[0], item[0] + item[1].bytes))
    end = 0
    for start, tensor in placed:
        if start != end:
            problem = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise _invalid(where, f"has wrong offsets: {_shown_name(tensor.name)} {problem}")
        end += tensor.bytes
    return tuple(tensor for _, tensor in placed)


def _entry(name: str, entry: Any, where: Path) -> tuple[int, StoredTensor]:
    """Return the offset of a tensor's bytes, and the tensor."""
    if not isinstance(entry, dict):
        raise _invalid(where, f"gives no shape for {_shown_name(name)}")
    fields = cast(dict[str, Any], entry)
    dtype: object = fields.get("dtype")
    shape, offsets = cast(Any, fields.get("shape")), cast(Any, fields.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _invalid(where, f"has an unknown dtype {dtype!r:.40} for {_shown_name(name)}")
    if not _whole_numbers(shape, _MAX_DIMS, _MAX_SIZE):
        raise _invalid(where, f"has an invalid shape {shape!r:.40} for {_shown_name(name)}")
    if not _whole_numbers(offsets, 2, 2**63) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(where, f"has invalid offsets {offsets!r:.40} for {_shown_name(name)}")
    start, end = cast(tuple[int, int], offsets)
    bits = prod(cast(list[int], shape)) * BITS[dtype]
    if bits != 8 * (end - start):
        raise _invalid(where, f"has {end - start:,} bytes for {_shown_name(name)}, which is {dtype} {shape!r:.60}")
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
        raise _invalid(path, "ends before its header does")
    if length > _MAX_HEADER:
        raise _invalid(path, f"has a header of {length:,} bytes; at most {_MAX_HEADER // 2**20} MiB are read")
    tensors = tensors_of(_json(file.read(length), path), path)
    if sum(tensor.bytes for tensor in tensors) != size - 8 - length:
        raise _invalid(path, f"has {size:,} bytes, not as many as its header says")
    return tensors


def _shards(index: Path, places: Mapping[str, str]) -> list[str]:
    """Return the files that an index names, without duplicates."""
    shards = list(dict.fromkeys(places.values()))
    if len(shards) > _MAX_SHARDS:
        raise _invalid(index, f"names more than {_MAX_SHARDS:,} files")
    wrong = next((name for name in shards if not name.endswith(".safetensors") or name != Path(name).name), None)
    if wrong is not None:
        raise _invalid(index, f"names {_shown_name(wrong)}, which is not a safetensors file in the same folder")
    return shards


def _read_shards(index: Path, places: Mapping[str, str]) -> tuple[StoredTensor, ...]:
    read: list[StoredTensor] = []
    for shard in _shards(index, places):
        tensors = read_safetensors(index.parent / shard)
        other = next((tensor.name for tensor in tensors if places.get(tensor.name) != shard), None)
        if other is not None:
            raise _invalid(index, f"does not list {_shown_name(other)} in {_shown_name(shard)}")
        read += tensors
    if len(read) != len(places):
        names = {tensor.name for tensor in read}
        missing = next(name for name in places if name not in names)
        raise _invalid(index, f"lists {_shown_name(missing)}, which is not in {_shown_name(places[missing])}")
    return tuple(read)


def _is_absent(path: Path) -> bool:
    return not path.is_file() or _is_pointer(path)


def _is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer. Source: git-lfs docs/spec.md, below 1024 bytes."""
    try:
        return path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs")
    except OSError as error:
        raise _invalid(path, f"cannot be read ({error.strerror or error})") from None


def _index(file: BinaryIO, size: int, path: Path) -> dict[str, str]:
    if size > _MAX_HEADER:
        raise _invalid(path, f"is larger than {_MAX_HEADER // 2**20} MiB")
    places: Any = _json(file.read(_MAX_HEADER), path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in cast(dict[str, Any], places).values()):
        raise _invalid(path, "has no weight_map from tensors to files")
    return cast(dict[str, str], places)


def _json(raw: bytes, path: Path) -> Mapping[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise _invalid(path, "has a duplicate key in its header")
        return entries

    if raw.count(b"[") + raw.count(b"{") > 4 * _MAX_TENSORS:
        raise _invalid(path, f"lists more than {_MAX_TENSORS:,} tensors")
    try:
        header: object = json.loads(raw, object_pairs_hook=unique)
    except RecursionError:
        raise _invalid(path, "has a header that is nested too deeply") from None
    except ValueError:  # not JSON, not UTF-8, or a number with more digits than Python reads
        raise _invalid(path, "has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise _invalid(path, "has a header that is not a JSON object")
    return cast(dict[str, Any], header)


def _read(path: Path, read: Any) -> Any:
    """Return what `read` makes of the file, cached until the file changes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe may never end
            raise _invalid(path, "is not a regular file")
        return _cached(path, read, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"model: {_shown(path)} cannot be read ({reason})", "model") from None


@lru_cache(maxsize=512)
def _cached(path: Path, read: Any, size: int, _: int) -> Any:
    with path.open("rb") as file:
        return read(file, size, path)


# GGUF's value types, by number, as struct format codes. Source: ggml docs/gguf.md gguf_metadata_value_type.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4  # of nested arrays
_MIN_INFO = 8 + 4 + 4 + 8  # bytes of the shortest description of a tensor


class _Reader:
    """Reads a GGUF file's header front to back, up to the end of the file or `_MAX_METADATA` bytes."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.path = file, path
        self.left, self.at, self.reads = min(size, _MAX_METADATA), 0, 0
        self.is_cut_off = size > _MAX_METADATA

    def take(self, n: int) -> bytes:
        if n > self.left:
            if self.is_cut_off:
                raise _invalid(self.path, f"has a header of more than {_MAX_METADATA // 2**20} MiB")
            raise _invalid(self.path, "ends before its header does")
        self.left, self.at, self.reads = self.left - n, self.at + n, self.reads + 1
        if self.reads > _MAX_READS:
            raise _invalid(self.path, "has more values in its header than any model needs")
        return self.file.read(n)

    def number(self, code: str) -> Any:
        raw = self.take(struct.calcsize(f"<{code}"))
        try:
            return struct.unpack(f"<{code}", raw)[0]
        except struct.error:  # the file was truncated meanwhile
            raise _invalid(self.path, "ends before its header does") from None

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _VALUES:
            return self.number(_VALUES[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > _MAX_DEPTH:
            raise _invalid(
                self.path, f"has a value of unknown type {kind}" if kind != _ARRAY else "has arrays nested too deeply"
            )
        inner, length = self.number("I"), self.number("Q")
        if inner in _VALUES:
            raw = self.take(struct.calcsize(_VALUES[inner]) * length)
            is_kept = length <= _MAX_VALUES and len(raw) == struct.calcsize(_VALUES[inner]) * length
            return struct.unpack(f"<{length}{_VALUES[inner]}", raw) if is_kept else ArrayLength(length)
        if inner == _STRING:
            for _ in range(length):  # each reads at least 8 bytes, so a false length stops at the end of the file
                self.take(self.number("Q"))
            return ArrayLength(length)
        return tuple(self.value(inner, depth + 1) for _ in range(length))


def _gguf(file: BinaryIO, size: int, path: Path) -> Gguf:
    reader = _Reader(file, size, path)
    if reader.take(4) != b"GGUF":
        raise _invalid(path, "is not a GGUF file")
    version = reader.number("I")
    if version not in (2, 3):
        raise _invalid(path, f"has GGUF version {version}; only little-endian versions 2 and 3 can be read")
    tensors, pairs = reader.number("Q"), reader.number("Q")
    if tensors > min(_MAX_TENSORS, size // _MIN_INFO) or pairs > size // 12:
        raise _invalid(path, f"claims {tensors:,} tensors and {pairs:,} keys, more than it has room for")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.text()
        if key in metadata:
            raise _invalid(path, f"has the key {_shown_name(key)} twice")
        metadata[key] = reader.value(reader.number("I"))
    infos = [_info(reader) for _ in range(tensors)]
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or not 1 <= align <= 2**20:
        raise _invalid(path, f"has an invalid alignment: {align!r:.40}")
    start = -(-reader.at // align) * align
    _check_offsets(infos, size - start, align, path)
    return Gguf(metadata, tuple(_unique(path, [tensor for _, tensor in infos])))


def _info(reader: _Reader) -> tuple[int, StoredTensor]:
    """Return the offset of a tensor's bytes, and the tensor. ggml lists the innermost dimension first."""
    name, dims = reader.text(), reader.number("I")
    if dims > _MAX_DIMS:
        raise _invalid(reader.path, f"has {dims:,} dimensions for {_shown_name(name)}")
    shape = tuple(reader.number("Q") for _ in range(dims))
    number, offset = reader.number("I"), reader.number("Q")
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise _invalid(reader.path, f"has {_shown_name(name)} in ggml's type {number}, which is unknown")
    if any(not 1 <= n <= _MAX_SIZE for n in shape) or (shape[0] if shape else 1) % kind.elements:
        raise _invalid(reader.path, f"has an invalid shape {list(shape)!r:.60} for {_shown_name(name)} in {kind.name}")
    bytes_ = prod(shape) // kind.elements * kind.bytes
    return offset, StoredTensor(name, kind.name, tuple(reversed(shape)), bytes_)


def _check_offsets(infos: Sequence[tuple[int, StoredTensor]], size: int, align: int, path: Path) -> None:
    end = 0
    for offset, tensor in sorted(infos, key=lambda info: (info[0], info[1].bytes)):
        if offset % align or offset < end:
            name = _shown_name(tensor.name)
            raise _invalid(path, f"has wrong offsets: {name} is at {offset:,}, but {end:,} bytes are already taken")
        end = offset + tensor.bytes
        if end > size:
            raise _invalid(path, f"ends before {_shown_name(tensor.name)} does")


def _unique(path: Path, tensors: Sequence[StoredTensor]) -> Iterator[StoredTensor]:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise _invalid(path, f"has the tensor {_shown_name(tensor.name)} twice")
        seen.add(tensor.name)
        yield tensor


def _shown(path: Path) -> str:
    return printable(str(path), _MAX_SHOWN)


def _shown_name(name: str) -> str:
    return printable(name, _MAX_SHOWN)


def _invalid(path: Path, what: str) -> ConfigError:
    return ConfigError(f"model: {_shown(path)} {what}", "model")
