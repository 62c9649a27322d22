"""Trace generation with inference-only weight formats, as transformers loads and runs them, and print rows for
tests/golden/traced_inference.jsonl.

python tests/golden/trace_packed.py >> tests/golden/traced_inference.jsonl

Needs compressed-tensors 0.20, torchao 0.18 and optimum-quanto 0.2.7 in addition to transformers. A small Llama is saved
to a folder by each library, loaded by transformers' `from_pretrained` and run on the CPU with every allocation
recorded. Weights that compressed-tensors unpacks on the model's first call are unpacked at the end of loading. Of
quanto's own operations the CUDA versions are run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # weight by weight: how far threads run ahead depends on the disk

import torch
import transformers.core_model_loading as loading
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, QuantoConfig, TorchAoConfig

from memplan.catalogue.quantization.fused_4bit import card_of
from memplan.probe.fake import tracker
from memplan.probe.script import script
from memplan.spec.run import RunSpec

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 600,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
BIASED = {**CONFIG, "attention_bias": True, "mlp_bias": True}


def _compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    if inputs:
        group["input_activations"] = {"symmetric": True, **inputs}
    said = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": {"g": group}}
    return {**said, "quantization_status": "compressed"}


FP8, INT8, FP4 = ({"num_bits": bits, "type": kind} for bits, kind in ((8, "float"), (8, "int"), (4, "float")))
INT4 = {"num_bits": 4, "type": "int"}
ROWS = {"strategy": "token", "dynamic": True}
EXPONENTS = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
STORED: dict[str, Any] = {
    "fp8-channel": _compressed({**FP8, "strategy": "channel"}, {**FP8, **ROWS}, "float-quantized"),
    "fp8-tensor": _compressed(
        {**FP8, "strategy": "tensor"}, {**FP8, "strategy": "tensor", "dynamic": False}, "float-quantized"
    ),
    "fp8-block": _compressed(
        {**FP8, "strategy": "block", "block_structure": [128, 128]},
        {**FP8, "strategy": "group", "group_size": 128, "dynamic": True},
        "float-quantized",
    ),
    "w8a8": _compressed({**INT8, "strategy": "channel"}, {**INT8, **ROWS}, "int-quantized"),
    "w4a16": _compressed(
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, None, "pack-quantized"
    ),
    "w8a16": _compressed({**INT8, "strategy": "group", "group_size": 128}, None, "pack-quantized"),
    "nvfp4": _compressed(
        {**FP4, "strategy": "tensor_group", "group_size": 16},
        {**FP4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
        "nvfp4-pack-quantized",
    ),
    "nvfp4a16": _compressed({**FP4, "strategy": "tensor_group", "group_size": 16}, None, "nvfp4-pack-quantized"),
    "mxfp4": _compressed({**FP4, **EXPONENTS}, None, "mxfp4-pack-quantized"),
    "mxfp8": _compressed({**FP8, **EXPONENTS}, {**FP8, **EXPONENTS, "dynamic": True}, "mxfp8-quantized"),
}


def _made() -> dict[str, tuple[dict[str, Any], Any]]:
    """Return the formats that are quantised on loading: the run's fields and the library's config."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return {
        "torchao-int8": ({"format": "torchao-int8"}, TorchAoConfig(Int8WeightOnlyConfig())),
        "torchao-fp8": (
            {"format": "fp8-channel", "backend": "torchao"},
            TorchAoConfig(Float8WeightOnlyConfig()),
        ),
        "quanto-int8": ({"format": "quanto-int8"}, QuantoConfig(weights="int8")),
        "quanto-fp8": ({"format": "fp8-channel", "backend": "quanto"}, QuantoConfig(weights="float8")),
    }


GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 600,
    "max_position_embeddings": 512,
    "layer_types": ["full_attention", "full_attention"],
}


MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 600,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


SQUARES = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def runs() -> Iterator[tuple[str, dict[str, Any], dict[str, Any], Any]]:
    """Yield a name, the run, the checkpoint's config, and the library's config if it is not in there."""
    for name, stored in STORED.items():
        for config in (CONFIG, BIASED) if name in ("fp8-channel", "w4a16") else (CONFIG,):
            said = {**config, "quantization_config": stored}
            yield name, {"model": {"config": said}}, said, None
    said = {**CONFIG, "quantization_config": {**STORED["w4a16"], "dequantize": True}}
    yield "w4a16, dequantised", {"model": {"config": said}}, said, None
    for config in (CONFIG, MIXTURE):
        said = {**config, "quantization_config": SQUARES}
        yield "fp8, dequantised", {"model": {"config": said}, "gpu": "a100-80gb"}, said, None  # as without a GPU
    for name in ("fp8-channel", "w4a16"):
        said = {**MIXTURE, "quantization_config": STORED[name]}
        yield name, {"model": {"config": said}}, said, None
    said = {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}
    yield "mxfp4, dequantised", {"model": {"config": said}, "gpu": "v100-32gb"}, said, None  # as without a GPU
    for name, (quantization, given) in _made().items():
        for config in (CONFIG, BIASED):
            yield name, {"model": {"config": config}, "method": {"quantization": quantization}}, config, given


