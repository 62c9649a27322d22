"""What a row of an optimizer says of a parameter: which ones it means, and the shapes of what it keeps of them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from memplan.core.units import ITEMSIZE, rounded

RANK = 128  # of GaLore and APOLLO, the Trainer's default


class Parameter(NamedTuple):
    """A trainable parameter as the optimizer sees it.

    `copies` are equal ones in a row: a sequence of parameters with the same number above 1 repeats as a whole, as the
    blocks of a model do. The first of such blocks may stand before it with copies=1.

    embedding   the weight of an nn.Embedding. bitsandbytes keeps its state in fp32 under the Trainer
    target      the matrix of a linear layer that low-rank optimizers take
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    copies: int = 1
    embedding: bool = False
    target: bool = False


Which = Callable[[Parameter], bool]
Shape = Callable[[Parameter], tuple[int, ...]]
Rank = Callable[[Parameter], int]


def bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """What the allocator takes for one tensor."""
    return rounded(prod(shape) * ITEMSIZE[dtype])


# Which parameters


def everything(p: Parameter) -> bool:
    """All parameters."""
    return True


def nothing(p: Parameter) -> bool:
    """No parameter."""
    return False


def other_than(which: Which) -> Which:
    """All parameters but those."""
    return lambda p: not which(p)


def fp32(p: Parameter) -> bool:
    """Parameters in fp32."""
    return p.dtype == "fp32"


def matrix(p: Parameter) -> bool:
    """Everything with at least two axes, kernels of convolutions too."""
    return len(p.shape) > 1


def hidden_matrix(p: Parameter) -> bool:
    """Matrices of two axes that embed nothing."""
    return len(p.shape) == 2 and not p.embedding


def large(p: Parameter) -> bool:
    """What bitsandbytes keeps in 8 bits: its min_8bit_size."""
    return prod(p.shape) >= 4096


def large_no_embedding(p: Parameter) -> bool:
    """The same under the Trainer (transformers 5.24 trainer.py), which has it keep embeddings in 32 bits."""
    return large(p) and not p.embedding


def paged(p: Parameter) -> bool:
    """Has states in managed memory, the host's, which torch does not count. bitsandbytes 0.50 optim/optimizer.py."""
    return prod(p.shape) >= 100_000


def quantised(p: Parameter) -> bool:
    """What torchao quantises the moments of: torchao 0.18 optim/adam.py _new_buffer."""
    return prod(p.shape) >= 4096 and prod(p.shape) % 256 == 0


def quantised_in_parts(p: Parameter) -> bool:
    """The same, but where a row is a block, or there is one row, one kernel does all, with nothing in memory."""
    return quantised(p) and sum(n > 1 for n in p.shape) > 1 and p.shape[-1] != 256


# Shapes of states


def same(p: Parameter) -> tuple[int, ...]:
    """The parameter's own."""
    return p.shape


def twice(p: Parameter) -> tuple[int, ...]:
    """Two of the parameter's in one tensor."""
    return (2, *p.shape)


def scalar(p: Parameter) -> tuple[int, ...]:
    """A number, without axes."""
    return ()


def vector(length: int) -> Shape:
    """As long for every parameter."""
    return lambda p: (length,)


def rows(p: Parameter) -> tuple[int, ...]:
    """A number for every row."""
    return p.shape[:-1]


def columns(p: Parameter) -> tuple[int, ...]:
    """A number for every column."""
    return (*p.shape[:-2], p.shape[-1])


def first_axis(p: Parameter) -> tuple[int, ...]:
    """A vector as long as the first axis, however many there are."""
    return p.shape[:1]


def second_axis(p: Parameter) -> tuple[int, ...]:
    """A vector as long as the second axis, however many there are."""
    return p.shape[1:2]


def packed(p: Parameter) -> tuple[int, ...]:
    """Two elements in a byte."""
    return (prod(p.shape) // 2,)


def blocks(p: Parameter) -> tuple[int, ...]:
    """A number for every 256 elements and for the rest."""
    return (-(-prod(p.shape) // 256),)


def blocks_twice(p: Parameter) -> tuple[int, ...]:
    """The blocks of `twice`, whose halves are cut up each for itself."""
    return (2, *blocks(p))


# Ranks that a matrix is projected to, and the projections


def fixed_rank(p: Parameter) -> int:
    """APOLLO's: a random matrix has any rank."""
    return RANK


def capped_rank(p: Parameter) -> int:
    """GaLore's: there are no more singular vectors than the matrix has."""
    return min(RANK, *p.shape)


def random_projection(p: Parameter) -> tuple[int, ...]:
    """As many random vectors along the narrow side as APOLLO's rank."""
    return (fixed_rank(p), min(p.shape))


def some_vectors(p: Parameter) -> tuple[int, ...]:
    """As many singular vectors of the narrow side as GaLore's rank."""
    return (capped_rank(p), min(p.shape))


def all_vectors(p: Parameter) -> tuple[int, ...]:
    """All singular vectors of the narrow side."""
    return (min(p.shape), min(p.shape))
