"""Compare other public memory calculators with memplan on the published runs.

python benchmarks/other_tools.py                          # the table, from the recorded answers
OTHER_TOOLS=/path/to/venvs python benchmarks/other_tools.py   # runs every tool with a venv there, and records

Each tool runs in its own virtual environment, $OTHER_TOOLS/<tool>/bin/python, created with

    python -m venv $OTHER_TOOLS/ftuneai && $OTHER_TOOLS/ftuneai/bin/pip install ftuneai==0.4.1

(for torch-mem-tracker: torch and transformers==4.48.1); the versions are in other_tools.jsonl, next to this file. A
calculator that is a web page or a single script is reimplemented here from its public formula, with its address.

Every tool gets all the inputs it accepts: the model's sizes and exact number of parameters, method, rank, targets,
quantisation, dtype, optimizer, batch, sequence, attention and checkpointing. If a run's memory depends on something
that a tool has no setting for, the run is skipped and the reason recorded. Two figures are recorded for each answer:
`allocated`, the tool's sum without what it calls context, fragmentation or overhead (the best match for
`torch.cuda.max_memory_allocated`), and `process`, the total it shows, meant to be compared with nvidia-smi.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "tests" / "golden" / "published.jsonl"
RECORD = HERE / "other_tools.jsonl"
GIB = 2**30
LEAST = 4 * GIB  # smaller runs, dominated by fixed costs, are left out of the table
METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Run:
    """The inputs of the tools for a published run: sizes in elements, `config` as on the Hub."""

    id: str
    config: dict[str, Any]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    gated: bool
    parameters: int
    trainable: int
    method: str
    rank: int
    targets: tuple[str, ...]
    quantization: str
    double_quant: bool
    weights: str
    autocast: bool
    optimizer: str
    micro: int
    sequence: int
    attention: str
    checkpointing: str
    plain_loss: bool
    own_stack: bool
    gpu: str

    @property
    def flash(self) -> bool:
        """Whether the full attention scores are never stored."""
        return self.attention not in ("eager", "sdpa_math")

    @property
    def checkpointed(self) -> bool:
        return self.checkpointing == "full"


class Answer(NamedTuple):
    """A tool's peak in bytes: the sum of its tensors, and its total if that is meant for the process."""

    allocated: float
    shown: float | None


class UnsupportedError(Exception):
    """Raised if the tool has no setting for something in the run, named in the message."""


def only(met: bool, otherwise: str) -> None:
    if not met:
        raise UnsupportedError(otherwise)


def imported(module: str) -> Any:
    """Return a tool's module as Any: the tools are not installed where this file is type-checked."""
    return import_module(module)


# --- inputs of the tools -------------------------------------------------------------------------------------------

