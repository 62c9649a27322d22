"""Trace ms-swift's adapters over Megatron-core's layers, and print rows for tests/catalogue/test_megatron.py.

pip download --no-deps ms-swift==4.0.0 mcore-bridge==1.6.5 megatron-core==0.12.0    (for Python 3.11; all in one FOLDER)

Each process is a rank, on the CPU. The adapter's code is that of ms-swift 4.0, and of mcore_bridge, which has it for
ms-swift 4.6. Transformer Engine's layers do not run without
a GPU: Megatron-core's own products, which save the same for backward, stand in for them.

python tests/golden/trace_megatron_lora.py FOLDER > tests/golden/traced_megatron_lora.jsonl
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

TOKENS, BATCH, HIDDEN, WIDTH, RANK = 256, 2, 512, 2048, 6
# name of a layer -> whether it divides columns, its inputs and outputs
LAYERS = {
    "linear_qkv": (True, HIDDEN, 3 * HIDDEN),
    "linear_proj": (False, HIDDEN, HIDDEN),
    "linear_fc1": (True, HIDDEN, WIDTH),
    "linear_fc2": (False, WIDTH, HIDDEN),
}


PACKAGES = {"ms-swift 4.0.0": "swift.megatron", "mcore_bridge 1.6.5": "mcore_bridge"}


def stand_ins(config: Any, world: int) -> dict[str, type[nn.Module]]:
    """Return Transformer Engine's classes by name: a product of a rank's part, and its collectives."""
    layers, mappings = (import_module(f"megatron.core.tensor_parallel.{name}") for name in ("layers", "mappings"))

    class Linear(nn.Module):
        parallel_mode: str | None = None
        tp_group = None

        def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
            super().__init__()
            self.config, self.sequence_parallel = config, config.sequence_parallel
            self.in_features, self.out_features = self.parts(input_size, output_size)
            self.weight = nn.Parameter(torch.zeros(self.out_features, self.in_features, dtype=torch.bfloat16))

        def parts(self, inputs: int, outputs: int) -> tuple[int, int]:
            return inputs, outputs

        def product(self, x: torch.Tensor, gathers: bool) -> torch.Tensor:
            trains = self.weight.requires_grad
            function: Any = layers.linear_with_grad_accumulation_and_async_allreduce
            function = function if trains else layers.linear_with_frozen_weight
            more = {"sequence_parallel": gathers, "allreduce_dgrad": False, "gradient_accumulation_fusion": False}
            return function(input=x, weight=self.weight, bias=None, **more)

        def forward(self, x: torch.Tensor) -> Any:
            return self.product(x, gathers=False), None

    class Column(Linear):
        parallel_mode = "column"

        def parts(self, inputs: int, outputs: int) -> tuple[int, int]:
            return inputs, outputs // world

        def forward(self, x: torch.Tensor) -> Any:
            x = x if self.sequence_parallel else mappings.copy_to_tensor_model_parallel_region(x)
            return self.product(x, gathers=self.sequence_parallel), None

    class NormColumn(Column):
        return_layernorm_output = False

        def forward(self, x: torch.Tensor) -> Any:
            normed = torch.nn.functional.rms_norm(x, (HIDDEN,))
            found, bias = super().forward(normed)
            return ((found, normed), bias) if self.return_layernorm_output else (found, bias)

    class Row(Linear):
        parallel_mode = "row"

        def parts(self, inputs: int, outputs: int) -> tuple[int, int]:
            return inputs // world, outputs

        def forward(self, x: torch.Tensor) -> Any:
            found = self.product(x, gathers=False)
            reduced = mappings.reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else None
            return (reduced or mappings.reduce_from_tensor_model_parallel_region)(found), None

    class Unused(nn.Module):
        pass

    grouped = ("TEGroupedLinear", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear")
    own = {"TELinear": Linear, "TEColumnParallelLinear": Column, "TERowParallelLinear": Row}
    return {**own, "TELayerNormColumnParallelLinear": NormColumn, **dict.fromkeys(grouped, Unused)}


def adapters_of(folder: Path, package: str, classes: dict[str, type[nn.Module]]) -> Any:
    """Return a package's module with its adapters, which finds the stand-ins for Transformer Engine's layers."""
    engine = ModuleType("megatron.core.extensions.transformer_engine")
    engine.__dict__.update(classes)
    sys.modules[engine.__name__] = engine
    import_module("peft.tuners.lora")  # which looks for Transformer Engine itself
    own: dict[str, Any] = {"get_current_device": lambda: "cpu", "tuners_sharded_state_dict": None}
    own |= {"NpuGroupedLoraLinear": classes["TEGroupedLinear"], "is_expert_layer": lambda layer: False}
    parts = ("", ".utils", ".tuners", ".tuners.utils", ".tuners.npu_lora")
    for name in ("transformer_engine", "swift", "swift.utils", *(f"{package}{part}" for part in parts)):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(own)
    path = folder.joinpath(*package.split("."), "tuners", "lora.py")
    spec = importlib.util.spec_from_file_location(f"{package}.tuners.lora", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tracker = SimpleNamespace(fork=nullcontext, is_initialized=lambda: False)
    module.get_cuda_rng_tracker = lambda: tracker  # pyright: ignore[reportAttributeAccessIssue]
    return module


def kept(layer: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that a layer keeps for backward, without its weights."""
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def save(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        found, _ = layer(x)
    found.sum().backward()
    return sum(storage.nbytes() for at, storage in saved.items() if at not in weights)


def rows(folder: Path, package: str, world: int, divided: bool) -> Iterator[dict[str, Any]]:
    """Yield what adapters keep in each layer, next to what the layer keeps without one."""
    sizes = {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 8}
    config = import_module("megatron.core.transformer.transformer_config").TransformerConfig(
        **sizes, tensor_model_parallel_size=world, sequence_parallel=divided, use_cpu_initialization=True
    )
    classes = stand_ins(config, world)
    lora = adapters_of(folder, package, classes)
    tokens = TOKENS // world if divided else TOKENS
    for name, (is_column, inputs, outputs) in LAYERS.items():
        base_class = classes["TELayerNormColumnParallelLinear" if is_column else "TERowParallelLinear"]
        shape = (tokens, BATCH, inputs) if is_column else (TOKENS, BATCH, inputs // world)
        for dropout in (0.0, 0.05):
            base = base_class(inputs, outputs)
            base.requires_grad_(False)
            x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
            before = kept(base, x)
            adapted = lora.LoraParallelLinear(base, "default", r=RANK, lora_alpha=32, lora_dropout=dropout)
            trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            run = {"layer": name, "ranks": world, "sequence_parallel": divided, "dropout": dropout}
            yield {**run, "kept": kept(adapted, x) - before, "trained": trained}


def dropped(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout as a GPU computes it, with a boolean mask."""
    return torch.native_dropout(x, p, training)[0]


def main() -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) == 2:
        for name, (world, divided) in product(PACKAGES, ((1, False), (2, False), (2, True))):
            ranks = [[name, str(world), str(int(divided)), str(rank)] for rank in range(world)]
            running = [
                subprocess.Popen(
                    [sys.executable, __file__, str(folder), *rank], stdout=None if i == 0 else subprocess.DEVNULL
                )
                for i, rank in enumerate(ranks)
            ]
            assert not any(process.wait() for process in running)
        return
    name, (world, divided, rank) = sys.argv[2], map(int, sys.argv[3:])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29556")
    sys.path.insert(0, str(folder))
    torch.cuda.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    torch.nn.functional.dropout = dropped
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    import_module("megatron.core.parallel_state").initialize_model_parallel(world)
    core = import_module("megatron.core.package_info").__version__
    for row in rows(folder, PACKAGES[name], world, bool(divided)):
        if rank == 0:
            print(json.dumps({**row, "code": name, "megatron-core": core}), flush=True)


if __name__ == "__main__":
    main()
