"""The engine's lifetime rules, each on a stack small enough to count by hand."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from memplan.catalogue.kernels.rewriting import rewrite_weights
from memplan.core.errors import InternalError
from memplan.core.ir import Block, Keep, Op, Run, Scratch, Stack, Tensor, UndefinedName, Weight, undefined_names
from memplan.engine.dtypes import Scope, promote
from memplan.engine.events import FREED
from memplan.engine.lowered import Lowered
from memplan.engine.record import record
from memplan.engine.step import PLAIN, ExecutionOptions, infer, lower
from memplan.engine.tape import Tape
from memplan.engine.walk import Term, alive, largest

AXES = {"L": 4, "n": 1}


def stack(ops: Iterable[Op], after: Iterable[Op] = (), copies: str = "n") -> Stack:
    """Return a stack with embeddings `x`, one block of `ops`, and a loss that reads the block's output."""
    before = (Op("embed", (), (Tensor("embeds", "x", "fp32"),), (Weight("e", "x", "embedding", "fp32"),)),)
    loss = (Op("loss", ("x",), (Tensor("loss", "", "fp32"),)),)
    return Stack(before, (Run((Block("layers", tuple(ops)),), copies),), tuple(after), loss)


def peak(low: Lowered, phase: str, sizes: dict[str, int]) -> int:
    """Return the most alive in a phase, with shapes as large as `sizes` says (default 1)."""
    return max(total(low, i, sizes) for i, m in enumerate(low.moments) if m.phase == phase)


def total(low: Lowered, i: int, sizes: dict[str, int]) -> int:
    counts = alive(low.moments[i], low.runs, AXES)
    return sum(n * sizes.get(low.sizes[key][0], 0) for key, n in counts.items())


def kept(low: Lowered) -> dict[str, int]:
    counts = alive(low.kept, low.runs, AXES)
    return {low.sizes[key][0]: n for key, n in counts.items() if n and low.sizes[key][0]}


def run(
    ops: Iterable[Op],
    copies: str = "n",
    checkpoint: bool = False,
    reentrant: bool = False,
    to_host: bool = False,
    grads_exist: bool = False,
) -> Lowered:
    options = ExecutionOptions(checkpoint=checkpoint, reentrant=reentrant, to_host=to_host)
    return lower(stack(ops, copies=copies), AXES, options, grads_exist=grads_exist)


def op(name: str, reads: str, writes: str, *keeps: Keep, **more: object) -> Op:
    """Return an operation by the names it reads and writes; a tensor's shape is its name."""
    tensors = tuple(Tensor(w, w, "fp32") for w in writes.split())
    return Op(name, tuple(reads.split()), tensors, keeps=keeps, **more)  # type: ignore[arg-type]


def test_an_output_dies_after_its_last_reader() -> None:
    ops = (op("a", "x", "p"), op("b", "p", "q"), op("c", "q", "y"))
    # p and q together at b, q and y together at c: never all three
    assert peak(run(ops), "forward", {"p": 1, "q": 1, "y": 1}) == 2


def test_saved_tensors_depend_on_which_inputs_require_gradients() -> None:
    frozen = Weight("w", "w", "mlp", "fp32", trains=False)
    for weight in (frozen, frozen._replace(trains=True)):
        ops = (op("a", "x", "p"), op("b", "p", "y", Keep("p", "w"), weights=(weight,)))
        assert ("p" in kept(run(ops))) is weight.trains


def test_a_tensor_kept_twice_is_counted_once_until_its_first_keepers_backward() -> None:
    ops = (
        op("a", "x", "p", Keep("p", "x")),
        op("b", "p", "q", Keep("p", "p")),
        op("c", "q", "y"),
    )
    low = run(ops)
    assert kept(low)["p"] == 1
    at = {m.where: total(low, i, {"p": 1}) for i, m in enumerate(low.moments) if m.phase == "backward"}
    # its gradient (1) next to it during b's backward, then only p with it until a's
    assert at["layers.0.b"] == 2