EIGHT_BIT = ("adamw_8bit", "adamw_torch_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
ADAM = ("adamw_torch", "adamw_torch_fused", "adamw", "paged_adamw", "paged_adamw_32bit")


def left_out(run: Mapping[str, Any]) -> str | None:
    """Return why no tool can express the run, if so."""
    kernels, optimizer = run.get("kernels", {}), run.get("optimizer", "adamw_torch")
    method = run.get("method", "full")
    kind = method if isinstance(method, str) else method["kind"]
    if kind not in METHODS:
        return f"method {kind}"
    if not isinstance(method, str) and method.get("modules_to_save"):
        return "modules trained in full next to LoRA"
    if run.get("parallelism", {}).get("world", 1) > 1:
        return "several GPUs"
    if kernels.get("checkpointing", "full") not in ("none", "full"):
        return "checkpoints offloaded or selective"
    if kernels.get("compile"):
        return "compiled"
    if not isinstance(optimizer, str) and optimizer.get("in_backward"):
        return "optimizer steps in backward"
    return None


def told(row: Mapping[str, Any]) -> Run:
    """Return the inputs for a row of published.jsonl, with memplan's parameter count (equal to the Hub's)."""
    from memplan import RunSpec, estimate, find_model

    run = row["run"]
    method = run.get("method", "full")
    method = {"kind": method} if isinstance(method, str) else method
    adapter = {k: method[k] for k in ("rank", "targets") if k in method}
    kind = "full" if method["kind"] == "full" else "lora"
    counted = estimate(RunSpec(model=run["model"], method={"kind": kind, **adapter})).parameters
    spec = RunSpec(**{k: v for k, v in run.items() if k not in ("profile", "kernels")})
    model = find_model(spec.model)
    quantization = spec.method.quantization
    kernels = run.get("kernels", {})
    return Run(
        id=row["id"],
        config=json.loads(json.dumps(model.config)) | {"model_type": model.model_type},
        layers=model.num_hidden_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        ffn=model.intermediate_size,
        vocab=model.vocab_size,
        tied=model.tie_word_embeddings,
        gated=model.hidden_act in ("silu", "swiglu") or model.model_type.startswith("gemma"),
        parameters=counted.total,
        trainable=counted.trainable,
        method=method["kind"],
        rank=spec.method.rank,
        targets=spec.method.targets if isinstance(spec.method.targets, tuple) else (spec.method.targets,),
        quantization=quantization.format if quantization else "none",
        double_quant=bool(quantization and quantization.double_quant),
        weights=spec.precision.weights,
        autocast=spec.precision.autocast,
        optimizer="adamw8bit" if spec.optimizer.name in EIGHT_BIT else str(spec.optimizer.name),
        micro=spec.batch.micro,
        sequence=spec.batch.sequence,
        attention=kernels.get("attention", "sdpa"),
        checkpointing=kernels.get("checkpointing", "full"),
        plain_loss=kernels.get("loss", "hf") == "hf" and "cross_entropy" not in kernels.get("fused", ()),
        own_stack=not str(run.get("profile", "transformers")).startswith("transformers") or bool(kernels.get("fused")),
        gpu=run.get("gpu", "a100-80gb"),
    )


def plain_loss(run: Run) -> None:
    only(run.plain_loss, "no setting for a chunked or fused loss")


def adam(run: Run, *others: str) -> str:
    """Return `adamw`, or the run's optimizer if it is one of `others`."""
    if run.optimizer in ADAM:
        return "adamw"
    only(run.optimizer in others, f"optimizer {run.optimizer}")
    return run.optimizer


# --- the tools -----------------------------------------------------------------------------------------------------


def fitcheck_llm(run: Run) -> Answer:
    """`allocated` excludes overhead_mib, which is context and fragmentation.

    Its constants were measured on a T4, in the runs of the family `fitcheck` here, which it therefore fits.
    """
    plain_loss(run)
    parser, estimator, gpus = (imported(f"fitcheck.{name}") for name in ("config_parser", "estimator", "gpu_db"))
    names = {"a100-80gb": "a100-80", "a100-40gb": "a100-40", "a10g": "a10", "a6000": "a6000"}
    try:  # as in its fetch_model_config, given the config and the Hub's count
        parser._reject_unsupported(run.config, run.id)
        fields = parser._parse_fields(run.config)
        total = parser._reconcile_param_count(run.id, run.parameters, parser._count_params(fields))
        report = estimator.estimate(
            parser.ModelConfig(name=run.id, num_params=total, **asdict(fields)),
            estimator.TrainingConfig(
                precision=run.weights,
                quantization=run.quantization,
                double_quant=run.double_quant,
                optimizer={"adamw8bit": "adam8bit"}.get(adam(run, "adamw8bit", "sgd"), adam(run, "adamw8bit", "sgd")),
                optimizer_dtype="bf16" if run.method == "full" and run.weights != "fp32" else "fp32",
                batch_size=run.micro,
                seq_len=run.sequence,
                lora_rank=None if run.method == "full" else run.rank,
                lora_targets=list(run.targets),
                grad_checkpoint=run.checkpointed,
                flash_attn=run.flash,
            ),
            gpus.get_gpu(names.get(run.gpu, run.gpu)),
        )
    except ValueError as error:
        raise UnsupportedError(str(error).split(". ", maxsplit=1)[0][:80]) from error
    return Answer((report.total_mib - report.overhead_mib) * 2**20, report.total_mib * 2**20)


def ftuneai(run: Run) -> Answer:
    """`allocated` excludes its 20 % for context, fragmentation and workspaces."""
    memory, models = imported("ftuneai.core.memory"), imported("ftuneai.core.models")
    target = {
        "q_proj v_proj": "attention",
        "k_proj o_proj q_proj v_proj": "attention_all",
        "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj": "all_linear",
        "all-linear": "all_linear",
    }.get(" ".join(sorted(run.targets)))
    only(run.method == "full" or target is not None, f"LoRA on {' '.join(run.targets)}")
    found = memory.MemoryEstimator(
        models.ModelSpec(
            name=run.id,
            parameters=run.parameters,
            hidden_size=run.hidden,
            num_layers=run.layers,
            num_attention_heads=run.heads,
            num_kv_heads=run.kv_heads,
            intermediate_size=run.ffn,
            vocab_size=run.vocab,
            max_seq_length=run.sequence,
            default_dtype=run.weights,
        ),
        models.TrainingConfig(
            method=models.FineTuneMethod(run.method),
            quantization=models.Quantization({"none": "none", "int8": "8bit"}.get(run.quantization, "4bit")),
            batch_size=run.micro,
            seq_length=run.sequence,
            gradient_checkpointing=run.checkpointed,
            optimizer=models.OptimizerType(adam(run, "adamw8bit").replace("adamw8bit", "adam_8bit")),
            lora_rank=run.rank,
            lora_target=models.LoRATarget(target or "attention"),
            flash_attention=run.flash,
        ),
    ).estimate()
    return Answer((found.total_gb - found.overhead_gb) * GIB, found.total_gb * GIB)


def vramcalc(run: Run) -> Answer:
    """Its total is torch's peak plus 0.75 GB of overhead."""
    plain_loss(run)
    only(run.quantization == "none", "no quantised weights")
    only(
        run.method == "full" or sorted(run.targets) == ["k_proj", "o_proj", "q_proj", "v_proj"],
        "LoRA on q, k, v, o only",
    )
    only(run.autocast is False or run.weights == "fp32", "autocast over 16-bit weights")
    names = {"eager": "eager", "sdpa_math": "eager", "flash_attention_2": "flash"}
    try:
        found = imported("vramcalc.estimate").estimate(
            run.config,
            mode="train",
            dtype="bf16" if run.autocast else run.weights,
            batch=run.micro,
            seq_len=run.sequence,
            lora_rank=None if run.method == "full" else run.rank,
            grad_checkpoint=run.checkpointed,
            optimizer=adam(run, "sgd"),
            precision="amp" if run.autocast else "pure",
            attn_impl=names.get(run.attention, "sdpa"),
        )
    except ValueError as error:
        raise UnsupportedError(str(error).split(";", maxsplit=1)[0][:80]) from error
    return Answer(found.total, found.total + found.overhead)


def llmcalculator(run: Run) -> Answer:
    """Takes no rank: it assumes that 0.5 % of the parameters train. `allocated` excludes its fixed overhead."""
    plain_loss(run)
    only(run.flash, "no setting for eager attention")
    adam(run)
    estimate, spec, workloads, base = (
        imported(f"llmcalculator.{name}") for name in ("estimate", "models.spec", "workloads", "hardware.base")
    )
    card = base.Accelerator(name="GPU", vendor="nvidia", memory_bytes=80 * GIB)
    found = estimate.estimate(
        spec.ModelSpec(
            name=run.id,
            params=run.parameters,
            n_layers=run.layers,
            hidden_size=run.hidden,
            n_heads=run.heads,
            n_kv_heads=run.kv_heads,
            max_context=run.sequence,
            vocab_size=run.vocab,
            head_dim=run.head_dim,
        ),
        base.HardwareProfile(cpu=base.CPU(name="", cores=1, threads=1), ram_bytes=64 * GIB, accelerators=[card]),
        workloads.get(run.method),
        quant_name="int8" if run.quantization == "int8" else "nf4" if run.quantization != "none" else run.weights,
        context=run.sequence,
        batch=run.micro,
        gradient_checkpointing=run.checkpointed,
    ).breakdown
    return Answer(found.total - found.overhead, found.total)


def ml_memguard(run: Run) -> Answer:
    """`allocated` excludes its 25 % and 400 MB of overhead."""
    module = imported("memory_guard.estimator")
    found = module.estimate_training_memory(
        module.ModelSpec(
            params=run.parameters,
            hidden_dim=run.hidden,
            num_heads=run.heads,
            num_kv_heads=run.kv_heads,
            num_layers=run.layers,
            intermediate_dim=run.ffn,
            bits={"none": 32 if run.weights == "fp32" else 16, "int8": 8}.get(run.quantization, 4),
        ),
        module.TrainSpec(
            method=module.FinetuneMethod(run.method),
            batch_size=run.micro,
            seq_length=run.sequence,
            lora_rank=run.rank,
            lora_layers=run.layers,
            lora_targets=7 if run.targets == ("all-linear",) else len(run.targets),
            optimizer=adam(run, "sgd", "adafactor", "lion"),
            grad_checkpoint=run.checkpointed,
            mixed_precision=run.weights != "fp32" or run.autocast,
            qlora_double_quant=run.double_quant,
            flash_attention=run.flash,
        ),
    )
    return Answer((found.total_mb - found.overhead_mb) * 2**20, found.total_mb * 2**20)


def torch_preflight(run: Run) -> Answer:
    """LoRA is a fraction of frozen parameters. `allocated` excludes context and fragmentation."""
    plain_loss(run)
    only(run.quantization == "none", "no quantised weights")
    types, costs = imported("torch_preflight.vram.types"), imported("torch_preflight.vram.costmodel")
    modes = types.PrecisionMode
    pure = {"fp32": modes.FP32, "fp16": modes.PURE_FP16, "bf16": modes.PURE_BF16}[run.weights]
    found = costs.estimate(
        types.ModelProfile(
            name=run.id,
            param_count=run.parameters,
            trainable_params=run.parameters,
            source="formula",
            confidence=types.Confidence.HIGH,
            kind=types.ModelKind.TRANSFORMER,
            shape=types.TransformerShape(
                layers=run.layers,
                hidden=run.hidden,
                heads=run.heads,
                vocab=run.vocab,
                intermediate=run.ffn,
                kv_heads=run.kv_heads,
                tied_embeddings=run.tied,
                gated_mlp=run.gated,
                has_lm_head=True,
            ),
        ),
        types.RunConfig(
            batch_size=run.micro,
            seq_len=run.sequence,
            precision=modes.AMP if run.autocast and run.weights == "fp32" else pure,
            optimizer=types.OptimizerKind(adam(run, "adamw8bit").replace("w8bit", "w-8bit")),
            gradient_checkpointing=run.checkpointed,
            flash_attention=run.flash,
            frozen_fraction=0.0 if run.method == "full" else 1 - run.trainable / run.parameters,
        ),
    ).breakdown
    return Answer(found.total - found.cuda_context - found.fragmentation, found.total)


def tinyforge(run: Run) -> Answer:
    """Adapters only; it counts their sizes in the given layers. Its constant 0.6 GiB is part of its peak."""
    only(run.method != "full", "adapters only")
    only(run.quantization in ("none", "nf4", "fp4"), f"quantization {run.quantization}")
    only(run.quantization != "none" or run.weights != "fp32", "weights in fp32")
    only(run.flash, "no setting for eager attention")
    plain_loss(run)
    adam(run)
    module = imported("tinyforge.finetune")
    shape = {
        "params": run.parameters,
        "hidden": run.hidden,
        "layers": run.layers,
        "vocab": run.vocab,
        "linear_dims": [run.trainable // run.rank],
    }
    config = module.FTConfig(max_len=run.sequence, lora_r=run.rank, chunked_ce=False)
    quant = "none" if run.quantization == "none" else "4bit"
    found = module.estimate_vram_gb(shape, config, quant, run.checkpointed, run.micro) * GIB
    return Answer(found, found)


def llm_analysis(run: Run) -> Answer:
    """Full training only. Feed-forward layers have two matrices, so gated ones get 3/2 the width; ties embeddings."""
    only(run.method == "full", "full training only")
    plain_loss(run)
    adam(run)
    module, configs = imported("llm_analysis.analysis"), imported("llm_analysis.config")
    width = run.ffn * 3 // 2 if run.gated else run.ffn
    state = 4 if run.weights == "fp32" else 2
    recompute = module.ActivationRecomputation
    summary = module.LLMAnalysis(
        configs.ModelConfig(
            name=run.id,
            num_layers=run.layers,
            n_head=run.heads,
            hidden_dim=run.hidden,
            vocab_size=run.vocab if run.tied else 2 * run.vocab,
            max_seq_len=run.sequence,
            num_key_value_heads=run.kv_heads,
            ffn_embed_dim=width,
            expansion_ratio=width / run.hidden,
        ),
        configs.get_gpu_config_by_name("a100-sxm-80gb"),
        configs.DtypeConfig(name="run", weight_bits=8 * state, activation_bits=32 if state == 4 else 16),
    ).training(
        batch_size_per_gpu=run.micro,
        gradient_accumulation_steps=1,
        seq_len=run.sequence,
        activation_recomputation=recompute.FULL if run.checkpointed else recompute.NONE,
        layernorm_dtype_bytes=4,
        master_weights_dtype_bytes=2 if state == 2 else 4,  # also of the gradients
        other_op_bytes=2 if state == 2 else 4,
        flash_attn=run.flash,
        mlp_gated_linear_units=run.gated,
    )
    found = summary["(weight+op_state+grad+act)_memory_per_gpu"]
    if not run.tied:  # the wider vocabulary above models the head's own weights, not twice the logits
        found -= run.vocab * run.micro * run.sequence * (4 if state == 4 else 2)
    return Answer(found, found)


def hf_vram_calc(run: Run) -> Answer:
    """Uses only the number of parameters: no batch, no sequence. `allocated` excludes its overhead factors."""
    adam(run)
    calculator, configs = imported("hf_vram_calc.calculator"), imported("hf_vram_calc.config")
    tool = calculator.VRAMCalculator(configs.ConfigManager())
    dtype = {"none": run.weights, "int8": "int8"}.get(run.quantization, "int4")
    base = tool.calculate_model_memory(run.parameters, dtype)
    if run.method == "full":
        shown = tool.calculate_training_memory(base) * GIB
        return Answer(shown / tool.training_overhead_factor, shown)
    shown = tool.calculate_lora_memory(base, run.parameters, run.rank, original_dim=run.hidden) * GIB
    return Answer(shown / tool.lora_overhead_factor, shown)


def gpu_estimator(run: Run) -> Answer:
    """Full training only; activations are guessed from the number of parameters. `allocated` excludes its 20 %."""
    only(run.method == "full", "full training only")
    tool = imported("gpu_estimator.estimator").GPUEstimator()
    shown = tool.estimate(
        model_params=run.parameters,
        batch_size=run.micro,
        sequence_length=run.sequence,
        precision=run.weights,
        optimizer=adam(run, "sgd"),
        gpu_memory_gb=1e6,
        gradient_checkpointing=run.checkpointed,
    ).total_memory_gb
    return Answer(shown / 1.2 * GIB, shown * GIB)


def qmemcalc(run: Run) -> Answer:
    """Guesses the parameters from width and depth. `allocated` excludes its buffers (10 %)."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(run.config), "utf-8")
        found = imported("qmemcalc.memory").estimate_memory(
            folder,
            run.micro,
            run.sequence,
            precision=run.weights,
            quantization={"none": "none", "int8": "8bit"}.get(run.quantization, "4bit"),
            optimizer=adam(run, "sgd"),
            num_trainable_params=run.trainable,
            hidden_size=run.hidden,
            num_layers=run.layers,
            gradient_checkpointing=run.checkpointed,
        )
    return Answer((found["total_MB"] - found["buffers_MB"]) * 1e6, found["total_MB"] * 1e6)


def alloc(run: Run) -> Answer:
    """Full training only, always as if checkpointed. `allocated` excludes its 10 % for buffers and fragmentation."""
    only(run.method == "full", "full training only")
    adam(run)
    found = imported("alloc.ghost").ghost(
        param_count=run.parameters,
        dtype={"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[run.weights],
        batch_size=run.micro,
        seq_length=run.sequence,
        hidden_dim=run.hidden,
        optimizer_type="AdamW",
    )
    return Answer((found.total_gb - found.buffer_gb) * GIB, found.total_gb * GIB)


def vram_check(run: Run) -> Answer:
    """Full training only; activations are twice the weights per sequence of any length."""
    only(run.method == "full", "full training only")
    found = imported("vram_check.estimator").estimate(
        run.parameters, run.micro, run.weights, adam(run, "sgd"), True, run.sequence
    )
    return Answer(found.total_bytes, found.total_bytes)


def accelerate(run: Run) -> Answer:
    """`accelerate estimate-memory`: full training with Adam at batch 1, from the model's size only."""
    only(run.method == "full", "full training only")
    adam(run)
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[run.weights]
    found = max(imported("accelerate.commands.estimate").estimate_training_usage(4 * run.parameters, dtype).values())
    return Answer(found, found)


def gpu_poor(run: Run) -> Answer:
    """https://github.com/RahulSChand/gpu_poor, src/App.js: getAllComputedData for training, reimplemented.

    Its rank is fixed at 8. `allocated` excludes its 650 MiB of context and other overhead.
    """
    only(run.method != "full" or run.quantization == "none", "full training of quantised weights")
    only(run.weights != "fp32", "weights in fp32")
    only(not run.flash, "no setting for fused attention")
    adam(run)
    h, i, n, s = run.hidden, run.ffn, run.layers, run.sequence
    size = 2 * run.vocab * h + n * (4 * h * h + 3 * i * h)
    attention = 16 * s * h + 8 * s * s * run.heads
    activations = n * run.micro * (attention + 4 * h * s + 12 * s * i + 8 * s + 12 * s * h)
    if run.checkpointed:
        activations *= 0.15
    extra = n * (15 * h + 6 * i) * 50 * max(1.0, math.sqrt(s / 50)) * run.micro
    weights, states = 2 * size, 6 * size
    if run.quantization == "int8":
        weights, states = size * (1 + 0.12), 192 * n * h + 0.75 * 1.25 * extra
    elif run.method == "qlora":
        weights, states = size * (0.5 - 1 / 32 + 0.12), 48 * n * h + 0.75 * extra
    elif run.method == "lora":
        states = 384 * n * h
    found = weights + states + activations
    return Answer(found, found + 650 * 2**20)


def eleuther_cookbook(run: Run) -> Answer:
    """https://github.com/EleutherAI/cookbook, calc/calc_transformer_mem.py, reimplemented for one GPU.

    Full training only, with a fixed 12 bytes of optimizer state per parameter. Gradients have the weights' dtype.
    """
    only(run.method == "full", "full training only")
    only(run.weights != "fp32", "weights in fp32")
    adam(run)
    h, n, s = run.hidden, run.layers, run.sequence
    linears = 3 if run.gated else 2
    size = 2 * run.vocab * h + h * s + 8 * h * n + 2 * h + linears * n * h * run.ffn
    size += 2 * (1 + run.kv_heads / run.heads) * n * h * h
    scores = 0 if run.checkpointed else 5 * run.heads * s / h
    found = size * (2 + 2 + 12) + s * run.micro * h * n * (34 + scores)
    return Answer(found, found)


def llama_factory(run: Run) -> Answer:
    """https://github.com/hiyouga/LLaMA-Factory, README, "Hardware Requirement": GB by method and size.

    Uses only the number of parameters. The nearest column is scaled to the run's size, which is closer than its rule.
    """
    adam(run)
    gigabytes = {
        "amp": (120, 240, 600, 1200),
        "pure": (60, 120, 300, 600),
        "lora": (16, 32, 64, 160),
        "int8": (10, 20, 40, 80),
        "4-bit": (6, 12, 24, 48),
    }
    only(run.method == "full" or run.quantization != "none" or run.weights != "fp32", "weights in fp32")
    if run.method == "full":
        row = "amp" if run.weights == "fp32" else "pure"
    elif run.quantization == "none":
        row = "lora"
    else:
        row = "int8" if run.quantization == "int8" else "4-bit"
    billions = run.parameters / 1e9
    size, found = min(zip((7, 14, 30, 70), gigabytes[row], strict=True), key=lambda column: abs(column[0] - billions))
    found *= 1e9 * billions / size
    return Answer(found, found)


def torch_mem_tracker(run: Run) -> Answer:
    """torch.distributed._tools.mem_tracker, used by torchtitan: two steps of the real model on fake tensors.

    A trace rather than a formula: it needs torch and transformers (4.48.1, as in these runs). It uses fake CPU tensors,
    whose fused attention saves what a GPU's does. It hooks every parameter's gradient, and refuses a parameter without.
    """
    only(run.method == "full", "hooks every parameter, so that none may be frozen")
    plain_loss(run)
    only(not run.own_stack, "needs transformers' own model and loss")
    adam(run)
    torch, transformers = imported("torch"), imported("transformers")
    fake, tracker = imported("torch._subclasses.fake_tensor"), imported("torch.distributed._tools.mem_tracker")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    kind = run.config["model_type"]
    config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in run.config.items() if k != "model_type"})
    if run.flash:  # a fused kernel saves no dropout mask, and the CPU's has no dropout
        config.attn_pdrop = config.attention_dropout = 0.0
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, torch_dtype=dtypes[run.weights], attn_implementation="sdpa" if run.flash else "eager"
        )
    model.train()
    if run.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with fake.FakeTensorMode():
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        model.tie_weights()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        ids = torch.zeros(run.micro, run.sequence, dtype=torch.int64)
        tracked = tracker.MemTracker()
        tracked.track_external(model, optimizer, ids)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.autocast)
        with tracked:
            for _ in range(2):
                with autocast:
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracked.reset_mod_stats()
        (peak,) = tracked.get_tracker_snapshot("peak").values()
    return Answer(peak["Total"], None)


