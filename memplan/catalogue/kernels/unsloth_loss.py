"""Unsloth's loss of 2026: logits in fp32, in chunks of rows or tiles of words, and their gradients in forward.

With a frozen head, three tiles of words or more and at least 4,096 labelled rows it works on tiles of 4,096 rows by
16,384 words, else on chunks of entire rows. memplan counts a label for every token but the last. GPUs of up to 24 GB
take tiles of fewer rows, too, which need less than the chunks that are counted.
"""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.trl_losses import labelled_rows
from memplan.catalogue.kernels.wiring import GENERATING, Trainer
from memplan.core.ir import Keep, Op, Tensor, Weight

TILE_ROWS = 4096  # unsloth_zoo 2026.10.9 fused_losses/fused_linear.py _BWD_ROWS, and _MAX_ROWS of a chunk
TILE_WORDS = 16384  # _SPLIT_COLS, which a budget of 256 MiB makes a tile of fp32 logits
LEAST_ROWS = 512  # of a chunk, unless the vocabulary is smaller than that of _MIN_LOGITS
LEAST_LOGITS = 512 * 151936  # _MIN_LOGITS
CHUNK_BYTES = 2 << 30  # _CHUNK_GB

_SOURCE = "unsloth_zoo 2026.10.9 fused_losses/fused_linear.py _ce_impl, _tiled_forward, _ce_backward"


def fused_chunks(matrix: Weight, bias: tuple[Weight, ...], autocast: str | None) -> tuple[Op, ...]:
    """Compute the loss and its gradients, which backward scales into new tensors.

    One buffer holds the logits of a chunk and then their gradient. The gradient of a chunk's rows is computed in fp32
    while that of the previous chunk still exists; a tile's rows are copied while those of the previous tile exist.
    """
    compute = autocast or "=n"
    kind = "trained" if matrix.trains else "frozen"
    outputs = (Tensor("loss", "", "fp32"), Tensor("loss.gradient", "b s h", "=n"))
    keeps = (Keep("loss.gradient", "n"),)
    if matrix.trains:
        outputs += (Tensor("loss.head_gradient", matrix.shape, matrix.dtype),)
        keeps += (Keep("loss.head_gradient", matrix.name),)
    return (
        Op("loss.targets", ("labels",), (Tensor("targets", "b s", "int64"),), gradient="none", source=_SOURCE),
        Op(
            "loss.chunks",
            ("n", "targets"),
            outputs,
            (matrix, *bias),
            keeps,
            scratch=(
                Tensor("positions of labels", "shifted_rows", "int64"),
                Tensor("log-probabilities of labels", "shifted_rows", "fp32"),
                Tensor("matrix, cast", matrix.shape, f"{compute}!{matrix.name}"),
                Tensor("logits of a chunk", f"fused_logits_{kind}", "fp32"),
                Tensor("statistics by tile", f"fused_parts_{kind}", "fp32"),
                Tensor("rows of a chunk", f"fused_rows_{kind} h", compute),
                Tensor("gradients of a chunk's rows", f"fused_sums_{kind} h", "fp32"),
            ),
            product="matrix",
            source=_SOURCE,
        ),
        ops.release_names("targets", "n"),
    )


def chunked_log_probs(
    matrix: Weight, bias: tuple[Weight, ...], autocast: str | None, labelled: str, trainer: Trainer
) -> tuple[Op, ...]:
    """Compute log-probabilities of labelled tokens and their gradients by rows, in the chunks and tiles of the loss.

    Backward scales these gradients into a new tensor. TRL's trainers of pairs ask for entropies, too, whose gradient,
    of which none arrives, would be computed from the rows again. The head is frozen.
    """
    source = "unsloth_zoo 2026.10.9 fused_losses/fused_linear.py fused_linear_logprobs, _logprobs_impl, _lp_backward"
    compute, has_entropies = autocast or "=loss.rows", trainer.name not in GENERATING
    numbers = ("log_z", "log_probs again", *(("entropy", "mean logits") if has_entropies else ()))
    written = tuple(Tensor(f"loss.{what}", labelled, "fp32") for what in ("log_probs", *numbers))
    gradients = () if trainer.is_reference else (Tensor("loss.gradients", f"{labelled} h", "=loss.rows"),)
    positions = Tensor("positions of labels", labelled, "int64")
    kept = ("loss.rows", "targets", "loss.log_z", "loss.entropy", "loss.log_probs again") if has_entropies else ()
    return (
        *labelled_rows(Tensor("loss.mask", "shifted_rows", "bool"), source, labelled),
        Op(
            "loss.chunks",
            ("loss.rows", "targets"),
            (written[0]._replace(name="log_probs"), *written[1:], positions, *gradients),
            (matrix, *bias),
            tuple(Keep(what, "loss.rows") for what in (*(t.name for t in gradients), *kept)),
            scratch=(
                Tensor("matrix, cast", matrix.shape, f"{compute}!{matrix.name}"),
                Tensor("logits of a chunk", "fused_logits_frozen", "fp32"),
                Tensor("statistics by tile", "fused_parts_frozen", "fp32"),
                *(Tensor("gradients of a chunk's rows", "fused_scored_frozen h", "fp32") for _ in gradients),
            ),
            gradient="own",
            product="matrix",
            source=source,
        ),
        ops.release_names("loss.rows", "targets", "loss.mask", "n", positions.name, *(t.name for t in written[1:])),
        *(ops.release_names(t.name) for t in gradients),
    )
