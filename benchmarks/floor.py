"""A minimal command with memplan's options: typer, pydantic and rich, and one table of the arguments."""

from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table


class Run(BaseModel):
    model: str
    method: str = "full"
    gpu: list[str] = []
    gpus: int = 1
    batch_size: int = 1
    seq_len: int = 2048
    grad_accum: int = 1
    rank: int = 16
    targets: str = "all-linear"
    lora_dropout: float = 0.0
    modules_to_save: str = ""
    trainable_layers: int = 2
    quant_format: str = "nf4"
    double_quant: bool = True
    kbit_preparation: str = "true"
    dtype: str = "bf16"
    precision: str = "pure"
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = True
    attention: str = "sdpa"
    loss: str = "hf"
    hold_outputs: bool = False
    padded: bool = False
    trainer: bool = False
    zero: int = 0
    fsdp: str = ""
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    offload: str = ""
    profile: str = "transformers-5"


def main(  # noqa: PLR0913, PLR0917 (the reference has an option for each)
    model: str,
    method: str = "full",
    gpu: Annotated[list[str] | None, typer.Option()] = None,
    gpus: int = 1,
    batch_size: int = 1,
    seq_len: int = 2048,
    grad_accum: int = 1,
    rank: int = 16,
    targets: str = "all-linear",
    lora_dropout: float = 0.0,
    modules_to_save: str = "",
    trainable_layers: int = 2,
    quant_format: str = "nf4",
    double_quant: bool = True,
    kbit_preparation: str = "true",
    dtype: str = "bf16",
    precision: str = "pure",
    optimizer: str = "adamw_torch_fused",
    gradient_checkpointing: bool = True,
    attention: str = "sdpa",
    loss: str = "hf",
    hold_outputs: bool = False,
    padded: bool = False,
    trainer: bool = False,
    zero: int = 0,
    fsdp: str = "",
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    offload: str = "",
    profile: str = "transformers-5",
    online: bool = False,
    spec: str = "",
    format: str = "table",
    json: bool = False,
    explain: bool = False,
    strict: bool = False,
    output: str = "",
) -> None:
    run = Run(
        model=model,
        method=method,
        gpu=gpu or [],
        gpus=gpus,
        batch_size=batch_size,
        seq_len=seq_len,
        grad_accum=grad_accum,
        rank=rank,
        targets=targets,
        lora_dropout=lora_dropout,
        dtype=dtype,
        precision=precision,
        optimizer=optimizer,
        attention=attention,
        loss=loss,
        profile=profile,
    )
    table = Table("option", "value")
    for name, value in run.model_dump().items():
        table.add_row(name, str(value))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
