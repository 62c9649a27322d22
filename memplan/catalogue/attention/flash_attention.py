"""Flash attention: torch's, FlashAttention 2 and 3 as transformers call them, and torch's varlen attention."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Keep, Op, Scratch, Tensor

_ATEN = "torch 2.13 aten/src/ATen/native/transformers"
_ROWS_OF_3 = Tensor("row sums", "b a s128", "fp32"), Tensor("logsumexp in base 2", "b a s128", "fp32")
_SOURCES_OF_FLASH = {
    "": f"{_ATEN}/cuda/flash_attn/flash_api.cpp mha_bwd",
    "cudnn": "assumed: cuDNN's workspace is not published, and counted as flash attention's; torch 2.13 "
    "aten/src/ATen/native/cudnn/MHA.cpp run_cudnn_SDP_fprop, run_cudnn_SDP_bprop",
    "3": "flash-attention 0e79d71 hopper/flash_attn_interface.py setup_context, flash_api.cpp mha_bwd",
}


def flash(name: str, q: str, k: str, v: str, y: str, grouped: bool, variant: str = "") -> Op:
    """Return flash attention: keeps q, k, v, the output, an fp32 number per row and head, and the RNG state.

    Backward accumulates an fp32 gradient of q, with rows rounded up to 128 (`s128`) and head widths to 32 (`d32`). If
    key heads are fewer than query heads, it also makes gradients of k and v for every query head.

    variant  `cudnn`, the same; or `3`: FlashAttention 3 keeps no state, and accumulates gradients of k and v in fp32
             too if heads are grouped. Its rows are rounded up to 64 if heads are wider than 64, counted as 128
    """
    source = _SOURCES_OF_FLASH[variant]
    if variant == "3":
        lse, wide = f"{y}.lse", ("dk accumulated", "dv accumulated") if grouped else ()
        accumulated = (Tensor(what, "b s128 k d_flash_3", "fp32") for what in wide)
        scratch = (*_ROWS_OF_3, Tensor("dq accumulated", "b s128 a d_flash_3", "fp32"), *accumulated)
        return Op(
            name,
            (q, k, v),
            (Tensor(y, "b s a d"), Tensor(lse, "b a s", "fp32")),
            (),
            tuple(Keep(what, of) for of in (q, k, v) for what in (q, k, v, y, lse)),
            scratch_back=tuple(map(Scratch, scratch)),
            autocast="lower",
            product="attention",
            source=source,
        )
    lse, seed, offset = f"{y}.lse", f"{y}.seed", f"{y}.offset"
    expanded = (Tensor("dk expanded", "b s a d", f"={k}"), Tensor("dv expanded", "b s a d", f"={k}")) if grouped else ()
    scratch = (Tensor("row sums", "b a s128", "fp32"), Tensor("dq accumulated", "b s128 a d32", "fp32"), *expanded)
    return Op(
        name,
        (q, k, v),
        (
            Tensor(y, "b s a d"),
            Tensor(lse, "b a s", "fp32"),
            Tensor(seed, "2", "int64"),
            Tensor(offset, "", "int64"),
        ),
        (),
        tuple(Keep(what, of) for of in (q, k, v) for what in (q, k, v, y, lse, seed, offset)),
        scratch_back=tuple(Scratch(t) for t in scratch),
        autocast="lower",
        product="attention",
        source=source,
    )


def _of_lengths(kernel: Op) -> Op:
    """Return flash attention of sequences of several lengths: backward's scratch has 128 more rows for each of them.

    Source: flash-attn 2.8 csrc/flash_attn/flash_api.cpp mha_varlen_bwd; torch 2.13
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp mha_varlen_bwd.
    """
    (kernel,) = ops.with_axes((kernel,), {"s128": "s_varlen"})
    return kernel


def _of_packed(kernel: Op) -> Op:
    """Return flash attention of a packed row, whose tokens attend within their own sequence."""
    return _of_lengths(kernel)._replace(product="attention over s_own")


def varlen(name: str, q: str, k: str, v: str, y: str, grouped: bool, repeats: bool) -> tuple[Op, ...]:
    """Return torch's varlen attention, before which Axolotl `repeats` k and v for every query head, and copies them.

    Source: axolotl 0.21.0 monkeypatch/attention/sdpa_varlen.py sdpa_varlen_forward.
    """
    if not (grouped and repeats):
        return (_of_packed(flash(name, q, k, v, y, grouped)),)
    repeated = (
        op
        for x in (k, v)
        for op in (
            ops.view(f"{name}.{x}_view", x, f"{x}.view", "b s k d", gradient="new"),
            ops.copy(f"{name}.repeat_{x}", f"{x}.view", f"{x}.repeated", "b s a d", gradient="new"),
            ops.copy(f"{name}.flatten_{x}", f"{x}.repeated", f"{x}.flat", "b s a d"),
            ops.release_names(f"{x}.repeated"),
        )
    )
    return (
        *repeated,
        _of_packed(flash(name, q, f"{k}.flat", f"{v}.flat", y, False)),
        ops.release_names(f"{k}.flat", f"{v}.flat"),
    )


def flash_2(name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool) -> tuple[Op, ...]:
    """Return flash attention 2 as transformers calls it.

    fp32 heads are cast to half precision first. The tokens of a padded batch are gathered into one sequence, and the
    output is scattered back into zeros; the sequences of a packed row are there already.

    Source: transformers 5.24 modeling_flash_attention_utils.py _upad_input, _pad_input.
    """
    shapes = {q: "b s a d", k: "b s k d", v: "b s k d"}
    operations: list[Op] = []
    inputs = {x: x for x in shapes}
    if wiring.target:
        operations += (
            ops.cast(f"{name}.cast_{x}", x, f"{x}.target", shape, wiring.target) for x, shape in shapes.items()
        )
        inputs = {x: f"{x}.target" for x in shapes}
    if not wiring.padded:
        kernel = flash(name, inputs[q], inputs[k], inputs[v], y, grouped, wiring.variant)
        return (*operations, _of_packed(kernel) if wiring.is_varlen else kernel)
    tokens, out = f"{y}.tokens", f"{y}.gathered"
    operations.append(Op(f"{name}.tokens", (), (Tensor(tokens, "b s", "int64"),), gradient="none"))
    for x in (k, v, q):
        operations.append(ops.index(f"{name}.gather_{x}", inputs[x], tokens, f"{x}.gathered", shapes[x]))
    kernel = flash(name, f"{q}.gathered", f"{k}.gathered", f"{v}.gathered", out, grouped, wiring.variant)
    operations.append(_of_lengths(kernel))
    operations.append(ops.index(f"{name}.pad", out, tokens, y, shapes[q]))
    return (
        *operations,
        ops.release_names(tokens, *(f"{x}.gathered" for x in shapes), *(inputs[x] for x in shapes if inputs[x] != x)),
    )


def padded_flash_2(name: str, q: str, k: str, v: str, y: str, wiring: Wiring, width: str) -> tuple[Op, ...]:
    """Pad values narrower than queries with zeros to the queries' width, and cut the output back.

    Source: transformers 5.24 integrations/flash_attention.py flash_attention_forward.
    """
    heads, out = "b s a d", f"{y}.wide"
    return (
        ops.copy(f"{name}.pad_values", v, "v.heads", heads, gradient="new"),
        *flash_2(name, q, k, "v.heads", out, wiring, False),
        ops.release_names("v.heads"),
        ops.view(f"{name}.cut", out, f"{y}.cut", f"b s a {width}", gradient="new"),
        ops.copy(f"{name}.contiguous", f"{y}.cut", y, f"b s a {width}"),
    )
