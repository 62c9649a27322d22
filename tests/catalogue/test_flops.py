"""FLOPs equal torch's count exactly: real models on the CPU, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import RunSpec
from memplan.catalogue.attention.attention import attention
from memplan.catalogue.kernels import flops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Tensor
from memplan.planning.step_time import Work, work
from tests.tiny import TINY

pytestmark = pytest.mark.torch

B, S, RANK = 2, 40, 4


def in_torch(
    config: dict[str, Any], attn: str, checkpointing: str, adapter: dict[str, Any] | None, amp: bool
) -> tuple[int, int]:
    """Return torch's count for forward, and in total."""
    import peft
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils import flop_counter

    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation=attn
    )
    model = made if adapter is None else peft.get_peft_model(made, peft.LoraConfig(task_type="CAUSAL_LM", **adapter))
    model.config.use_cache = False
    model.train()
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    ids = torch.arange(B * S).view(B, S)
    counter = flop_counter.FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = model(input_ids=ids, labels=ids).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def counted(config: dict[str, Any], attn: str, checkpointing: str, method: Any, amp: bool) -> Work:
    kernels = {
        "attention": "sdpa_math" if attn == "sdpa" else attn,
        "checkpointing": "none" if checkpointing == "none" else "full",
        "reentrant": checkpointing == "reentrant",
    }
    batch, precision = {"micro": B, "sequence": S}, "amp" if amp else "fp32"
    return work(RunSpec(model={"config": config}, method=method, precision=precision, batch=batch, kernels=kernels))


LLAMA, GPT2 = ({"model_type": name, **TINY[name]} for name in ("llama", "gpt2"))
EVERY = {"target_modules": "all-linear", "r": RANK}
LORA = {"kind": "lora", "rank": RANK}
SAVED = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "r": RANK}
CASES: dict[str, tuple[dict[str, Any], str, str, Any, dict[str, Any] | None, bool]] = {
    "full": (LLAMA, "eager", "none", "full", None, False),
    "full, checkpointed": (LLAMA, "sdpa", "torch's", "full", None, False),
    "full, checkpointed reentrantly": (LLAMA, "eager", "reentrant", "full", None, False),
    "full under autocast, with biases": (
        {**LLAMA, "attention_bias": True, "mlp_bias": True},
        "eager",
        "none",
        "full",
        None,
        True,
    ),
    "lora": (LLAMA, "sdpa", "none", LORA, EVERY, False),
    "lora, checkpointed": (LLAMA, "eager", "torch's", LORA, EVERY, False),
    "lora and a whole head": (
        LLAMA,
        "eager",
        "none",
        {**LORA, "targets": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        SAVED,
        False,
    ),
    "dora": (LLAMA, "eager", "none", {**LORA, "kind": "dora"}, {**EVERY, "use_dora": True}, False),
    "gpt2, full": (GPT2, "eager", "none", "full", None, False),
    "gpt2, lora, checkpointed": (GPT2, "eager", "torch's", LORA, EVERY, False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_operations_equal_torchs_count(name: str) -> None:
    config, attn, checkpointing, method, adapter, amp = CASES[name]
    w = counted(config, attn, checkpointing, method, amp)
    assert (w.forward, w.operations) == in_torch(config, attn, checkpointing, adapter, amp)
    assert (w.recomputed > 0) == (checkpointing != "none")


@pytest.mark.parametrize("backend", ["flash", "efficient"])
def test_attention_flops_match_torchs_except_for_the_masked_half(backend: str) -> None:
    """torch counts the full product, causal or not."""
    from torch.utils import flop_counter

    b, a, s, d = 2, 4, 96, 16
    shape = (b, a, s, d)
    op = next(op for op in attention("n", "q", "k", "v", "y", Wiring(backend, backend), False) if op.product)
    tensors = {name: Tensor(name, "b s a d") for name in op.reads}
    assert flops.causal_half(op)

    def operations(points: Any) -> int:
        (found,) = points
        return found.operations * b * s * a * d * s if found.shape == "b s a d s" else 0

    assert 2 * operations(flops.forward(op, tensors)) == flop_counter.sdpa_flop_count(shape, shape, shape)
    q = Tensor(op.reads[0], "b s a d")
    assert 2 * operations(flops.backward(op, tensors, q)) == flop_counter.sdpa_backward_flop_count(
        shape, shape, shape, shape
    )
    assert not flops.causal_half(Op("n", (*op.reads, "mask"), product="attention"))
