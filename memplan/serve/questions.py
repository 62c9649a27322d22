"""The bodies of requests, checked as a run is; a run by itself is a `RunSpec`."""

from __future__ import annotations

from typing import Annotated, Literal

from memplan.core.frozen import FrozenDict
from memplan.spec.base import Count, Flag, Natural, Number, Part
from memplan.spec.checks import After
from memplan.spec.pool import Job, NodeShape
from memplan.spec.run import RunSpec

MOST_RUNS = 1000  # of one request, and jobs
MOST_CARDS = 100_000  # of a pool
Mode = Literal["fit", "max", "ladder", "advise", "buy", "nodes"]
Axis = Literal["batch", "sequence", "rank", "completion", "generations", "model"]
Texts = Annotated[dict[str, str], After(FrozenDict)]


class RunBatch(Part):
    """Runs to estimate, at most 1,000. Each is answered by itself: a wrong one spoils no other.

    runs  as in `POST /v1/estimate`
    """

    runs: tuple[RunSpec, ...]


class FitsQuestion(Part):
    """A run, and GPUs that may hold it.

    run   the run; its own `gpu` is ignored
    pool  names of GPUs; all catalogued ones by default
    """

    run: RunSpec
    pool: tuple[str, ...] | None = None


class PlaceQuestion(Part):
    """Jobs to place, at most 1,000, and the nodes of a pool, of at most 100,000 GPUs.

    jobs    runs, or jobs with the numbers of GPUs that they may use
    pool    nodes, or names of GPUs, as in `8x a100`
    policy  the GPU with the least memory first, the lowest price, or the machine with the most free
    """

    jobs: tuple[Job, ...]
    pool: tuple[NodeShape, ...]
    policy: Literal["tightest", "cheapest", "spread"] = "tightest"


class PlanQuestion(Part):
    """A run to plan for.

    run           the run; without a GPU for mode `buy`
    mode          `fit` finds what makes it fit; `max` the largest value of an axis; `ladder` what each change saves;
                  `advise` a method; `buy` cards that hold it; `nodes` how to divide it over a cluster
    axis          of mode `max`
    headroom      bytes to leave free
    tight         count a tight run as fitting
    tokens        training tokens to price, of mode `buy`
    most          offers to list, of mode `buy`, or grids, of mode `nodes`
    nodes         nodes of the cluster, of mode `nodes`, each with `gpus` of the run's GPU
    gpus          GPUs of a node
    network_gbps  network Gb/s per GPU, one way; by default that of the vendor's own servers
    global_batch  sequences per step, all GPUs together; by default the run's batch on every GPU
    """

    run: RunSpec
    mode: Mode = "fit"
    axis: Axis = "sequence"
    headroom: Natural = 0
    tight: Flag = False
    tokens: Count | None = None
    most: Count = 20
    nodes: Count | None = None
    gpus: Count | None = None
    network_gbps: Number | None = None
    global_batch: Count | None = None


class CheckQuestion(Part):
    """Files of frameworks to check on GPUs, as text. Only these are read, whatever they name.

    files      name -> text, of the runs' files and of those that they name
    runs       names of the runs' files; all that are one by default
    gpu        the GPUs, each of which has to hold the runs
    gpus       how many of them a run is on; by default its file says so
    fail       limit over which a run fails, as in 90% or 22 GiB; by default the card's usable bytes
    warn       limit over which it is near
    band       compare what is `usual`, or the upper end of the expected range, `high`
    framework  NAME or NAME-VERSION; by default the files' keys tell it
    """

    files: Texts
    runs: tuple[str, ...] = ()
    gpu: tuple[str, ...]
    gpus: Count | None = None
    fail: str | None = None
    warn: str | None = None
    band: Literal["usual", "high"] = "usual"
    framework: str | None = None
