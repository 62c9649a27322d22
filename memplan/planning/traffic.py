"""What the GPUs of a cluster send each other in a step, over which links, and how long a step takes with that.

Bytes are counted as rings send them; seconds rest on the rows of `memplan.catalogue.hardware.links` and `.rates`. Ranks
are numbered as torchtitan's mesh has them: the ranks of a tensor-parallel group lie next to each other, then those of a
context-parallel one, then the replicas, and pipeline stages are furthest apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.links import SHOWN, Link
from memplan.catalogue.parallelism.sharding import BUCKET, STRATEGIES, Knobs
from memplan.core.units import ITEMSIZE
from memplan.estimate.answer import Estimate
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec
from memplan.planning.step_time import Product, Range, Work, pace, work
from memplan.program.training.program import Program, program
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec

_DEEPSPEED = Knobs()


class Cluster(NamedTuple):
    """`nodes` of `each` such GPUs; `inside` a node they send over one link, between nodes over another."""

    gpu: GPU
    nodes: int
    each: int
    inside: Link
    network: Link

    @property
    def world(self) -> int:
        return self.nodes * self.each


class Grid(NamedTuple):
    """How the GPUs divide a run: the degrees, the strategy of the replicas, and the passes that make up a step.

    world = dp x tp x pp x cp; the ep ranks that divide the experts are among the replicas, or, where there are none,
    those that divide matrices.
    """

    dp: int
    tp: int
    pp: int
    cp: int
    ep: int
    strategy: str
    micro: int
    accumulation: int
    virtual_stages: int = 1

    @property
    def replicas(self) -> int:
        return self.dp * self.cp


class Group(NamedTuple):
    """`ranks` that are `stride` apart, as many of them in one node as `near`."""

    ranks: int
    stride: int
    near: int

    @property
    def crosses(self) -> bool:
        return self.near < self.ranks


def group(cluster: Cluster, ranks: int, stride: int) -> Group:
    """The ranks of a group that lies across nodes worst, where nodes and groups do not divide each other."""
    span = ranks * stride
    if cluster.nodes == 1 or (span <= cluster.each and cluster.each % span == 0):
        return Group(ranks, stride, ranks)
    return Group(ranks, stride, max(1, min(ranks - 1, cluster.each // stride)))


def groups(cluster: Cluster, grid: Grid) -> dict[str, Group]:
    """The groups that a rank is in, by what divides it."""
    beside = grid.tp * grid.cp
    return {
        "tp": group(cluster, grid.tp, 1),
        "cp": group(cluster, grid.cp, grid.tp),
        "ep": group(cluster, grid.ep, grid.tp if grid.replicas > 1 else 1),
        "dp": group(cluster, grid.replicas, grid.tp),
        "pp": group(cluster, grid.pp, beside * grid.dp),
    }


class Facts(NamedTuple):
    """What of a run on one GPU decides what several send: bytes, but for counts.

    weights, trained, experts   of all weights as they are gathered; of gradients; of the experts' weights; `item`, of
                  one number of them
    held          what one GPU holds throughout a step, that no memory of several is less than in all: see `least`
    work          of one pass on one GPU
    state         of the residual stream for one pass: micro x sequence x hidden
    keys, routed, logits   of keys and values in a layer; of what goes to a layer's experts; of all logits
    layer         of one layer's weights as they are gathered, where all layers are alike; else 0
    shares        ranks that divide matrices divide the tokens between them too
    recomputes, delayed    whether a layer's forward pass is done twice; whether gradients are reduced once a step
    """

    weights: int
    trained: int
    experts: int
    item: int
    held: tuple[int, int, int]
    work: Work
    state: int
    keys: int
    routed: int
    logits: int
    layers: int
    recomputes: bool
    delayed: bool
    layer: int = 0
    shares: bool = False


def _held(run: RunSpec, p: Program) -> tuple[int, int, int]:
    """Bytes of weights, gradients and states on one GPU. What trains beside frozen weights may be in another dtype
    among several ranks, and what is offloaded is on the host there: it counts for nothing."""
    if run.parallelism.offload.parameters:
        return 0, 0, 0
    if p.trainable_parameters == p.total_parameters:
        return (p.parameters, 0, 0) if run.parallelism.offload.optimizer else (p.parameters, p.gradients, p.states)
    return p.parameters - p.trainable_parameters * 4, 0, 0


def facts(bare: RunSpec, answer: Estimate, asked: RunSpec | None = None) -> Facts:
    """Of a run on one GPU, and its answer; `asked` says what several offload. Raises MemplanError where it cannot be
    answered."""
    model, run = find_model(bare.model), answer.run
    p: Program = program(decide(bare).structure)
    item = ITEMSIZE[str(run.precision.compute)]
    tokens = run.batch.micro * run.batch.sequence
    total, active, trains = answer.parameters.total, answer.parameters.active, answer.parameters.trainable
    sent = item if run.precision.autocast else ITEMSIZE[run.precision.weights]
    axes = model.axes()
    of = axes.get("E", 1)
    share = axes.get("e", 1) / of
    experts = (total - active) / (1 - share) if share < 1 else 0
    quantised = run.method.quantization is not None
    return Facts(
        weights=p.parameters if quantised else total * sent,
        trained=trains * sent,
        experts=round(experts * sent),
        item=sent,
        held=_held(asked or bare, p),
        work=work(bare.model_copy(update={"batch": bare.batch.model_copy(update={"accumulation": 1})})),
        state=tokens * model.hidden_size * item,
        keys=tokens * 2 * model.num_key_value_heads * model.head_dim * item,
        routed=tokens * axes.get("e", 1) * model.hidden_size * item if experts else 0,
        logits=tokens * model.vocab_size * item,
        layers=model.num_hidden_layers,
        recomputes=run.kernels.checkpointing != "none",
        delayed=run.loop.trainer,
        layer=_of_one_layer(model, total) * sent if not quantised and trains == total else 0,
        shares=(asked or bare).parallelism.sequence_parallel,
    )


def _of_one_layer(model: ModelSpec, total: int) -> int:
    """How many of so many parameters each layer has, where all have as many; 0 where they are not alike, or there are
    parameters of something else than layers, embeddings, a norm and a head."""
    if len(set(model.layers)) > 1 or model.objective != "causal_lm" or model.get("vision_config", None):
        return 0
    outside = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2) + model.hidden_size
    of_layers, over = divmod(total - outside, model.num_hidden_layers)
    return 0 if over else of_layers


def least(known: Facts, grid: Grid) -> int:
    """Bytes that the rank with most holds at least, of weights, gradients and states: no less than the mean of all."""
    parts = grid.tp * grid.pp
    row = STRATEGIES.get(grid.strategy)
    divided = (row.parameters, row.gradients, row.states) if row else (False, False, False)
    alike = (grid.replicas if cut else grid.ep for cut in divided)
    divided_up = sum(held // (parts * n) for held, n in zip(known.held, alike, strict=True))
    if not _whole(grid):
        return divided_up
    state = known.state / (grid.cp * (grid.tp if known.shares else 1))
    handed = 2 * grid.accumulation * (grid.pp - 1) / grid.pp  # torch has a buffer for all that a stage is sent
    mean = divided_up + int((known.weights + known.trained) / parts + handed * state)
    if not known.layer or grid.pp < 3 or grid.virtual_stages > 1:
        return mean
    return max(mean, _second_stage(known, grid, divided_up, state))


def _second_stage(known: Facts, grid: Grid, divided_up: int, state: float) -> int:
    """The same of the second stage, as torchtitan deals layers: beside a buffer for all that it is sent and sends, it
    has an input of each of its layers for every microbatch in flight but the one that is on its way back."""
    each, more = divmod(known.layers + 2, grid.pp)
    layers = each + (more > 1)
    flying = max(0, min(grid.accumulation, grid.pp - 1) - 2)
    share = layers * known.layer * grid.pp / known.weights  # of what a stage has in the mean
    passing = 2 * grid.accumulation + flying * layers
    return int(divided_up * share + 2 * layers * known.layer / grid.tp + (passing - flying) * state)


def _whole(grid: Grid) -> bool:
    """Whether weights stay whole for a step, and gradients until its end: as FSDP2 has it in a pipeline's stages."""
    return grid.strategy == "fsdp2" and grid.pp > 1 and grid.replicas > 1