TOOLS: dict[str, Callable[[Run], Answer]] = {
    "fitcheck-llm": fitcheck_llm,
    "ftuneai": ftuneai,
    "vramcalc": vramcalc,
    "llmcalculator": llmcalculator,
    "ml-memguard": ml_memguard,
    "torch-preflight": torch_preflight,
    "tinyforge": tinyforge,
    "llm-analysis": llm_analysis,
    "hf-vram-calc": hf_vram_calc,
    "gpu-estimator": gpu_estimator,
    "qmemcalc": qmemcalc,
    "alloc": alloc,
    "vram-check": vram_check,
    "accelerate": accelerate,
    "gpu_poor": gpu_poor,
    "eleuther-cookbook": eleuther_cookbook,
    "llama-factory": llama_factory,
    "torch-mem-tracker": torch_mem_tracker,
}
# Commits of the reimplemented formulas.
WRITTEN_OUT = {"gpu_poor": "05d18ab", "eleuther-cookbook": "069ae2e", "llama-factory": "README"}
DISTRIBUTION = {"torch-mem-tracker": "torch"}
# Estimators that answer none of these runs, and why.
NOT_ASKED = {
    "DeepSpeed's estimate_zero*_model_states_mem_needs": "model states under ZeRO, no activations",
    "Megatron's report_theoretical_memory": "activations under selective recomputation only, 18 bytes of states",
    "SimuMax, Calculon": "Megatron's layers and states, and performance models of clusters",
    "LLMem": "runs inside Colossal-AI, on CUDA; the package of that name is another project",
    "vram-calculator (furiousteabag)": "full training over fp32 weights only",
    "trainstream": "plans from a step measured on the GPU",
    "hf-mem, vramscout, llmfit, llm-mem-planner, llm-resource-planner, llm-sizer, do-i-have-the-vram": "inference only",
}


