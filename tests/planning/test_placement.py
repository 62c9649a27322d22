"""Jobs on a pool: nothing holds more than it has, few GPUs are used, and what is pending has a reason."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from memplan import Job, MemplanError, NodeShape, Placement, RunSpec, all_gpus, estimate, find_gpu, fits, place
from memplan.planning.placement import POLICIES, JobDemand, packed, pool_gpus
from tests.tiny import SMALLEST

MODELS = ("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "llama-3.2-1b", "llama-3-8b", "gpt2", "smollm2-135m", "phi-2")
GPUS = ("t4", "3090", "4090", "l4", "a100-40gb", "a100-80gb", "h100", "a100-80gb:3g.40gb")
GIB = 2**30


def jobs(count: int, seed: int, methods: tuple[str, ...] = ("full", "lora", "qlora")) -> list[Job]:
    random = Random(seed)

    def run() -> RunSpec:
        batch = {"micro": random.randint(1, 4), "sequence": random.choice((256, 512, 1024))}
        return RunSpec(model=random.choice(MODELS), method=random.choice(methods), batch=batch)

    return [Job(run=run(), gpus=random.choice([(), (), (1, 2), (2, 4, 8)])) for _ in range(count)]


def pool(seed: int, host_memory: int | None = None) -> list[NodeShape]:
    random = Random(seed)
    names = random.sample(GPUS, 4)
    return [
        NodeShape(
            gpu=name,
            cards=random.choice((1, 4, 8)),
            count=random.randint(1, 3),
            shared=random.random() < 0.4,
            host_memory=host_memory,
        )
        for name in names
    ]


def check(found: Placement, asked: list[Job], nodes: list[NodeShape]) -> None:
    """Check that every job is there once, and that no GPU and no machine holds more than it has."""
    assert sorted(job.index for job in (*found.placed, *found.pending)) == list(range(len(asked)))
    held: Counter[tuple[str, str, int]] = Counter()
    jobs_on: Counter[tuple[str, str, int]] = Counter()
    host: Counter[str] = Counter()
    shared = {find_gpu(node.gpu).name: node.shared for node in nodes}
    for job in found.placed:
        assert job.gpus in (job.job.gpus or (job.job.run.parallelism.world,))
        assert job.answer.verdict.answer == "fits"
        assert job.bytes <= job.gpu.usable
        for seat in job.seats:
            assert len(set(seat.cards)) == len(seat.cards)
            host[seat.machine] += job.host_bytes
            for card in seat.cards:
                at = (seat.machine, job.gpu.name, card)
                held[at] += job.answer.most if shared[job.gpu.name] else job.bytes
                jobs_on[at] += 1
    for (machine, name, card), bytes_ in held.items():
        assert bytes_ <= find_gpu(name).usable, (machine, name, card)
        assert shared[name] or jobs_on[machine, name, card] == 1
    limits = [node.host_memory for node in nodes if node.host_memory is not None]
    assert not limits or max(host.values(), default=0) <= max(limits)
    assert len(held) == found.cards_used <= found.cards


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_no_gpu_holds_more_than_its_usable_bytes(policy: Any, seed: int) -> None:
    asked, nodes = jobs(40, seed), pool(seed)
    check(place(asked, nodes, policy), asked, nodes)


@pytest.mark.parametrize("seed", range(3))
def test_no_machine_holds_more_than_its_host_memory(seed: int) -> None:
    offloaded = RunSpec(model="gpt2", parallelism=OFFLOADED).parallelism
    asked = [Job(run=job.run.model_copy(update={"parallelism": offloaded})) for job in jobs(30, seed, ("full",))]
    nodes = pool(seed, 60 * GIB)
    found = place(asked, nodes)
    check(found, asked, nodes)
    assert {job.code for job in found.pending} & {"host_memory", "no_free_card"}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shared", [True, False])
def test_few_more_gpus_than_the_best_of_twenty_orders(seed: int, shared: bool) -> None:
    asked = [job.run for job in jobs(120, seed, ("lora", "qlora"))]
    nodes = [NodeShape(gpu=gpu, cards=4, count=20, shared=shared) for gpu in ("3090", "a100-80gb", "l4")]
    demands = [JobDemand(Job(run=run), index) for index, run in enumerate(asked)]
    for demand in demands:
        demand.weigh(pool_gpus(nodes))
    tried = [packed(nodes, "tightest", Random(100 + i).sample(demands, len(demands))) for i in range(20)]
    most = max(len(packing.placed) for packing in tried)
    best = min(packing.cards_used for packing in tried if len(packing.placed) == most)
    found = place(asked, nodes)
    assert len(found.placed) >= most
    assert found.cards_used <= max(best * 1.05, best + (len(found.placed) - most))


RUN = RunSpec(model="qwen2-7b", method="qlora")
OFFLOADED = {"world": 2, "strategy": "fsdp2", "offload": {"parameters": True, "optimizer": True}}


@pytest.mark.parametrize(
    ("job", "node", "code", "says"),
    [
        (
            RunSpec(model="llama-3-70b", method="full"),
            {"gpu": "h100", "cards": 8},
            "too_large",
            "no GPU of the pool holds it: needs 566.77 GiB; the nearest is h100",
        ),
        (Job(run=RUN, gpus=(4,)), {"gpu": "h100", "cards": 2}, "too_few_cards", "no machines have 4 GPUs for it"),
        (Job(run=RUN, gpus=(2,)), {"gpu": "h100:3g.40gb", "cards": 7}, "too_few_cards", "no machines have 2 GPUs"),
        (
            RunSpec(model="qwen2-7b", method="full", parallelism=OFFLOADED),
            {"gpu": "h200", "cards": 2, "host_memory": GIB},
            "host_memory",
            "of one machine; the most left is 1.00 GiB",
        ),
        ({"model": "qwen2-7c"}, {"gpu": "h100"}, "unknown_name", "model: unknown name 'qwen2-7c'"),
        (
            Job(run={"model": "qwen2-7b", "parallelism": {"tp": 2}}, gpus=(1,)),
            {"gpu": "h100"},
            "invalid_run",
            "gpus: 1 are not the 2 that tp, pp, cp",
        ),
    ],
)
def test_a_job_that_is_not_placed_has_a_reason(job: Any, node: dict[str, Any], code: str, says: str) -> None:
    found = place([RUN, job], [node, "h100"])
    [pending] = found.pending
    assert (pending.index, pending.code) == (1, code)
    assert says in pending.reason
    assert [placed.index for placed in found.placed] == [0]


def test_a_job_waits_for_gpus_that_are_taken() -> None:
    found = place([RUN, RUN], ["3090"])
    assert [(job.index, job.code) for job in found.pending] == [(1, "no_free_card")]


def test_policies_choose_as_they_say() -> None:
    nodes = [
        NodeShape(gpu="h100", usd_per_hour=1.0),
        NodeShape(gpu="3090", usd_per_hour=2.0),
        NodeShape(gpu="4090", cards=8),
    ]
    chosen = {policy: place([RUN], nodes, policy).placed[0].gpu.name for policy in POLICIES}
    tightest = min(("rtx-3090", "rtx-4090"), key=lambda name: find_gpu(name).usable)
    assert chosen == {"tightest": tightest, "cheapest": "rtx-4090", "spread": "rtx-4090"}


def test_a_gpu_is_divided_into_instances_and_shared() -> None:
    divided = place([RUN] * 6, [NodeShape(gpu="a100-80gb", mig=("3g.40gb", "2g.20gb", "1g.10gb"), cards=2)])
    assert Counter(job.gpu.mig for job in divided.placed) == {"2g.20gb": 2, "3g.40gb": 2}
    assert divided.cards == 6
    shared = place([RUN] * 6, [NodeShape(gpu="a100-80gb", shared=True)])
    assert len(shared.placed) == find_gpu("a100-80gb").usable // estimate(RUN, gpu="a100-80gb").most
    assert shared.cards_used == 1


def test_a_placement_is_written_as_json() -> None:
    found = place([RUN, {"model": "nobody/nothing"}], ["2x 3090"]).as_dict()
    assert found["placed"][0]["seats"] == [{"machine": "3090-0", "cards": [0]}]
    assert found["placed"][0]["bytes"] == estimate(RUN, gpu="3090").band.high
    assert found["pending"][0]["code"] == "model_not_available"
    assert (found["cards_used"], found["cards"]) == (1, 2)


@pytest.mark.parametrize(
    ("asked", "nodes", "policy", "line"),
    [
        ([RUN], [], "tightest", "pool: has no node; give one, as in '8x a100'"),
        ([RUN], ["3090"], "tight", "policy: unknown name 'tight'; did you mean tightest"),
        ([3], ["3090"], "tightest", "jobs.0.run: must be a mapping, not 3"),
        (
            [RUN, {"run": {**dict(RUN), "batch": {"micro": 0}}}],
            ["3090"],
            "tightest",
            "jobs.1.run.batch.micro: must be at",
        ),
        ([RUN], ["3090", {"gpu": "3090", "gpus": 2}], "tightest", "pool.1.gpus: no such key; did you mean gpu?"),
        ([RUN], [{"gpu": "3090", "cards": 0}], "tightest", "pool.0.cards: must be at least 1, not 0"),
        ([RUN], ["309"], "tightest", "pool: unknown name '309'"),
        ([RUN], [{"gpu": "3090", "mig": ["3g.40gb"]}], "tightest", "mig: rtx-3090 has no MIG profiles in the table"),
        ([RUN], [{"gpu": "a100", "mig": ["9g.9gb"]}], "tightest", "mig: unknown name '9g.9gb'"),
        ([RUN], [{"gpu": "a100", "mig": ["7g.80gb"] * 2}], "tightest", "mig: 7g.80gb and 7g.80gb need more memory"),
        (
            [RUN],
            [{"gpu": "a100", "mig": ["4g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"]}],
            "tightest",
            "mig: 4g.40gb and 2g",
        ),
        ([RUN], [{"gpu": "a100", "count": 2**30}], "tightest", "pool: must have at most 1,048,576 GPUs, not 1,073,741"),
        ([RUN], [3], "tightest", "pool.0: must be a mapping, not 3"),
        ([RUN], "3090", "tightest", "pool: must be a list, not '3090'"),
        ([RUN], None, "tightest", "pool: must be a list, not None"),
        (RUN, ["3090"], "tightest", "jobs: must be a list, not RunSpec(model="),
    ],
)
def test_malformed_pools_are_refused_in_a_line(asked: Any, nodes: Any, policy: Any, line: str) -> None:
    with pytest.raises(MemplanError) as caught:
        place(asked, nodes, policy)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "run",
    [
        RunSpec(model={"config": SMALLEST}),
        RUN,
        RunSpec(model="llama-3-8b", method="lora", batch={"micro": 4}),
        RunSpec(model="llama-3-8b", method="lora", parallelism={"world": 2, "strategy": "fsdp2"}),
        RunSpec(model="llama-3-8b", method="lora", parallelism={"world": 2, "strategy": "zero3"}),
        RunSpec(model="llama-3-8b", task="generate"),
        RunSpec(model="llama-3-8b", task="generate", profile="vllm"),
        RunSpec(model="qwen2-7b", method="lora", kernels={"attention": "flash_attention_2"}),
        RunSpec(
            model="qwen2.5-1.5b",
            method="lora",
            batch={"micro": 8},
            trainer="grpo",
            rollout="colocate",
            profile="trl-1.15",
        ),
    ],
    ids=str,
)
def test_every_gpu_has_the_answer_of_an_estimate(run: RunSpec) -> None:
    for fit in fits(run):
        try:
            answer = estimate(run, gpu=fit.gpu.name).verdict.answer
            refusal = ""
        except MemplanError as error:
            answer, refusal = None, str(error)
        assert (fit.fits, fit.answer, fit.refusal) == (answer == "fits", answer, refusal)  # `fits` is read first


def test_a_pool_is_answered_in_its_order() -> None:
    assert [fit.gpu for fit in fits(RUN)] == list(all_gpus())
    assert [(fit.gpu.name, fit.fits) for fit in fits(RUN, ["h100:1g.10gb", "3090", find_gpu("t4"), "g5.xlarge"])] == [
        ("h100-sxm:1g.10gb", False),
        ("rtx-3090", True),
        ("t4", True),
        ("a10g", True),
    ]


def test_the_type_of_a_machine_is_a_node() -> None:
    assert NodeShape.model_validate("p4d.24xlarge") == NodeShape(gpu="a100-sxm-40gb", cards=8, host_memory=1152 * GIB)


def test_a_run_that_no_gpu_allows_is_an_error() -> None:
    wrong: list[tuple[Any, Any, str]] = [
        ({"model": "qwen2-7c"}, None, "model: unknown name"),
        ("qwen2-7b", None, "run: must be a mapping"),
        (RUN, "3090", "pool: must be a list"),
        (RUN, [3], "pool: unknown name '3'"),
        (RUN, ["2x4090"], "pool: '2x4090' is a number of GPUs; name the kind alone, as the run says how many"),
        (RUN, [], "pool: has no GPU; give one"),
    ]
    for run, gpus, line in wrong:
        with pytest.raises(MemplanError, match=line):
            fits(run, gpus)
