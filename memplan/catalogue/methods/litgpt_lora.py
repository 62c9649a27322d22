"""LitGPT's LoRA: adapters in the model's dtype. q, k and v share matrix A; each has its own B, applied by convolution.

Source: litgpt 0.5.3 lora.py LoRALinear, LoRAQKVLinear; lit_gpt of October 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.kernels import ops
from memplan.catalogue.quantization.quantization import quantised_linear
from memplan.core.ir import Keep, Op, Tensor, Weight

_SOURCE = "litgpt 0.5.3 lora.py LoRAQKVLinear"

# LitGPT's command-line switches (`--lora_query` ...) and the layers each adapts.
SWITCHES = {
    "query": ("attn.attn",),
    "key": ("attn.attn",),
    "value": ("attn.attn",),
    "projection": ("attn.proj",),
    "mlp": ("mlp.fc", "mlp.fc_1", "mlp.fc_2", "mlp.proj"),
    "head": ("lm_head",),
}

# Other libraries' names for those layers, with the switch that adapts them.
ROLES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    **dict.fromkeys(("o_proj", "dense", "out_proj", "proj"), "projection"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "fc", "fc1", "fc2", "fc_1", "fc_2"), "mlp"),
    **dict.fromkeys(("dense_h_to_4h", "dense_4h_to_h"), "mlp"),
    "lm_head": "head",
}


def takes(op: Op, switches: tuple[str, ...]) -> bool:
    """Whether any of the switches adapts the layer."""
    return any(op.name in SWITCHES[switch] for switch in switches)


def adapt(op: Op, switches: tuple[str, ...], dtype: str, compute: str, dropout: bool) -> Iterator[Op]:
    """Yield the operations of a frozen linear layer, by bitsandbytes before 0.43 if it has 4 bits, and its adapter."""
    (x,), y = op.reads, op.writes[0]
    n, p = op.name, y.name
    base = next(w for w in op.weights if w.matrix)
    out = y.shape.removeprefix("b s ")
    into = base.shape.removeprefix(f"{out} ")
    result = f"{p}.base"
    if base.stored:
        yield from quantised_linear(op, f"{n}.linear", result, compute, older=True)
    else:
        yield op._replace(name=f"{n}.linear", writes=(y._replace(name=result),))
    lora_input = x
    if dropout:
        lora_input = f"{p}.dropped"
        yield ops.dropout(f"{n}.lora_dropout", x, lora_input, f"b s {into}")
    roles = tuple(role for role in ("query", "key", "value") if role in switches)
    if n == "attn.attn":
        yield from _qkv_adapter(op, lora_input, roles, dtype)
    else:
        yield from (_with_dtype(o, dtype) for o in _linear_adapter(op, lora_input, out, into))
    yield ops.scale(f"{n}.scaling", f"{p}.b", f"{p}.delta", y.shape)
    yield ops.add(f"{n}.add", result, f"{p}.delta", p, y.shape)
    yield ops.release_names(x, result, f"{p}.delta")


def _with_dtype(op: Op, dtype: str) -> Op:
    return op._replace(weights=tuple(w._replace(dtype=dtype) for w in op.weights))


def _linear_adapter(op: Op, x: str, out: str, into: str) -> Iterator[Op]:
    p = op.writes[0].name
    yield ops.linear(f"{op.name}.lora_A", x, f"{p}.a", "r", into, "adapter")
    yield ops.linear(f"{op.name}.lora_B", f"{p}.a", f"{p}.b", out, "r", "adapter")


def _qkv_adapter(op: Op, x: str, roles: tuple[str, ...], dtype: str) -> Iterator[Op]:
    """One A for all roles and one B per role, applied by convolution.

    Roles without an adapter get zeros, by `index_copy`, which keeps what it copies for backward.
    """
    n, p = op.name, op.writes[0].name
    count = len(roles)
    a = Weight(f"{n}.lora_A", f"{count} r h", "adapter", dtype, matrix=True, rows=2)
    lora_a = ops.linear(f"{n}.lora_A", x, f"{p}.a", f"{count} r", "h", "adapter")
    yield lora_a._replace(weights=(a,), keeps=(Keep(a.name, x), Keep(x, a.name)))
    heads = {role: "a d" if role == "query" else "k d" for role in roles}
    b = tuple(
        Weight(f"{n}.lora_B.{role}", f"{shape} r", "adapter", dtype, matrix=True, rows=2)
        for role, shape in heads.items()
    )
    outputs = tuple(Tensor(f"{p}.{role}", f"b s {shape}") for role, shape in heads.items())
    yield Op(
        f"{n}.conv1d",
        (f"{p}.a",),
        outputs,
        b,
        (*(Keep(w.name, f"{p}.a") for w in b), *(Keep(f"{p}.a", w.name) for w in b)),
        product="matrix",
        source=f"{ops.DERIVATIVES}: convolution",
    )
    names = tuple(t.name for t in outputs)
    adapts_all = count == 3
    yield Op(
        f"{n}.zero_pad",
        names,
        (Tensor(f"{p}.b", op.writes[0].shape),),
        (),
        () if adapts_all else tuple(Keep(name, name) for name in names),
        scratch=() if adapts_all else (Tensor("zeros", op.writes[0].shape),),
        source=f"{ops.DERIVATIVES}: index_copy",
    )
    yield ops.release_names(f"{p}.a", *names)