class Sent(NamedTuple):
    """What a rank sends for one kind of division in a step.

    bytes     in all; `link`, what it goes over, and whether between nodes
    seconds   that takes; `shown`, what of it shows beside computing, of which there is less to hide it at high rates
    """

    kind: str
    bytes: int
    link: str
    crosses: bool
    seconds: Range
    shown: Range


class Step(NamedTuple):
    """How long a step takes.

    computing   of one rank, all passes; zeros where the catalogue has no rate for the card
    bubble      what a pipeline waits until it is full, and while it runs empty
    """

    seconds: Range
    computing: Range
    bubble: Range
    sent: tuple[Sent, ...]

    @property
    def bytes(self) -> int:
        """Sent by a rank in all."""
        return sum(sent.bytes for sent in self.sent)


class _Message(NamedTuple):
    """So many bytes in so many collectives; of an all-to-all each goes straight to where it belongs."""

    kind: str
    bytes: float
    times: float
    direct: bool = False


def step(known: Facts, cluster: Cluster, grid: Grid) -> Step:
    """How long the step takes on the cluster, at its usual and at its ends."""
    around = groups(cluster, grid)
    passed = pace(_share(known, grid), cluster.gpu)
    computing = passed.seconds if passed else Range(0, 0, 0)
    sent = tuple(_sent(message, around[message.kind], cluster, computing) for message in _messages(known, grid))
    inner = [sum(s.shown[i] for s in sent if s.kind in ("tp", "cp", "ep")) for i in range(3)]
    outer = [sum(s.shown[i] for s in sent if s.kind in ("dp", "pp")) for i in range(3)]
    waits = (grid.pp - 1) / (grid.accumulation * grid.virtual_stages)
    bubble = Range(*(waits * (c + i) for c, i in zip(computing, inner, strict=True)))
    whole = (c + b + i + o for c, b, i, o in zip(computing, bubble, inner, outer, strict=True))
    return Step(Range(*whole), computing, bubble, sent)


