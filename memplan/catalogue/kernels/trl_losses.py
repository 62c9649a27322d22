"""TRL's losses that never hold all logits: in chunks that backward recomputes, tile by tile, and Liger's of RL.

The first two gather the rows of hidden states that have a label; memplan counts a label for every token but the last.
`head` is the model's own head, of which all use the matrix and the bias; soft capping stays inside a chunk or kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import FusedGradients, Trainer
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, Weight

TRL_LOSSES = ("chunked_nll", "chunked_nll_fp32", "tiled_lm_head")  # values of `kernels.loss`
CHUNK = 256  # trl 1.14 trainer/sft_trainer.py _CHUNKED_LM_HEAD_CHUNK_SIZE
TILE_TOKENS = 4096  # trl 1.16 kernels/chunked_logprob.py TOKEN_CHUNK_SIZE
TILE_WIDTH = 32768  # trl 1.16 trainer/utils.py _CHUNKED_LOGPROB_CHUNK_SIZE
PART_TOKENS = 2048  # trl 1.14 trainer/utils.py _CHUNKED_LOGPROB_TOKEN_CHUNK_SIZE
PART_WIDTH = 8192  # trl 1.14 trainer/dpo_trainer.py _CHUNKED_LOGPROB_CHUNK_SIZE

_ROWS = "shifted_rows"


def labelled_rows(selector: Tensor, source: str, rows: str = _ROWS) -> tuple[Op, ...]:
    """Copy the rows of hidden states that `selector` picks, a mask or indices, and their labels.

    Backward adds their gradients into zeros of the same size, by indices that it sorts, and copies the result into
    zeros for all tokens.
    """
    mask = selector.dtype == "bool"
    positions = Tensor("positions", f"{rows} 2", "int64")
    sorting = (Tensor(name, rows, "int64") for name in ("rows", "sorted rows", "order", "original order"))
    return (
        Op("loss.shift", ("n",), (Tensor("loss.shifted", f"{_ROWS} h"),), gradient="new", view=True, source=source),
        Op("loss.select", ("labels",), (selector,), gradient="none", source=source),
        Op(
            "loss.rows",
            ("loss.shifted", selector.name),
            (Tensor("loss.rows", f"{rows} h"),),
            keeps=(Keep(selector.name, "loss.shifted"),),
            scratch=(positions,) if mask else (),
            scratch_back=tuple(map(Scratch, (*((positions,) if mask else ()), *sorting))),
            source=source,
        ),
        Op("loss.labels", ("labels", selector.name), (Tensor("targets", rows, "int64"),), gradient="none"),
        ops.release_names("loss.shifted"),
    )


def tiled_lm_head(
    matrix: Weight,
    bias: tuple[Weight, ...],
    autocast: str | None,
    result: Tensor = Tensor("loss", "", "fp32"),  # noqa: B008 (immutable)
    labelled: str = _ROWS,
) -> tuple[Op, ...]:
    """Compute log-probabilities in tiles of 4,096 tokens by 32,768 words, each folded into a few numbers per token.

    Backward computes every tile again and turns it into the gradient of its logits. It adds products to gradients of
    the rows and of the matrix in fp32, and casts them at the end, while they and the tile exist. A part of the matrix
    in another dtype than the compute dtype is cast for each tile; in backward until the next one is cast.

    result    the output that the loss reads: their sum, or all of them
    labelled  axis of the tokens that have a label
    """
    source = "trl 1.16.0 kernels/chunked_logprob.py ChunkedLogProbFunction, trainer/utils.py add_fused_lm_head"
    compute = autocast or "=loss.rows"
    tile = Tensor("tile of logits", f"tile_tokens {TILE_WIDTH}", compute)
    rows = Tensor("rows of a tile, cast", "tile_tokens h", f"{compute}!loss.rows")
    part, following = (
        Tensor("part of the matrix, cast", f"{axis} h", f"{compute}!{matrix.name}")
        for axis in ("tile_words", "next_tile_words")
    )
    numbers = ("maximum", "sum", "weighted sum", "squares", "logits' sum", "maximum before the label", "label's logit")
    outputs = tuple(Tensor(f"loss.{what}", labelled, "fp32") for what in ("log_probs", "entropy", "log_z"))
    outputs += (Tensor("loss.is_top1", labelled, "bool"),)
    return (
        *labelled_rows(Tensor("loss.mask", _ROWS, "bool"), source, labelled),
        Op(
            "loss.tiles",
            ("loss.rows", "targets"),
            (result, *outputs),
            (matrix, *bias),
            tuple(Keep(what, "loss.rows") for what in ("loss.rows", "targets", "loss.log_z", "loss.entropy")),
            scratch=(*(Tensor(what, labelled, "fp32") for what in numbers), tile, rows, part),
            scratch_back=(*_wide_gradients(matrix, labelled), *map(Scratch, (tile, rows, part, following))),
            gradient="own",
            product="matrix",
            source=source,
        ),
        ops.release_names("loss.rows", "targets", "loss.mask", "n", *(t.name for t in outputs)),
    )


def _wide_gradients(matrix: Weight, labelled: str) -> tuple[Scratch, Scratch]:
    """Return the sums in fp32 of the gradients of the rows and of `matrix`, where these are in another dtype."""
    return (
        Scratch(Tensor("gradient of rows in fp32", f"{labelled} h", "fp32!loss.rows"), "loss.rows"),
        Scratch(Tensor("gradient of the matrix in fp32", matrix.shape, f"fp32!{matrix.name}"), matrix.name),
    )


_OF_TILE = ("exponents", "gradients")


def recomputed_log_probs(
    matrix: Weight, bias: tuple[Weight, ...], autocast: str | None, result: Tensor
) -> tuple[Op, ...]:
    """Compute log-probabilities in tiles of 2,048 tokens by 8,192 words, in fp32 by torch's own operations.

    Two buffers hold a tile, in the compute dtype and in fp32; the exponents of the tile before live until those of this
    one exist. Backward computes tiles again. Its largest moment has the exponents and gradients of two tiles, or of one
    and the operands of its products in fp32; at its end the gradients are cast, unless they are of fp32 tensors.
    """
    source, labelled = "trl 1.14.1 trainer/utils.py _ChunkedLogProbFunction", result.shape
    compute = autocast or "=loss.rows"
    outputs = tuple(Tensor(f"loss.{what}", labelled, "fp32") for what in ("entropy", "log_z"))
    buffers = (
        Tensor("products of a tile", f"few_tokens {PART_WIDTH}", compute),
        Tensor("logits of a tile", f"few_tokens {PART_WIDTH}", "fp32"),
        Tensor("part of the matrix, cast", "part_words h", f"{compute}!{matrix.name}"),
    )
    rows = Tensor("rows of a tile, cast", "few_tokens h", f"{compute}!loss.rows")  # in forward for the product alone
    tile = Tensor("exponents of a tile", "few_tokens part_words", "fp32")
    last = tuple(Tensor(f"{what} of the last tile", "few_tokens part_words_last", "fp32") for what in _OF_TILE)
    wide = _wide_gradients(matrix, labelled)
    largest = Tensor("more of two tiles, or operands of products", "part_operands", "fp32")
    return (
        *labelled_rows(Tensor("loss.mask", _ROWS, "bool"), source, labelled),
        Op(
            "loss.tiles",
            ("loss.rows", "targets"),
            (result, *outputs),
            (matrix, *bias),
            tuple(Keep(what, "loss.rows") for what in ("loss.rows", "targets", "loss.log_z", "loss.entropy")),
            scratch=(*buffers, *(tile for _ in range(3))),
            scratch_back=(
                *wide,
                *map(Scratch, (*buffers, rows, *last)),
                Scratch(largest, early=matrix.dtype != "fp32"),
            ),
            gradient="own",
            product="matrix",
            source=source,
        ),
        ops.release_names("loss.rows", "targets", "loss.mask", *(t.name for t in outputs)),
    )


def chunked_nll(
    head: tuple[Op, ...],
    matrix: Weight,
    bias: tuple[Weight, ...],
    autocast: str | None,
    casts_to_fp32: bool,
    single: bool,
) -> tuple[Op, ...]:
    """Compute the loss of 256 tokens at a time, of which backward computes everything again.

    The last three operations are the largest moments of backward: when a chunk's entropies are computed, when its
    logits are, and when the matrix's gradient of a second chunk is added to that of the first in a new tensor, because
    that is a view. Later ones are added in place.

    single         there is one chunk, whose view of the matrix's gradient, made next to its logits', is all of it
    casts_to_fp32  a chunk casts the matrix and its rows to fp32 first, as TRL 1.6 to 1.12 do; autocast casts them back
    """
    version = "1.10.0" if casts_to_fp32 else "1.14.1"
    source = f"trl {version} trainer/sft_trainer.py _chunked_cross_entropy_loss"
    first = "fp32" if casts_to_fp32 else "=loss.rows"
    words = f"nll_tokens {matrix.shape.split()[0]}"
    parts = (("matrix", matrix.shape, matrix.name), ("rows", "nll_tokens h", "loss.rows"))
    casts = tuple(Tensor(f"{what} of a chunk", shape, f"{first}!{name}") for what, shape, name in parts)
    kept = casts
    if autocast:
        again = autocast if casts_to_fp32 else f"{autocast}!loss.rows"
        kept = tuple(Tensor(f"{what} of a chunk, cast by autocast", shape, again) for what, shape, _ in parts)
        casts += kept
    logits = Tensor("logits of a chunk", words, autocast or first)
    in_fp32 = (*(() if casts_to_fp32 else ("logits",)), "log-probabilities", "probabilities", "products")
    chunk = (
        *((logits,) if casts_to_fp32 else ()),
        *(Tensor(f"{what} of a chunk in fp32", words, "fp32") for what in in_fp32),
    )
    capped = logits.dtype if casts_to_fp32 else "fp32"
    kept += tuple(Tensor(f"{name} of a chunk", words, capped) for name in _kept_logits(head))
    rows = Tensor("gradient of rows so far", f"nll_several {_ROWS} h", "=loss.rows")
    gradient = Tensor("gradient of the matrix so far", f"nll_several {matrix.shape}", matrix.dtype)
    so_far = (rows, gradient) if matrix.trains else (rows,)
    added_rows = "nll_tokens" if matrix.trains else _ROWS  # all rows' once the matrix's gradients are summed
    added = (
        (Scratch(logits._replace(name="gradient of a chunk's logits"), matrix.name),)
        if single
        else (
            Scratch(Tensor("gradient of a chunk's rows", f"{added_rows} h", "=loss.rows"), "loss.rows"),
            Scratch(gradient, matrix.name),
            Scratch(gradient._replace(name="gradient of the matrix in a chunk"), matrix.name),
        )
    )
    return (
        *labelled_rows(Tensor("loss.order", _ROWS, "int64"), source),
        Op(
            "loss.products",
            ("loss.rows", "targets"),
            (Tensor("loss.chunk", "", f"={matrix.name}"),),
            (matrix, *bias),
            (Keep("loss.rows", "loss.rows"), Keep("targets", "loss.rows")),
            scratch_back=added,
            gradient="view" if single else "own",
            product="matrix",
            source=source,
        ),
        Op(
            "loss.logits",
            ("loss.chunk",),
            (Tensor("loss.chunk_logits", "", "fp32"),),
            scratch=(*casts, logits),
            scratch_back=tuple(map(Scratch, (*so_far, *casts, logits))),
            source=source,
        ),
        Op(
            "loss.log_softmax",
            ("loss.chunk_logits",),
            (Tensor("loss", "", "fp32"),),
            scratch=chunk,
            scratch_back=tuple(map(Scratch, (*so_far, *kept, *chunk))),
            source=source,
        ),
        ops.release_names("loss.rows", "targets", "loss.order", "loss.chunk", "loss.chunk_logits", "n"),
    )


def _kept_logits(head: tuple[Op, ...]) -> Iterator[str]:
    """Yield the names of tensors as large as the logits that the head keeps for backward, such as soft capping's."""
    written = {t.name for op in head for t in op.writes if "v" in t.shape.split()}
    yield from dict.fromkeys(keep.what for op in head for keep in op.keeps if keep.what in written)


