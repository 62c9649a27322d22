"""DeepSeek sparse attention: an indexer scores every key for every query, and attention uses only the best.

The indexer's weights would train but get no gradient, because it runs under `torch.no_grad`. Every layer turns the
chosen keys into a mask, so attention itself uses as much memory as without an indexer.

Axes of this module:

    ih           heads of the indexer
    id           width of those heads
    rot, idp     the rotated and the unrotated part of that width
    chosen_keys  keys that a query attends to
    several      sequences in the batch if more than one, else 0

Source: transformers 5.24 models/deepseek_v32/modeling_deepseek_v32.py DeepseekV32Indexer, DeepseekV32Attention.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import cached, mask
from memplan.catalogue.attention.latent import rotated_halves, rotated_pairs
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Tensor

MASK, KEYS = "mask.sparse", "index.keys"
_Q, _K, _SCORES, _CHOSEN = "b s ih id", "b s id", "b s ih s", "b s chosen_keys"


def detached(*operations: Op) -> tuple[Op, ...]:
    """Return the operations as they run under `torch.no_grad`."""
    return tuple(op._replace(gradient="none", keeps=(), scratch_back=(), unit="") for op in operations)


def indexer(name: str, x: str, latent: str, wiring: Wiring, pairs: bool) -> tuple[Op, ...]:
    """Return `index.keys`, the keys chosen for every query, from `x` and the queries' `latent` vector.

    Every head multiplies queries and keys, in fp32 unless autocast casts them; three such products exist at once. With
    several sequences, keys are first copied for every query. `pairs`: adjacent numbers are rotated as pairs.
    """
    n, i = f"{name}.indexer", "index"
    turned = rotated_pairs if pairs else rotated_halves
    biased = f"{i}.biased"
    causal = (
        Op(f"{n}.mask", (f"{i}.sum", "mask"), (Tensor(biased, "b s s", "fp32"),))
        if wiring.backend == "eager"
        else Op(
            f"{n}.mask",
            (f"{i}.sum", "mask"),
            (Tensor(biased, "b s s", f"={i}.sum"),),
            scratch=(Tensor("not causal", "b s s", "bool"),),
        )
    )
    return detached(
        ops.linear(f"{n}.wq_b", latent, f"{i}.q0", "ih id", "ql", "attention"),
        ops.split(f"{n}.q_split", f"{i}.q0", (Tensor(f"{i}.q.rot", "b s ih rot"), Tensor(f"{i}.q.pass", "b s ih idp"))),
        ops.linear(f"{n}.wk", x, f"{i}.k0", "id", "h", "attention"),
        ops.layer_norm(f"{n}.k_norm", f"{i}.k0", f"{i}.k1", _K, "id"),
        ops.release_names(f"{i}.k0"),
        ops.split(f"{n}.k_split", f"{i}.k1", (Tensor(f"{i}.k.rot", "b s rot"), Tensor(f"{i}.k.pass", "b s idp"))),
        *turned(f"{n}.rope_q", f"{i}.q.rot", f"{i}.q.turned", "b s ih rot", "b s ih rot2"),
        *turned(f"{n}.rope_k", f"{i}.k.rot", f"{i}.k.turned", "b s rot", "b s rot2"),
        Op(f"{n}.q_cat", (f"{i}.q.turned", f"{i}.q.pass"), (Tensor(f"{i}.q", _Q),)),
        Op(f"{n}.k_cat", (f"{i}.k.turned", f"{i}.k.pass"), (Tensor(f"{i}.k", _K),)),
        *cached(n, wiring, (), tensors=(f"{i}.k",)),
        ops.cast(f"{n}.q_float", f"{i}.q", f"{i}.q32", _Q, "fp32"),
        ops.cast(f"{n}.k_float", f"{i}.k", f"{i}.k32", _K, "fp32"),
        lowered(f"{n}.q_lowered", f"{i}.q32", f"{i}.q.given", _Q),
        lowered(f"{n}.k_lowered", f"{i}.k32", f"{i}.k.given", _K),
        (ops.view if wiring.decodes else ops.copy)(f"{n}.k_expand", f"{i}.k.given", f"{i}.k.every", "several s id s"),
        Op(
            f"{n}.products",
            (f"{i}.q.given", f"{i}.k.given", f"{i}.k.every"),
            (Tensor(f"{i}.products", _SCORES),),
            product="matrix",
        ),
        ops.release_names(*(f"{i}.{t}" for t in ("q32", "k32", "q.given", "k.given", "k.every"))),
        ops.scale(f"{n}.scale", f"{i}.products", f"{i}.scaled", _SCORES),
        ops.release_names(f"{i}.products"),
        ops.activation(f"{n}.relu", f"{i}.scaled", f"{i}.scores", _SCORES),
        ops.release_names(f"{i}.scaled"),
        ops.cast(f"{n}.weights_input", x, f"{i}.x", "b s h", f"={n}.weights_proj.weight"),
        ops.linear(f"{n}.weights_proj", f"{i}.x", f"{i}.weights0", "ih", "h", "attention"),
        ops.release_names(f"{i}.x"),
        ops.cast(f"{n}.weights_float", f"{i}.weights0", f"{i}.weights32", "b s ih", "fp32"),
        ops.release_names(f"{i}.weights0"),
        ops.scale(f"{n}.weights_scale", f"{i}.weights32", f"{i}.weights", "b s ih"),
        ops.release_names(f"{i}.weights32"),
        Op(
            f"{n}.sum",
            (f"{i}.weights", f"{i}.scores"),
            (Tensor(f"{i}.sum", "b s s"),),
            autocast="lower",
            product="matrix",
        ),
        causal,
        ops.release_names(f"{i}.sum"),
        Op(
            f"{n}.topk",
            (biased,),
            (Tensor(f"{i}.best", _CHOSEN, f"={biased}"), Tensor(f"{i}.places", _CHOSEN, "int64")),
        ),
        Op(f"{n}.int32", (f"{i}.places",), (Tensor(KEYS, _CHOSEN, "int32"),)),
        ops.release_names(f"{i}.best", f"{i}.places"),
        ops.release_names(
            *(f"{i}.{t}" for t in ("q0", "k1", "q.turned", "k.turned", "q", "k", "scores", "weights")), biased
        ),
    )


def lowered(name: str, x: str, y: str, shape: str) -> Op:
    """Cast a product's input as autocast does. The caller's original stays alive."""
    return Op(name, (x,), (Tensor(y, shape),), cast=True, autocast="lower")


def causal_mask(wiring: Wiring) -> tuple[Op, ...]:
    """Return the model's mask, built for every kernel. Without padding a boolean mask serves all sequences."""
    if wiring.backend == "eager" or wiring.padded:
        return mask(wiring, "embeds")
    return (Op("mask", (), (Tensor("mask", "s s", "bool"),), source="transformers 5.24 masking_utils.py"),)


def sparse_mask(name: str, wiring: Wiring) -> tuple[Op, ...]:
    """Return `mask.sparse`, the model's mask without the keys that were not chosen, and `index.others`."""
    eager, shape = wiring.backend == "eager", "b s s"
    return detached(
        Op(f"{name}.ones", (), (Tensor("index.ones", shape, "bool"),)),
        Op(
            f"{name}.scatter",
            ("index.ones",),
            (Tensor("index.others", shape, "bool"),),
            scratch=(Tensor("wide", _CHOSEN, "int64"),),
        ),
        Op(
            f"{name}.sparse_mask",
            ("mask", "index.others"),
            (Tensor(MASK, shape, "=mask"),),
            scratch=() if eager else (Tensor("chosen", shape, "bool"),),
        ),
    )
