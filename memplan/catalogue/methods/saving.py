"""Copies that saving a checkpoint makes on the device.

transformers 5 keeps a layer's experts as one parameter and converts it back to the checkpoint's layout before anything
goes to the host, for all layers at once.

Source: transformers 5.24 conversion_mapping.py, core_model_loading.py revert_weight_conversion, Chunk, Transpose.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.core.ir import Tensor, Weight

SOURCE = "transformers 5.24 core_model_loading.py revert_weight_conversion"


def checkpoint_copies(w: Weight, experts: str) -> Iterator[Tensor]:
    """Yield the copies that saving makes of a weight; most weights need none.

    `experts`: how the checkpoint stores experts (`CheckpointFacts.experts`).
    """
    if not w.stacked or w.stored:
        return
    if experts == "transposed":
        yield Tensor(f"{w.name}, transposed", w.shape, w.dtype)
    elif experts == "split" and w.name.endswith("gate_up_proj"):
        number, two, *rest = w.shape.split()
        assert two == "2"
        for name in ("gate_proj", "up_proj"):
            yield Tensor(w.name.replace("gate_up_proj", name), " ".join((number, *rest)), w.dtype)
