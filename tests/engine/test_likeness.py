"""Lists of operations that differ only in names and shapes: what one is resolved to and allocates tells the other's."""

from __future__ import annotations

import pytest

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor
from memplan.engine.dtypes import ResolvedOps, Scope
from memplan.engine.likeness import ALIKE, Likeness
from memplan.engine.repeats import BlockRepeat
from memplan.engine.storages import Storage

X = Tensor("x", "b s h", "bf16")


def selects(number: int, source: str = "", dtype: str = "=all") -> tuple[Op, ...]:
    """Return operations that read a number of earlier sums."""
    shape = f"b s {number + 1} h"
    sums = source or f"sums.{number}"
    return (
        Op("cat", (sums, "x"), (Tensor("all", shape),)),
        ops.cast("float", "all", "all32", shape, "fp32"),
        Op("mix", ("all32",), (Tensor("mixed", "b s h", "fp32"),), keeps=(Keep("all32", "all32"),)),
        Op("cast", ("mixed",), (Tensor("y", "b s h", dtype),), cast=True),
        ops.release_names("all", "all32", "mixed"),
    )


def sums(number: int, dtype: str = "bf16") -> Tensor:
    return Tensor(f"sums.{number}", f"b s {number} h", dtype)


def likeness(a: int, b: int, ops: tuple[Op, ...] = (), dtype: str = "bf16") -> Likeness | None:
    return Likeness.of(selects(a), ops or selects(b), [(sums(a), sums(b, dtype)), (X, X)])


def test_the_names_and_shapes_that_differ() -> None:
    names, shapes = {"sums.2": "sums.5"}, {"b s 2 h": "b s 5 h", "b s 3 h": "b s 6 h"}
    assert likeness(2, 5) == Likeness(names, shapes)
    assert likeness(5, 2) == Likeness(names, shapes).inverse()
    assert likeness(2, 2) == ALIKE
    two, four = likeness(1, 2), likeness(1, 4)
    assert two is not None
    assert four is not None
    between = four.after(two)
    assert between.name("sums.2") == "sums.4"
    assert [between.shapes[shape] for shape in ("b s 2 h", "b s 3 h")] == ["b s 4 h", "b s 5 h"]


def test_operations_are_renamed() -> None:
    like = likeness(2, 5)
    assert like is not None
    assert like.operations(selects(2)) == selects(5)
    full = Op(
        "full",
        ("sums.2",),
        (Tensor("y", "b s 2 h"),),
        keeps=(Keep("sums.2", "sums.2", seen="b s 3 h"),),
        scratch=(Tensor("t", "b s 3 h"),),
        scratch_back=(Scratch(Tensor("u", "b s 2 h"), "sums.2"),),
        past=(Tensor("sums.2", "b s 2 h"),),
        captures=("sums.2",),
        wraps=(Tensor("w", "b s 3 h"),),
    )
    text = repr(full).replace("sums.2", "sums.5").replace("b s 3 h", "b s 6 h").replace("b s 2 h", "b s 5 h")
    assert repr(like.operation(full)) == text


@pytest.mark.parametrize(
    "other",
    [
        (*selects(5)[:-1], ops.release_names("all", "all32")),  # another number of names
        selects(5, "x"),  # two tensors become one
        (*selects(5)[:2], selects(5)[2]._replace(gradient="view"), *selects(5)[3:]),
        (*selects(5)[:4], ops.release_names("all", "all32", "sums.2")),  # the other's name
    ],
)
def test_operations_that_differ_otherwise_are_not_alike(other: tuple[Op, ...]) -> None:
    assert likeness(2, 5, other) is None


def test_inputs_of_other_dtypes_are_not_alike() -> None:
    assert likeness(2, 5, dtype="fp32") is None


def test_a_dtype_may_name_a_tensor_that_differs() -> None:
    a, b = selects(2, dtype="=sums.2"), selects(5, dtype="=sums.2")
    assert Likeness.of(a, b, [(sums(2), sums(5)), (X, X)]) is None


def test_a_shape_that_stays_elsewhere_is_not_renamed() -> None:
    """The sums of the second list are as many as the first list has anyway."""
    stays = (ops.mul("mul", "x", "x", "product", "b s 3 h"),)
    assert Likeness.of((*selects(2), *stays), (*selects(5), *stays), [(sums(2), sums(5)), (X, X)]) is None


@pytest.mark.parametrize("autocast", [None, "bf16"])
def test_alike_operations_are_resolved_as_if_alone(autocast: str | None) -> None:
    def resolved(number: int) -> ResolvedOps:
        found = Scope(None, {"x": X, f"sums.{number}": sums(number)}).resolve(selects(number), autocast)
        assert isinstance(found, ResolvedOps)
        return found

    first, other = resolved(7), resolved(8)
    assert (other.first, other.like.names) == (first, {"sums.7": "sums.8"})
    assert first.first == ()
    assert other[3] is first[3]  # what is the same is shared
    text = repr((*first,)).replace("sums.7", "sums.8").replace("b s 8 h", "b s 9 h").replace("b s 7 h", "b s 8 h")
    assert repr((*other,)) == text


def test_a_block_falls_earlier_if_it_frees_what_it_finds() -> None:
    operations = [Op("a"), Op("b")]
    block = BlockRepeat(
        [0, 1, ~0], operations, Op("b"), range(2), [], [-1], [(1, False, 0)], {}, {}, [], {}, {}, {}, ALIKE, {}
    )
    frees = [block.frees([Storage(7, True, refs)], lambda storage: ~storage.size) for refs in (2, 1)]
    assert frees == [(0,), (~7,)]
    held, alone = map(block.among, frees)
    assert (held.events, held.falls, held.names, held.left) == ([0, 1, ~0], [2], ["b"], {1: 1})
    assert (alone.events, alone.falls, alone.names) == ([0, ~7, 1, ~0], [1, 3], ["a", "b"])
    assert alone.left == {1: 1, 7: -1}
