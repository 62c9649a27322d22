"""The inputs of a model (token ids, images or audio) and the labels of the run's objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from memplan.probe.script.model import base_of, lower_of
from memplan.probe.script.packed_batches import packed_batch, packed_inputs
from memplan.spec.run import RunSpec


def inputs_of(run: RunSpec, model: Any, device: torch.device) -> dict[str, Any]:
    """Return the model's inputs by name.

    input_ids       [micro, sequence]
    pixel_values    [micro, channels, height, width], in fp32, which the model casts itself
    input_features  [micro, mel bins, frames], in the dtype of the weights, because the model does not cast them
    """
    base = base_of(model)
    config = base.config
    decodes = run.task == "generate" and not config.is_encoder_decoder  # an encoder runs once for all beams
    micro = run.batch.micro * (run.generation.num_beams if decodes else 1)
    match base.main_input_name:
        case "pixel_values":
            height, width = _pair(config.image_size)
            return {"pixel_values": torch.zeros((micro, config.num_channels, height, width), device=device)}
        case "input_features":
            shape = (micro, config.num_mel_bins, 2 * config.max_source_positions)
            dtype = base.get_encoder().conv1.weight.dtype
            return {"input_features": torch.zeros(shape, dtype=dtype, device=device)}
        case _ if (packed := packed_batch(run)) is not None:
            return packed_inputs(packed, device, lower_of(run.precision))
        case _:
            return {"input_ids": _ids(model, (micro, run.batch.sequence), device)}


def labels_of(run: RunSpec, objective: str, model: Any, inputs: Mapping[str, Any], device: torch.device) -> Any:
    """Return the labels of the objective; None if it has none."""
    micro, config = run.batch.micro, base_of(model).config
    match objective:
        case "feature_extraction":
            return None
        case "seq2seq_lm":
            longest = getattr(config, "max_target_positions", None)
            return _ids(model, (micro, run.batch.target_sequence or longest or run.batch.sequence), device)
        case "sequence_classification" | "image_classification":
            regression = config.num_labels == 1
            return torch.zeros(micro, dtype=torch.float32 if regression else torch.int64, device=device)
        case "token_classification":
            return torch.zeros_like(inputs["input_ids"])
        case _:
            return inputs["input_ids"].clone()


def _ids(model: Any, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    table = base_of(model).get_input_embeddings()
    vocabulary = int(getattr(table, "num_embeddings", 0) or table.weight.shape[0])
    return torch.randint(min(vocabulary, 2**15), shape, device=device)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
