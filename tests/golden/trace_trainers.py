"""Trace steps of trainers themselves, and print rows for tests/estimate/test_trainers.py.

python -m venv /tmp/trl
/tmp/trl/bin/pip install trl==1.16.0 transformers==5.24.0 peft==0.21.2 bitsandbytes==0.50.2 'torch==2.13.*' pydantic
/tmp/trl/bin/python tests/golden/trace_trainers.py trl-1.15 tests/golden/traced_trainers.jsonl >> /tmp/rows.jsonl

Runs with a row in a file that is given are not traced again. LLaMA-Factory 0.9.5 needs transformers 5.6 and TRL 0.24.

TRL's trainer itself wraps the model: its constructor adds the adapters and casts them, enables checkpointing, patches
the head and prepares the model with accelerate. A step is its `training_step`, then clipping and its optimizer. Tensors
are fake, Triton's kernels compute nothing, and every label counts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.core.errors import MemplanError
from memplan.probe.fake import fake_device
from memplan.probe.libraries import library
from memplan.probe.run import child
from memplan.probe.run.trace import read
from memplan.spec.run import RunSpec
from tests.golden.trace_runs import line

LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen2": {**LLAMA, "model_type": "qwen2", "vocab_size": 151936},
    "qwen3": {**LLAMA, "model_type": "qwen3", "vocab_size": 151936, "head_dim": 64},
    "mistral": {**LLAMA, "model_type": "mistral", "vocab_size": 32768, "sliding_window": None},
    "gemma2": {
        **LLAMA,
        "model_type": "gemma2",
        "vocab_size": 100000,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
    },
    "phi3": {**LLAMA, "model_type": "phi3", "vocab_size": 32064, "pad_token_id": 0},
}
FP32, BF16 = ({"weights": dtype, "compute": "bf16", "autocast": True} for dtype in ("fp32", "bf16"))
# Family, method, precision, sequences and tokens; then what differs from the trainer's defaults.
CASES: tuple[tuple[str, str, dict[str, Any], int, int, dict[str, Any]], ...] = (
    ("llama", "full", FP32, 2, 1024, {}),
    ("llama", "full", BF16, 2, 1024, {}),
    ("llama", "full", BF16, 8, 4096, {}),
    ("llama", "full", BF16, 1, 512, {"checkpointing": "none"}),
    ("llama", "lora", BF16, 2, 1024, {}),
    ("llama", "lora", BF16, 4, 8192, {}),
    ("llama", "lora", FP32, 4, 2048, {}),
    ("llama", "lora", BF16, 2, 1024, {"checkpointing": "none"}),
    ("llama", "qlora", BF16, 2, 2048, {}),
    ("llama", "qlora", FP32, 2, 2048, {}),
    ("llama", "qlora", BF16, 1, 8192, {}),
    ("llama", "dora", BF16, 2, 1024, {}),
    ("tied", "full", FP32, 2, 1024, {}),
    ("tied", "full", BF16, 4, 2048, {}),
    ("tied", "lora", BF16, 4, 2048, {}),
    ("qwen2", "full", BF16, 2, 2048, {}),
    ("qwen2", "lora", BF16, 4, 4096, {}),
    ("qwen2", "qlora", BF16, 4, 1024, {}),
    ("qwen3", "full", FP32, 1, 2048, {}),
    ("qwen3", "lora", BF16, 2, 4096, {}),
    ("mistral", "full", BF16, 2, 4096, {}),
    ("mistral", "lora", BF16, 8, 1024, {}),
    ("mistral", "qlora", BF16, 2, 8192, {}),
    ("gemma2", "full", BF16, 2, 1024, {}),
    ("gemma2", "lora", BF16, 2, 2048, {}),
    ("phi3", "full", FP32, 2, 2048, {}),
    ("phi3", "lora", BF16, 4, 2048, {}),
)


def runs(profile: str) -> Iterator[tuple[str, RunSpec]]:
    """Yield the runs of `CASES` under a profile, as transformers' Trainer runs them."""
    for family, method, precision, micro, tokens, changes in CASES:
        if (profile.partition("-")[0], method, precision) == ("llamafactory", "full", BF16):
            continue  # it casts the weights to fp32
        kernels = dict(changes)
        if (profile.partition("-")[0], family) == ("llamafactory", "gemma2"):
            kernels["attention"] = "eager"  # its configure_attn_implementation; transformers 5.6 would take sdpa
        targets = {} if method == "full" else {"targets": ["q_proj", "v_proj", "down_proj"]}
        yield (
            f"{profile} {family} {method} {precision['weights']} {micro}x{tokens}{' plain' if changes else ''}",
            RunSpec.model_validate(
                {
                    "model": {"config": CONFIGS[family]},
                    "method": {"kind": method, **targets},
                    "precision": precision,
                    "batch": {"micro": micro, "sequence": tokens},
                    "kernels": kernels,
                    "loop": {"trainer": True},
                    "profile": profile,
                }
            ),
        )