FUSED_WIDTH = 4096  # liger-kernel 0.8.5 chunked_loss/fused_linear_ppo.py _SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
FUSED_TOKENS = 2048  # _SELECTIVE_LOGPROB_SEQ_CHUNK_SIZE, tokens of one completion


def fused_policy_loss(
    matrix: Weight, bias: tuple[Weight, ...], gradients: FusedGradients, rows: str = "completion_rows"
) -> tuple[Op, ...]:
    """Compute Liger's loss of GRPO, a completion at a time, in tiles of 2,048 tokens by 4,096 words.

    Forward computes what backward returns. A completion's gradients of rows and matrix are summed in fp32 and cast when
    it ends; then the matrix's is added to that of the completions before. The first two operations are the largest
    moments until all gradients of rows are joined.

    gradients  of the matrix: if it is `trained`; `always`, as up to Liger 0.8.2; or `compiled`, as up to Liger 0.6,
               which computes all logits of a completion, and their gradient in their place
    """
    compiled, has_gradient = gradients == "compiled", matrix.trains or gradients != "trained"
    source = f"liger-kernel {'0.6.4' if compiled else '0.8.5'} chunked_loss/fused_linear_ppo.py LigerFusedLinearPPOBase"
    gradient = (Tensor("head_gradient", matrix.shape, matrix.dtype),) if has_gradient else ()
    of_completion = tuple(t._replace(name="gradient of the matrix by a completion") for t in gradient)
    wide = tuple(t._replace(name="gradient of the matrix in fp32", dtype="fp32") for t in gradient)
    of_rows = (Tensor("gradient of rows in fp32", "completion h", "fp32"),)
    fp32 = partial(Tensor, dtype="fp32")
    whats = ("logits", "probabilities", "gradients")
    tile = (
        *(fp32(f"{what} of a tile", f"fused_tokens {FUSED_WIDTH}") for what in whats),
        fp32("part of the matrix", f"{FUSED_WIDTH} h"),
        fp32("product of a tile", "fused_tokens h"),
    )
    before = (*gradient, Tensor("gradients of earlier rows", "earlier_rows h", "=kept"))
    cast = of_completion if matrix.dtype != "fp32" else ()
    moments = {"tiles": (*wide, *of_rows, *tile), "casts": (*wide, *cast, *of_rows)}
    if compiled:
        moments = {"logits": (*of_completion, Tensor("logits of a completion", "completion v", "=kept"))}
    return (
        Op("loss.drop_last", ("n",), (Tensor("shifted", "shifted_rows h"),), gradient="new", view=True, source=source),
        Op("loss.keep", ("shifted",), (Tensor("kept", f"{rows} h"),), gradient="new", view=True, source=source),
        *(
            Op(f"loss.{name}", ("kept",), (), (matrix, *bias), scratch=(*before, *made), gradient="none", source=source)
            for name, made in moments.items()
        ),
        Op(
            "loss.fused",
            ("kept", "ids"),
            (Tensor("loss", "", "fp32"), Tensor("hidden_gradient", f"{rows} h", "=kept"), *gradient),
            (matrix, *bias),
            (
                Keep("hidden_gradient", "kept", is_gradient=True),
                *(Keep(t.name, matrix.name if matrix.trains else "kept", is_gradient=matrix.trains) for t in gradient),
            ),
            scratch=(Tensor("gradients of completions", f"{rows} h", "=kept"),),
            product="matrix",
            source=source,
        ),
        ops.release_names("kept", "shifted", "n"),
    )