def save(folder: Path, config: dict[str, Any]) -> int:
    """Save a checkpoint of random weights in its config's format; return the model's parameter count."""
    from transformers import AutoConfig

    plain = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **plain)).to(torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    if config["model_type"] == "gpt_oss":
        model.save_pretrained(folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
            experts, into, out = tensors.pop(key).shape
            tensors[f"{key}_blocks"] = torch.zeros(experts, out, into // 32, 16, dtype=torch.uint8)
            tensors[f"{key}_scales"] = torch.full((experts, out, into // 32), 127, dtype=torch.uint8)
        save_file(tensors, file, {"format": "pt"})
    elif config.get("quantization_config") == SQUARES:
        model.save_pretrained(folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for key in [key for key in tensors if key.endswith("_proj.weight")]:
            out, into = tensors[key].shape
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = torch.ones(-(-out // 128), -(-into // 128))
        save_file(tensors, file, {"format": "pt"})
    elif "quantization_config" in config:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

        plainly = {key: value for key, value in config["quantization_config"].items() if key != "dequantize"}
        said = QuantizationConfig.model_validate({**plainly, "quantization_status": "frozen"})
        apply_quantization_config(model, said, show_progress=False)
        for name, parameter in model.named_parameters():
            if name.endswith(("_scale", "_global_scale")):
                parameter.data.fill_(0.01)
        compressor = ModelCompressor(quantization_config=said)
        compressor.compress_model(model)
        compressor.remove_decompression_hook(model)
    if config["model_type"] != "gpt_oss" and config.get("quantization_config") != SQUARES:
        model.save_pretrained(folder)
    if config["model_type"] == MIXTURE["model_type"] and config["quantization_config"] != SQUARES:
        _compress_experts(folder / "model.safetensors", config["quantization_config"])
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return count


def _compress_experts(file: Path, stored: dict[str, Any]) -> None:
    """Save experts as separate linear layers, each compressed like the others."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantizationConfig.model_validate(stored).config_groups["g"]
    compressor = BaseCompressor.get_value_from_registry(stored["format"])
    tensors = load_file(file)
    for key in [key for key in tensors if ".experts." in key]:
        weight = tensors.pop(key)
        groups = weight.shape[1] // scheme.weights.group_size if scheme.weights.group_size else 1
        scales = torch.full((weight.shape[0], groups), 0.01, dtype=torch.bfloat16)
        made = compressor.compress({"weight": weight, "weight_scale": scales}, scheme)
        tensors |= {f"{key.removesuffix('weight')}{name}": tensor.contiguous() for name, tensor in made.items()}
    save_file(tensors, file, {"format": "pt"})


@contextmanager
def batched(model: Any) -> Iterator[None]:
    """Run experts as CUDA does when decoding, if the class has experts."""
    before = model.get_experts_implementation()
    if "grouped_mm" not in before.values():
        yield
        return
    model.set_experts_implementation("batched_mm")
    yield
    model.set_experts_implementation(before)


def as_on_cuda() -> None:
    """Run quanto's operations by their Python functions, so that allocations are recorded, and two as on CUDA."""
    from optimum.quanto.library import qbytes_mm

    def quantize_symmetric(base: Any, dtype: Any, axis: int, scale: Any) -> Any:
        whole = base / scale
        if not dtype.is_floating_point:
            whole = torch.round(whole)
        most = (torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype)
        return torch.clamp(whole, min=most.min, max=most.max).to(dtype)

    materialize = loading._materialize_copy
    loading._materialize_copy = lambda *args: materialize(*args).clone()  # copied as to a GPU, not mapped from the file
    torch.ops.quanto.qbytes_mm = qbytes_mm.qbytes_mm
    torch.ops.quanto.quantize_symmetric = quantize_symmetric
    tracker._WRAPPERS = tracker._WRAPPERS | {"Int8Tensor", "Float8Tensor", "WeightQBytesTensor"}


def trace(fields: dict[str, Any], config: dict[str, Any], given: Any) -> dict[str, Any]:
    run = RunSpec(**fields)
    script.checked_run = lambda run: run
    with tempfile.TemporaryDirectory() as folder:
        count = save(Path(folder), config)

        def load(*_: Any) -> Any:
            more = {"attn_implementation": "eager", **({"quantization_config": given} if given is not None else {})}
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map="cpu", **more
            ).eval()
            if hasattr(model, "ct_decompress_hook"):
                for hook in [*model._forward_pre_hooks.values()]:
                    hook(model, ())
            model.requires_grad_(False)
            model._optimize_model_for_decode = lambda: batched(model)
            return model

        script.build_model = load
        script.parameters = lambda model: (sum(p.numel() for p in model.parameters()), None)
        seen = tracker.Tracker("cpu", tracker.new_operation_cache(card_of((9, 0)), fake=False))
        seen.calibrate()
        with seen:
            script.build(run, "cpu", seen.phase).step()
    sizes = [-(-made.asked // 512) * 512 for made in seen.made]
    live = [*accumulate(sizes[e] if e >= 0 else -sizes[~e] for e in seen.events)]
    phases = {p.name: max(live[p.start : p.end]) for p in seen.intervals}
    return {"phases": phases, "parameters": count}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    as_on_cuda()
    asked = set(sys.argv[1:])  # by name, or by family
    for name, fields, config, given in runs():
        if asked and asked.isdisjoint((name, config["model_type"])):
            continue
        batch = {"micro": 3, "sequence": 75, "new_tokens": 3}
        whole = {"gpu": "h100", **fields, "task": "generate", "batch": batch}
        whole["kernels"] = {"attention": "eager"}
        trace(whole, config, given)  # what a library allocates once is not part of a run
        print(
            json.dumps({"name": f"{config['model_type']}, {name}", "run": whole, **trace(whole, config, given)}),
            flush=True,
        )


if __name__ == "__main__":
    main()
