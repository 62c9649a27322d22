"""The vocabulary of optimizer rows: which parameters have a state, and the state's shape."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE, rounded

RANK = 128  # the Trainer's default for GaLore and APOLLO


class Parameter(NamedTuple):
    """A trainable parameter as the optimizer sees it.

    name       path of the parameter
    shape      its shape
    dtype      its dtype
    copies     repetitions; a sequence of parameters with the same number above 1 repeats as a unit, like the blocks of
               a model, and the first of those blocks may come before it with copies=1
    embedding  the weight of an nn.Embedding, whose bitsandbytes state stays in fp32 under the Trainer
    target     the matrix of a linear layer that low-rank optimizers project
    vocabulary an embedding or an output head, which Muon leaves to AdamW
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    copies: int = 1
    embedding: bool = False
    target: bool = False
    vocabulary: bool = False


Which = Callable[[Parameter], bool]
Shape = Callable[[Parameter], tuple[int, ...]]
Rank = Callable[[Parameter], int]


def bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one tensor, rounded up as the allocator does."""
    return rounded(prod(shape) * ITEMSIZE[dtype])


# Which parameters


def everything(p: Parameter) -> bool:
    """All parameters."""
    return True


def nothing(p: Parameter) -> bool:
    """No parameter."""
    return False


def other_than(which: Which) -> Which:
    """All parameters that `which` does not select."""
    return lambda p: not which(p)


def fp32(p: Parameter) -> bool:
    """Parameters in fp32."""
    return p.dtype == "fp32"


def matrix(p: Parameter) -> bool:
    """Parameters with at least two axes, including convolution kernels."""
    return len(p.shape) > 1


def hidden_matrix(p: Parameter) -> bool:
    """Two-dimensional parameters of the layers: neither embeddings nor the head."""
    return len(p.shape) == 2 and not p.vocabulary


def large(p: Parameter) -> bool:
    """Parameters with 8-bit states in bitsandbytes: at least its min_8bit_size."""
    return prod(p.shape) >= 4096


def large_no_embedding(p: Parameter) -> bool:
    """Parameters with 8-bit states under the Trainer, which leaves out embeddings: transformers 5.24 trainer.py."""
    return large(p) and not p.embedding


def paged(p: Parameter) -> bool:
    """Parameters whose states are in managed host memory, uncounted by torch: bitsandbytes 0.50 optim/optimizer.py."""
    return prod(p.shape) >= 100_000


def quantised(p: Parameter) -> bool:
    """Parameters whose moments torchao quantises: torchao 0.18 optim/adam.py _new_buffer."""
    return prod(p.shape) >= 4096 and prod(p.shape) % 256 == 0


def quantised_in_parts(p: Parameter) -> bool:
    """Quantised parameters that need temporaries. One kernel does it all if a row is one block, or there is one row."""
    return quantised(p) and sum(n > 1 for n in p.shape) > 1 and p.shape[-1] != 256


# Shapes of states


def same(p: Parameter) -> tuple[int, ...]:
    """The parameter's shape."""
    return p.shape


def twice(p: Parameter) -> tuple[int, ...]:
    """Two of the parameter's shape in one tensor."""
    return (2, *p.shape)


def scalar(p: Parameter) -> tuple[int, ...]:
    """A 0-dimensional tensor."""
    return ()


def vector(length: int) -> Shape:
    """A vector of the same length for every parameter."""
    return lambda p: (length,)


def rows(p: Parameter) -> tuple[int, ...]:
    """One number per row."""
    return p.shape[:-1]


def columns(p: Parameter) -> tuple[int, ...]:
    """One number per column."""
    return (*p.shape[:-2], p.shape[-1])


def first_axis(p: Parameter) -> tuple[int, ...]:
    """A vector as long as the first axis, whatever the number of axes."""
    return p.shape[:1]


def second_axis(p: Parameter) -> tuple[int, ...]:
    """A vector as long as the second axis, whatever the number of axes."""
    return p.shape[1:2]


def packed(p: Parameter) -> tuple[int, ...]:
    """Two elements per byte."""
    return (prod(p.shape) // 2,)


def blocks(p: Parameter) -> tuple[int, ...]:
    """One number per block of 256 elements, the last possibly partial."""
    return (-(-prod(p.shape) // 256),)


def blocks_twice(p: Parameter) -> tuple[int, ...]:
    """The blocks of `twice`, each half divided separately."""
    return (2, *blocks(p))


# Ranks of projections, and their shapes


def fixed_rank(p: Parameter) -> int:
    """APOLLO's rank: a random matrix can have any."""
    return RANK


def capped_rank(p: Parameter) -> int:
    """GaLore's rank: at most the number of the matrix's singular vectors."""
    return min(RANK, *p.shape)


def random_projection(p: Parameter) -> tuple[int, ...]:
    """APOLLO's random vectors along the narrow side, one per rank."""
    return (fixed_rank(p), min(p.shape))


def some_vectors(p: Parameter) -> tuple[int, ...]:
    """GaLore's singular vectors of the narrow side, one per rank."""
    return (capped_rank(p), min(p.shape))


def all_vectors(p: Parameter) -> tuple[int, ...]:
    """All singular vectors of the narrow side."""
    return (min(p.shape), min(p.shape))
