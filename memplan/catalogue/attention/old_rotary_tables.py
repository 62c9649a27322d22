"""Rotary tables that stay allocated: of every layer before transformers 4.40, and of Unsloth's models of 2026."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight

_PREFIX = "rotary."  # of the operations that compute cos and sin for all layers
_TABLES = ("cos", "sin")
_MASK = "transformers 4.38.2 models/llama/modeling_llama.py LlamaModel: a buffer of one byte for two positions"
_CACHE, _CACHED = "unsloth 2026.10.9 models/llama.py LlamaRotaryEmbedding", 4 * 8192
_SOURCE = "transformers 4.38.2 models/qwen2/modeling_qwen2.py Qwen2RotaryEmbedding, apply_rotary_pos_emb, and alike"


def own_tables(stack: Stack, positions: int, dtype: str, how: str) -> Stack:
    """Return the stack with cos and sin tables in `dtype` in every layer that rotates.

    `how`: the rows for the batch's positions are `gathered` from the tables, or `computed` again although the tables
    exist, as Llama did from 4.38 on. `cached`: the model has one pair of tables, of which layers read views. A stack
    without shared rotary operations is returned unchanged.
    """
    written = {t.name for op in stack.before if op.name.startswith(_PREFIX) for t in op.writes}
    shared = tuple(
        op for op in stack.before if op.name.startswith(_PREFIX) or (op.reads and written.issuperset(op.reads))
    )
    if not shared or not any({"cos", "sin"} & set(op.reads) for run in stack.runs for b in run.blocks for op in b.ops):
        return stack
    before = tuple(op for op in stack.before if op not in shared)
    if how == "cached":
        table = f"{min(positions, _CACHED)} rot"
        buffers = tuple(Weight(f"model.rotary_emb.{n}_cached", table, "buffer", dtype, False) for n in _TABLES)
        views = tuple(Tensor(n, "0 rot", dtype) for n in _TABLES)
        return stack._replace(before=(*before, Op("rotary.tables", ("positions",), views, buffers, source=_CACHE)))
    table = f"{positions} rot"
    weights = (
        Weight("self_attn.rotary_emb.inv_freq", "rot2", "buffer", "fp32", False),
        *(Weight(f"self_attn.rotary_emb.{n}_cached", table, "buffer", dtype, False) for n in ("cos", "sin")),
    )
    recomputed = tuple(op._replace(weights=()) for op in shared)
    gathered = tuple(Op(f"rotary.{n}", ("positions",), (Tensor(n, "s rot", dtype),), source=_SOURCE) for n in _TABLES)
    rows = gathered if how == "gathered" else recomputed
    if how == "computed":
        mask = Weight("model.causal_mask", f"{positions} {positions}", "buffer", "bool", False)
        before = (*before, Op("model.causal_mask", (), (), (mask,), source=_MASK))

    def blocks(run: Run) -> Iterator[Block]:
        for block in run.blocks:
            at = next((i for i, op in enumerate(block.ops) if set(_TABLES) & set(op.reads)), None)
            if at is None:
                yield block
                continue
            tables = Op("self_attn.rotary_emb", (), (), weights, source=_SOURCE)
            yield block._replace(ops=(*block.ops[:at], tables, *rows, *block.ops[at:]))

    return stack._replace(before=before, runs=tuple(run._replace(blocks=tuple(blocks(run))) for run in stack.runs))
