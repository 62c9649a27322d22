"""Record only this rank's shards of a tensor-parallel model."""

from __future__ import annotations

from typing import Any

from memplan.probe.libraries import library


def hide_shape_propagation() -> None:
    """Hide DTensor's shape propagation, which computes full-size results without memory, from the trace."""
    propagator: Any = library("torch.distributed.tensor._sharding_prop").ShardingPropagator
    propagate = propagator._propagate_tensor_meta_non_cached

    def _propagate_tensor_meta_non_cached(self: Any, schema: Any) -> Any:
        with library("torch.utils._python_dispatch")._disable_current_modes():
            return propagate(self, schema)

    propagator._propagate_tensor_meta_non_cached = _propagate_tensor_meta_non_cached