def _share(known: Facts, grid: Grid) -> Work:
    """What one rank computes: an even share, or that of a pipeline's largest stage."""
    w, m = known.work, grid.accumulation
    stage = -(-known.layers // grid.pp) / known.layers
    part = stage / (grid.tp * grid.cp)
    row = STRATEGIES.get(grid.strategy)
    updated = stage / grid.tp / (grid.replicas if row and row.states else 1)

    def one(p: Product) -> Product:
        return p._replace(operations=round(p.operations * part), bytes=round(p.bytes * part), times=p.times * m)

    return w._replace(
        tokens=w.tokens * m,
        products=tuple(map(one, w.products)),
        moved=round(w.moved * part * m),
        update=round(w.update * updated),
        copied=round(w.copied * part * m),
        calls=round(w.calls * stage * m),
    )


def _messages(known: Facts, grid: Grid) -> Iterator[_Message]:
    """What a rank sends in a step, as rings do: of an all-gather or reduce-scatter of n ranks (n - 1) / n of the whole,
    of an all-reduce twice that.

    Sources: Rajbhandari et al. 2020, ZeRO, section 7 (2 and 3 times the weights); Narayanan et al. 2021, Efficient
    Large-Scale Language Model Training, section 3.2 (four all-reduces a layer, a bubble of (p - 1) / m); Liu et al.
    2023, Ring Attention.
    """
    m, layers = grid.accumulation, known.layers / grid.pp
    twice = known.recomputes
    if grid.replicas > 1:
        yield _of_replicas(known, grid)
    state = known.state / grid.cp
    if grid.tp > 1:
        ring = (grid.tp - 1) / grid.tp
        sums = layers * (4 + 2 * twice) + 2
        yield _Message("tp", m * ring * (sums * 2 * state + known.logits / grid.cp), m * (2 * sums + 1))
    if grid.cp > 1:
        rounds = layers * (3 + twice)
        yield _Message("cp", m * rounds * (grid.cp - 1) / grid.cp * known.keys / grid.tp, m * rounds)
    if grid.ep > 1:
        hands = layers * (4 + 2 * twice)
        away = (grid.ep - 1) / grid.ep
        yield _Message("ep", m * hands * away * known.routed / grid.cp / grid.tp, m * hands, direct=True)
    if grid.pp > 1:
        passes = 2 * m * grid.virtual_stages
        yield _Message("pp", passes * state, passes, direct=True)


def _of_replicas(known: Facts, grid: Grid) -> _Message:
    """Gradients summed, weights gathered: for every pass, or for a step."""
    row, n, m = STRATEGIES.get(grid.strategy), grid.replicas, grid.accumulation
    dense = (known.weights - known.experts) / (grid.tp * grid.pp)
    of_experts = known.experts / (grid.tp * grid.pp * grid.ep)
    weights = dense * (n - 1) / n + of_experts * (n // grid.ep - 1) / (n // grid.ep)
    trained = weights * known.trained / known.weights
    units = known.layers / grid.pp
    if _whole(grid):
        return _Message("dp", weights + trained, 2 * units)
    if row is not None and row.parameters:
        reduced = 1 if known.delayed else m
        return _Message("dp", 2 * m * weights + reduced * trained, (2 * m + reduced) * units)
    if row is not None and row.states:  # reduced to where the states are, and gathered once they are stepped
        reduced = m if row.gradients else 1
        bucket = known.item * _DEEPSPEED.reduce_bucket
        return _Message("dp", (reduced + 1) * trained, (reduced + 1) * max(1, trained / bucket))
    reduced = 1 if known.delayed else m
    return _Message("dp", 2 * reduced * trained, 2 * reduced * max(1, trained / BUCKET))


def _sent(message: _Message, among: Group, cluster: Cluster, computing: Range) -> Sent:
    """Range's low end is at the high rates."""
    link = cluster.network if among.crosses else cluster.inside
    seconds = Range(*(_seconds(message, among, cluster, choice) for choice in ("high", "usual", "low")))
    row = SHOWN[message.kind]
    shown = Range(
        *(
            max(t * share / 100, t - c)
            for t, share, c in zip(seconds, (row.low, row.usual, row.high), computing, strict=True)
        )
    )
    return Sent(message.kind, round(message.bytes), link.name, among.crosses, seconds, shown)


def _seconds(message: _Message, among: Group, cluster: Cluster, choice: str) -> float:
    """A ring goes at the rate of its slowest link; as many rings as a group has ranks in a node share that node's
    network. A hop takes its time in every collective."""
    fast, slow = (link.bytes * getattr(link.share, choice) / 100 for link in (cluster.inside, cluster.network))
    late = {"high": "low", "usual": "usual", "low": "high"}[choice]
    near, far = (getattr(link.hop, late) * 1e-7 for link in (cluster.inside, cluster.network))
    if not among.crosses:
        hops = 1 if message.direct else among.ranks - 1
        return message.bytes / fast + message.times * hops * near
    if message.direct:
        away = 1.0 if message.kind == "pp" else (among.ranks - among.near) / (among.ranks - 1)
        return max(message.bytes * away / slow, message.bytes * (1 - away) / fast) + message.times * far
    nodes = -(-among.ranks // among.near)
    return message.bytes / min(fast, among.near * slow) + message.times * ((among.ranks - nodes) * near + nodes * far)
