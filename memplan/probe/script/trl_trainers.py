"""The step of TRL's own trainer, which is traced on fake tensors: its model, its collator's batch, its loss.

    script = TrainerScript(run, "cuda", phase)
    script.step()

The trainer itself wraps the model: it adds the adapters and casts them, makes the reference model, enables
checkpointing, patches the head and prepares the model with accelerate. A step is its `training_step`, then clipping and
its optimizer. Left out are loading the weights from a file and precomputing the reference's log-probabilities.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

from memplan.catalogue.kernels.wiring import GENERATING, PAIRED
from memplan.core.errors import MemplanError
from memplan.core.records import NamedTuple
from memplan.models.cards import find_config
from memplan.probe.libraries import library
from memplan.probe.script.packed_batches import PackedBatch, packed_batch
from memplan.resolve.decide import fill_from_profile
from memplan.resolve.roles import fields_of_role
from memplan.spec.generation import InlineModel
from memplan.spec.roles import RoleModel
from memplan.spec.run import RunSpec


class TrlTrainer(NamedTuple):
    """A trainer of TRL.

    name     of its class, without `Trainer`; its config's is `nameConfig`
    modules  where it is, in newer and in older releases
    options  of its config
    """

    name: str
    modules: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()


_ONE_ROW = ("bfd", "bfd_split", "padding_free")
_CPO = ("trl.experimental.cpo.cpo_trainer", "trl.trainer.cpo_trainer")
TRAINERS = {
    "sft": TrlTrainer("SFT", ("trl.trainer.sft_trainer",), (("dataset_kwargs", {"skip_prepare_dataset": True}),)),
    "dpo": TrlTrainer("DPO", ("trl.trainer.dpo_trainer",)),
    "kto": TrlTrainer("KTO", ("trl.experimental.kto.kto_trainer", "trl.trainer.kto_trainer")),
    "reward": TrlTrainer("Reward", ("trl.trainer.reward_trainer",)),
    "orpo": TrlTrainer("ORPO", ("trl.experimental.orpo.orpo_trainer", "trl.trainer.orpo_trainer")),
    "cpo": TrlTrainer("CPO", _CPO),
    "simpo": TrlTrainer("CPO", _CPO, (("loss_type", "simpo"), ("cpo_alpha", 0.0))),
    "grpo": TrlTrainer("GRPO", ("trl.trainer.grpo_trainer",)),
    "rloo": TrlTrainer("RLOO", ("trl.trainer.rloo_trainer",)),
    "ppo": TrlTrainer("PPO", ("trl.experimental.ppo.ppo_trainer", "trl.trainer.ppo_trainer")),
    "gkd": TrlTrainer("GKD", ("trl.experimental.gkd.gkd_trainer", "trl.trainer.gkd_trainer"), (("lmbda", 0.0),)),
    "distill": TrlTrainer("Distillation", ("trl.trainer.distillation_trainer",)),
    "distill from a server": TrlTrainer(
        "ServerDistillation",
        ("trl.experimental.server_distillation.server_distillation_trainer",),
        (("teacher_model_server_url", "server"),),
    ),
}


def trainer_of(run: RunSpec) -> TrlTrainer:
    """Return the trainer of a run."""
    teacher = run.roles.teacher
    return TRAINERS["distill from a server" if teacher is not None and teacher.location == "server" else run.trainer]


def trainer_module(run: RunSpec) -> Any:
    """Return the module of the run's trainer in the installed TRL. Raises ProbeError if it has none."""
    without_extras()
    *others, last = trainer_of(run).modules
    for name in others:
        try:
            return library(name)
        except MemplanError:
            continue
    return library(last)


def without_extras() -> None:
    """Let TRL 0.24 know under transformers 5, which answers (found, version), which packages are not there."""
    facts: ModuleType = library("trl.import_utils")
    found = vars(facts)
    for name, value in [*found.items()]:
        if name.endswith("_available") and isinstance(value, tuple):
            found[name] = value[0]


def always(value: Any) -> Any:
    """Return a function that returns the value."""

    def answer(*_: Any, **__: Any) -> Any:
        return value

    return answer


def _as_given(trainer: Any, dataset: Any, *_: Any, **__: Any) -> Any:
    return dataset


