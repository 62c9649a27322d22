"""TRL's trainers that learn a teacher's distribution of tokens: the teacher's pass, and the divergence from it.

The teacher runs while the student's graph is alive. Its operation carries it (`memplan.core.ir.Op.model`), with axes of
its own (`memplan.catalogue.kernels.own_axes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.losses import begins_head, matrix_and_bias
from memplan.catalogue.kernels.policy_gradient import with_generated
from memplan.catalogue.kernels.preference import returned, with_masks
from memplan.catalogue.kernels.trl_losses import TILE_WIDTH
from memplan.catalogue.kernels.wiring import Trainer
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor

_GKD = "trl 1.16.0 experimental/gkd/gkd_trainer.py compute_loss, generalized_jsd_loss; the same since 0.24.0"
_TILES = "trl 1.16.0 trainer/distillation_trainer.py _compute_loss, kernels/chunked_divergence.py"
_SERVER = "trl 1.16.0 experimental/server_distillation/server_distillation_trainer.py compute_loss"
_CHUNKS = "ms-swift 4.6.0 rlhf_trainers/gkd_loss.py extract_active, jsd_loss"
_ROWS = "shifted_rows v"
_WHO = ("student", "teacher")


def attach(stack: Stack, trainer: Trainer, teacher: Stack | None, autocast: str | None) -> Stack:
    """Return the stack with the teacher's pass and the loss; that of a teacher itself, without them."""
    if trainer.name == "gkd":
        return _of_logits(stack, trainer, teacher, autocast)
    return _in_tiles(stack, trainer, teacher) if trainer.calls_backbone else _of_server(stack, trainer, autocast)


def _in_tiles(stack: Stack, trainer: Trainer, teacher: Stack | None) -> Stack:
    """Compute the divergence of completions in tiles of 4,096 tokens by 32,768 words of both models' logits, in fp32.

    Backward computes every tile again, and casts its gradient to the compute dtype until the next one's is cast. It
    adds products to gradients of the rows and of the matrix in fp32, and casts them at the end.
    """
    start = next(i for i, op in enumerate(stack.after) if begins_head(op))
    body, head = stack.after[:start], stack.after[start:]
    if trainer.is_reference:  # the states that it returns live as long as the function that called it
        states = (op._replace(holds="cache") if any(t.name == "n" for t in op.writes) else op for op in body)
        unread = (Op(op.name, weights=op.weights, gradient="none") for op in head if op.weights)
        return stack._replace(after=(*states, *unread))
    matrix, bias = matrix_and_bias(head)
    rows, theirs, numbers = "loss.rows", "loss.teacher_rows", ("log_z", "teacher_log_z", "aux")
    vectors = (*(f"loss.{name}" for name in numbers), "loss.entropy")
    of_teacher = Tensor(theirs, "completion_rows teacher.h", trainer.teacher_dtype)
    part = Tensor("loss.part", "completion_rows h", "=n")
    cast = f"={rows}!loss.log_z"
    tiles = tuple(Tensor(f"tile of the {who}'s logits", f"tile_tokens {TILE_WIDTH}", "fp32") for who in _WHO)
    running = tuple(Tensor(f"running sum {i}", "completion_rows", "fp32") for i in range(9))
    gradients = (
        Scratch(Tensor("gradient of rows in fp32", "completion_rows h", f"fp32!{rows}"), rows),
        Scratch(Tensor("gradient of the matrix in fp32", matrix.shape, f"fp32!{matrix.name}"), matrix.name),
    )
    casts = (
        Scratch(Tensor("gradients of two tiles, cast", "tile_tokens tile_words_early", cast), early=True),
        Scratch(Tensor("gradient of the last tile, cast", "tile_tokens tile_words_last", cast)),
    )
    loss = (
        Op("teacher", (), (of_teacher,), gradient="none", model=teacher, source=_TILES),
        Op("loss.shift", ("n",), (part,), view=trainer.has_one_sequence, source=_TILES),
        Op("loss.rows", ("loss.part",), (Tensor(rows, "completion_rows h", "=n"),), source=_TILES),
        ops.release_names("loss.part"),
        Op(
            "loss.tiles",
            (rows, theirs),
            (Tensor("divergence", "completion_rows", "fp32"), *(Tensor(v, "completion_rows", "fp32") for v in vectors)),
            (matrix, *bias),
            tuple(Keep(what, rows) for what in (rows, theirs, *vectors[:3])),
            scratch=(*running, *tiles),
            scratch_back=(*gradients, *map(Scratch, tiles), *casts),
            gradient="own",
            product="matrix",
            source=_TILES,
        ),
        Op("loss.distill", ("divergence",), (Tensor("loss", "", "fp32"),), source=_TILES),
        ops.release_names(rows, theirs, "n", "divergence", *vectors),
    )
    return _generated(stack)._replace(after=body, loss=loss)


