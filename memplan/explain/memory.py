"""Whose memory it was, by the message alone: other processes, the CUDA context, fragmentation, the card itself."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.core.records import NamedTuple
from memplan.core.units import GIB, MIB, gib
from memplan.explain.message import Amount, Message, ProcessUse

_IMPOSSIBLE = 2**50  # bytes that no card has: a negative number, printed without its sign


class Owner(NamedTuple):
    """A holder of memory: a sentence, how sure it is, and why."""

    text: str
    certainty: str
    why: str


def _sum_slack(*amounts: Amount | None) -> int:
    return sum(amount.slack for amount in amounts if amount is not None) + MIB


def owners(message: Message) -> Iterator[Owner]:
    """Yield what the numbers of a message say about who held the card's memory."""
    total, free = message.amount("total"), message.amount("free")
    allocated, rest = message.amount("allocated"), message.amount("unallocated")
    reserved, in_use, request = message.amount("reserved"), message.amount("in_use"), message.amount("request")
    if in_use is not None and in_use.bytes >= _IMPOSSIBLE:
        yield Owner(
            f"{in_use.text} of this process is no number of bytes: the driver does not tell",
            "sure",
            "2**64 minus something: WSL, or a container without NVML",
        )
        in_use = None
    held = reserved.bytes if reserved else allocated.bytes + rest.bytes if allocated and rest else None
    own, others = _processes(message, in_use, held)
    if own is not None:
        text = f"process {own.pid} with {own.in_use.text} is this one"
        yield Owner(
            text, "likely", "torch alone reserves nearly as much; in a container, process numbers are those of the host"
        )
        in_use = own.in_use
    for other in others:
        yield Owner(f"process {other.pid}: {other.in_use.text}", "sure", "another process on the card, by the message")
    if in_use is not None and held is not None and in_use.bytes - held > _sum_slack(in_use, allocated, rest, reserved):
        text = f"{gib(in_use.bytes - held)} of this process are outside torch: CUDA context, libraries, NCCL"
        yield Owner(text, "sure", "in use by the process, minus reserved by torch")
    if total is not None and free is not None:
        yield from _unnamed(message, total, free, in_use, held, others)
    if request is not None:
        yield from _fragmentation(request, allocated, rest, reserved, free, total)
    allowed = message.amount("allowed")
    if allowed is not None:
        limit = "PYTORCH_MPS_HIGH_WATERMARK_RATIO" if "MPS" in message.form.start else "set_per_process_memory_fraction"
        yield Owner(f"the process may have {allowed.text} only", "sure", f"torch's limit, {limit}")
    if allocated is not None and total is not None and allocated.bytes > total.bytes + total.slack:
        yield Owner(
            f"{allocated.text} are allocated on a card of {total.text}",
            "sure",
            "Windows and WSL spill to host memory, slowly",
        )


def _processes(message: Message, in_use: Amount | None, held: int | None) -> tuple[ProcessUse | None, list[ProcessUse]]:
    """Return the process that is this one under a number of the host, if it is among those named, and the others."""
    named = [*message.processes]
    if in_use is not None or held is None:
        return None, named
    own = min(
        (p for p in named if p.in_use.bytes + p.in_use.slack + MIB >= held and p.in_use.bytes - held < 4 * GIB),
        key=lambda p: p.in_use.bytes - held,
        default=None,
    )
    return own, [p for p in named if p is not own]


def _unnamed(
    message: Message, total: Amount, free: Amount, in_use: Amount | None, held: int | None, others: list[ProcessUse]
) -> Iterator[Owner]:
    known = in_use.bytes if in_use else held
    if known is None:
        return
    hidden = total.bytes - free.bytes - known - sum(p.in_use.bytes for p in others)
    slack = _sum_slack(total, free, in_use, *(p.in_use for p in others))
    if in_use is None:  # what torch reserves is not all that its process has
        if hidden > GIB + GIB // 2:
            text = f"{gib(hidden)} are neither free nor torch's: more than a CUDA context, so probably another process"
            yield Owner(text, "likely", "total minus free minus reserved by torch")
        return
    if hidden > slack + GIB // 4:
        text = f"{gib(hidden)} belong to no process that the driver names"
        yield Owner(text, "likely", "total minus free minus all processes: other containers or users, or a display")


def _fragmentation(
    request: Amount,
    allocated: Amount | None,
    rest: Amount | None,
    reserved: Amount | None,
    free: Amount | None,
    total: Amount | None,
) -> Iterator[Owner]:
    unused = rest.bytes if rest else reserved.bytes - allocated.bytes if reserved and allocated else None
    if total is not None and request.bytes > total.bytes:
        yield Owner(
            f"the request alone is larger than the card: {request.text} of {total.text}",
            "sure",
            "the message's own numbers",
        )
        return
    if free is not None and free.bytes >= request.bytes * 5 // 4 + GIB // 4:  # the driver keeps a little
        text = f"{free.text} were free, more than the {request.text} asked for: a limit of the system, or a race"
        yield Owner(
            text, "likely", "WSL, MIG, vGPU or a memory fraction limit a process; another process may have been faster"
        )
    if unused is None:
        return
    unsure = request.slack + sum(amount.slack for amount in ((rest,) if rest else (reserved, allocated)) if amount)
    if unused - unsure >= request.bytes:
        text = (
            f"{gib(unused)} were reserved but free, more than the request, in pieces that are too small: fragmentation"
        )
        yield Owner(text, "sure", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True avoids most of it")
    elif free is not None and unused + free.bytes >= request.bytes:
        text = f"{gib(unused)} were reserved but free: with the {free.text} of the card they would have been enough"
        yield Owner(text, "likely", "fragmentation; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True avoids most of it")
    elif unused > GIB:
        yield Owner(f"{gib(unused)} were reserved but free", "sure", "fragmentation, but not enough for the request")
