"""The step of TRL's trainers that generate, GRPO and RLOO, on fake tensors: see `memplan.probe.script.trl_trainers`.

A step begins with its generation batch: transformers' `generate`, until all completions have their longest length, then
log-probabilities of the reference, and rewards. The policy's passes follow, one for each micro-batch.
"""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from memplan.catalogue.kernels.wiring import DISTILLING
from memplan.core.errors import MemplanError
from memplan.probe.fake import kernels
from memplan.probe.libraries import library
from memplan.probe.script.distributed_wrapping import clip, unreduced_gradients
from memplan.probe.script.model import base_of
from memplan.probe.script.trl_trainers import TrainerScript, always, fused_loss, trainer_module, trainer_of
from memplan.resolve.roles import scoring_run
from memplan.spec.run import RunSpec


def _let_go(*_: Any) -> None:
    """Wait until autograd's thread has dropped the last gradient, which it does as soon as Python lets it."""
    time.sleep(0.1)


def _reward(completions: Any, **_: Any) -> list[float]:
    """Return the same reward for every completion."""
    return [0.0] * len(completions)


class _Texts:
    """A tokenizer of the reward model, to which every text has the same number of tokens."""

    pad_token_id = 0

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def __call__(self, text: list[str], **_: Any) -> dict[str, Any]:
        ids = torch.zeros((len(text), self._tokens), dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class GenerationScript(TrainerScript):
    """A run under one of TRL's trainers that generate."""

    @property
    def rewards(self) -> dict[str, Any]:
        if self.run.trainer in DISTILLING:
            return {}
        if self.run.roles.reward is None:
            return {"reward_funcs": [_reward]}
        model = self._built(scoring_run(self.run))
        model.config._name_or_path = "reward"
        return {"reward_funcs": [model], "reward_processing_classes": [_Texts(self.run.batch.tokens)]}

    def __init__(self, run: RunSpec, device: Any, phase: Any) -> None:
        with suppress(MemplanError):  # older releases
            library("trl.generation.vllm_client").VLLMClient = always(None)
        super().__init__(run, device, phase)
        tokens, completion = run.batch.sequence + run.batch.new_tokens, run.batch.new_tokens
        evaluation = run.also.evaluation
        for rows in (run.batch.micro, *((evaluation.micro,) if evaluation is not None else ())):
            kernels.selections[rows, tokens - 1] = rows * completion
            if run.trainer in DISTILLING:
                kernels.selections[rows * completion,] = kernels.selections[rows, completion] = rows * completion
        for name in ("liger_grpo_loss", "liger_loss"):
            if hasattr(self.trainer, name):
                fused = getattr(self.trainer, name)
                fused.compiled = False  # its arithmetic of a number per token
                fused.register_forward_hook(_let_go)
        self._generate_longest()
        self._in_phase(self.trainer, "_generate", "generate")
        if run.trainer in DISTILLING:
            self.trainer._compute_prompt_length = always(run.batch.sequence)
            self.trainer._get_teacher_token_logprobs_from_server = self._from_server
            return
        self._in_phase(self.trainer, "_calculate_rewards", "reward")
        self._score = self.trainer._get_per_token_logps_and_entropies
        self.trainer._get_per_token_logps_and_entropies = self._scored

    def _copy_reference(self, module: Any, run: RunSpec) -> None:
        """Let TRL 0.24, too, build its copy of the model instead of loading it."""
        super()._copy_reference(module, run)
        if not hasattr(module, "create_model_from_path"):
            name = "PreTrainedModel"  # any
            module.AutoConfig = SimpleNamespace(from_pretrained=always(SimpleNamespace(architectures=[name])))
            module.transformers = SimpleNamespace(**{name: SimpleNamespace(from_pretrained=self._copied(run))})

    def _generate_longest(self) -> None:
        """Have the model generate until all completions have their longest length."""
        base = base_of(self.trainer.model)
        self._left = 0
        base.generate, base._has_unfinished_sequences = partial(self._generate, base.generate), self._has_unfinished

    def _from_server(self, *_: Any) -> dict[str, Any]:
        """Return the log-probabilities that a server would send of the teacher."""
        shape = self.run.batch.micro, self.run.batch.new_tokens
        return {
            "actual_logprobs": torch.zeros(shape, device=self.device),
            "topk_logprobs": torch.zeros((*shape, 1), device=self.device),
            "topk_token_ids": torch.zeros((*shape, 1), dtype=torch.int64, device=self.device),
        }

    def _generate(self, generate: Any, *args: Any, **kwargs: Any) -> Any:
        self._left = self.run.batch.new_tokens
        return generate(*args, **kwargs)

    def _has_unfinished(self, *_: Any, **__: Any) -> bool:
        """Return whether completions are shorter than their longest length."""
        self._left -= 1
        return self._left >= 0

    def _scored(self, *args: Any, **kwargs: Any) -> Any:
        """Compute log-probabilities: of the reference if nothing is recorded."""
        with nullcontext() if torch.is_grad_enabled() else self.phase("forward"):
            return self._score(*args, **kwargs)

    def options(self, run: RunSpec) -> dict[str, Any]:
        """Return the options of the trainer's config that the run decides."""
        if run.trainer in DISTILLING:
            parts = run.batch.accumulation
            return {"max_completion_length": run.batch.new_tokens, "gradient_accumulation_steps": parts}
        reference = run.reference or ("none" if run.trainer == "grpo" else "copy")
        config = getattr(trainer_module(run), f"{trainer_of(run).name}Config")
        truncates = {"max_prompt_length": run.batch.sequence} if hasattr(config, "max_prompt_length") else {}
        return {
            **truncates,
            "max_completion_length": run.batch.new_tokens,
            "num_generations": run.batch.generations,
            "gradient_accumulation_steps": run.batch.accumulation,
            "beta": 0.0 if reference == "none" else 0.05,
            **({"entropy_coef": 0.01} if run.loop.entropy_bonus else {}),
            **fused_loss(run, config),
        }

    def _batch(self) -> tuple[Any, int]:
        """Return the prompts of a batch of completions."""
        return [{"prompt": "<pad>" * self.run.batch.sequence}] * self.run.batch.micro, 0

    def step(self) -> None:
        """Run the trainer's step: the generation batch, forward and backward of its parts, clipping, the optimizer."""
        batch = self.run.batch
        self.trainer.current_gradient_accumulation_steps = batch.accumulation
        prompt = {"prompt": "<pad>" * batch.sequence}
        for left in reversed(range(batch.accumulation)):
            with unreduced_gradients(self.model, self.run) if left else nullcontext():
                self.trainer.training_step(self.model, [prompt] * batch.micro * batch.accumulation, None)
        with self.phase("clip"):
            clip(self.model, self.run, self.parameters)
        with self.phase("step"):
            self.optimizer.step()
            self.model.zero_grad()