def _generated(stack: Stack) -> Stack:
    return stack._replace(before=tuple(with_generated(op) if op.name == "inputs" else op for op in stack.before))


def _of_server(stack: Stack, trainer: Trainer, autocast: str | None) -> Stack:
    """Compute the log-softmax of completions' logits. A server sends a few of the teacher's log-probabilities."""
    logits = next(op for op in reversed(stack.after) if op.writes).writes[0].name
    tail, outputs, _ = returned(logits, trainer, autocast)

    def step(name: str, read: str, written: str, axes: str = "completion_rows v", **more: Any) -> Op:
        return Op(f"loss.{name}", (read,), (Tensor(written, axes, f"={outputs}"),), source=_SERVER)._replace(**more)

    loss = (
        step("completions", outputs, "completion_logits", view=True),
        step("temperature", "completion_logits", "scaled"),
        step("log_softmax", "scaled", "log_probs", keeps=(Keep("log_probs", "scaled"),)),
        ops.release_names("scaled"),
        step("gather", "log_probs", "chosen", "completion_rows"),
        Op("loss.distill", ("chosen",), (Tensor("loss", "", "fp32"),), source=_SERVER),
        ops.release_names(outputs, "completion_logits", "log_probs", "chosen"),
    )
    return _generated(stack)._replace(loss=(*tail, *loss))


def _of_logits(stack: Stack, trainer: Trainer, teacher: Stack | None, autocast: str | None) -> Stack:
    """Compute the divergence of all logits, which a teacher returns in fp32 under autocast, as the student does."""
    logits = next(op for op in reversed(stack.after) if op.writes).writes[0].name
    tail, outputs, _ = returned(logits, trainer, autocast)
    if trainer.is_reference:
        return stack._replace(after=(*stack.after, *tail))
    before = (new for op in stack.before for new in (with_masks(op) if op.name == "inputs" else (op,)))
    written = (Tensor("teacher_outputs", "b s teacher.v", trainer.teacher_dtype),)
    passed = Op("teacher", (), written, gradient="none", model=teacher, source=_GKD)
    divergence = _divergence_by_chunk if trainer.log_probs == "rolled" else _divergence
    return stack._replace(before=tuple(before), loss=(*tail, passed, *divergence(outputs)))


def _divergence_by_chunk(outputs: str) -> Iterator[Op]:
    """Compute the divergence of copies of the labelled rows, chunk by chunk: all chunks' graphs exist until backward.

    The student's rows are padded to the teacher's vocabulary. A chunk keeps the student's log-softmax, both
    log-probabilities weighted, their mixture, both models' probabilities and the student's gap from the mixture. Its
    gradient is written into zeros for all rows.
    """
    copies: list[str] = []

    def copied(name: str, read: str, words: str, gradient: str) -> Op:
        copies.append(name)
        copy = Tensor(name, f"shifted_rows {words}", f"={read}")
        return Op(f"loss.{name}", (read,), (copy,), gradient=gradient, source=_CHUNKS)

    yield copied("labelled", outputs, "v", "new")
    yield copied("teacher_labelled", "teacher_outputs", "teacher.v", "none")
    yield copied("scaled", "labelled", "chunk_words", "new")._replace(
        scratch=(Tensor("padded", "shifted_rows chunk_padded", "=labelled"),)
    )
    yield copied("teacher_scaled", "teacher_labelled", "chunk_words", "none")
    rows = "shifted_rows chunk_words"
    kept = (Tensor("log_probs", rows, "=scaled"), Tensor("probs", rows, "=scaled"), Tensor("chunks", f"5 {rows}", ""))
    yield Op(
        "loss.chunks",
        ("scaled", "teacher_scaled"),
        (*kept, Tensor("loss", "", "fp32")),
        keeps=tuple(Keep(tensor.name, "scaled", is_gradient=tensor is kept[0]) for tensor in kept),
        scratch=(Tensor("teacher's log-softmax and a product", "chunk_rows chunk_words", "=chunks"),),
        scratch_back=(Scratch(Tensor("gradients of a chunk", "chunk_rows_back chunk_words", "=chunks"), "scaled"),),
        source=_CHUNKS,
    )
    yield ops.release_names(*copies, *(tensor.name for tensor in kept), outputs, "teacher_outputs")