class TrainerScript:
    """A run under TRL's SFTTrainer, with the attributes of `memplan.probe.script.script.Script`."""

    assistant = scaler = None
    attention_backend = nullcontext

    def __init__(self, run: RunSpec, device: Any, phase: Any) -> None:
        import torch

        from memplan.probe.script import model as building
        from memplan.probe.script.parameter_counts import parameters
        from memplan.resolve.decide import fill_from_profile

        self.run, self.device, self.phase = run, torch.device(device), phase
        filled = fill_from_profile(run)
        with phase("load"):
            model = building._empty_model(filled)
            building._materialise(model, filled, lambda _: self.device)
            self.counted = parameters(model)
            model.hf_quantizer = SimpleNamespace(is_trainable=True)  # which Trainer asks if layers are quantised
            torch.cuda.is_available = lambda: True  # which transformers' arguments ask
            self.trainer: Any = self._trainer(model, filled)
            torch.cuda.is_available = lambda: False  # or fused optimizers ask a stream
            del model
            self.trainer.model_wrapped = self.trainer.accelerator.prepare(self.trainer.model)
            self.trainer.model.train()
            if getattr(self.trainer.args, "activation_checkpointing", False):  # as Trainer.train does
                self.trainer.model.activation_checkpointing_enable()
            self.model = self.trainer.model_wrapped
            self.parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.trainable = sum(p.numel() for p in self.parameters)
            self.optimizer = self.trainer.create_optimizer()
            self.optimizers = [self.optimizer]
        self._in_phase(self.trainer, "compute_loss", "forward")
        self._in_phase(self.trainer.accelerator, "backward", "backward")

    def _trainer(self, model: Any, run: RunSpec) -> Any:
        """Return the trainer around the model, to which it adds the adapters."""
        from memplan.probe.script.model import _targets

        method, adapters = run.method, None
        if method.kind != "full":
            adapters = library("peft").LoraConfig(
                task_type="CAUSAL_LM",
                r=method.rank,
                lora_alpha=8,
                target_modules=_targets(run),
                use_dora="dora" in method.kind,
            )
        return library("trl").SFTTrainer(
            model=model,
            args=self._arguments(
                run,
                "trl",
                "SFTConfig",
                max_length=run.batch.sequence,
                gradient_checkpointing=run.kernels.checkpointing == "full",
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=self._dataset(),
            processing_class=self._tokenizer(),
            peft_config=adapters,
        )

    def _in_phase(self, owner: Any, method: str, name: str) -> None:
        """Enter a phase during every call of the method."""
        call = getattr(owner, method)

        def entered(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        setattr(owner, method, entered)

    @staticmethod
    def _arguments(run: RunSpec, package: str, kind: str, **more: Any) -> Any:
        return getattr(library(package), kind)(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=run.batch.micro,
            report_to=[],
            optim=str(run.optimizer.name),
            **more,
        )

    @staticmethod
    def _dataset() -> Any:
        return library("datasets").Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})

    @staticmethod
    def _tokenizer() -> Any:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")

    def step(self) -> None:
        """Run the trainer's step: forward and backward, clipping, the optimizer."""
        import torch

        shape, trainer = (self.run.batch.micro, self.run.batch.sequence), self.trainer
        ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.ones_like(ids)}
        tokens = torch.full((), shape[0] * (shape[1] - 1), device=self.device)
        del ids
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(self.model, inputs, num_items_in_batch=tokens)
        del inputs
        with self.phase("clip"):
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        with self.phase("step"):
            self.optimizer.step()
            self.model.zero_grad()