# --- running the tools ---------------------------------------------------------------------------------------------


def answered(tool: str, run: Run) -> list[dict[str, Any]]:
    """Return the lines to record for one run: two figures, or the reason why there are none."""
    head = {"tool": tool, "version": WRITTEN_OUT.get(tool) or version(DISTRIBUTION.get(tool, tool)), "id": run.id}
    try:
        with redirect_stdout(sys.stderr):  # some tools print
            answer = TOOLS[tool](run)
    except UnsupportedError as error:
        return [{**head, "unsupported": str(error)}]
    named = (("allocated", answer.allocated), ("process", answer.shown))
    return [{**head, "metric": metric, "bytes": round(bytes_)} for metric, bytes_ in named if bytes_ is not None]


def answer_here(tool: str) -> None:
    """Inside a tool's environment: read a run per line, and print the lines to record."""
    for line in sys.stdin:
        given = json.loads(line)
        for found in answered(tool, Run(**{**given, "targets": tuple(given["targets"])})):
            print(json.dumps(found), flush=True)


def ask(tool: str, runs: list[Run], venvs: Path) -> list[dict[str, Any]] | None:
    """Return the tool's lines for every run; None if it has no environment."""
    if tool in WRITTEN_OUT:
        return [line for run in runs for line in answered(tool, run)]
    python = venvs / tool / "bin" / "python"
    if not python.exists():
        return None
    given = "".join(json.dumps(asdict(run)) + "\n" for run in runs)
    done = subprocess.run(
        [python, __file__, "--answer", tool], input=given, check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{tool}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


@cache
def published() -> list[dict[str, Any]]:
    return [row for row in map(json.loads, GOLDEN.read_text("utf-8").splitlines()) if "run" in row]


def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORD.read_text("utf-8").splitlines()] if RECORD.exists() else []