def test_further_contributions_to_a_gradient_cost_one_more_buffer() -> None:
    ops = (op("a", "x", "p"), op("b", "x", "q"), op("c", "p q", "y"))
    # d(x) from b, then a's own: two buffers of x while the second is added in place
    assert peak(run(ops), "backward", {"x": 1}) == 2


def test_a_gradient_that_is_a_view_is_added_to_in_new_storage() -> None:
    ops = (op("a", "x", "p"), op("b", "x", "q", gradient="view"), op("c", "p q", "y"))
    assert peak(run(ops), "backward", {"x": 1}) == 3


def test_scratch_lives_inside_one_operation() -> None:
    ops = (
        op("a", "x", "p", scratch=(Tensor("s", "s", "fp32"),)),
        op("b", "p", "y", scratch_back=(Scratch(Tensor("t", "t", "fp32")),)),
    )
    low = run(ops)
    assert peak(low, "forward", {"s": 1}) == 1
    assert peak(low, "forward", {"t": 1}) == 0
    assert peak(low, "backward", {"t": 1}) == 1
    assert "s" not in kept(low)


def test_views_share_their_storage() -> None:
    ops = (op("a", "x", "p"), op("b", "p", "q", view=True), op("c", "q", "y", Keep("q", "q")))
    low = run(ops)
    assert "q" not in kept(low)
    assert kept(low)["p"] == 1


def test_held_outputs_stay_to_the_end() -> None:
    ops = (op("a", "x", "p", holds="step"), op("b", "p", "y"))
    low = run(ops)
    assert kept(low)["p"] == 1
    assert total(low, len(low.moments) - 1, {"p": 1}) == 1  # the last moment is the end of the step itself


def test_checkpointing_keeps_a_blocks_input_and_replays_its_forward() -> None:
    ops = (op("a", "x", "p", Keep("p", "x")), op("b", "p", "q"), op("c", "q", "y"))
    plain, checkpointed = run(ops), run(ops, checkpoint=True)
    assert "p" in kept(plain)
    assert "p" not in kept(checkpointed)
    assert peak(checkpointed, "backward", {"p": 1}) == peak(plain, "backward", {"p": 1})


def test_a_recomputation_stops_at_the_last_tensor_that_is_kept() -> None:
    ops = (op("a", "x", "p", Keep("x", "x")), op("b", "p", "q"), op("c", "q", "y"))
    low = run(ops, checkpoint=True)
    # only a keeps its input: nothing is recomputed, p and q only exist as gradients
    assert peak(low, "backward", {"q": 1}) == 1


def test_an_offloaded_input_leaves_the_gpu_until_its_recomputation() -> None:
    ops = (op("a", "x", "p", Keep("p", "x")), op("b", "p", "q"), op("c", "q", "y"))
    here, away = (run(ops, copies="L", checkpoint=True, to_host=to_host) for to_host in (False, True))
    assert kept(here)["y"] == AXES["L"] - 1  # each block's output is the next one's input
    assert "y" not in kept(away)
    assert here.host.counts == {}
    counts = alive(away.host, away.runs, AXES)
    assert {away.sizes[key][0]: n for key, n in counts.items()} == {"x": 1, "y": AXES["L"] - 1}


def test_a_restored_input_is_freed_after_recomputation_or_after_the_block() -> None:
    ops = (op("a", "x", "p", Keep("p", "x")), op("b", "p", "q"), op("c", "q", "y", Keep("q", "q")))
    for reentrant, expected in ((False, 0), (True, 1)):
        low = run(ops, checkpoint=True, reentrant=reentrant, to_host=True)
        at_b = [i for i, m in enumerate(low.moments) if (m.phase, m.where) == ("backward", "layers.0.b")]
        # in b's backward: its gradient and q's, and what a keeps
        assert max(total(low, i, {"x": 1}) for i in at_b) == expected


def test_captured_tensors_outlive_checkpointing() -> None:
    ops = (op("a", "x", "p"), op("b", "p", "y", captures=("p",)))
    assert kept(run(ops, checkpoint=True))["p"] == 1


