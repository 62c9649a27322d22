"""Tensors kept for backward equal those that autograd saves, to the byte: kernel by kernel, then model by model.

Uses real tensors on the CPU; a hook sees every tensor that autograd saves, and each storage is counted once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from memplan.catalogue import build
from memplan.catalogue.attention import attention
from memplan.catalogue.kernels import losses, ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.methods import methods
from memplan.catalogue.vision import vision
from memplan.core.arithmetic import ONE_RUN
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor, Weight
from memplan.core.units import ITEMSIZE
from memplan.engine.lowered import Lowered
from memplan.engine.step import lower
from memplan.engine.walk import alive
from memplan.models.model import ModelSpec
from memplan.models.peft_methods import PEFT_METHODS
from memplan.probe.libraries import model_class
from memplan.program.axes import chunked
from memplan.program.graph import operations_of
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec
from memplan.spec.training import Method
from tests.cases import Lazy
from tests.golden.ask_libraries import saved_bytes, saves
from tests.tiny import TINY as DECODERS
from tests.tiny_towers import TINY as TOWERS

TINY = {**DECODERS, "step3p7": {key: value for key, value in TOWERS["step3p7"].items() if key != "model_type"}}

pytestmark = pytest.mark.torch
torch: Any = Lazy("torch")
F: Any = Lazy("torch.nn.functional")

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
B, S, H, A, K, D, W, V = 2, 40, 64, 4, 2, 16, 176, 300
AXES = {"b": B, "s": S, "h": H, "a": A, "k": K, "d": D, "f": W, "v": V, "n": 1, "rot": D, "rot2": D // 2}
AXES |= {"s128": 128, "d32": 32, "targets": B * S, "padded_labels": B * (S + 1), "sorted_ids": 0, "segments": 0}
AXES |= {"h32": 64, "s32": 64, "s8": 40, "efficient_workspace": 0, "efficient_fp32": 0}


def in_bytes(
    low: Lowered, axes: dict[str, int], leave_out: Iterable[str] = (), statistics: str = "fp32", masks: str = "bool"
) -> int:
    """Return the exact bytes alive after forward, without the allocator's rounding.

    On a GPU LayerNorm's `statistics` are fp32 and dropout's `masks` one byte per element; on the CPU both have the
    input's dtype.
    """
    total = 0
    for key, count in alive(low.kept, low.runs, axes).items():
        shape, dtype, _, _, _, name, source = low.sizes[key]
        if "native_layer_norm" in source and name.endswith((".mean", ".rstd")):
            dtype = statistics
        if "native_dropout" in source and name.endswith(".mask"):
            dtype = masks
        if name not in leave_out:
            n = ITEMSIZE[dtype] * count
            for token in shape.split():
                n *= int(token) if token.isdigit() else axes[token]
            total += n
    return total


# kernels


def one_block(
    operations: Iterable[Op],
    dtype: str,
    y: str,
    inputs: tuple[Tensor, ...],
    trains: bool = True,
    constants: tuple[Tensor, ...] = (),
) -> Lowered:
    """Return a stack whose block is the kernel, with `inputs` that require gradients and `constants` that do not."""
    weight = Weight("e", "h", "embedding", dtype)
    before = (
        Op("inputs", (), (Tensor("embeds", "n", dtype), *inputs), (weight,)),
        Op("constants", (), constants),
    )
    made = tuple(
        o._replace(weights=tuple(w._replace(dtype=dtype, trains=trains) for w in o.weights)) for o in operations
    )
    last = Op("output", (y, *(t.name for t in (*inputs, *constants))), (Tensor("y", "n", dtype),), gradient="none")
    return lower(
        Stack(before, (Run((Block("layers", (*made, last)),), "n"),), (), (Op("loss", ("x",), (Tensor("loss"),)),)),
        AXES,
        labelled=True,
    )


def leaf(*shape: int, dtype: Any, grad: bool = True) -> Any:
    """Return a non-leaf tensor, like an activation."""
    x = torch.ones(*shape, dtype=dtype)
    return x.requires_grad_() * 1 if grad else x


def rms_norm(x: Any, w: Any) -> Any:
    wide = x.to(torch.float32)
    hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * hat.to(x.dtype)


def rotated(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


X = Tensor("in", "b s h", "")
Q = Tensor("q", "b s a d", "")
# name: operations, their output's name, inputs, and the torch equivalent (or F's, by its name) with its parameters
KERNELS: dict[str, tuple[tuple[Op, ...], str, tuple[Tensor, ...], Any, dict[str, tuple[int, ...]]]] = {
    "linear": (
        (ops.linear("l", "in", "out", "f", "h", "mlp"),),
        "out",
        (X,),
        "linear",
        {"w": (W, H)},
    ),
    "linear with bias": (
        (ops.linear("l", "in", "out", "f", "h", "mlp", bias=True),),
        "out",
        (X,),
        "linear",
        {"w": (W, H), "b": (W,)},
    ),
    "add": (
        (ops.add("a", "in", "other", "out", "b s h"),),
        "out",
        (X, X._replace(name="other")),
        lambda a, b: a + b,
        {},
    ),
    "mul": (
        (ops.mul("m", "in", "other", "out", "b s h"),),
        "out",
        (X, X._replace(name="other")),
        lambda a, b: a * b,
        {},
    ),
    "scale": ((ops.scale("s", "in", "out", "b s h"),), "out", (X,), lambda x: x * 0.5, {}),
    "silu": ((ops.activation("a", "in", "out", "b s h"),), "out", (X,), "silu", {}),
    "gelu": ((ops.activation("a", "in", "out", "b s h"),), "out", (X,), "gelu", {}),
    "tanh gelu": (
        (ops.activation("a", "in", "out", "b s h"),),
        "out",
        (X,),
        lambda x: F.gelu(x, approximate="tanh"),
        {},
    ),
    "softcap": (ops.softcap("c", "in", "out", "b s h"), "out", (X,), lambda x: torch.tanh(x / 30) * 30, {}),
    "rms_norm": (ops.rms_norm("n", "in", "out", "b s h", "h"), "out", (X,), rms_norm, {"w": (H,)}),
    "matmul": (
        (ops.matmul("m", "in", "other", "out", "b s s"),),
        "out",
        (X, X._replace(name="other")),
        lambda a, b: a @ b.transpose(1, 2),
        {},
    ),
    "split": (
        (
            ops.split("s", "in", (Tensor("one", "b s h"), Tensor("two", "b s h"))),
            ops.mul("m", "one", "two", "out", "b s h"),
        ),
        "out",
        (X._replace(shape="b s 2 h"),),
        lambda x: torch.mul(*x.reshape(B, S, 2 * H).split(H, dim=-1)),
        {},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_keeps_what_autograd_saves(kernel: str, trains: bool, dtype: str) -> None:
    operations, y, inputs, named, shapes = KERNELS[kernel]
    function = getattr(F, named) if isinstance(named, str) else named
    low = one_block(operations, dtype, y, tuple(t._replace(dtype=dtype) for t in inputs), trains)
    mine = in_bytes(low, AXES, leave_out=("embeds", "y", "loss"))
    arguments = [
        leaf(*(AXES[a] if a in AXES else int(a) for a in t.shape.split()), dtype=getattr(torch, DTYPES[dtype]))
        for t in inputs
    ]
    weights = [
        torch.ones(shape, dtype=getattr(torch, DTYPES[dtype]), requires_grad=trains) for shape in shapes.values()
    ]
    keeps_output = any(k.what == y for o in operations for k in o.keeps)
    result: list[Any] = []
    bytes_ = saved_bytes(lambda: result.append(function(*arguments, *weights)) or torch.empty(0), own=weights)
    assert mine == bytes_
    assert keeps_output or result[0].untyped_storage().nbytes() > 0


def test_layer_norm_keeps_its_input_and_two_fp32_numbers_a_row() -> None:
    low = one_block((ops.layer_norm("n", "in", "out", "b s h", "h"),), "fp32", "out", (X._replace(dtype="fp32"),))
    x = leaf(B, S, H, dtype=torch.float32)
    w, b = (torch.ones(H, requires_grad=True) for _ in range(2))
    saved = saved_bytes(lambda: _discard(F.layer_norm(x, (H,), w, b)), own=(w, b))
    assert in_bytes(low, AXES, ("embeds", "y", "loss")) == saved


def _discard(_: Any) -> Any:
    return torch.empty(0)


def test_dropout_keeps_a_mask_of_a_byte_an_element() -> None:
    low = one_block((ops.dropout("d", "in", "out", "b s h"),), "bf16", "out", (X._replace(dtype="bf16"),))
    assert in_bytes(low, AXES, ("embeds", "y", "loss")) == B * S * H


def test_rotation_keeps_cos_and_sin_and_not_what_it_rotates() -> None:
    table = (Tensor("cos", "s rot", "bf16"), Tensor("sin", "s rot", "bf16"))
    operations = ops.rotate("r", "q", "out", "b s a d", "b s a rot2")
    low = one_block(operations, "bf16", "out", (Q._replace(dtype="bf16"),), constants=table)
    q = leaf(B, A, S, D, dtype=torch.bfloat16)
    cos, sin = (torch.ones(S, D, dtype=torch.bfloat16) for _ in range(2))
    saved = saved_bytes(lambda: _discard(rotated(q, cos, sin)))
    assert in_bytes(low, AXES, ("embeds", "y", "loss")) == saved == 2 * S * D * 2


def test_cross_entropy_keeps_one_fp32_copy_of_the_logits() -> None:
    logits = leaf(B, S, V, dtype=torch.bfloat16)
    labels = torch.zeros(B, S, dtype=torch.int64)

    def loss() -> Any:
        wide = logits.float()
        targets = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return F.cross_entropy(wide.view(-1, V), targets.view(-1), ignore_index=-100)

    keeps = {k.what for o in losses.cross_entropy("logits") for k in o.keeps}
    assert keeps == {"log_probs", "targets", "loss.total_weight"}
    # log-probabilities in fp32, targets, the sum of the targets' weights, and the loss itself
    assert saved_bytes(loss) == B * S * V * 4 + B * S * 8 + 4 + 4


def test_flash_attention_keeps_q_k_v_output_and_row_sums() -> None:
    """Flash attention saves q, k, v, its output, and one number per row and head."""
    q, k, v = (leaf(B, A, S, D, dtype=torch.bfloat16) for _ in range(3))
    mine = attention.flash("f", "q", "k", "v", "o", grouped=False)
    assert {k_.what for k_ in mine.keeps} == {"q", "k", "v", "o", "o.lse", "o.seed", "o.offset"}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        saved = saved_bytes(lambda: _discard(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
    # the CPU's kernel keeps no state of a random generator
    assert saved == 4 * B * A * S * D * 2 + B * A * S * 4


def test_features_put_in_place_of_tokens_keep_one_mask() -> None:
    op = vision.scattered()[-1]
    assert op.keeps == (Keep("image_mask", "text"), Keep("image_mask", "image_embeds"))
    text, features = (leaf(B, rows, H, dtype=torch.float32) for rows in (S, S // 2))
    mask = (torch.arange(S) < S // 2).repeat(B, 1)
    saved = saved_bytes(lambda: _discard(text.masked_scatter(mask.unsqueeze(-1).expand_as(text), features)))
    assert saved == B * S


def test_embedding_keeps_the_ids() -> None:
    op = ops.embedding("e", "ids", "out", "v", "h")
    assert op.keeps == (Keep("ids", "e.weight"),)
    table = torch.ones(V, H, requires_grad=True)
    ids = torch.zeros(B, S, dtype=torch.int64)
    assert saved_bytes(lambda: _discard(F.embedding(ids, table)), own=(table,)) == B * S * 8


# models

# The tensors saved by the indexers of MiniMax-M3 and DeepSeek V4 are freed with their graph once tokens are chosen, as
# are those of Kimi Linear's last scan state; a hook would keep them alive.
DROPPED = {"deepseek_v4", "kimi_linear", "minimax_m3_vl_text"}
MODELS = sorted(TINY.keys() - DROPPED)


def model_saves(
    model_type: str, dtype: str, batch: int, sequence: int, method: Method | None = None, live: bool = False
) -> int:
    config = {"model_type": model_type, **TINY[model_type]}
    adapters = None
    if method is not None:
        from memplan.probe.script.model import adapter_config

        adapters = adapter_config(method, model_type, target_modules=list(method.targets), task_type="CAUSAL_LM")
    auto = model_class(model_type, sees="vision_config" in config)
    return saves(config, auto, DTYPES[dtype], batch, sequence, adapters, live=live)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_keeps_what_autograd_saves(model_type: str, dtype: str) -> None:
    batch, sequence = 2, 40 if "qwen3_5" not in model_type and model_type != "qwen3_next" else 150  # 3 chunks of 64
    model = ModelSpec({"model_type": model_type, **TINY[model_type]})
    windowed = model.sliding_window is not None and sequence >= model.sliding_window
    stack = build(model, Wiring("eager", "eager", windowed=windowed))
    stack = losses.attach(methods.apply(stack, methods.Recipe("full", dtype, dtype)), "hf")
    axes = {**model.axes(), "b": batch, "s": sequence, "targets": batch * sequence}
    axes |= {"padded_labels": batch * (sequence + 1), "s1": sequence + 1}
    if "E" in axes:  # equal tokens choose equal experts: as many rows in total as if spread evenly
        axes["routed"] = batch * sequence * axes["e"] // axes["E"]
    if "groups" in axes:
        axes["spread"] = batch * sequence * axes["e"] // axes["groups"]
    axes |= {"several": batch, "chosen_keys": min(sequence, model.config_int("index_topk", sequence))}
    axes |= chunked(axes, sequence, ONE_RUN)
    low = lower(stack, {run.times: axes[run.times] for run in stack.runs}, labelled=True)
    statistics = "fp32" if model_type == "olmo" else dtype  # OLMo normalises in fp32
    theirs = model_saves(model_type, dtype, batch, sequence, live=dtype == "bf16" and model_type in MODELS[::8])
    assert in_bytes(low, axes, statistics=statistics, masks=dtype) == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["frod", "shira", "unilora"])
def test_a_method_that_cannot_be_traced_keeps_what_autograd_saves(kind: str, dtype: str) -> None:
    rank = {"rank": 4} if PEFT_METHODS[kind].rank else {}
    method = Method(kind=kind, targets=("q_proj", "v_proj", "down_proj"), **rank)  # type: ignore[arg-type]
    run = {
        "model": {"config": {"model_type": "llama", **TINY["llama"]}},
        "method": method.model_dump(),
        "precision": {"weights": dtype},
        "kernels": {"attention": "eager", "checkpointing": "none"},
        "loop": {"trainer": kind == "frod"},  # it moves the factors that are copied for each pass otherwise
    }
    stack, axes = operations_of(decide(RunSpec.model_validate(run)).structure.graph)
    axes = {**axes, "b": B, "s": S, "s1": S + 1, "targets": B * S, "padded_labels": B * (S + 1)}
    low = lower(stack, {run.times: axes[run.times] for run in stack.runs}, labelled=True)
    assert in_bytes(low, axes) == model_saves("llama", dtype, B, S, method)
