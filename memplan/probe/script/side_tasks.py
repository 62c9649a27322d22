"""Evaluate, save and merge after the training steps, as transformers' Trainer and peft do."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from memplan.catalogue.kernels.wiring import TRAINERS
from memplan.probe.libraries import library
from memplan.probe.script.model import base_of
from memplan.probe.script.script import Script
from memplan.spec.run import changed
from memplan.spec.training import Evaluation


def run_all(script: Script) -> None:
    """Evaluate, save and merge if the run asks for it, each in its own phase."""
    also = script.run.also
    with script.attention_backend():
        if also.evaluation is not None and not TRAINERS[script.run.trainer].own_loop:  # which evaluates in its steps
            evaluate(script, also.evaluation)
        if also.saving is not None:
            save(script)
        if also.merging is not None:
            merge(script)


def evaluate(script: Script, e: Evaluation) -> None:
    """Evaluate batches in a loop that keeps their logits and labels, then generate if the run asks for it.

    Follows transformers 5.24 trainer.py evaluation_loop and prediction_step, with its local variables, because they
    determine how long tensors live.
    """
    containers: Any = library("transformers.trainer_pt_utils").EvalLoopContainer
    trained, phase = script.run, script.phase
    batch = {"micro": e.micro, "sequence": e.sequence or trained.batch.sequence, "accumulation": 1}
    loss = "hf" if e.kept_batches and trained.kernels.loss == "fused" else str(trained.kernels.loss)
    script.run = changed(changed(trained, "batch", **batch), "kernels", loss=loss)
    script.model.eval()
    all_preds, all_labels = containers(e.concatenates), containers(e.concatenates)
    with phase("eval"):
        for step in range(max(e.kept_batches, 2)):
            losses, logits, labels = _predict(script, keeps=step < e.kept_batches)
            if logits is not None:
                if e.preprocess == "argmax":
                    logits = logits.argmax(dim=-1)
                if not e.batch_metrics:
                    all_preds.add(logits)
                    all_labels.add(labels)
            if e.batch_metrics:
                del losses, logits, labels
            elif e.accumulation is not None and (step + 1) % e.accumulation == 0:
                all_preds.tensors = all_labels.tensors = None  # on the host by now
                del losses, logits, labels
        all_preds.tensors = all_labels.tensors = None
    if e.new_tokens:
        generation_run = script.run.model_copy(update={"task": "generate"})
        script.run = changed(generation_run, "batch", new_tokens=e.new_tokens, target_sequence=None)

        def generate(name: str) -> AbstractContextManager[None]:
            return phase("generate")

        script.phase = generate
        script.generate()
    script.model.train()
    script.run, script.phase = trained, phase


def _predict(script: Script, keeps: bool) -> tuple[Any, Any, Any]:
    """Return loss, logits and labels of a batch; the last two are None unless the loop `keeps` them."""
    with torch.no_grad():
        loss, outputs, labels = script.predict()
        loss = loss.detach().mean()
        logits = outputs.logits if outputs is not None and hasattr(outputs, "logits") else None
    if not keeps or logits is None:
        return loss, None, None
    return loss, logits.detach(), labels


def save(script: Script) -> None:
    """Convert the state dict back into a checkpoint's format, as save_pretrained does.

    Source: transformers 5.24 modeling_utils.py save_pretrained.
    """
    loading: Any = library("transformers.core_model_loading")
    base = base_of(script.model)
    with script.phase("save"):
        adapted = script.run.method.kind not in ("full", "freeze")
        tensors = dict(base.state_dict()) if not adapted else {}
        if tensors:
            tensors = loading.revert_weight_conversion(base, tensors)
        for name in list(tensors):
            tensors[name] = tensors[name].contiguous()
        del tensors


def merge(script: Script) -> None:
    """Run `merge_and_unload`, with stand-ins for bitsandbytes' parameters, which cannot hold fake tensors."""
    bnb, lora_bnb = library("bitsandbytes"), library("peft.tuners.lora.bnb")
    integrations: Any = library("peft.utils.integrations")
    original_classes = (bnb.nn.Params4bit, bnb.nn.Int8Params)
    bnb.nn.Params4bit, bnb.nn.Int8Params = _FourBits, _Int8
    dequantise = lora_bnb.dequantize_bnb_weight
    lora_bnb.dequantize_bnb_weight = integrations.dequantize_bnb_weight = _dequantised
    for module in script.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.module = module  # as Params4bit has it
    try:
        with script.phase("merge"):
            script.model.merge_and_unload()
    finally:
        bnb.nn.Params4bit, bnb.nn.Int8Params = original_classes
        lora_bnb.dequantize_bnb_weight = integrations.dequantize_bnb_weight = dequantise


def _dequantised(weight: Any, state: Any = None) -> Any:
    """Dequantise without checking the weight's class.

    Source: peft 0.21 utils/integrations.py dequantize_bnb_weight.
    """
    functional: Any = library("bitsandbytes").functional
    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    if state.SCB is None:
        state.SCB = weight.SCB
    return functional.int8_vectorwise_dequant(weight.data, state.SCB.to(weight.data.device))


class _FourBits:
    """Stands in for Params4bit: quantised when moved. Source: bitsandbytes 0.50 nn/modules.py Params4bit._quantize."""

    def __init__(self, data: Any, **settings: Any) -> None:
        self._data, self._settings = data.detach(), settings

    def to(self, device: Any) -> Any:
        w, keys = (
            self._data.contiguous().to(device),
            ("blocksize", "compress_statistics", "quant_type", "quant_storage"),
        )
        codes, state = library("bitsandbytes").functional.quantize_4bit(w, **{key: self._settings[key] for key in keys})
        weight = nn.Parameter(codes, requires_grad=False)
        for key, value in {**self._settings, "quant_state": state, "bnb_quantized": True}.items():
            if key != "requires_grad":
                setattr(weight, key, value)
        self._settings["module"].quant_state = state
        return weight


class _Int8:
    """Stands in for Int8Params: quantised when moved. Source: bitsandbytes 0.50 nn/modules.py Int8Params._quantize."""

    def __init__(self, data: Any, requires_grad: bool, has_fp16_weights: bool) -> None:
        self._data, self._fp16 = data.detach(), has_fp16_weights

    def to(self, device: Any) -> Any:
        half = self._data.contiguous().to(device=device, dtype=torch.float16)
        codes, scales, _ = library("bitsandbytes").functional.int8_vectorwise_quant(half)
        weight: Any = nn.Parameter(codes, requires_grad=False)
        weight.CB, weight.SCB, weight.has_fp16_weights = codes, scales, self._fp16
        return weight
