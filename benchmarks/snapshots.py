"""Memory snapshots without a GPU: `python -m benchmarks.snapshots [EVENTS]` compares explaining one with pickle.load.

`snapshot_of` writes down what torch would have recorded of a run's allocations, by the model of its allocator.
"""

from __future__ import annotations

import pickle
import random
import resource
import sys
import time
from typing import Any

from memplan.engine.allocator import PythonAllocator
from memplan.engine.events import FREED, RELEASED
from memplan.estimate.training import TrainingWalk
from memplan.explain.history import History
from memplan.explain.snapshot import read_snapshot
from memplan.program.training.replay import STREAMS, steps_of

_POOL = 2**40  # addresses of a pool
Frames = list[dict[str, Any]]


def event(action: str, address: int, size: int, frames: Frames, time_us: int, **more: int) -> dict[str, Any]:
    """Return an event as torch writes it."""
    names = {"compile_context": "N/A", "user_metadata": ""}
    return {
        "action": action,
        "addr": address,
        "size": size,
        "stream": 0,
        "time_us": time_us,
        **names,
        **more,
        "frames": frames,
    }


def frame(file: str, line: int, name: str) -> dict[str, Any]:
    return {"filename": file, "line": line, "name": name}


def snapshot_of(walk: TrainingWalk, frames: Frames | None = None) -> dict[str, Any]:
    """Return the snapshot of a run's steps: its history, and the segments and blocks at its end."""
    stack = frames or [frame("/usr/lib/python3.12/site-packages/transformers/trainer.py", 2052, "training_step")]
    axes = {**walk.peaks.axes, "workspace": walk.peaks.workspace}
    events = steps_of(walk.decided.structure)
    sizes, allocator = events.bytes_of_keys(axes), PythonAllocator(streams=STREAMS)
    pools = {id(pool): n for n, pool in enumerate(allocator._pools)}  # pyright: ignore[reportPrivateUsage]
    live: dict[int, tuple[Any, int, int]] = {}
    out: list[dict[str, Any]] = []
    for number, key in events.unrolled():
        if key == RELEASED:
            allocator.release()
        elif key == FREED:
            block, address, size = live.pop(number)
            allocator.free(block)
            if size:
                out.append(event("free_requested", address, size, stack, len(out)))
                out.append(event("free_completed", address, size, stack, len(out)))
        elif number not in live:
            block = allocator.alloc(sizes[key], events.streams[key])
            address = _POOL * (1 + pools[id(block.pool)]) + block.start
            live[number] = block, address, sizes[key]
            if sizes[key]:
                out.append(event("alloc", address, sizes[key], stack, len(out)))
    blocks = [
        {"address": address, "size": block.size, "requested_size": size, "state": "active_allocated", "frames": stack}
        for block, address, size in live.values()
        if size
    ]
    segment = {"device": 0, "address": _POOL, "total_size": allocator.reserved, "stream": 0, "segment_type": "large"}
    return {
        "segments": [{**segment, "is_expandable": False, "blocks": sorted(blocks, key=lambda block: block["address"])}],
        "device_traces": [out],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": ""},
        "external_annotations": [],
    }


def made(events: int, depth: int = 30, segments: int = 400) -> dict[str, Any]:
    """Return a snapshot with that many events, whose 600 stacks share 3,000 frames, as torch's do."""
    chosen = random.Random(1)
    frames = [frame(f"/usr/lib/python3.11/site-packages/torch/nn/modules/m{i}.py", i, f"f{i}") for i in range(3000)]
    stacks = [chosen.sample(frames, depth) for _ in range(600)]
    first, history = 0x7F0000000000, list[dict[str, Any]]()
    for i in range(events // 2):
        size = 512 * chosen.randint(1, 40_000)
        history.append(event("alloc", first + i * 2**26, size, chosen.choice(stacks), i))
        history.append(event("free_completed", first + i * 2**26, size, [], i))
    history.append(
        {"action": "oom", "size": 2**31, "stream": 0, "device_free": 10**8, "time_us": events, "frames": stacks[0]}
    )
    half, big = 2**26, 2**27
    held = [
        {
            "device": 0,
            "address": k * big,
            "total_size": big,
            "stream": 0,
            "segment_type": "large",
            "is_expandable": False,
            "allocated_size": half,
            "active_size": half,
            "requested_size": half,
            "frames": [],
            "blocks": [
                {"address": k * big, "size": half, "state": "active_allocated", "frames": chosen.choice(stacks)},
                {"address": k * big + half, "size": half, "state": "inactive", "frames": []},
            ],
        }
        for k in range(segments)
    ]
    return {"segments": held, "device_traces": [history], "allocator_settings": {}, "external_annotations": []}


def main(events: int = 200_000) -> None:
    data = pickle.dumps(made(events))
    start = time.process_time()
    whole = pickle.loads(data)
    loading = time.process_time() - start
    del whole
    start = time.process_time()
    history = History(read_snapshot(data))
    history.buckets(96)
    taken = time.process_time() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{events:,} events, {len(data) / 1e6:.1f} MB: pickle.load {loading:.2f} s, explained in {taken:.2f} s")
    print(f"{taken / loading:.1f} times pickle.load; at most {most} MB, with the data that made it")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
