"""The bytes that the GPUs of a cluster send each other in a step, over which links, and the time of a step.

Bytes are those of ring collectives; seconds come from the rows of `memplan.catalogue.hardware.links` and `.rates`.
Ranks are numbered as in torchtitan's mesh: the ranks of a tensor-parallel group are adjacent, then come those of a
context-parallel group, then the replicas; pipeline stages are furthest apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.links import EXPOSED, Link
from memplan.catalogue.parallelism.sharding import BUCKET, STRATEGIES, ZeroSettings
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.estimate.answer import Estimate
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec
from memplan.planning.step_time import Product, Range, Work, step_pace, work
from memplan.program.training.program import Program, program
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec

_DEEPSPEED = ZeroSettings()


class Cluster(NamedTuple):
    """`nodes` nodes of `each` GPUs, with one link inside a node and another between nodes."""

    gpu: GPU
    nodes: int
    each: int
    inside: Link
    network: Link

    @property
    def world(self) -> int:
        return self.nodes * self.each


class ParallelGrid(NamedTuple):
    """How the GPUs divide a run: the degrees, the strategy of the replicas, and the passes of a step.

    world = dp x tp x pp x cp. The ep ranks that divide the experts are among the replicas or, if there is only one,
    among the tensor-parallel ranks.
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


class RankGroup(NamedTuple):
    """A communicator of `ranks` ranks that are `stride` apart, `near` of them in the same node."""

    ranks: int
    stride: int
    near: int

    @property
    def crosses(self) -> bool:
        return self.near < self.ranks


