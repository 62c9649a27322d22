"""Trace steps of vision-language models, and print the rows for tests/catalogue/test_vision.py.

python tests/golden/trace_vision.py qwen2_vl qwen2_5_vl >> tests/golden/traced_vision.jsonl
python tests/golden/trace_vision.py --size 352x480 qwen3_vl qwen3_5 >> tests/golden/traced_vision.jsonl
python tests/golden/trace_vision.py --images 1 --size 1120 --sequence 1608 qwen2_vl >> tests/golden/traced_vision.jsonl
python tests/golden/trace_vision.py --frames 4 --size 224x160 qwen3_vl internvl >> tests/golden/traced_vision.jsonl
python tests/golden/trace_vision.py --clips 2 --seconds 1 qwen2_audio voxtral >> tests/golden/traced_vision.jsonl
python tests/golden/trace_vision.py --images 1 --size 1024 qwen2-vl-2b >> tests/golden/traced_vision.jsonl
python tests/golden/trace_vision.py --attention eager qwen2_vl mllama >> tests/golden/traced_vision.jsonl
python tests/golden/trace_vision.py --attention eager --size 560x700 --sequence 1010 qwen2_vl  # appended as well

A model_type is traced with its config in tests/tiny_vision.py, a card with its own: full, LoRA and QLoRA with and
without checkpointing, on text alone and with images, and with images a frozen tower. With another attention
than sdpa there are only full and LoRA, with images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.spec.run import RunSpec
from tests.golden.trace_runs import write
from tests.tiny_vision import TINY as FAMILIES
from tests.tiny_vision import VARIANTS

TINY = {**FAMILIES, **VARIANTS}
KINDS = ("full", "lora", "qlora")
# all but Llama 4's router, which peft cannot adapt
LLAMA4 = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "fc1",
    "fc2",
    "linear_1",
    "linear",
)
# all but those that merge patches, whose names are numbers
QWEN3_OMNI = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "qkv", "linear_fc1", "linear_fc2")
NAMED = {"llama4": LLAMA4, "qwen3omni": QWEN3_OMNI}


def method(name: str, kind: str, sees: bool) -> dict[str, Any]:
    """Return a method that peft supports for the family, and that runs if it `sees` images."""
    short = name.replace("-", "").replace("_", "")
    named = next((targets for stem, targets in NAMED.items() if kind != "full" and short.startswith(stem)), None)
    skips = kind == "qlora" and sees and name.startswith("lfm2")
    return {
        "kind": kind,
        **({"targets": named} if named else {}),
        **({"quantization": {"skip": ["lm_head", "patch_embedding"]}} if skips else {}),
    }


def runs(
    names: list[str],
    images: int,
    size: Any,
    sequence: int = 0,
    frames: int = 0,
    clips: tuple[int, int] = (0, 0),
    attention: str = "sdpa",
) -> Iterator[tuple[str, RunSpec]]:
    """Yield runs; with a video, or a `sequence` as short as the images, whose peak is then in the tower, only full and
    LoRA. `clips` are their number and seconds."""
    count, seconds = clips
    for name in names:
        model: Any = {"config": {"model_type": name, **TINY[name]}} if name in TINY else name
        length = sequence or (640 if name in TINY else 2048)
        seen = {"frames": frames} if frames else {"images": images}
        seen = {**seen, **({"image_size": size} if size else {})}
        if count:
            seen = {"clips": count, **({"clip_seconds": seconds} if seconds else {})}
        ways = [(kind, checkpointing, {}, ()) for kind, checkpointing in product(KINDS, ("none", "full"))]
        if attention != "sdpa":
            ways = [(kind, checkpointing, seen, ()) for kind, checkpointing in product(KINDS[:2], ("none", "full"))]
            ways += [("lora", checkpointing, seen, ("vision",)) for checkpointing in ("none", "full")]
        elif sequence or frames:
            ways = [(kind, checkpointing, seen, ()) for kind, checkpointing in product(KINDS[:2], ("none", "full"))]
        elif images or count:
            ways += [(kind, checkpointing, seen, ()) for kind, checkpointing in product(KINDS, ("none", "full"))]
            tower = ("audio" if count else "vision",)
            ways += [(kind, checkpointing, seen, tower) for kind, checkpointing in product(KINDS[:2], ("none", "full"))]
        for kind, checkpointing, batch, frozen in ways:
            yield (
                f"{name}-{kind}",
                RunSpec(
                    model=model,
                    method={**method(name, kind, bool(batch)), "frozen": frozen},
                    batch={"micro": 2 if name in TINY else 1, "sequence": length, **batch},
                    kernels={
                        "checkpointing": checkpointing,
                        **({} if attention == "sdpa" else {"attention": attention}),
                    },
                    gpu="a100-sxm-80gb",
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="model_types of tests/tiny_vision.py, or cards")
    parser.add_argument("--images", type=int, default=2, help="0: text alone")
    parser.add_argument("--frames", type=int, default=0, help="of a video, instead of images")
    parser.add_argument("--size", default="300x420", help="pixels: a side, or height x width; empty for the tower's")
    parser.add_argument("--clips", type=int, default=0, help="of audio, instead of images")
    parser.add_argument("--seconds", type=int, default=0, help="of a clip")
    parser.add_argument("--sequence", type=int, default=0, help="tokens, where only the images matter")
    parser.add_argument("--attention", default="sdpa")
    asked = parser.parse_args()
    sides = [int(side) for side in asked.size.split("x") if side]
    size = tuple(sides) if len(sides) == 2 else sides[0] if sides else None
    clips = asked.clips, asked.seconds
    wanted = list(runs(asked.names, asked.images, size, asked.sequence, asked.frames, clips, asked.attention))
    write(wanted)


if __name__ == "__main__":
    main()
