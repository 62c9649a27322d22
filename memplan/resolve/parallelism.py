"""Degrees of parallelism: their product must be the world's size."""

from __future__ import annotations

from memplan.catalogue.degrees import WHOLE, Degrees
from memplan.core.errors import SpecError
from memplan.spec.parallelism import Parallelism


def degrees_of(p: Parallelism, style: str) -> Degrees:
    """The degrees of a rank of such a world, whose profile has tensor parallelism of that style."""
    style = style if p.tp > 1 else WHOLE.style
    etp = p.tp if p.etp is None else p.etp
    most = round(1000 * p.expert_imbalance)
    return Degrees(
        tp=p.tp,
        sequence_parallel=p.sequence_parallel,
        cp=p.cp,
        context=p.context,
        ep=p.ep,
        etp=etp,
        imbalance=most,
        style=style,
    )


def check_product(p: Parallelism) -> SpecError | None:
    """The error of a world that is not the product of its degrees, naming every one."""
    product = p.dp * p.tp * p.pp * p.cp
    if p.world == product or (product == 1 and p.device_map is not None):  # which is on all of them
        return None
    field = "parallelism.world" if p.world > 1 else "parallelism.dp"
    degrees = " x ".join(f"{name} {getattr(p, name)}" for name in ("dp", "tp", "pp", "cp"))
    return SpecError(f"{field}: a world of {p.world} GPUs is not {degrees} = {product}", field)


def replicas(p: Parallelism) -> int:
    """The ranks that hold the same part of the model, among whom its weights, gradients and states may be divided.

    Those of context parallelism are among them: each has all weights.
    """
    return p.dp * p.cp