def group(cluster: Cluster, ranks: int, stride: int) -> RankGroup:
    """Return the group that is spread over most nodes; groups differ if node and group sizes do not divide evenly."""
    span, each = ranks * stride, cluster.each
    if cluster.nodes == 1 or each % span == 0:
        return RankGroup(ranks, stride, ranks)
    if span % each == 0 and (each % stride == 0 or stride % each == 0):
        return RankGroup(ranks, stride, max(1, each // stride))
    return RankGroup(ranks, stride, _fewest_near(each, cluster.world // span, ranks, stride))


@lru_cache(maxsize=1024)
def _fewest_near(each: int, blocks: int, ranks: int, stride: int) -> int:
    """Return how many ranks of the group that is spread most are on one node, at most, by looking at every group.

    blocks  number of spans of `ranks` x `stride` GPUs; their places on nodes repeat after `each`
    """
    starts = {block * ranks * stride % each for block in range(min(each, blocks))}
    firsts = [start + at for start in starts for at in range(stride)]
    on_nodes = (Counter((first + i * stride) // each for i in range(ranks)) for first in firsts)
    return min(max(ranks_on.values()) for ranks_on in on_nodes)


def groups(cluster: Cluster, grid: ParallelGrid) -> dict[str, RankGroup]:
    """Return the groups of a rank by degree."""
    model_ranks = grid.tp * grid.cp
    return {
        "tp": group(cluster, grid.tp, 1),
        "cp": group(cluster, grid.cp, grid.tp),
        "ep": group(cluster, grid.ep, grid.tp if grid.replicas > 1 else 1),
        "dp": group(cluster, grid.replicas, grid.tp),
        "pp": group(cluster, grid.pp, model_ranks * grid.dp),
    }


class TrafficFacts(NamedTuple):
    """The facts about a run on one GPU that decide what several GPUs send each other; sizes are bytes.

    weights      all weights in the dtype they are gathered in
    trained      gradients
    experts      the experts' weights
    item         one number of the gathered weights
    held         weights, gradients and states that one GPU holds throughout a step, see `least`
    work         one pass on one GPU
    state        the residual stream of one pass: micro x sequence x hidden
    keys         keys and values of a layer
    routed       tokens sent to a layer's experts
    logits       all logits
    layers       number of layers
    recomputes   whether a layer's forward pass runs twice
    delayed      whether gradients are reduced once a step rather than after every pass
    layer        one layer's gathered weights if all layers have equally many; else 0
    shares       whether tensor-parallel ranks also divide the tokens (sequence parallelism)
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
    """Return bytes of weights, gradients and states on one GPU, as a lower bound for several.

    Offloaded parts are on the host. Adapters may have another dtype on several ranks, so with frozen weights only the
    frozen part counts.
    """
    if run.parallelism.offload.parameters:
        return 0, 0, 0
    if p.counts.trainable == p.counts.total:
        return (p.parameters, 0, 0) if run.parallelism.offload.optimizer else (p.parameters, p.gradients, p.states)
    return p.parameters - p.counts.trainable * 4, 0, 0


def traffic_facts(bare: RunSpec, answer: Estimate, asked: RunSpec | None = None) -> TrafficFacts:
    """Return the facts about a run on one GPU, given its answer; `asked` is the run on several, if that differs.

    Raises MemplanError if the run cannot be estimated.
    """
    model, run = find_model(bare.model), answer.run
    p: Program = program(decide(bare).structure)
    item = ITEMSIZE[str(run.precision.compute)]
    tokens = run.batch.micro * run.batch.sequence
    total, active, trains = answer.parameters.total, answer.parameters.active, answer.parameters.trainable
    sent = item if run.precision.autocast else ITEMSIZE[run.precision.weights]
    axes = model.axes()
    share = axes.get("e", 1) / axes.get("E", 1)
    experts = (total - active) / (1 - share) if share < 1 else 0
    quantised = run.method.quantization is not None
    return TrafficFacts(
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
        delayed=run.loop.trainer and not run.loop.sync_each_batch,
        layer=_parameters_per_layer(model, total) * sent if not quantised and trains == total else 0,
        shares=(asked or bare).parallelism.sequence_parallel,
    )


def _parameters_per_layer(model: ModelSpec, total: int) -> int:
    """Return the parameters of one layer, given the model's total.

    0 if layers differ, or if there is more than layers, embeddings, a final norm and a head.
    """
    if len(set(model.layers)) > 1 or model.objective != "causal_lm" or model.get("vision_config", None):
        return 0
    outside = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2) + model.hidden_size
    per_layer, remainder = divmod(total - outside, model.num_hidden_layers)
    return 0 if remainder else per_layer


def min_state_bytes(known: TrafficFacts, grid: ParallelGrid) -> int:
    """Return a lower bound, in bytes, of the weights, gradients and states on the largest rank: the mean of all."""
    parts = grid.tp * grid.pp
    row = STRATEGIES.get(grid.strategy)
    divided = (row.parameters, row.gradients, row.states) if row else (False, False, False)
    shards = (grid.replicas if is_divided else grid.ep for is_divided in divided)
    resident = sum(held // (parts * n) for held, n in zip(known.held, shards, strict=True))
    if not _keeps_gathered(grid):
        return resident
    state = known.state / (grid.cp * (grid.tp if known.shares else 1))
    handed = 2 * grid.accumulation * (grid.pp - 1) / grid.pp  # torch allocates a buffer per tensor sent to a stage
    mean = resident + int((known.weights + known.trained) / parts + handed * state)
    if not known.layer or grid.pp < 3 or grid.virtual_stages > 1:
        return mean
    return max(mean, _second_stage(known, grid, resident, state))


def _second_stage(known: TrafficFacts, grid: ParallelGrid, resident: int, state: float) -> int:
    """Return a lower bound of the bytes on the second stage, with layers split as torchtitan splits them.

    It holds a buffer for each tensor that it receives or sends, and an input of each of its layers for every microbatch
    in flight except the one in backward.
    """
    each, more = divmod(known.layers + 2, grid.pp)
    layers = each + (more > 1)
    in_flight = max(0, min(grid.accumulation, grid.pp - 1) - 2)
    share = layers * known.layer * grid.pp / known.weights  # relative to the mean stage
    states = 2 * grid.accumulation + in_flight * layers
    return int(resident * share + 2 * layers * known.layer / grid.tp + (states - in_flight) * state)


def _keeps_gathered(grid: ParallelGrid) -> bool:
    """Whether weights stay gathered, and gradients unreduced, until the step ends, as in pipeline stages with FSDP2."""
    return grid.strategy == "fsdp2" and grid.pp > 1 and grid.replicas > 1


class Traffic(NamedTuple):
    """The traffic of a rank in a step for one degree.

    kind      tp, cp, ep, dp or pp
    bytes     in all
    link      name of the slowest link
    crosses   whether the group spans several nodes
    seconds   time of sending
    shown     the part of that time not hidden by computing
    """

    kind: str
    bytes: int
    link: str
    crosses: bool
    seconds: Range
    shown: Range


class StepTime(NamedTuple):
    """The time of a step.

    seconds     in all
    computing   one rank, all passes; zero if the catalogue has no rate for the card
    bubble      idle time while a pipeline fills and drains
    sent        traffic by degree
    """

    seconds: Range
    computing: Range
    bubble: Range
    sent: tuple[Traffic, ...]

    @property
    def bytes(self) -> int:
        """Bytes that a rank sends in all."""
        return sum(sent.bytes for sent in self.sent)


class _Message(NamedTuple):
    """Bytes sent in a number of collectives; `direct` if sent straight to the receiver rather than round a ring."""

    kind: str
    bytes: float
    times: float
    direct: bool = False


def step(known: TrafficFacts, cluster: Cluster, grid: ParallelGrid) -> StepTime:
    """Return the time of a step on the cluster."""
    by_degree = groups(cluster, grid)
    compute = step_pace(_share(known, grid), cluster.gpu)
    computing = compute.seconds if compute else Range(0, 0, 0)
    sent = tuple(_sent(message, by_degree[message.kind], cluster, computing) for message in _messages(known, grid))
    inner = [sum(s.shown[i] for s in sent if s.kind in ("tp", "cp", "ep")) for i in range(3)]
    outer = [sum(s.shown[i] for s in sent if s.kind in ("dp", "pp")) for i in range(3)]
    waits = (grid.pp - 1) / (grid.accumulation * grid.virtual_stages)
    bubble = Range(*(waits * (c + i) for c, i in zip(computing, inner, strict=True)))
    total = (c + b + i + o for c, b, i, o in zip(computing, bubble, inner, outer, strict=True))
    return StepTime(Range(*total), computing, bubble, sent)


def _share(known: TrafficFacts, grid: ParallelGrid) -> Work:
    """Return the work of one rank: an even share, or that of the largest pipeline stage."""
    w, m = known.work, grid.accumulation
    stage = -(-known.layers // grid.pp) / known.layers
    part = stage / (grid.tp * grid.cp)
    row = STRATEGIES.get(grid.strategy)
    updated = stage / grid.tp / (grid.replicas if row and row.states else 1)

    def scaled(p: Product) -> Product:
        return p._replace(operations=round(p.operations * part), bytes=round(p.bytes * part), times=p.times * m)

    return w._replace(
        tokens=w.tokens * m,
        products=tuple(map(scaled, w.products)),
        moved=round(w.moved * part * m),
        update=round(w.update * updated),
        copied=round(w.copied * part * m),
        calls=round(w.calls * stage * m),
    )


def _messages(known: TrafficFacts, grid: ParallelGrid) -> Iterator[_Message]:
    """Yield what a rank sends in a step with ring collectives.

    Over n ranks an all-gather or reduce-scatter sends (n - 1) / n of the tensor, an all-reduce twice that.

    Sources: Rajbhandari et al. 2020, ZeRO, section 7 (2 and 3 times the weights); Narayanan et al. 2021, Efficient
    Large-Scale Language Model Training, section 3.2 (four all-reduces a layer, a bubble of (p - 1) / m); Liu et al.
    2023, Ring Attention.
    """
    m, layers = grid.accumulation, known.layers / grid.pp
    recomputes = known.recomputes
    if grid.replicas > 1:
        yield _data_parallel(known, grid)
    state = known.state / grid.cp
    if grid.tp > 1:
        ring = (grid.tp - 1) / grid.tp
        sums = layers * (4 + 2 * recomputes) + 2
        yield _Message("tp", m * ring * (sums * 2 * state + known.logits / grid.cp), m * (2 * sums + 1))
    if grid.cp > 1:
        rounds = layers * (3 + recomputes)
        yield _Message("cp", m * rounds * (grid.cp - 1) / grid.cp * known.keys / grid.tp, m * rounds)
    if grid.ep > 1:
        exchanges = layers * (4 + 2 * recomputes)
        away = (grid.ep - 1) / grid.ep
        yield _Message("ep", m * exchanges * away * known.routed / grid.cp / grid.tp, m * exchanges, direct=True)
    if grid.pp > 1:
        passes = 2 * m * grid.virtual_stages
        yield _Message("pp", passes * state, passes, direct=True)


def _data_parallel(known: TrafficFacts, grid: ParallelGrid) -> _Message:
    """Return what replicas send: gradients to reduce and weights to gather, for every pass or once a step."""
    row, n, m = STRATEGIES.get(grid.strategy), grid.replicas, grid.accumulation
    dense = (known.weights - known.experts) / (grid.tp * grid.pp)
    experts = known.experts / (grid.tp * grid.pp * grid.ep)
    weights = dense * (n - 1) / n + experts * (n // grid.ep - 1) / (n // grid.ep)
    trained = weights * known.trained / known.weights
    units = known.layers / grid.pp
    if _keeps_gathered(grid):
        return _Message("dp", weights + trained, 2 * units)
    if row is not None and row.parameters:
        reduced = 1 if known.delayed else m
        return _Message("dp", 2 * m * weights + reduced * trained, (2 * m + reduced) * units)
    if row is not None and row.states:  # gradients go to the rank with the states; updated weights are gathered
        reduced = m if row.gradients else 1
        bucket = known.item * _DEEPSPEED.reduce_bucket
        return _Message("dp", (reduced + 1) * trained, (reduced + 1) * max(1, trained / bucket))
    reduced = 1 if known.delayed else m
    return _Message("dp", 2 * reduced * trained, 2 * reduced * max(1, trained / BUCKET))


def _sent(message: _Message, among: RankGroup, cluster: Cluster, computing: Range) -> Traffic:
    """Return the traffic of a message. The low end of a time range is at the high rates."""
    link = cluster.network if among.crosses else cluster.inside
    seconds = Range(*(_seconds(message, among, cluster, choice) for choice in ("high", "usual", "low")))
    row = EXPOSED[message.kind]
    shown = Range(
        *(
            max(t * share / 100, t - c)
            for t, share, c in zip(seconds, (row.low, row.usual, row.high), computing, strict=True)
        )
    )
    return Traffic(message.kind, round(message.bytes), link.name, among.crosses, seconds, shown)


def _seconds(message: _Message, among: RankGroup, cluster: Cluster, choice: str) -> float:
    """Return the seconds of a message at one choice of rates.

    A ring runs at the rate of its slowest link; a node's network is shared by as many rings as the group has ranks in
    the node. Every collective pays the latency of each hop.
    """
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