def test_copies_of_a_block_are_counted_without_running_them() -> None:
    ops = (op("a", "x", "p", Keep("p", "x")), op("b", "p", "y"))
    deep = run(ops, copies="L")
    assert kept(deep)["p"] == AXES["L"]
    assert len(deep.moments) < 2 * len(run(ops).moments) + 8


def test_weight_gradients_are_allocated_unless_they_already_exist() -> None:
    weight = Weight("w", "w", "mlp", "fp32")
    ops = (op("a", "x", "y", weights=(weight,)),)
    assert peak(run(ops, copies="L"), "backward", {"w": 1}) == AXES["L"]
    assert peak(run(ops, copies="L", grads_exist=True), "backward", {"w": 1}) == 1


def test_promotion_is_torchs() -> None:
    assert promote(["bf16", "bf16"]) == "bf16"
    assert promote(["bf16", "fp16"]) == "fp32"
    assert promote(["int64", "fp16"]) == "fp16"
    assert promote(["int64"]) == "int64"


def test_autocast_casts_inputs_each_time_and_trained_weights_once() -> None:
    weight = Weight("w", "w", "mlp", "fp32")
    ops = (
        Op("a", ("x",), (Tensor("p", "p"),), (weight,), autocast="lower"),
        Op("b", ("x",), (Tensor("q", "q"),), (weight,), autocast="lower"),
    )
    scope = Scope(inputs={"x": Tensor("x", "x", "fp32")})
    names = [o.name for o in scope.resolve(ops, "bf16")]
    assert names == ["autocast(w)", "a.autocast(x)", "a", "b.autocast(x)", "b"]
    assert scope["p"].dtype == "bf16"


def test_a_cast_to_a_tensors_own_dtype_is_skipped() -> None:
    ops = (Op("cast", ("x",), (Tensor("p", "x", "fp32"),), cast=True), Op("a", ("p",), (Tensor("q", "x"),)))
    resolved = Scope(inputs={"x": Tensor("x", "x", "fp32")}).resolve(ops, None)
    assert [(o.name, o.reads) for o in resolved] == [("a", ("x",))]


def test_a_recomputed_node_frees_its_saved_tensors_before_casting_gradients() -> None:
    ops = (
        op("k", "", "k"),
        Op("low", ("x",), (Tensor("p", "p", "bf16"),), cast=True),
        Op("c", ("p", "k"), (Tensor("y", "y", "fp32"),), keeps=(Keep("k", "p"),)),
    )
    for checkpoint, expected in ((False, 3), (True, 2)):
        low = run(ops, checkpoint=checkpoint)
        at_c = [i for i, m in enumerate(low.moments) if (m.phase, m.where) == ("backward", "layers.0.c")]
        # the gradient in fp32 and in bf16, and k, unless it was freed with the recomputation's function
        assert max(total(low, i, {"p": 1, "k": 1}) for i in at_c) == expected


def two_streams(copies: str, times: int) -> Stack:
    """An encoder whose output every decoder block reads in addition to its own stream; all weights train."""

    def weight(name: str) -> tuple[Weight, ...]:
        return (Weight(name, name, "mlp", "fp32"),)

    encode = (
        op("a", "x", "p", Keep("x", "wa"), weights=weight("wa")),
        Op("b", ("p",), (Tensor("y", "x", "fp32"),), keeps=(Keep("p", "p"),)),
    )
    cross = Op(
        "cross", ("x", "encoded"), (Tensor("q", "q", "fp32"),), keeps=(Keep("encoded", "x"), Keep("x", "encoded"))
    )
    decode = (cross, Op("d", ("q",), (Tensor("y", "t", "fp32"),), weight("wd"), (Keep("q", "wd"),)))
    between = (
        Op("norm", ("x",), (Tensor("encoded", "x", "fp32"),), keeps=(Keep("x", "x"),)),
        Op("embed_again", (), (Tensor("stream", "t", "fp32"),), (Weight("e", "e", "embedding", "fp32"),)),
    )
    return Stack(
        (Op("embed", (), (Tensor("embeds", "x", "fp32"),), (Weight("e", "e", "embedding", "fp32"),)),),
        (
            Run((Block("encoder", encode),) * times, copies),
            Run((Block("decoder", decode),) * times, copies, between),
        ),
        (op("head", "x", "logits", Keep("x", "wh"), weights=weight("wh")),),
        (Op("loss", ("logits",), (Tensor("loss", "", "fp32"),)),),
    )