def record(venvs: Path, names: Iterable[str]) -> None:
    """Run the tools again and record their answers; answers of tools without an environment are kept."""
    rows = published()
    runs = [told(row) for row in rows if left_out(row["run"]) is None]
    lines = recorded()
    for tool in names:
        found = ask(tool, runs, venvs)
        if found is None:
            print(f"{tool}: no environment in {venvs}", file=sys.stderr)
            continue
        head = {"tool": tool, "version": found[0]["version"]}
        found += [
            {**head, "id": row["id"], "unsupported": why} for row in rows if (why := left_out(row["run"])) is not None
        ]
        lines = [line for line in lines if line["tool"] != tool] + found
    order = {row["id"]: place for place, row in enumerate(rows)}
    lines = [line for line in lines if line["id"] in order]
    lines.sort(key=lambda line: (list(TOOLS).index(line["tool"]), order[line["id"]], line.get("metric", "")))
    RECORD.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


# --- the table -----------------------------------------------------------------------------------------------------


@cache
def by_memplan() -> dict[str, tuple[int, int]]:
    """Return memplan's allocated and used bytes for every published run that it answers."""
    from memplan import MemplanError, RunSpec, estimate

    found: dict[str, tuple[int, int]] = {}
    for row in published():
        try:
            answer = estimate(RunSpec(**row["run"])).bytes
        except MemplanError:
            continue
        found[row["id"]] = answer.allocated, answer.used
    return found


