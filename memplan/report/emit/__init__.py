"""An answer in the fields that schedulers read: a table of systems, and the function of each that writes them.

Every number is of one GPU, in MiB and rounded up. What is set aside is the upper end of the band; the peak and the
margin between both stand next to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.core.errors import SpecError, UnknownNameError, refused
from memplan.core.records import NamedTuple
from memplan.core.units import GIB, MIB, gib
from memplan.estimate.answer import Estimate
from memplan.models.cards import find_model
from memplan.planning.fitting import card_answers, fits
from memplan.report.emit.products import PRODUCTS

# Host memory of a process in addition to what the answer counts. Measured: 304 MiB of its own once torch 2.13.0+cpu,
# transformers 5.24.0, peft 0.21.2 and bitsandbytes are imported (Anonymous of /proc/self/smaps_rollup). Assumed: the
# rest, for CUDA's context and pinned memory, the data set and its loader.
_PROCESS = 4 * GIB

_LONGEST_NAME = 50  # characters; Kubernetes adds some for a Job's pods, and takes 63


class Ask(NamedTuple):
    """The GPUs and memory that a run asks a scheduler for.

    gpus     GPUs that hold it, of which any will do
    count    number of GPUs
    peak     MiB of one GPU
    limit    MiB of one GPU to set aside: the upper end of the band
    host     MiB of host memory, of all processes on a machine
    shared   whether part of a GPU is asked for
    patch    whether only the fields that change are written
    site     a site's own names, by section
    """

    answer: Estimate
    gpus: tuple[GPU, ...]
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the field's word)
    peak: int
    limit: int
    host: int
    shared: bool
    patch: bool
    site: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The run in a word that systems take for a name."""
        run = self.answer.run
        asked = self.answer.asked.model
        model = asked.rpartition("/")[2] if isinstance(asked, str) else "model"
        words = f"{run.method.kind if run.task == 'train' else run.task}-{model}".lower()
        kept = "".join(c if c.isalnum() and c.isascii() else "-" for c in words)
        return "-".join(filter(None, kept.split("-")))[:_LONGEST_NAME].rstrip("-")

    @property
    def repository(self) -> str:
        """The model's id on Hugging Face, or what the run calls it."""
        model = self.answer.asked.model
        card = find_model(model).card or {}
        named = model if isinstance(model, str) else "model"
        return named if "/" in named else str(card.get("hf_id") or named)

    @property
    def mig(self) -> str:
        """The profile, if the GPUs are MIG instances."""
        return self.gpus[0].mig

    @property
    def notes(self) -> dict[str, str]:
        """The annotations: peak and margin, of one GPU."""
        margin = self.limit - self.peak
        return {"memplan.dev/peak-mib": str(self.peak), "memplan.dev/margin-mib": str(margin)}


class System(NamedTuple):
    """A scheduler, and the module and function that write for it.

    shares   whether it can ask for part of a GPU
    divides  whether it can ask for a MIG instance
    nvidia   whether the resource that it asks for is NVIDIA's
    """

    module: str
    render: str
    title: str
    shares: bool = False
    divides: bool = False
    nvidia: bool = False


SYSTEMS: dict[str, System] = {
    "kubernetes": System(
        "kubernetes", "kubernetes", "Kubernetes: node affinity, or a MIG resource", divides=True, nvidia=True
    ),
    "dra": System("kubernetes", "dra", "Kubernetes DRA: a ResourceClaimTemplate", divides=True, nvidia=True),
    "hami": System("kubernetes", "hami", "HAMi", shares=True, nvidia=True),
    "volcano": System("kubernetes", "volcano", "Volcano vGPU", shares=True, nvidia=True),
    "kai": System("kubernetes", "kai", "KAI scheduler", shares=True, nvidia=True),
    "runai": System("kubernetes", "runai", "Run:ai", shares=True, nvidia=True),
    "kueue": System("kubernetes", "kueue", "Kueue", nvidia=True),
    "production-stack": System(
        "services", "production_stack", "vLLM production stack: Helm values", shares=True, nvidia=True
    ),
    "kaito": System("services", "kaito", "KAITO: its table of methods and models"),
    "slurm": System("services", "slurm", "Slurm: an sbatch header", divides=True),
    "ray": System("services", "ray", "Ray: options of a task or actor", shares=True),
    "skypilot": System("services", "skypilot", "SkyPilot"),
    "dstack": System("services", "dstack", "dstack"),
    "modal": System("services", "modal", "Modal"),
}