@pytest.mark.parametrize(
    "options", [PLAIN, ExecutionOptions(checkpoint=True), ExecutionOptions(checkpoint=True, reentrant=True)]
)
def test_repeated_layers_with_operations_between_them_equal_running_every_copy(options: ExecutionOptions) -> None:
    sizes = {"x": 1, "p": 10, "q": 100, "t": 1000, "logits": 10_000, "e": 10**5, "wa": 10**6, "wd": 10**7, "wh": 10**8}
    short, long = (lower(two_streams(*way), AXES, options) for way in (("L", 1), ("n", 4)))
    for phase in ("forward", "loss", "backward"):
        assert peak(short, phase, sizes) == peak(long, phase, sizes)
    assert kept(short) == kept(long)
    left = alive(short.left, short.runs, AXES)
    # the gradients of every weight, the shared one's once, and nothing else
    assert {short.sizes[key][0]: n for key, n in left.items() if n} == {"e": 1, "wa": 4, "wd": 4, "wh": 1}
    events = record(two_streams("L", 1), AXES, options)
    live = most = 0
    alive_now: dict[int, int] = {}
    for number, size in events.unrolled():
        if size == FREED:
            live -= alive_now.pop(number)
        else:
            alive_now[number] = sizes.get(events.sizes[size][0], 0)
            live += alive_now[number]
        most = max(most, live)
    assert most == max(peak(short, phase, sizes) for phase in ("forward", "loss", "backward"))


def test_tensors_left_between_runs_are_alive_in_the_next_pass() -> None:
    """Tensors before, between and after runs of blocks are alive at the start and at the end of the pass."""

    def left(name: str, *reads: str) -> Op:
        past, now = Tensor(f"{name} before", name, "fp32"), Tensor(name, name, "fp32")
        return Op(name, (past.name, *reads), (now,), past=(past,), view=True, holds="cache")

    embed = op("embed", "", "embeds")
    blocks = (Block("layers", (op("f", "x", "y"),)),)
    between = (left("b"), op("g", "x b", "stream"))
    after = (left("c"), op("head", "x c", "logits"))
    low = infer(Stack((embed, left("a")), (Run(blocks, "n"), Run(blocks, "n", between)), after, ()), AXES)
    sizes = {"a": 1, "b": 10, "c": 100}
    assert all(total(low, i, sizes) == 111 for i in range(len(low.moments)))
    assert sum(sizes.get(low.sizes[key][0], 0) * n for key, n in alive(low.left, low.runs, AXES).items()) == 111


def test_the_encoders_output_is_kept_once_for_all_blocks_that_read_it() -> None:
    low = lower(two_streams("L", 1), AXES)
    # per copy a block keeps its input (x: the encoder's blocks, t: the decoder's) and p or q; then x of the norm and of
    # the first block, which is the norm's own input after the last one; and the encoded states once
    assert (kept(low)["p"], kept(low)["q"]) == (4, 4)
    assert kept(low)["x"] == 4 + 1 + 1


def test_frozen_runs_pass_no_gradient_through_operations_between_them() -> None:
    still = rewrite_weights(two_streams("L", 1), lambda w: w._replace(trains=w.name == "wd"))
    low = lower(still, AXES)
    # the encoder keeps nothing; its output is kept if the decoder's stream requires a gradient
    assert "p" not in kept(low)
    assert kept(low)["x"] == 1
    left = alive(low.left, low.runs, AXES)
    assert {low.sizes[key][0]: n for key, n in left.items() if n} == {"wd": 4}