def errors(pairs: Iterable[tuple[float, float]]) -> str:
    """Return mean and maximum of the absolute relative errors of (answer, measured) pairs."""
    off = [answer / measured - 1 for answer, measured in pairs]
    if not off:
        return "- | -"
    return f"{100 * mean(map(abs, off)):.2f} % | {100 * max(off, key=abs):+.1f} %"


def kind_of(row: Mapping[str, Any]) -> str:
    method = row["run"].get("method", "full")
    return method if isinstance(method, str) else method["kind"]


def table(metric: str) -> Iterable[str]:
    """Yield a line per tool and method: errors on the runs above LEAST that both answer, of those the tool answers."""
    lines = recorded()
    rows = {row["id"]: row for row in published()}
    mine, place = by_memplan(), ("allocated", "process").index(metric)
    yield "| tool | version | method | runs | mean | worst | memplan's mean | memplan's worst |"
    yield "|---|---|---|---|---|---|---|---|"
    for tool in dict.fromkeys(line["tool"] for line in lines):
        said = {
            line["id"]: line
            for line in lines
            if line["tool"] == tool
            and line.get("metric") == metric
            and rows.get(line["id"], {}).get(metric)
            and rows[line["id"]]["allocated"] > LEAST
        }
        for method in (*METHODS, "all"):
            asked = [i for i in said if method in (kind_of(rows[i]), "all")]
            those = [i for i in asked if i in mine]
            if asked:
                yield (
                    f"| {tool} | {said[asked[0]]['version']} | {method} | {len(those)} of {len(asked)} "
                    f"| {errors((said[i]['bytes'], rows[i][metric]) for i in those)} "
                    f"| {errors((mine[i][place], rows[i][metric]) for i in those)} |"
                )


def main() -> None:
    if sys.argv[1:2] == ["--answer"]:
        answer_here(sys.argv[2])
        return
    if "OTHER_TOOLS" in os.environ:
        record(Path(os.environ["OTHER_TOOLS"]), sys.argv[1:] or TOOLS)
    for metric, against in (("allocated", "torch.cuda.max_memory_allocated"), ("process", "nvidia-smi")):
        print(f"\n`{metric}`, against {against}, runs above {LEAST // GIB} GiB:\n")
        print("\n".join(table(metric)))
    refused = len(published()) - len(by_memplan())
    print(f"\n{len(published())} published runs, of which memplan refuses {refused}. Not asked:\n")
    for tool, why in NOT_ASKED.items():
        print(f"- {tool}: {why}.")


if __name__ == "__main__":
    main()
