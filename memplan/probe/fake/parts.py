"""Counting only the parts of a tensor-parallel model that this rank holds."""

from __future__ import annotations

from typing import Any

from memplan.probe.libraries import library


def watch_parts_only() -> None:
    """DTensor finds out the shape of a whole result by computing it without memory; that is none of the run's."""
    propagator: Any = library("torch.distributed.tensor._sharding_prop").ShardingPropagator
    asked = propagator._propagate_tensor_meta_non_cached

    def _propagate_tensor_meta_non_cached(self: Any, schema: Any) -> Any:
        with library("torch.utils._python_dispatch")._disable_current_modes():
            return asked(self, schema)

    propagator._propagate_tensor_meta_non_cached = _propagate_tensor_meta_non_cached