def test_the_largest_moment_may_be_less_than_separately_counted_memory() -> None:
    """If every moment subtracts from the constant memory, the one that subtracts least is found."""
    terms = Term((-7, 2), 3), Term((-5, 1), 4)
    assert largest(terms, (1, 1)) == (-5 + 1, 4)
    assert largest(terms, (1, 9)) == (-7 + 2 * 9, 3)


def test_a_tensor_freed_twice_is_an_error_that_names_it() -> None:
    tape = Tape(labelled=True)
    storage = tape.alloc(Tensor("logits", "b s v", "fp32"), "activation")
    tape.drop(storage)
    with pytest.raises(InternalError, match=r"b s v fp32 logits.*freed twice.*report"):
        tape.drop(storage)


def test_copies_that_free_more_than_they_make_are_an_error() -> None:
    """Every copy of a run would free a tensor that only the first copy got."""
    tape = Tape()
    given = tape.alloc(Tensor("message", "m", "uint8"), "temp")
    tape.enter_run(0, {})
    tape.drop(given)
    with pytest.raises(InternalError, match="m uint8"):
        tape.leave_run()


def test_a_block_that_narrows_its_input_is_counted_apart() -> None:
    """The first copy gets all tokens, and the others one."""
    ops = (op("f", "x", "y")._replace(writes=(Tensor("y", "one", "fp32"),)),)
    low = infer(stack(ops, copies="L"), AXES)
    # the last copy reads the previous one's output, and no two copies share an input
    assert all(n >= 0 for m in low.moments for n in alive(m, low.runs, AXES).values())
    assert peak(low, "forward", {"x": 100, "one": 1}) == 101


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (op("mul", "x mask", "y"), "mask"),
        (op("mul", "x", "y", Keep("mask", "x")), "mask"),
        (op("mul", "x", "y", Keep("x", "scores")), "scores"),
        (op("mul", "x", "y", captures=("cos",)), "cos"),
        (op("mul", "x", "z"), "y"),
        (Op("mul", ("x",), (Tensor("y", "x", "=q"),)), "q"),
        (Op("mul", ("x",), (Tensor("y", "x", "=q/64"),)), "q"),
        (op("mul", "x", "y", scratch_back=(Scratch(Tensor("product", "x", "=q")),)), "q"),
    ],
)
def test_a_name_that_nothing_writes_is_found(bad: Op, name: str) -> None:
    assert [missing.name for missing in undefined_names(stack([bad]))] == [name]
    assert not list(undefined_names(stack([op("mul", "x", "y")])))


def test_a_block_sees_tensors_shared_by_earlier_blocks_until_replaced() -> None:
    share = Block("layers", (op("first", "x", "y keys"),), shares=("keys",))
    replace = Block("layers", (op("second", "x keys", "y new"),), shares=("new",), replaces=("keys",))
    late = Block("layers", (op("third", "x keys", "y"),))
    whole = stack([op("mul", "x", "y")])
    runs = tuple(Run((block,), "n") for block in (share, replace, late))
    assert list(undefined_names(whole._replace(runs=runs))) == [UndefinedName("layers", "third", "keys")]
    assert list(undefined_names(whole._replace(runs=runs[::2]))) == []
    assert list(undefined_names(whole._replace(runs=runs[1:2]))) == [UndefinedName("layers", "second", "keys")]
    passed = Run((late._replace(passed=("keys",)),), "n")
    assert list(undefined_names(whole._replace(runs=(passed,)))) == []


def two_tracks(updates: Iterable[Op], **last: object) -> Stack:
    """Return a stack whose blocks share their input `old` until the next block replaces the second track `s`."""
    first = (Op("seed", (), (Tensor("s", "s", "fp32"),), (Weight("m", "s", "adapter", "fp32"),)),)
    enter = Block("enter", (view("old", "x"), op("mix", "x s", "y")), ("old",), returned=True)
    leave = Block("leave", (*updates, view("y", "x")), ("s",), returned=True, replaces=("old", "s"))
    whole = stack([op("mul", "x", "y")], copies="L")
    layers = Run((enter, whole.runs[0].blocks[0], leave), "L")
    ended = Run((leave._replace(shares=(), replaces=("s",), **last),), "n")  # type: ignore[arg-type]
    return whole._replace(before=(*whole.before, *first), runs=(layers, ended))


