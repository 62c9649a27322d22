"""llama.cpp's names for a model's tensors, and the ggml type its quantize tool chooses for each: data and rules.

A `Q4_K_M` file has tensors of several types: more bits for some layers' value and down projections, Q6_K for the
output, F32 for norms and routers. The choice depends on the tensor's name and layer, and on a few sizes. Sources:
llama.cpp as in llama-cpp-python 0.3.36, src/llama-quant.cpp tensor_allows_quantization, llama_tensor_get_type_impl,
tensor_type_fallback; conversion/base.py; gguf-py/gguf/constants.py, tensor_mapping.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from memplan.core.records import NamedTuple
from memplan.core.toml import read_tables
from memplan.models.headers import GGML_TYPES

SOURCE = "llama.cpp src/llama-quant.cpp llama_tensor_get_type (llama-cpp-python 0.3.36)"
BLOCKS = {kind.name: (kind.elements, kind.bytes) for kind in GGML_TYPES.values()}

# The tool's file types, with the type of most tensors in each: llama_ftype_get_default_type.
FILE_TYPES = {
    **{name: name for name in ("F32", "F16", "BF16", "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K")},
    "Q2_K_S": "Q2_K",
    **dict.fromkeys(("Q3_K_S", "Q3_K_M", "Q3_K_L"), "Q3_K"),
    **dict.fromkeys(("Q4_K_S", "Q4_K_M"), "Q4_K"),
    **dict.fromkeys(("Q5_K_S", "Q5_K_M"), "Q5_K"),
    **{name: name for name in ("Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")},
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS",
    **dict.fromkeys(("IQ3_XS", "IQ3_S", "IQ3_M"), "IQ3_S"),
    **{name: name for name in ("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0")},
    "MXFP4_MOE": "MXFP4",
}
# Other names: tools/quantize/quantize.cpp QUANT_OPTIONS; and unsloth's dynamic files (UD-Q4_K_XL), which choose a type
# for each tensor of each model, with the plain file that is counted.
ALIASES = {
    **{f"{name}_K{end}": f"{name}_K_M" for name in ("Q3", "Q4", "Q5") for end in ("", "_XL")},
    "Q2_K_XL": "Q2_K",
    "Q6_K_XL": "Q6_K",
    "Q8_K_XL": "Q8_0",
}
# Bytes of such files minus those of the plain file, in thousandths, by the bits in their name.
_DYNAMIC = {**dict.fromkeys("123", (-140, 0)), "4": (-65, 90), **dict.fromkeys("56", (0, 160)), "8": (0, 250)}
DYNAMIC_SOURCE = (
    "sizes of 13 published files of Qwen3 30B A3B, Qwen3.5 9B and 35B A3B, Qwen3.6 and 3.8 27B: -13.8 % to 15.9 %; "
    "8 bits are assumed"
)

_NAMES = read_tables(Path(__file__).with_name("gguf_names.toml"))
# The path of a module -> its name: outside of the layers, by the last part of the path, and in a layer.
OUTSIDE, INSIDE = (
    {path: name for name, paths in _NAMES[part].items() for path in paths} for part in ("outside", "inside")
)
# Parameters that the conversion splits -> the names of their parts in the order of the rows.
PARTS = {path: tuple(names.split()) for names, paths in _NAMES["parts"].items() for path in paths}

# Architectures whose files list the heads of each layer, with 0 for layers without attention.
BY_LAYER = ("granitehybrid", "jamba", "nemotron_h")
BARE = ("ssm_a", "ssm_d")  # names without `.weight` or `.bias`


class Sizes(NamedTuple):
    """Facts besides a tensor's name and shape on which the choice of types depends.

    layers     layers of the model
    experts    experts in a layer, 0 if there are none
    ratio      query heads per key/value head in the first layer; 0 if it has no attention
    seventy    llama.cpp classifies the model as 70B
    tied       there is no output.weight
    values     number of value tensors
    imatrix    the file is quantised with an importance matrix
    """

    architecture: str
    layers: int
    experts: int
    ratio: int
    seventy: bool
    tied: bool
    values: int
    imatrix: bool


_TWO_BITS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")
# File types that require an importance matrix: tensor_requires_imatrix.
NEEDS_IMATRIX = frozenset((*_TWO_BITS, "IQ3_XXS", "IQ3_XS", "Q2_K_S"))
# Parts of the names of tensors that are never quantised, for the families above.
_UNQUANTISED = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d")
_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def dynamic_range(name: str) -> tuple[int, int] | None:
    """Return how a dynamic file's size may differ from the plain one's, in thousandths; None for another name.

    >>> dynamic_range("UD-Q4_K_XL"), dynamic_range("UD-IQ2_M"), dynamic_range("Q4_K_M")
    ((-65, 90), (-140, 0), None)
    """
    upper = name.strip().upper().removeprefix("GGUF:").replace("-", "_")
    if not (upper.startswith("UD_") or upper.endswith("_K_XL")):
        return None
    return next((_DYNAMIC[letter] for letter in upper if letter in _DYNAMIC), None)


def category(name: str) -> str:
    """Return the tool's category of a tensor: tensor_get_category."""
    if name == "output.weight":
        return "output"
    if name == "token_embd.weight":
        return "token_embd"
    names = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight", "attn_k.weight", "attn_q.weight")
    for part in (*names, "attn_output.weight", "ffn_up", "ffn_gate", "ffn_down"):
        if part in name:
            return part.removesuffix(".weight")
    return ""