class LlamaFactoryScript(TrainerScript):
    """A run as LLaMA-Factory prepares it: its checkpointing and its adapters, under transformers' Seq2SeqTrainer."""

    def _trainer(self, model: Any, run: RunSpec) -> Any:
        from memplan.probe.script.model import _targets

        hparams: Any = library("llamafactory.hparams")
        method = run.method
        arguments = hparams.ModelArguments(
            model_name_or_path="", disable_gradient_checkpointing=run.kernels.checkpointing == "none"
        )
        arguments.quantization_bit = 4 if method.quantization is not None else None
        tuning = hparams.FinetuningArguments(
            finetuning_type="full" if method.kind == "full" else "lora",
            lora_rank=method.rank,
            lora_target=",".join(_targets(run)) if method.kind != "full" else "all",
            use_dora="dora" in method.kind,
        )
        library("llamafactory.model.model_utils.checkpointing").prepare_model_for_training(model, arguments)
        adapter: Any = library("llamafactory.model.adapter")
        model = adapter.init_adapter(model.config, model, arguments, tuning, is_trainable=True)
        return library("transformers").Seq2SeqTrainer(
            model=model,
            args=self._arguments(run, "transformers", "Seq2SeqTrainingArguments", bf16=True),
            train_dataset=self._dataset(),
            processing_class=self._tokenizer(),
        )


SCRIPTS = {"trl": TrainerScript, "llamafactory": LlamaFactoryScript}
IMPORTED = {"trl": "trl.trainer.sft_trainer", "llamafactory": "llamafactory.model.adapter"}


def main() -> None:
    profile, *files = sys.argv[1:]
    done = {json.loads(row).get("name") for file in files for row in Path(file).read_text("utf-8").splitlines()}
    fake_device.load()
    import torch

    framework = profile.rpartition("-")[0]
    library(IMPORTED[framework])  # before the patches, some of which these imports do not survive

    from memplan.probe.fake import fake_tensor_patches as patches
    from memplan.probe.fake import tracker
    from memplan.probe.fake.kernels import card_of
    from memplan.probe.libraries import versions
    from memplan.probe.script import script

    patches.apply(card_of(None))
    cuda: Any = torch.cuda
    cuda.device_count, cuda.set_device, cuda.get_device_name = (lambda: 1), (lambda device: None), (lambda *_: "A100")
    library("transformers.masking_utils").fast_all = lambda mask: True  # nothing is padded
    library("transformers.training_args").is_torch_bf16_gpu_available = lambda: True
    script.build = SCRIPTS[framework]
    release = f"{framework} {library(framework).__version__}" if framework == "trl" else profile.replace("-", " ")
    with_kernels()
    for name, run in runs(profile):
        if name in done:
            continue
        rows = -(-run.batch.micro * (run.batch.sequence - 1) // 256) * 256  # TRL up to 1.14 reads their number
        # transformers 5.6 reads whether nothing is padded, and TRL whether no label counts
        tracker.scalar_answers.append(lambda t, n=rows: n if t.dtype == torch.int64 else framework != "trl")
        try:
            answer = child._answer(run, 2, "cuda", False)
        except MemplanError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        read_versions = f"{release}, " + ", ".join(f"{k} {v}" for k, v in versions().items())
        print(json.dumps({**line(name, run, read(run, answer)), "versions": read_versions}), flush=True)


def with_kernels() -> None:
    """Have TRL call its Triton kernels, which compute nothing here."""
    try:
        kernels: Any = library("trl.kernels.chunked_logprob")
    except MemplanError:  # before TRL 1.15
        return

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **__: None

    kernels._forward_kernel = kernels._backward_kernel = Kernel()
    kernels._TRITON_AVAILABLE = True

    class Triton:
        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

    kernels.triton = Triton


if __name__ == "__main__":
    main()
