"""Trace updates of PPO's critics of OpenRLHF and verl, and print rows for tests/estimate/test_generation.py.

FOLDER has both packages unpacked (pip download --no-deps openrlhf==0.11.2 verl==0.9.1), without what they depend on.
The critic is a Llama with the forward of OpenRLHF's CriticModel, or of the token classifier that verl loads, followed
by the framework's own value loss; transformers, accelerate and the optimizer are the installed ones.

python tests/golden/trace_critics.py FOLDER > tests/golden/traced_critics.jsonl
"""

from __future__ import annotations

import ast
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.probe.libraries import library
from memplan.probe.run import child
from memplan.resolve.roles import critic_run
from memplan.spec.run import RunSpec
from tests.golden.trace_trainers import BF16, CONFIGS, FP32, line, read

# Family, method, precision; completions of a micro-batch, tokens of a prompt and of a completion.
CASES: tuple[tuple[str, str, dict[str, Any], int, int, int], ...] = (
    ("llama", "full", BF16, 4, 256, 64),
    ("llama", "lora", BF16, 4, 512, 128),
    ("blocks", "full", FP32, 2, 512, 256),
)
Forward = Callable[..., tuple[Any, Any]]  # the values of all completions' tokens, and the loss


def _module(name: str, **contents: Any) -> None:
    """Put a module in place of one that is not installed, or whose package imports what is not."""
    module = ModuleType(name)
    vars(module).update(contents, __path__=contents.pop("__path__", []))
    sys.modules[name] = module


def openrlhf(folder: Path) -> Forward:
    """Return the forward of OpenRLHF's critic, and its loss."""
    package = str(next(folder.rglob("openrlhf/models")))
    for name in ("deepspeed", "flash_attn", "flash_attn.utils", "openrlhf", "openrlhf.utils"):
        _module(name)
    padding = ("index_first_axis", "pad_input", "rearrange", "unpad_input")
    _module("flash_attn.bert_padding", **dict.fromkeys(padding))
    _module("flash_attn.utils.distributed", all_gather=None)
    _module("openrlhf.utils.logging_utils", init_logger=logging.getLogger)
    _module("openrlhf.models", __path__=[package])
    llama: Any = library("transformers.models.llama.modeling_llama")
    models: Any = library("openrlhf.models.model")
    loss: Any = library("openrlhf.models.loss").ValueLoss(0.2)
    critic: Any = models._get_critic_model(llama.LlamaPreTrainedModel, llama.LlamaModel, "score", False)
    for name in ("deepspeed", "flash_attn"):
        del sys.modules[name]

    def forward(model: Any, ids: Any, mask: Any, before: Any, actions: Any) -> tuple[Any, Any]:
        model.packing_samples, model.normalize_reward, model.value_head_prefix = False, False, "score"
        values, _ = critic.forward(model, ids, action_mask=actions, attention_mask=mask, return_output=True)
        return values, loss(values, before, before, action_mask=actions)

    return forward


def verl(folder: Path) -> Forward:
    """Return the forward of the classifier of tokens that verl trains, and verl's loss."""
    import torch

    found: dict[str, Any] = {"torch": torch, "Optional": Optional}
    for file, names in (
        ("verl/utils/torch_functional.py", ("masked_sum", "masked_mean", "clip_by_value")),
        ("verl/trainer/ppo/core_algos.py", ("agg_loss", "compute_value_loss")),
    ):
        tree = ast.parse(next(folder.rglob(file)).read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                node.decorator_list = []
                exec(f"from __future__ import annotations\n{ast.unparse(node)}", found)
        found["verl_F"] = SimpleNamespace(**found)

    def forward(model: Any, ids: Any, mask: Any, before: Any, actions: Any) -> tuple[Any, Any]:
        states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        values = model.score(torch.nn.functional.dropout(states, 0.0))[:, -actions.shape[1] - 1 : -1].squeeze(-1)
        loss, _ = found["compute_value_loss"](values, before, before, actions.float(), cliprange_value=0.5)
        return values, loss

    return forward


def runs() -> Iterator[tuple[int, RunSpec]]:
    """Yield the tokens of a completion, and the run of a critic."""
    for family, method, precision, micro, prompt, new in CASES:
        targets = {} if method == "full" else {"targets": ["q_proj", "v_proj", "down_proj"]}
        model = {"config": CONFIGS[family]}
        policy = {
            "model": model,
            "trainer": "grpo",
            "method": {"kind": method, **targets},
            "precision": precision,
            "roles": {"value": {"model": model, "micro": micro}},
            "batch": {"micro": micro, "sequence": prompt, "new_tokens": new, "generations": 1},
        }
        run = critic_run(RunSpec.model_validate(policy))
        assert run is not None
        yield new, run


def classifier(tokens: int, forward: Forward) -> Any:
    """Return the forward of a classifier, with a framework's values of tokens and its loss in place of its own."""
    outputs: Any = library("transformers.modeling_outputs").SequenceClassifierOutputWithPast

    def replaced(model: Any, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
        mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        actions = mask.new_ones((len(mask), tokens)).bool()
        values, loss = forward(model, input_ids, mask, actions.float(), actions)
        return outputs(loss=loss, logits=values)

    return replaced


def traced(run: RunSpec, tokens: int, framework: Callable[[Path], Forward]) -> Any:
    """Return the trace of two updates. A trace itself must be the first to import torch."""
    context = child._trainers_context

    def patched(run: RunSpec) -> Any:
        llama: Any = library("transformers.models.llama.modeling_llama")
        llama.LlamaForSequenceClassification.forward = classifier(tokens, framework(Path(sys.argv[1])))
        return context(run)

    child._trainers_context = patched
    return read(run, child._answer(run, 2, "cuda", False))


def main() -> None:
    output, sys.stdout = sys.stdout, sys.stderr
    for framework in (openrlhf, verl):
        for tokens, run in runs():
            if process := os.fork():  # a trace patches classes, as long as its process lasts
                os.waitpid(process, 0)
                continue
            batch = f"{run.batch.micro}x({run.batch.sequence - tokens}+{tokens})"
            name = f"{framework.__name__} critic {run.method.kind} {run.precision.weights} {batch}"
            try:
                row = line(name, run, traced(run, tokens, framework))
                print(json.dumps(row), file=output, flush=True)
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