def _divergence(outputs: str) -> Iterator[Op]:
    """Compute the Jensen-Shannon divergence of all logits.

    Variables of the function hold both models' logits divided by the temperature, their log-softmax, the mixture's and
    both divergences from it until it returns. FSDP2 returns a student's logits in another dtype than a teacher's.
    """
    both = ("log_probs", "teacher_log_probs")

    def tensor(name: str, axes: str = _ROWS, dtype: str = "=mixed") -> Tensor:
        return Tensor(name, axes, dtype)

    def step(name: str, reads: tuple[str, ...], written: str, *keeps: Keep, **more: object) -> Op:
        return Op(f"loss.{name}", reads, (tensor(written, dtype=""),), keeps=keeps, source=_GKD)._replace(**more)

    for prefix, gradient in (("", "new"), ("teacher_", "none")):
        whole, shifted, scaled = "teacher_outputs" if prefix else outputs, f"{prefix}shifted", f"{prefix}scaled"
        yield step(f"{prefix}shift", (whole,), shifted, view=True, gradient=gradient)
        yield step(f"{prefix}temperature", (shifted,), scaled, gradient=gradient)
    yield step("log_softmax", ("scaled",), "log_probs", Keep("log_probs", "scaled"))
    yield step("teacher_log_softmax", ("teacher_scaled",), "teacher_log_probs", gradient="none")
    terms = tuple(tensor(f"weighted {log_probs}", dtype=f"={log_probs}") for log_probs in both)
    pair = f"2 {_ROWS}"
    yield Op("loss.stack", both, (tensor("mixed", pair, ""),), scratch=terms, source=_GKD)
    exponents = tuple(tensor(f"{what} of both", pair) for what in ("exponents", "differences"))
    yield step("logsumexp", ("mixed",), "mixture", Keep("mixed", "mixed"), Keep("mixture", "mixed"))._replace(
        scratch=exponents[:1], scratch_back=tuple(map(Scratch, exponents))
    )
    yield step("mixture", ("mixture",), "minus_mixture", view=True)  # its gradient is negated
    for who, log_probs in (("teacher", "teacher_log_probs"), ("student", "log_probs")):
        probs, gap = f"{who}_probs", f"{who}_gap"
        yield step(f"{who}_gap", (log_probs, "minus_mixture"), gap, gradient="same")
        yield step(f"{who}_probs", (log_probs,), probs, Keep(probs, log_probs))
        yield step(f"{who}_divergence", (gap, probs), f"{who}_divergence", Keep(probs, gap), Keep(gap, probs))
        yield ops.release_names(gap, probs)
    divergences = ("teacher_divergence", "student_divergence")
    weighted = tuple(tensor(f"weighted {name}") for name in divergences)
    yield step("divergence", divergences, "divergence", scratch=weighted)
    labelled = (tensor("divergence of labelled tokens"),)
    yield Op("loss.gkd", ("divergence",), (Tensor("loss", "", "fp32"),), scratch=labelled, source=_GKD)
    yield ops.release_names("scaled", "teacher_scaled", *both, "mixture", *divergences)
    yield ops.release_names(outputs, "teacher_outputs")