VALUES = ("attn_v", "attn_qkv", "attn_kv_b")


def quantises(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether the tool quantises a tensor. Shapes are in torch's order. Source: tensor_allows_quantization."""
    dims = len(shape) - next((i for i, n in enumerate(shape) if n != 1), len(shape) - 1)  # ggml_n_dims
    return (
        dims > 1
        and name.endswith("weight")
        and name != "position_embd.weight"
        and all(p not in name for p in _UNQUANTISED)
    )


def types_of(
    tensors: Iterable[tuple[str, tuple[int, ...]]], file_type: str, sizes: Sizes
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and ggml type of each tensor of a file. Shapes are in torch's order, tensors in the file's."""
    counts = {"values": 0, "ffn_down": 0, "ffn_gate": 0, "ffn_up": 0}
    for name, shape in tensors:
        default = FILE_TYPES[file_type]
        if not quantises(name, shape):
            yield name, shape, "F32"
        elif BLOCKS[default][0] == 1:
            yield name, shape, default
        else:
            chosen = _chosen(name, shape, file_type, sizes, counts)
            yield name, shape, _fitting(chosen, shape[-1])


def _fitting(kind: str, columns: int) -> str:
    """Return the type, or a fallback with smaller blocks if rows are no multiple of its blocks.

    Source: tensor_type_fallback.
    """
    if columns % BLOCKS[kind][0] == 0:
        return kind
    other = _FALLBACK.get(kind, "F16")
    return other if columns % BLOCKS[other][0] == 0 else "F16"


def _more_bits(i: int, n: int) -> bool:
    """Return whether a layer gets more bits: the first and last eighth, and every third between.

    Source: use_more_bits.
    """
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _chosen(name: str, shape: tuple[int, ...], file: str, sizes: Sizes, counts: dict[str, int]) -> str:  # noqa: PLR0911 (a return for each of llama.cpp's rules)
    """Return the type that the file type `file` gives a tensor. Source: llama_tensor_get_type_impl, in its order."""
    kind, default = category(name), FILE_TYPES[file]
    if kind == "output" or (kind == "token_embd" and sizes.tied):
        return _output(file, default, shape[-1], sizes)
    if file == "MXFP4_MOE":
        return "MXFP4" if len(shape) > 2 and shape[0] > 1 else "Q8_0"
    if kind == "token_embd":
        return _embeddings(file, default)
    if file in _TWO_BITS:
        return _two_bits(kind, file, default, sizes, counts)
    if kind in VALUES:
        value_type = _values(file, default, sizes, counts["values"])
        counts["values"] += 1
        return value_type
    if kind in ("attn_k", "attn_q"):
        if kind == "attn_k" and sizes.experts == 8:
            return "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(file, default)
    if kind == "attn_output":
        return _attention_output(file, default, sizes)
    if kind in ("ffn_down", "ffn_gate", "ffn_up"):
        layer = int(name.split(".")[1]) if sizes.experts > 1 else counts[kind]
        counts[kind] += 1
        if kind == "ffn_down":
            return _down(file, default, sizes, layer)
        middle = sizes.layers // 8 <= layer < 7 * sizes.layers // 8
        return "IQ3_XXS" if file == "IQ3_XS" and middle else default
    return default


def _output(file: str, default: str, columns: int, sizes: Sizes) -> str:
    if file == "MXFP4_MOE" or sizes.architecture == "falcon" or columns % BLOCKS[default][0]:
        return "Q8_0"
    if file in (*_TWO_BITS, "IQ3_XXS"):
        return "Q5_K"
    return "Q8_0" if default == "Q8_0" else "Q6_K"


def _embeddings(file: str, default: str) -> str:
    if file in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
        return "Q2_K"
    if file in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "IQ3_S"
    return "Q4_K" if file in ("TQ1_0", "TQ2_0", "Q2_0") else default


def _two_bits(kind: str, file: str, default: str, sizes: Sizes, counts: dict[str, int]) -> str:
    larger = "IQ3_S" if file in ("IQ2_S", "IQ2_M") else "Q2_K"
    if kind in VALUES:
        return "Q4_K" if sizes.ratio >= 4 or sizes.experts >= 4 else larger
    if kind == "attn_k" and sizes.experts == 8:
        return "Q4_K"
    if kind == "ffn_down":
        first = counts["ffn_down"] < sizes.layers // 8
        counts["ffn_down"] += 1
        return larger if first else default
    if kind == "attn_output":
        if sizes.experts == 8:
            return "Q5_K"
        return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(file, default)
    return default


def _values(file: str, default: str, sizes: Sizes, i: int) -> str:
    is_grouped = sizes.ratio >= 4
    value_type = default
    match file:
        case "Q2_K":
            value_type = "Q4_K" if is_grouped else "Q3_K"
        case "IQ3_XXS":
            value_type = "Q4_K" if is_grouped else "IQ3_XXS" if sizes.imatrix else "IQ3_S"
        case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if is_grouped:
            value_type = "Q4_K"
        case "IQ3_M":
            value_type = "Q4_K"
        case "Q3_K_M":
            value_type = "Q5_K" if i < 2 else "Q4_K"
        case "Q3_K_L":
            value_type = "Q5_K"
        case "IQ4_NL" | "IQ4_XS" if is_grouped:
            value_type = "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if _more_bits(i, sizes.values):
            value_type = "Q6_K"
        case "Q4_K_S" if i < 4:
            value_type = "Q5_K"
        case _:
            pass
    if sizes.seventy and value_type in ("Q3_K", "Q4_K"):
        value_type = "Q5_K"
    return "Q8_0" if sizes.experts == 8 else value_type


def _down(file: str, default: str, sizes: Sizes, i: int) -> str:  # noqa: PLR0911 (a return for each of llama.cpp's rules)
    n, falcon = sizes.layers, sizes.architecture == "falcon"
    first = i < n // 8
    match file:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S" if first:
            return "Q4_K"
        case "IQ3_XXS" if not sizes.imatrix:
            return "Q4_K" if first else "Q3_K"
        case "Q3_K_M":
            if i < n // 16:
                return "Q5_K"
            return "Q4_K" if not falcon or _more_bits(i, n) else "Q3_K"
        case "IQ3_M" if first or (sizes.experts == 8 and _more_bits(i, n)):
            return "Q4_K"
        case "Q3_K_L":
            return "Q4_K" if falcon else "Q5_K"
        case "Q4_K_M":
            if falcon:
                return "Q6_K" if i < n // 16 else "Q5_K" if _more_bits(i, n) else "Q4_K"
            return "Q6_K" if _more_bits(i, n) else default
        case "IQ4_NL" | "IQ4_XS" if first and not sizes.imatrix:
            return "Q5_K"
        case "Q5_K_M" if _more_bits(i, n):
            return "Q6_K"
        case "Q4_K_S" if first and not falcon:
            return "Q5_K"
        case "Q4_0" | "Q5_0" if first and sizes.imatrix:
            return "Q4_1" if file == "Q4_0" else "Q5_1"
        case _:
            return default


_Q5_WITH_8_EXPERTS = (
    *("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS"),
)


def _attention_output(file: str, default: str, sizes: Sizes) -> str:
    if sizes.architecture == "falcon":
        return "Q4_K" if file == "Q3_K_L" else default
    if sizes.experts == 8:
        return "Q5_K" if file in _Q5_WITH_8_EXPERTS else default
    larger = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
    return larger.get(file, default)