def view(y: str, x: str) -> Op:
    return Op(y, (x,), (Tensor(y, "y", "fp32"),), view=True, gradient="same" if y == "y" else "none")


UPDATE = op("update", "x s", "s", Keep("x", "s"), Keep("s", "x"))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_block_shares_its_input_until_a_later_one_replaces_it(checkpoint: bool) -> None:
    low = lower(two_tracks((UPDATE,), unread=True), AXES, ExecutionOptions(checkpoint=checkpoint))
    # each of the four copies keeps its input of the update and the track before it; the first track is the seed
    assert kept(low)["s"] == 4
    named = [m.where for m in low.moments]
    assert {f"leave.{i}.update" for i in range(4)} <= {*named}  # numbered by name, though three blocks alternate


def test_repeated_blocks_are_numbered_by_name() -> None:
    even, odd = (Block(name, (op("f", "x", "y", Keep("x", "x")),)) for name in ("even", "odd"))
    low = lower(stack([])._replace(runs=(Run((even, odd), "L"),)), AXES)
    assert {m.where for m in low.moments} >= {"even.3.f", "odd.3.f"}
    assert not {m.where for m in low.moments} & {"even.6.f", "odd.4.f", "odd.7.f"}


def test_what_an_unread_side_branch_keeps_is_freed_with_its_block() -> None:
    sizes = {"s": 1}
    unread, read = (
        lower(two_tracks((UPDATE, op("more", "s", "p", Keep("p", "s"))), **last), AXES)
        for last in ({"unread": True}, {})
    )
    assert peak(unread, "loss", sizes) == peak(read, "loss", sizes) - 1  # which kept the last track
    assert (kept(unread)["p"], kept(read)["p"]) == (4, 5)


def test_what_a_model_references_stays_into_the_optimizer_step_alone() -> None:
    low = lower(stack([Op("a", ("x",), (Tensor("y", "y", "fp32"),), holds="model"), view("z", "y")], copies="n"), AXES)
    named = {low.sizes[key][0]: n for key, n in alive(low.held, low.runs, AXES).items() if n}
    assert named == {"y": 1}


def test_a_tensor_lives_until_an_operation_that_only_a_recomputation_runs() -> None:
    """An autograd function runs it to save tensors for backward, but not in a checkpointed block's forward."""
    record_states = Op("record", ("a",), (Tensor("states", "states", "fp32"),), needs_recording=True)
    ops = (op("f", "x", "a", Keep("x", "x")), op("g", "a", "b"), record_states, op("h", "b", "y", Keep("b", "b")))
    low = lower(stack(ops), AXES, ExecutionOptions(checkpoint=True))
    assert peak(low, "forward", {"a": 100, "states": 10}) == 100
    assert peak(low, "backward", {"a": 100, "states": 10}) == 110


def test_blocks_of_the_same_operations_are_resolved_once_for_the_same_tensors() -> None:
    """Many equal layers share one block; layers with another dtype or mask have their own."""
    ops = (Op("mul", ("x", "mask"), (Tensor("y", "b s"),)),)
    x = Tensor("x", "b s", "bf16")

    def resolved(mask: str, given: Tensor = x) -> tuple[tuple[Op, ...], Scope]:
        scope = Scope(inputs={"mask": Tensor("mask", "s s", mask), "other": x, "x": given})
        return scope.resolve(ops, None), scope

    first, scope = resolved("bf16")
    assert resolved("bf16")[0] is first
    assert first[0].writes[0].dtype == scope["y"].dtype == "bf16"
    assert resolved("fp32")[1]["y"].dtype == "fp32"
    assert resolved("bf16", x._replace(dtype="fp32"))[1]["y"].dtype == "fp32"
    assert resolved("bf16")[1]["other"] == x