def fused_pair_loss(
    matrix: Weight, bias: tuple[Weight, ...], trainer: Trainer, reference: Stack | None
) -> tuple[Op, ...]:
    """Compute Liger's loss of DPO or KTO from the states that the policy and its reference return, a pair or an example
    at a time.

    Forward computes what backward returns. A pair's logits, their gradient and the fp32 sum that it begins with are
    alive together, as Inductor of torch 2.13 schedules them, which frees the reference's logits before; then the pair's
    gradients of rows and matrix are made. Backward scales all gradients into copies if a step has several
    micro-batches, whose loss the Trainer divides. TRL 0.24 copies no rows, and asks both models for all their states;
    KTO copies none either, as an example's are contiguous.
    """
    has_states, is_kto = trainer.log_probs == "joined", trainer.name == "kto"
    views = has_states or is_kto
    source = "liger-kernel 0.8.5 chunked_loss/fused_linear_preference.py LigerFusedLinearPreferenceBase"
    if is_kto:
        source = "liger-kernel 0.8.5 chunked_loss/fused_linear_unpaired_preference.py, kto_loss.py"
    has_gradient = matrix.trains or trainer.fused_gradients != "trained"
    gradient = (Tensor("head_gradient", matrix.shape, matrix.dtype),) if has_gradient else ()
    tokens = "row_tokens" if is_kto else "2 row_tokens"
    rows, pair, logits = "shifted_rows h", f"{tokens} h", f"{tokens} v"
    inputs = () if is_kto else (Tensor("pair", pair, "=rows"), Tensor("pair of the reference", pair, "=ref_rows"))
    of_pair = (Tensor("logits of a pair", logits, "=rows"), Tensor("gradient of the logits", logits, "=rows"))
    moments = {
        "logits": (Tensor("sum of the gradient", logits, "fp32"),),
        "products": (
            Tensor("gradient of the pair", pair, "=rows"),
            *(t._replace(name="gradient of the matrix by a pair") for t in gradient),
        ),
    }
    before = (*gradient, Tensor("gradients of earlier pairs", "earlier_pairs h", "=rows"), *inputs)
    before += (Tensor("gradient of the example before", pair, "=rows"),) if is_kto else ()
    is_kept = not trainer.has_parts
    return (
        Op("loss.shift", ("n",), (Tensor("rows", rows),), view=views, source=source),
        Op(
            "reference",
            (),
            (Tensor("ref_n", "0" if has_states else "b s h", "=n"),),
            gradient="none",
            model=reference,
            source=source,
        ),
        Op("loss.shift_reference", ("ref_n",), (Tensor("ref_rows", rows),), gradient="none", view=views, source=source),
        Op("loss.shift_labels", ("ids",), (Tensor("targets", "shifted_rows", "int64"),), gradient="none"),
        *(
            Op(
                f"loss.{name}",
                ("rows",),
                weights=(matrix, *bias),
                scratch=(*before, *of_pair, *made),
                gradient="none",
                source=source,
            )
            for name, made in moments.items()
        ),
        Op(
            "loss.fused",
            ("rows", "ref_rows", "targets"),
            (Tensor("loss", "", "fp32"), Tensor("hidden_gradient", rows, "=rows"), *gradient),
            (matrix, *bias),
            (
                Keep("hidden_gradient", "rows", is_gradient=is_kept),
                *(
                    Keep(t.name, matrix.name if matrix.trains else "rows", is_gradient=matrix.trains and is_kept)
                    for t in gradient
                ),
            ),
            scratch=(Tensor("gradients of pairs", rows, "=rows"), *inputs),
            product="matrix",
            source=source,
        ),
        ops.release_names("rows", "ref_rows", "targets", "ref_n", "n"),
        *((Op("return", releases="states"),) if has_states else ()),
    )
