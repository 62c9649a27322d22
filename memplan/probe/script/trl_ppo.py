"""The step of TRL's PPOTrainer on fake tensors: see `memplan.probe.script.trl_trainers`.

A step is one update of its `train`: completions of all its prompts, the reference's, the value model's and the reward
model's passes over them, then forward and backward of policy and value model as one module.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from memplan.catalogue.kernels.wiring import GENERATING
from memplan.probe.libraries import library
from memplan.probe.script.distributed_wrapping import unreduced_gradients, wrap
from memplan.probe.script.model import adapt
from memplan.probe.script.parameter_counts import parameters
from memplan.probe.script.trl_generation import GenerationScript
from memplan.probe.script.trl_trainers import TrainerScript, always, trainer_module
from memplan.resolve.ranks import without_preparation
from memplan.resolve.roles import models_of, scoring_run
from memplan.spec.run import RunSpec, changed


class PPOScript(GenerationScript):
    """A run under TRL's PPOTrainer, one update of a single epoch and mini-batch at a time.

    Every moment is in a phase: one lasts until the next begins. `metrics` are computed once gradients are freed.
    """

    def __init__(self, run: RunSpec, device: Any, phase: Any) -> None:
        self._open: AbstractContextManager[None] | None = None
        self._logits: Any = None
        self._evaluates = False
        TrainerScript.__init__(self, run, device, phase)
        self.counted = self._all_counted()
        self._generate_longest()
        module, trainer = trainer_module(run), self.trainer
        module.batch_generation = self._kept(module.batch_generation)
        self._begin(module, "forward", lambda *_: "forward" if torch.is_grad_enabled() else "rollout")
        self._begin(module, "get_reward", self._scoring)
        self._begin(trainer.accelerator, "backward", lambda *_: "backward")
        self._begin(trainer.optimizer, "step", lambda *_: "step")
        self._begin(trainer.optimizer, "zero_grad", after="metrics")
        trainer._save_checkpoint = trainer.log = always(None)
        if run.also.evaluation is not None:
            self._evaluate(run.also.evaluation.micro)

    def _trainer(self, model: Any, run: RunSpec) -> Any:
        """Return the trainer. TRL 0.24 makes a tensor of the time, on the device, which has no data."""
        make: Any = torch.tensor

        def tensor(value: Any, **more: Any) -> Any:
            return torch.full((), value, **more) if isinstance(value, int) else make(value, **more)

        torch.tensor = tensor
        try:
            return super()._trainer(model, run)
        finally:
            torch.tensor = make

    def _all_counted(self) -> tuple[int, int]:
        """Return the number of parameters of policy and value model, and of those active per token."""
        both = [self.counted, parameters(self.trainer.value_model)]
        total, active = (sum(number or 0 for number in numbers) for numbers in zip(*both, strict=True))
        return total, active

    def _begin(self, owner: Any, function: str, phase_of: Callable[..., str] | None = None, after: str = "") -> None:
        """Begin a phase at every call of the function, or another one `after` it."""
        call = getattr(owner, function)

        def begun(*args: Any, **kwargs: Any) -> Any:
            if phase_of is not None:
                self._enter(phase_of(*args))
            result = call(*args, **kwargs)
            if after:
                self._enter(after)
            return result

        setattr(owner, function, begun)

    def _evaluate(self, rows: int) -> None:
        """Give the trainer an evaluation batch, whose texts and scores nothing reads."""
        module, trainer = trainer_module(self.run), self.trainer
        generate, gather = trainer.generate_completions, trainer.accelerator.gather_for_metrics
        scores = SimpleNamespace(float=lambda: SimpleNamespace(cpu=lambda: SimpleNamespace(numpy=always([]))))

        def generated(*args: Any, **kwargs: Any) -> None:
            self._evaluates, trainer.accelerator.gather_for_metrics = True, always(scores)
            generate(*args, **kwargs)
            self._evaluates, trainer.accelerator.gather_for_metrics = False, gather

        trainer.generate_completions = generated
        trainer.processing_class.batch_decode = always([])
        module.print_rich_table = always(None)
        prompts = torch.zeros((rows, self.run.batch.sequence), dtype=torch.int64, device=self.device)
        trainer.eval_dataset = trainer.eval_dataloader = [{"input_ids": prompts}]
        self._begin(trainer, "generate_completions", always("eval"), after="metrics")

    def _scoring(self, model: Any, *_: Any) -> str:
        return "eval" if self._evaluates else "reward" if model is self.trainer.reward_model else "rollout"

    def _kept(self, generate: Any) -> Any:
        """Keep the logits that were generated until the next ones are, as a variable of the trainer's loop does."""

        def generated(*args: Any) -> Any:
            made = generate(*args)
            if not self._evaluates:
                self._logits = made[1]
            return made

        return generated

    def _enter(self, name: str) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = self.phase(name) if name else None
        if self._open is not None:
            self._open.__enter__()

    @property
    def rewards(self) -> dict[str, Any]:
        """The other models of the step."""
        reference = self._built(self.run) if self._copies else None
        scalars = {f"{role}_model": self._built(scoring_run(self.run, role)) for role in ("reward", "value")}
        method = models_of(self.run)["value"].method
        if method is not None and method.kind != "full":  # which ms-swift makes of the value model
            alone = scoring_run(self.run, "value").model_copy(update={"method": without_preparation(method)})
            scalars["value_model"] = adapt(self._built(alone), alone)
        return {**scalars, "ref_model": reference}

    @property
    def _copies(self) -> bool:
        return self.run.reference == "copy" and self.run.method.kind != "full"

    def options(self, run: RunSpec) -> dict[str, Any]:
        """Return the options of the trainer's config that the run decides."""
        os.environ["ACCELERATE_MIXED_PRECISION"] = str(run.precision.compute) if run.precision.autocast else "no"
        library("accelerate.state").AcceleratorState._reset_state(True)
        return {
            "response_length": run.batch.new_tokens,
            "gradient_accumulation_steps": run.batch.accumulation,
            "num_ppo_epochs": 1,
            "num_sample_generations": int(run.also.evaluation is not None),
            "total_episodes": run.batch.micro * run.batch.accumulation,
        }

    def _copy_reference(self, module: Any, run: RunSpec) -> None:
        """Let the trainer copy the model as it does."""

    def _dataset(self) -> Any:
        rows = self.run.batch.micro * self.run.batch.accumulation
        return library("datasets").Dataset.from_dict({"input_ids": [[0] * self.run.batch.sequence] * rows})

    def _checkpoint(self, model: Any, arguments: Any) -> None:
        """Checkpoint nothing: PPOTrainer's own loop does not enable it."""

    def _wrapped(self, run: RunSpec) -> Any:
        """Return policy and value model as the trainer has wrapped them, inside DDP on several GPUs."""
        trainer = self.trainer
        if run.parallelism.dp > 1:  # accelerate has wrapped the forward in autocast
            trainer.model = wrap(trainer.model, changed(run, "precision", autocast=False), self.device)
            trainer.accelerator.no_sync = partial(unreduced_gradients, run=run)
        return trainer.model

    def step(self) -> None:
        """Run one update of the trainer."""
        rows = self.run.batch.micro * self.run.batch.accumulation
        prompts = torch.zeros((rows, self.run.batch.sequence), dtype=torch.int64, device=self.device)
        self.trainer.dataloader = [{"input_ids": prompts}]
        self._enter("generate")
        self.trainer.train()
        self._enter("")


def script_of(run: RunSpec) -> type[TrainerScript]:
    """Return the class of the script of a run under a trainer of TRL."""
    if run.trainer == "ppo":
        return PPOScript
    return GenerationScript if run.trainer in GENERATING else TrainerScript