def emit(
    system: str,
    answers: Sequence[Estimate],
    *,
    share: bool = False,
    patch: bool = False,
    site: Mapping[str, Any] | None = None,
) -> str:
    """Return what a system takes for a run, given its answers on one GPU or several, or on none for all that hold it.

    Raises SpecError, in a line, for what the system cannot say, and with exit code 1 if no GPU holds the run.
    """
    if system not in SYSTEMS:
        raise UnknownNameError("emit", system, SYSTEMS)
    row = SYSTEMS[system]
    if share and not row.shares:
        able = ", ".join(name for name, other in SYSTEMS.items() if other.shares)
        raise refused("share", f"{system} cannot ask for part of a GPU; {able} can, or name a MIG instance (--gpu)")
    asked = _ask(answers, share, patch, site or {})
    if asked.mig and not row.divides:
        able = ", ".join(name for name, other in SYSTEMS.items() if other.divides)
        raise refused("emit", f"{system} cannot ask for a MIG instance; {able} can")
    other = next((gpu for gpu in asked.gpus if row.nvidia and gpu.vendor != "NVIDIA"), None)
    if other is not None:
        raise refused(
            "emit", f"{system} asks for NVIDIA's GPUs, and {other.name} is {other.vendor}'s; use slurm or ray"
        )
    write: Callable[[Ask], str] = getattr(import_module(f"memplan.report.emit.{row.module}"), row.render)
    return write(asked)


def _ask(answers: Sequence[Estimate], share: bool, patch: bool, site: Mapping[str, Any]) -> Ask:
    first = answers[0]
    if len({answer.asked.model_copy(update={"gpu": None}) for answer in answers}) > 1:
        raise refused("emit", "writes one run; give the GPUs that it may use by --gpu, not several runs")
    if first.gpu is None:
        gpus = tuple(fit.gpu for fit in fits(first.asked) if fit.fits and fit.gpu.name in PRODUCTS)
    else:
        gpus = tuple(find_gpu(one.gpu.name) for one in answers if one.gpu and one.verdict.answer == "fits")
    if not gpus:
        which = first.gpu.name if first.gpu and len(answers) == 1 else "any of the GPUs"
        error = refused("emit", f"the run does not surely fit {which}: it needs up to {gib(first.most)}")
        error.exit_code = 1
        raise error
    kinds = card_answers(first.asked.model_copy(update={"gpu": None}))
    fitting = max((one for one in map(kinds.on, gpus) if isinstance(one, Estimate)), key=lambda one: one.most)
    world = first.run.parallelism.world
    if len({gpu.mig for gpu in gpus}) > 1:
        raise refused("gpu", "name GPUs, or MIG instances of one profile, not both")
    if world > 1 and gpus[0].mig:
        raise refused("gpu", f"{world:,} MIG instances do not communicate; name whole GPUs")
    if share and world > 1:
        raise refused("share", f"applies to one GPU, and the run is on {world:,}")
    peak = -(-fitting.bytes.used // MIB)
    limit = max(peak, min(-(-fitting.most // MIB), min(gpu.usable for gpu in gpus) // MIB))
    processes = fitting.host.ranks
    host = -(-(fitting.host.peak.node + processes * _PROCESS) // MIB)
    return Ask(fitting, gpus, world, peak, limit, host, share, patch, site)


def nothing_named(system: str, asked: Ask) -> SpecError:
    """Return the error that a system has no name for any of the GPUs."""
    return refused("emit", f"{system} has no name known for {', '.join(gpu.name for gpu in asked.gpus[:4])}")