def _blocks(a: int, b: int) -> int:
    return -(-a // b)


def _set(owner: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


def fused_loss(run: RunSpec, config: Any) -> dict[str, Any]:
    """Return the options of a trainer's config for Liger's loss, without Liger's layers, if the run has it."""
    if run.kernels.loss != "fused":
        return {}
    if hasattr(config, "use_liger_loss"):  # TRL 0.24
        return {"use_liger_loss": True}
    return {"use_liger_kernel": True, "liger_kernel_config": dict.fromkeys(("rope", "rms_norm", "swiglu"), False)}


@contextmanager
def _without_triton() -> Generator[None]:
    """Let a module with Triton kernels be imported where Triton is not installed."""
    if find_spec("triton") is not None:
        yield
        return

    def unchanged(function: Any) -> Any:
        return function

    language = ModuleType("triton.language")
    language.constexpr = Any  # pyright: ignore[reportAttributeAccessIssue]
    triton = ModuleType("triton")
    triton.language, triton.jit = language, unchanged  # pyright: ignore[reportAttributeAccessIssue]
    triton.autotune = triton.heuristics = always(unchanged)  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.update({"triton": triton, "triton.language": language})
    try:
        yield
    finally:
        del sys.modules["triton"], sys.modules["triton.language"]


@contextmanager
def prepared(run: RunSpec) -> Generator[None]:
    """Let the trainer and the libraries see a card while it is built and steps, no padding, and kernels that compute
    nothing. Its module must have been imported before tensors are fake."""
    import torch

    from memplan.probe.fake import tracker
    from memplan.probe.fake.kernels import selections
    from memplan.probe.script.trl_losses import compiled_pair

    def half_of(labels: Any, **_: Any) -> Any:
        """Return the indices of one half of the examples: KTO asks which are desirable."""
        return torch.arange(labels.shape[0] // 2, device=labels.device).view(-1, 1)

    def of_all(mask: Any, as_tuple: bool = False) -> Any:
        """Return indices of a mask's positions: where TRL 0.24 asks in which of a row the rejected sequences begin."""
        if not as_tuple:  # a mesh of ranks asks for its own
            return before[torch.Tensor]["nonzero"](mask)
        return tuple(torch.zeros(mask.numel(), dtype=torch.int64, device=mask.device) for _ in mask.shape)

    def without_gradients(*_: Any) -> Any:
        """Stand in for inference mode, in which no tensor can be fake."""
        return torch.no_grad()

    owners: dict[Any, dict[str, Any]] = {
        torch: {"nonzero": half_of, "inference_mode": without_gradients, "compile": compiled_pair},
        torch.Tensor: {"nonzero": of_all},
        torch.cuda: {
            "device_count": always(1),
            "set_device": always(None),
            "get_device_name": always("A100"),
        },
        library("transformers.masking_utils"): {"fast_all": always(True)},
        library("transformers.training_args"): dict.fromkeys(
            ("is_torch_bf16_gpu_available", "is_torch_tf32_available"), always(True)
        ),
    }
    before = {owner: {name: getattr(owner, name) for name in patches} for owner, patches in owners.items()}
    for owner, patches in owners.items():
        _set(owner, patches)
    TrainerScript.patch()
    tracker.scalar_answers.append(partial(TrainerScript.answer, run))
    try:
        yield
    finally:
        tracker.scalar_answers.pop()
        selections.clear()
        for owner, patches in before.items():
            _set(owner, patches)


class TrainerScript:
    """A run under one of TRL's trainers, with the attributes of `memplan.probe.script.script.Script`."""

    imported: tuple[str, ...] = ("trl.trainer.sft_trainer",)  # before tensors are fake; more with another trainer
    unused: tuple[str, ...] = ()  # modules that its imports name, and no step runs
    assistant = scaler = None
    attention_backend = nullcontext

    def __init__(self, run: RunSpec, device: Any, phase: Any) -> None:
        import torch

        from memplan.probe.script import model as building
        from memplan.probe.script.parameter_counts import parameters

        self.run, self.device, self.phase = run, torch.device(device), phase
        filled = fill_from_profile(run)
        with phase("load"):
            if run.trainer == "reward":  # its head is a score
                config = {**find_config(run.model), "num_labels": 1}
                filled = filled.model_copy(update={"model": InlineModel(config=config)})
            model = building.empty_model(filled)
            building.materialise(model, filled, lambda _: self.device)
            self.counted = parameters(model)
            model.warnings_issued = {}  # which TRL 0.24 writes to, and transformers 5 has no longer
            if filled.method.quantization is not None:  # which Trainer and Axolotl ask
                config = SimpleNamespace(quant_method="bitsandbytes")
                model.hf_quantizer = SimpleNamespace(
                    is_trainable=True, is_compileable=False, quantization_config=config
                )
            torch.cuda.is_available = lambda: True  # which transformers' arguments ask
            self.trainer: Any = self._trainer(model, filled)
            torch.cuda.is_available = lambda: False  # or fused optimizers ask a stream
            del model
            self.trainer.model.train()
            self._checkpoint(self.trainer.model, self.trainer.args)
            self.trainable = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
            self.model = self.trainer.model_wrapped = self._wrapped(filled)
            self.parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = self.trainer.create_optimizer()
            self.optimizers = [self.optimizer]
        self._in_phase(self.trainer, "compute_loss", "forward")
        self._in_phase(self.trainer.accelerator, "backward", "backward")

    @staticmethod
    def patch() -> None:
        """Have TRL call its Triton kernels, which compute nothing here."""

        class Kernel:
            def __getitem__(self, grid: Any) -> Any:
                return always(None)

        for name in ("chunked_logprob", "chunked_divergence", "logprob_entropy"):  # since TRL 1.15, and in 1.14
            try:
                with _without_triton():
                    kernels: Any = library(f"trl.kernels.{name}")
            except MemplanError:  # another release
                continue
            for kernel in ("forward", "backward", "stats", "jsd"):
                setattr(kernels, f"_{kernel}_kernel", Kernel())
            kernels._TRITON_AVAILABLE = True
            kernels.triton = SimpleNamespace(cdiv=_blocks)
            if name == "logprob_entropy":
                library("trl.trainer.utils")._fused_logprob_entropy = kernels.selective_log_softmax_and_entropy

    @staticmethod
    def answer(run: RunSpec, value: Any) -> bool | int:
        """Return the value of a tensor: the number of labels, which TRL up to 1.14 reads, and whether none counts; for
        trainers that generate zero, the first token of the vocabulary."""
        if run.trainer in GENERATING:
            return False if str(value.dtype) == "torch.bool" else 0
        rows = -(-run.batch.micro * (run.batch.sequence - 1) // 256) * 256
        if run.batch.packing in _ONE_ROW:
            rows = -(-(run.batch.micro * run.batch.sequence - 1) // 256) * 256
        return rows if str(value.dtype) == "torch.int64" else False

    def _trainer(self, model: Any, run: RunSpec) -> Any:
        """Return the trainer around the model, to which it adds the adapters."""
        import torch

        from memplan.probe.script.model import lower_of, target_modules

        method, adapters = run.method, None
        if method.kind != "full":
            adapters = library("peft").LoraConfig(
                task_type="SEQ_CLS" if run.trainer == "reward" else "CAUSAL_LM",
                r=method.rank,
                lora_alpha=8,
                lora_dropout=method.dropout,
                target_modules=target_modules(run, model),
                use_dora="dora" in method.kind,
            )
        module, trainer = trainer_module(run), trainer_of(run)
        self._copy_reference(module, run)
        kind: Any = getattr(module, f"{trainer.name}Trainer")
        for name in ("_prepare_dataset", "_precompute_ref_logps"):
            if run.trainer != "sft" and hasattr(kind, name):
                setattr(kind, name, _as_given)
        half = lower_of(run.precision) if run.precision.autocast else None
        arguments = self._arguments(
            run,
            module.__name__,
            f"{trainer.name}Config",
            gradient_checkpointing=run.kernels.checkpointing == "full",
            bf16=half is torch.bfloat16,
            fp16=half is torch.float16,
            **dict(trainer.options),
            **self.options(run),
        )
        others = {}
        for role, other in run.roles.named:
            if role in ("reward", "value") or other.location == "server":
                continue
            others[f"{role}_model"] = self._other(run, other)
        return kind(
            model=model,
            args=arguments,
            train_dataset=self._dataset(),
            processing_class=self._tokenizer(),
            peft_config=adapters,
            **others,
            **self.rewards,
        )

    @property
    def rewards(self) -> dict[str, Any]:
        """The functions that score completions, of a trainer that does."""
        return {}

    def options(self, run: RunSpec) -> dict[str, Any]:
        """Return the options of the trainer's config that the run decides."""
        precomputes = {"precompute_ref_log_probs": True} if run.reference == "precomputed" else {}
        precomputes |= fused_loss(run, getattr(trainer_module(run), f"{trainer_of(run).name}Config"))
        if run.parallelism.offload.activations:
            precomputes["activation_offloading"] = True
        if run.batch.packing == "padding_free":
            return {"padding_free": True, "max_length": None}
        packs = {"packing": True, "packing_strategy": run.batch.packing} if run.batch.packing else {}
        return {"max_length": run.batch.sequence, **precomputes, **packs}

    def _wrapped(self, run: RunSpec) -> Any:
        """Return the trainer's model as accelerate wraps it for the run's GPUs. FSDP also shards a reference model."""
        trainer, p = self.trainer, run.parallelism
        if p.dp == 1:
            return trainer.accelerator.prepare(trainer.model)
        from memplan.probe.script.distributed_wrapping import prepare_reference, wrap

        if p.strategy in ("fsdp", "fsdp2"):
            if getattr(trainer, "ref_model", None) is not None:
                trainer.ref_model = prepare_reference(trainer.ref_model, run, self.device)
            if hasattr(trainer, "_dist"):
                trainer._dist.fsdp_version = 1 if p.strategy == "fsdp" else 2
            trainer.model, trainer.is_fsdp_enabled = wrap(trainer.model, run, self.device), True
            return trainer.model
        return wrap(trainer.model, run, self.device)

    def _copy_reference(self, module: Any, run: RunSpec) -> None:
        """Let the trainer build its copy of the model instead of loading it, and not hash the weights. TRL 0.24 copies
        the model where accelerate loads it, for FSDP on the host."""

        def frozen(*_: Any) -> Any:
            return self._built(run).requires_grad_(False).eval()

        copies = {"create_model_from_path": self._copied(run), "create_reference_model": frozen}
        for name, instead in {**copies, "hash_module": always("")}.items():
            if hasattr(module, name):
                setattr(module, name, instead)

    def _copied(self, run: RunSpec) -> Any:
        """Return a function that builds another model like the run's."""

        def built(*_: Any, **__: Any) -> Any:
            return self._built(run)

        return built

    def _other(self, run: RunSpec, other: RoleModel) -> Any:
        """Return another model of the run's step."""
        update = {"model": other.model, **fields_of_role(run.precision, other)}
        return self._built(run.model_copy(update=update))

    def _built(self, run: RunSpec) -> Any:
        """Return the run's model on the device."""
        from memplan.probe.script import model as building

        run = fill_from_profile(run)
        model = building.empty_model(run)
        building.materialise(model, run, lambda _: self.device)
        return model

    def _checkpoint(self, model: Any, arguments: Any) -> None:
        """Checkpoint the layers if the arguments say so, as Trainer.train does."""
        if getattr(arguments, "activation_checkpointing", False):
            model.activation_checkpointing_enable()
        elif arguments.gradient_checkpointing and not hasattr(model, "activation_checkpointing_enable"):
            model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)  # before transformers 5.24

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

    def _dataset(self) -> Any:
        columns = ("input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids")
        pairs = () if self.run.trainer == "kto" else ("chosen", "rejected")
        texts = {name: ["<pad>"] for name in ("prompt", "completion", *pairs)}
        return library("datasets").Dataset.from_dict({**{name: [[0]] for name in columns}, **texts, "label": [True]})

    @staticmethod
    def _tokenizer() -> Any:
        tokenizers, transformers = library("tokenizers"), library("transformers")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
        return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")

    def step(self) -> None:
        """Run the trainer's step: forward and backward, clipping, the optimizer."""
        import torch

        from memplan.probe.script.distributed_wrapping import clip

        inputs, labels = self._batch()
        tokens = torch.full((), labels, device=self.device)
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.training_step(self.model, inputs, num_items_in_batch=tokens)
        del inputs
        with self.phase("clip"):
            clip(self.model, self.run, self.parameters)
        with self.phase("step"):
            self.optimizer.step()
            self.model.zero_grad()

    def predict(self) -> tuple[Any, None, None]:
        """Return the loss of an evaluation batch; TRL's trainers keep no more of it."""
        inputs, _ = self._batch()
        with_loss: Any = self.trainer.prediction_step(self.model, inputs, True)
        return with_loss[0], None, None

    def _packed_inputs(self, packed: PackedBatch) -> dict[str, Any]:
        """Return the batch that the trainer's collator makes of packed examples, on the device."""
        import torch

        without_modes: Any = library("torch.utils._python_dispatch")._disable_current_modes
        length = packed.tokens // packed.sequences
        joined = [*(length for _ in range(packed.sequences - 1)), packed.tokens - length * (packed.sequences - 1)]
        examples = [{"input_ids": [0] * packed.tokens, "seq_lengths": joined}]
        with without_modes():
            batch: Any = self.trainer.data_collator(examples)
        return {
            name: torch.zeros(t.shape, dtype=t.dtype, device=self.device) if isinstance(t, torch.Tensor) else t
            for name, t in batch.items()
        }

    def _batch(self) -> tuple[dict[str, Any], int]:
        """Return a batch as the trainer's collator makes it, without padding, and its number of labels."""
        import torch

        micro, tokens = self.run.batch.micro, self.run.batch.sequence

        def ids(rows: int, columns: int) -> Any:
            return torch.zeros((rows, columns), dtype=torch.int64, device=self.device)

        def masked(name: str, rows: int, columns: int) -> dict[str, Any]:
            part = ids(rows, columns)
            return {f"{name}input_ids": part, f"{name}attention_mask": torch.ones_like(part)}

        packed = packed_batch(self.run)
        if packed is not None and self.run.trainer == "sft":
            return self._packed_inputs(packed), packed.rows * (packed.tokens - 1)
        if self.run.trainer in ("sft", "gkd"):
            inputs = masked("", micro, tokens)
            if self.run.trainer == "gkd":
                inputs |= {"prompts": ids(micro, 1), "prompt_attention_mask": ids(micro, 1)}
            return {**inputs, "labels": torch.ones_like(inputs["input_ids"])}, micro * (tokens - 1)
        if self.run.trainer == "reward":
            return masked("", 2 * micro, tokens), 2 * micro
        if self.run.trainer == "kto":
            first = hasattr(self.trainer, "kto_loss")  # TRL 0.24
            label, reference = ("labels", "reference") if first else ("mask", "ref")
            older = "completion_" if first or hasattr(self.trainer, "_get_kl_dataset") else ""  # up to 1.9
            inputs: dict[str, Any] = {"label": torch.ones(micro, dtype=torch.bool, device=self.device)}
            if older:
                inputs["label"] = [row % 2 == 0 for row in range(micro)]
            for part in ("", "KL_"):
                inputs |= masked(f"{part}{older}", micro, tokens)
                inputs[f"{part}completion_{label}"] = ids(micro, tokens)
                if self.run.reference == "precomputed":
                    inputs[f"{reference}_{part}logps"] = torch.zeros(micro, device=self.device)
            return inputs, micro * (tokens - 1)
        if self.run.trainer in PAIRED:
            inputs = {**masked("chosen_", micro, tokens), **masked("rejected_", micro, tokens)}
            inputs |= {f"{side}_labels": inputs[f"{side}_input_ids"].clone() for side in ("chosen", "rejected")}
        elif hasattr(self.trainer, "concatenated_forward"):  # TRL 0.24 joins prompts and completions itself
            inputs = {**masked("prompt_", micro, 1), **masked("chosen_", micro, tokens - 1)}
            inputs |= masked("rejected_", micro, tokens - 1)
        else:
            inputs = masked("", 2 * micro, tokens)
            inputs["completion_mask"] = torch.ones_like(inputs["input_ids"])
        if self.run.reference == "precomputed":
            inputs |= {f"ref_{side}_logps": torch.zeros(micro, device=self.device) for side in ("chosen", "rejected")}
        return inputs, 2 * micro * (tokens - 1)
