"""Steps of other frameworks' releases, for trace_trainers.py: how each adapts a model and constructs its trainer."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from memplan.catalogue.kernels.wiring import TRAINERS
from memplan.probe.libraries import library
from memplan.probe.script.packed_batches import PackedBatch, packed_inputs, packed_sequences
from memplan.probe.script.trl_trainers import TrainerScript, trainer_of, without_extras
from memplan.spec.run import RunSpec


class _Packed(TrainerScript):
    """A trainer whose collator is not constructed: a packed batch is put together as it would be."""

    gives_lengths = False  # the collator tells flash attention where sequences begin

    def _packed_inputs(self, packed: PackedBatch) -> dict[str, Any]:
        import torch

        inputs = packed_inputs(packed, self.device, torch.bfloat16)
        inputs["labels"] = torch.ones_like(inputs["input_ids"])
        if packed.kind.is_varlen and self.gives_lengths:
            ends = torch.zeros(packed.sequences + 1, dtype=torch.int32, device=self.device)
            longest = packed.tokens // packed.sequences
            inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone()}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        return inputs


class AutomodelScript:
    """A run of NeMo Automodel's recipe: its classes of Llama, Qwen2 and Qwen3, its LoRA, its loss and its FSDP2."""

    def __new__(cls, run: RunSpec, device: Any, phase: Any) -> Any:
        """Return memplan's own script, as patched."""
        from memplan.resolve.decide import fill_from_profile

        script: Any = library("memplan.probe.script.script")
        return script.Script(fill_from_profile(run), library("torch").device(device), phase)

    imported: tuple[str, ...] = (
        "transformers.modeling_utils",
        "nemo_automodel.components._peft.lora",
        "nemo_automodel.components.loss.masked_ce",
        *(f"nemo_automodel.components.models.{family}.model" for family in ("llama", "qwen2", "qwen3")),
    )
    unused: tuple[str, ...] = ()

    @staticmethod
    def patch() -> None:
        """Have memplan's script build the model, adapt it and compute the loss as the recipe does."""
        model: Any = library("memplan.probe.script.model")
        auto: Any = library("transformers").AutoModelForCausalLM
        plain, common = auto.from_config, library("nemo_automodel.components.models.common.utils")
        backend = common.BackendConfig(attn="sdpa", linear="torch", rope_fusion=False)

        def build(config: Any, **options: Any) -> Any:
            if config.model_type not in ("llama", "qwen2", "qwen3"):
                return plain(config, **options)
            kind = library(f"nemo_automodel.components.models.{config.model_type}.model").ModelClass
            config._attn_implementation, config.torch_dtype = (
                options.get("attn_implementation", "sdpa"),
                options["dtype"],
            )
            return kind(config, backend=backend).to(options["dtype"])

        def adapt(model: Any, run: RunSpec) -> Any:
            lora: Any = library("nemo_automodel.components._peft.lora")
            names = ["*_proj"] if run.method.targets == "all-linear" else [f"*{name}" for name in run.method.targets]
            config = lora.PeftConfig(target_modules=names, dim=run.method.rank, dropout=run.method.dropout)
            lora.apply_lora_to_linear_modules(model, config, run.method.quantization)
            return model

        def compute(kind: str, model: Any, inputs: Any, labels: Any, in_fp32: bool, **options: Any) -> Any:
            outputs = model(**inputs, **options)
            loss: Any = library("nemo_automodel.components.loss.masked_ce").MaskedCrossEntropy()
            return loss(outputs.logits, labels, num_label_tokens=labels.numel()), None

        common._float32_rms_norm_fwd = library(
            "torch"
        ).ops.nemo_automodel.float32_rms_norm  # what the compiled function calls
        tracker: Any = library("memplan.probe.fake.tracker")
        replacements = tracker.data_free_kernels
        norm = library("torch").ops.nemo_automodel.float32_rms_norm.default
        tracker.data_free_kernels = lambda: {**replacements(), norm: common._float32_rms_norm_impl._init_fn}
        mlp: Any = library("nemo_automodel.components._peft.lora_mlp")
        mlp._is_silu = lambda function: True  # it compares values
        mlp._swiglu_fwd, mlp._swiglu_bwd_inplace = (lambda e, g: library("torch").empty_like(e)), (lambda *given: given)

        def shard(model: Any, run: RunSpec, device: Any) -> Any:
            """Divide the model, and have every pass but a step's last one leave its gradients whole."""
            config: Any = library("nemo_automodel.components.distributed.config").FSDP2Config()
            names = ("dp_replicate", "dp_shard", "cp", "tp")
            with library("torch.utils._python_dispatch")._disable_current_modes():
                mesh: Any = library("torch.distributed.device_mesh").init_device_mesh(
                    device.type, (1, run.parallelism.world, 1, 1), mesh_dim_names=names
                )
            passes, last = count(1), run.batch.accumulation
            model.register_forward_pre_hook(lambda *_: model.set_requires_gradient_sync(next(passes) % last == 0))
            parallelizer: Any = library("nemo_automodel.components.distributed.parallelizer").ModelParallelizer()
            return parallelizer._apply(
                model, mesh, mp_policy=config.mp_policy, enable_fsdp2_prefetch=config.enable_fsdp2_prefetch
            )

        def checkpoint(model: Any, *_: Any) -> None:
            parts: Any = library("nemo_automodel.components.distributed.activation_checkpointing")
            if type(model).__module__.startswith("nemo_automodel."):
                parts.apply_submodule_checkpointing(list(model.model.layers), False)
            else:
                enable(model, *_)

        enable = model._checkpoint
        auto.from_config, model.adapt, model._checkpoint = build, adapt, checkpoint
        library("memplan.probe.script.script").compute = compute
        library("memplan.probe.script.script").Script._cast = lambda script: nullcontext()  # FSDP2 casts
        library("memplan.probe.script.distributed_wrapping")._wrap_fsdp2 = shard

    @staticmethod
    def answer(run: RunSpec, value: Any) -> bool | int:
        """Answer that nothing is padded."""
        return True


_STAGES = {"dpo": "dpo", "orpo": "dpo", "simpo": "dpo", "kto": "kto", "reward": "rm"}
_TRAINERS = ("CustomDPOTrainer", "CustomKTOTrainer", "PairwiseTrainer")


class _Tags(list[int]):
    """The desirable examples, the first half of a batch: a mask's length is not known on fake tensors."""

    rows = 0

    def __invert__(self) -> list[int]:
        return [*range(len(self), self.rows)]


class LlamaFactoryScript(_Packed):
    """A run as LLaMA-Factory prepares it: its checkpointing and its adapters, under transformers' Seq2SeqTrainer."""

    imported: tuple[str, ...] = ("llamafactory.model.adapter",)
    unused = ("torchaudio",)

    @staticmethod
    def patch() -> None:
        """Have KTO count the examples of a batch by all of its tags."""
        without_extras()
        library("transformers.masking_utils")._ignore_causal_mask_sdpa = (
            lambda mask, queries, keys, start, window=None: window is None or keys < window
        )
        for stage in ("dpo", "kto", "rm"):
            library(f"llamafactory.train.{stage}.trainer")
        vars(library("llamafactory.train.kto.trainer"))["len"] = lambda value: getattr(value, "rows", 0) or len(value)

    @staticmethod
    def answer(run: RunSpec, value: Any) -> bool | int:
        """Answer transformers 5.6, which reads whether nothing is padded."""
        return True

    def _trainer(self, model: Any, run: RunSpec) -> Any:
        from memplan.probe.script.model import target_modules

        hparams: Any = library("llamafactory.hparams")
        method = run.method
        arguments = hparams.ModelArguments(
            model_name_or_path="", disable_gradient_checkpointing=run.kernels.checkpointing == "none"
        )
        arguments.quantization_bit = 4 if method.quantization is not None else None
        tuning = hparams.FinetuningArguments(
            stage=_STAGES.get(run.trainer, "sft"),
            finetuning_type="full" if method.kind == "full" else "lora",
            lora_rank=method.rank,
            lora_target=",".join(target_modules(run, model)) if method.kind != "full" else "all",
            use_dora="dora" in method.kind,
            pref_loss=run.trainer if run.trainer in ("orpo", "simpo") else "sigmoid",
        )
        library("llamafactory.model.model_utils.checkpointing").prepare_model_for_training(model, arguments)
        adapter: Any = library("llamafactory.model.adapter")
        model = adapter.init_adapter(model.config, model, arguments, tuning, is_trainable=True)
        if run.trainer == "reward":
            model = library("trl").AutoModelForCausalLMWithValueHead.from_pretrained(model)
            library("llamafactory.model.patcher").patch_valuehead_model(model)
            model.v_head.to(self.device)
            scores = sum(weight.numel() for weight in model.v_head.parameters())
            self.counted = tuple(count + scores for count in self.counted)
        copy = None
        if run.trainer in ("dpo", "kto") and method.kind == "full":
            copy = self._copied(run)().requires_grad_(False).to(library("torch").bfloat16)
        trainer: Any = library("transformers").Seq2SeqTrainer
        if run.trainer != "sft":
            stage: Any = vars(library(f"llamafactory.train.{tuning.stage}.trainer"))
            trainer = next(stage[name] for name in _TRAINERS if name in stage)
        tokenizer = self._tokenizer()
        own = {"tokenizer": tokenizer, "finetuning_args": tuning, "processor": None}
        own |= {} if run.trainer == "reward" else {"ref_model": copy}
        return trainer(
            model=model,
            args=self._arguments(
                run, "transformers", "Seq2SeqTrainingArguments", bf16=True, remove_unused_columns=False
            ),
            train_dataset=self._dataset(),
            **({"processing_class": tokenizer} if run.trainer == "sft" else own),
        )

    def _batch(self) -> tuple[dict[str, Any], int]:
        """Return a batch of TRL's SFT or of pairs; of other stages, as LLaMA-Factory collates them."""
        if self.run.trainer in ("sft", "reward"):
            return super()._batch()
        import torch

        rows = self.run.batch.micro * (1 if self.run.trainer == "kto" else 2)
        ids = torch.zeros((rows, self.run.batch.sequence), dtype=torch.int64, device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        if self.run.trainer == "kto":
            inputs |= {f"kl_{name}": value.clone() for name, value in inputs.items()}
            tags = _Tags(range(-(-rows // 2)))
            _Tags.rows, inputs["kto_tags"] = rows, tags
        return inputs, rows


class AxolotlScript(_Packed):
    """A run of an Axolotl config: its validation, patches, model loader, adapters and trainer."""

    imported: tuple[str, ...] = ("axolotl.core.builders",)
    gives_lengths = True
    unused = ("wandb",)

    @staticmethod
    def patch() -> None:
        """Launch none of its Triton kernels and of bitsandbytes' C functions, and log no memory."""
        without_launches()
        quantize: Any = library("axolotl.kernels.quantize")
        quantize._stream = quantize._ptr = quantize.cdequantize_blockwise_fp32 = lambda *_: None
        quantize._NF4_DEQUANT_KERNELS = dict.fromkeys(quantize._NF4_DEQUANT_KERNELS, lambda *_: None)
        library("axolotl.utils.bench").gpu_memory_usage_all = lambda *_: (0, 0, 0)

    @staticmethod
    def answer(run: RunSpec, value: Any) -> bool | int:
        """Return that nothing is padded, and the sequences of packed rows; for anything else, one."""
        if run.batch.packing and str(value.dtype) == "torch.int64":
            return run.batch.micro * packed_sequences(run)
        return not run.batch.packing or run.kernels.attention == "flash_attention_2"

    def _trainer(self, model: Any, run: RunSpec) -> Any:
        folder = str(Path(tempfile.gettempdir(), "run"))  # Axolotl looks for families' names in the path
        model.config.save_pretrained(folder)
        cfg: Any = library("axolotl.utils.config").validate_config(
            library("axolotl.utils.dict").DictDefault(self._config(run, folder, model)),
            {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_80"},
            {"torch_version": "2.13.0"},
        )
        library("axolotl.utils.config").normalize_config(cfg)
        tokenizer = self._tokenizer()
        loader: Any = library("axolotl.loaders").ModelLoader(cfg, tokenizer)

        def build() -> bool:
            """Stand in for from_pretrained, which reads weights."""
            loader.model = model
            return False

        loader._build_model = build
        adapted, _ = loader.load()
        builder: Any = library("axolotl.core.builders").HFCausalTrainerBuilder(cfg, adapted, tokenizer)
        builder.train_dataset = self._dataset()
        return builder.build(10)

    @staticmethod
    def _config(run: RunSpec, folder: str, model: Any) -> dict[str, Any]:
        from memplan.probe.script.model import target_modules

        method = run.method
        adapter = {
            "adapter": "lora" if method.quantization is None else "qlora",
            "load_in_4bit": method.quantization is not None,
            "lora_r": method.rank,
            "lora_alpha": 8,
            "lora_target_linear": method.targets == "all-linear",
            "lora_target_modules": [] if method.targets == "all-linear" else list(target_modules(run, model)),
            "peft_use_dora": "dora" in method.kind,
            **(
                {}
                if run.kernels.fused
                else dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
            ),
        }
        return {
            "base_model": folder,
            "output_dir": folder,
            "datasets": [{"path": folder, "type": "alpaca"}],
            "micro_batch_size": run.batch.micro,
            "gradient_accumulation_steps": 1,
            "sequence_len": run.batch.sequence,
            "num_epochs": 1,
            "learning_rate": 1e-4,
            "optimizer": str(run.optimizer.name),
            "bf16": "auto",
            "attn_implementation": str(run.kernels.attention),
            "sample_packing": run.batch.packing == "sample_packing",
            "gradient_checkpointing": run.kernels.checkpointing == "full",
            **(adapter if method.kind != "full" else {}),
        }


_TYPES = {"reward": "rm"}  # trainer of TRL -> `rlhf_type`


class SwiftScript(_Packed):
    """A run of ms-swift's `sft` or `rlhf`: its arguments, model patches, tuner, template and trainer."""

    imported: tuple[str, ...] = ("swift.pipelines.train.sft", "swift.pipelines.train.rlhf")

    @staticmethod
    def patch() -> None:
        """Leave out the accuracy, which is computed on the host, and the label of a single sequence's first token."""
        mixin: Any = library("swift.trainers.mixin")
        mixin.compute_acc = lambda *_, **__: {}
        prepare = mixin.SwiftMixin.prepare_logits_to_keep

        def prepare_logits_to_keep(self: Any, inputs: Any) -> None:
            prepare(self, inputs)
            if len(inputs["labels"]) == 1:
                inputs["labels"] = inputs["labels"][:, 1:]

        mixin.SwiftMixin.prepare_logits_to_keep = prepare_logits_to_keep

    @staticmethod
    def answer(run: RunSpec, value: Any) -> bool | int:
        """Return the index of the first label, and that nothing is padded."""
        return str(value.dtype) == "torch.bool"

    def _trainer(self, model: Any, run: RunSpec) -> Any:
        from memplan.probe.script.model import target_modules

        folder, method = tempfile.mkdtemp(), run.method
        model.config.save_pretrained(folder)
        self._tokenizer().save_pretrained(folder)
        register: Any = library("swift.model.register")
        is_sft = run.trainer == "sft"
        has_copy = run.trainer in ("dpo", "kto") and method.kind == "full"
        models = [model, self._copied(run)()] if has_copy else [model]  # the reference or teacher first
        teacher = {}
        for role, other in run.roles.named:
            models.append(self._other(run, other))
            teacher = {f"{role}_model": tempfile.mkdtemp(), f"{role}_model_type": models[-1].config.model_type}
            for part in (models[-1].config, self._tokenizer()):
                part.save_pretrained(teacher[f"{role}_model"])
        register.ModelLoader.get_model = lambda *_: models.pop()  # instead of from_pretrained
        adapter = {
            "tuner_type": "lora",
            "lora_rank": method.rank,
            "target_modules": ["all-linear"] if method.targets == "all-linear" else list(target_modules(run, model)),
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "use_dora": "dora" in method.kind,
            **({"quant_method": "bnb", "quant_bits": 4} if method.quantization is not None else {}),
        }
        kind: Any = library("swift.arguments")
        arguments: Any = (kind.SftArguments if is_sft else kind.RLHFArguments)(
            model=folder,
            model_type=model.config.model_type,
            template="dummy",
            dataset=["dataset"],
            torch_dtype=str(model.dtype).removeprefix("torch."),
            max_length=run.batch.sequence,
            per_device_train_batch_size=run.batch.micro,
            gradient_checkpointing=run.kernels.checkpointing == "full",
            optim=str(run.optimizer.name),
            bf16=True,
            report_to=[],
            output_dir=folder,
            check_model=False,
            **({"attn_impl": "flash_attention_2"} if run.batch.packing else {}),
            packing=run.batch.packing == "binpack",
            padding_free=run.batch.packing == "padding_free",
            **(adapter if method.kind != "full" else {"tuner_type": "full"}),
            **({} if is_sft else {"rlhf_type": _TYPES.get(run.trainer, run.trainer), "use_logits_to_keep": False}),
            **({"cpo_alpha": 0.0} if run.trainer == "simpo" else {}),
            **teacher,
        )
        train: Any = library(f"swift.pipelines.train.{'sft' if is_sft else 'rlhf'}")
        pipeline: Any = (train.SwiftSft if is_sft else train.SwiftRLHF)(arguments)
        adapted = pipeline.prepare_model(arguments, pipeline.model, template=pipeline.template)
        return library("swift.trainers").TrainerFactory.get_trainer_cls(arguments)(
            model=adapted,
            args=arguments.training_args,
            template=pipeline.template,
            train_dataset=self._dataset(),
            **({} if is_sft else pipeline._get_trainer_kwargs()),
        )

    def _batch(self) -> tuple[dict[str, Any], int]:
        """Return a batch of TRL's SFT; of pairs or of KTO's examples, as ms-swift's template collates them."""
        inputs, labels = super()._batch()
        if self.run.trainer in ("sft", "reward"):
            return inputs, labels
        import torch

        is_kto = self.run.trainer == "kto"
        rows = self.run.batch.micro * TRAINERS[self.run.trainer].rows
        ids = torch.zeros((rows, self.run.batch.sequence), dtype=torch.int64, device=self.device)
        if not self.run.batch.packing:
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        if is_kto:
            kinds = ("completion_", "KL_completion_")
            inputs = {f"{kind}{name}": value.clone() for kind in kinds for name, value in inputs.items()}
            inputs |= {"label": [row % 2 == 0 for row in range(rows)]}
        if self.run.trainer == "gkd":
            from memplan.probe.fake.kernels import selections
            from memplan.probe.fake.tracker import scalar_answers

            scalar_answers[:] = [lambda _: True]  # student and teacher have the same labels
            data: Any = library("swift.rl_core.data")
            sequences, tokens = inputs["labels"].shape
            selections[sequences, tokens] = sequences * (tokens - 1)
            batch = data.GKDBatch(data_source=library("swift.rlhf_trainers.gkd_loss").DataSource.DATASET)
            self.trainer._prepare_inputs = lambda inputs: inputs  # it would generate
            inputs = {"model_inputs": inputs, "gkd_batch": batch, "teacher_model_inputs": dict(inputs)}
        return inputs, labels

    def _checkpoint(self, model: Any, arguments: Any) -> None:
        self.trainer._prepare_gradient_checkpointing(self.trainer.template.get_base_model(model))


class UnslothScript(TrainerScript):
    """A run of Unsloth: its model's and its adapters' patches, and TRL's SFT, DPO or KTO as it patches them."""

    imported = ("trl", "torch._inductor.config", "torch._dynamo.trace_rules")

    @staticmethod
    def patch() -> None:
        """Import Unsloth as on a machine with an 80 GB card, and launch no kernels."""
        import importlib
        import os

        import torch

        library("torch._dynamo.trace_rules")
        without_launches()
        os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()
        os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"  # a fake tensor's blocks cannot be compiled
        os.system = lambda *_: 0  # it would run ldconfig
        cuda: Any = torch.cuda
        card = SimpleNamespace(
            name="A100",
            total_memory=80 << 30,
            major=8,
            minor=0,
            multi_processor_count=108,
            gcnArchName="",
            warp_size=32,
            L2_cache_size=40 << 20,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            shared_memory_per_block_optin=166912,
        )
        cuda.is_available = lambda: True
        cuda.get_device_properties = lambda *_: card
        cuda.mem_get_info = lambda *_: (70 << 30, 80 << 30)
        cuda.memory_reserved = cuda.memory_allocated = cuda.max_memory_reserved = lambda *_: 0
        cuda.is_current_stream_capturing = lambda: False
        torch.version.cuda = "13.0"
        torch._C._cuda_getCurrentRawStream = lambda index: 0
        reload = importlib.reload
        importlib.reload = lambda module: module if module.__name__.startswith("bitsandbytes") else reload(module)
        library("unsloth")
        importlib.reload = reload
        for kind in _FAST_MODELS.values():
            getattr(library(f"unsloth.models.{kind[4:-5].lower()}"), kind).pre_patch()
        kernels: Any = library("unsloth.kernels.utils")
        kernels._can_use_scratch = lambda device: True  # as on the default stream
        library("unsloth.utils.attention_dispatch").SDPA_HAS_GQA = True  # read from the docstring of torch's function
        losses: Any = library("unsloth_zoo.fused_losses.fused_linear")
        losses._launch = lambda device, run: run()
        fake: Any = library("torch._subclasses.fake_tensor").FakeTensor
        fake.data_ptr = lambda tensor: tensor.untyped_storage()._cdata  # by which Unsloth knows a tied head
        tracker: Any = library("memplan.probe.fake.tracker")
        replacements = tracker.data_free_kernels
        zoo = torch.ops.unsloth_zoo

        def log_probs(*given: Any) -> Any:
            *same, wants_gradient, need_h, need_w, need_b, rows, _ = given
            recomputes = (need_h or need_w or need_b) and not wants_gradient
            return losses._logprobs_impl(*same, wants_gradient, rows, recomputes, need_w)

        run = {  # what the operations run
            getattr(zoo, losses._CE_OP).default: losses._ce_impl,
            getattr(zoo, losses._LP_OP).default: log_probs,
            zoo.fused_linear_scale_rows.default: losses._scale_rows_impl,
        }
        tracker.data_free_kernels = lambda: {**replacements(), **run}
        cuda.is_available = lambda: False

    def _trainer(self, model: Any, run: RunSpec) -> Any:
        from memplan.probe.script.model import target_modules

        method, tokenizer, losses = run.method, self._tokenizer(), library("unsloth_zoo.fused_losses.fused_linear")
        sequences = run.batch.micro if run.trainer == "sft" else 0
        losses._keep_index = lambda targets, *_: _rows_but(sequences, targets)
        family = model.config.model_type
        fast: Any = getattr(library(f"unsloth.models.{family}"), _FAST_MODELS[family])
        model, tokenizer = fast.post_patch(model, tokenizer)
        for module in list(sys.modules.values()):
            if "fix_untrained_tokens" in vars(module):  # it reads values
                vars(module)["fix_untrained_tokens"] = lambda *_, **__: None
        library(
            "transformers"
        ).Trainer._inner_training_loop.__name__ = "_fast_inner_training_loop"  # the loop never runs
        model.max_seq_length = model.model.max_seq_length = run.batch.sequence
        model._saved_temp_tokenizer = tokenizer
        original: Any = library("unsloth.models.llama")
        for layer in model.model.layers:
            layer.self_attn.apply_qkv, layer.self_attn.apply_o = original.original_apply_qkv, original.original_apply_o
        checkpoints = {"full": True, "offload": "unsloth"}.get(str(run.kernels.checkpointing), False)
        if method.kind != "full":
            model = fast.get_peft_model(
                model,
                r=method.rank,
                lora_alpha=8,
                target_modules=list(_ALL) if method.targets == "all-linear" else list(target_modules(run, model)),
                use_gradient_checkpointing=checkpoints,
                use_dora="dora" in method.kind,
            )
        trainer = trainer_of(run)
        kind = getattr(library("trl"), f"{trainer.name}Trainer")
        for name in ("_prepare_dataset", "_precompute_ref_logps") if run.trainer != "sft" else ():
            for owner in (kind, kind.__mro__[1]):
                setattr(owner, name, lambda _, dataset, *__, **___: dataset)
        return kind(
            model=model,
            args=self._arguments(
                run, "trl", f"{trainer.name}Config", bf16=True, **dict(trainer.options), **self.options(run)
            ),
            train_dataset=self._dataset(),
            processing_class=tokenizer,
        )

    def _checkpoint(self, model: Any, arguments: Any) -> None:
        model.for_training()


def _rows_but(sequences: int, targets: Any) -> tuple[Any, int]:
    """Return the positions of labelled rows, and their number: all but the last of each sequence."""
    rows = targets.numel() - sequences
    return targets.new_zeros(rows), rows


_FAST_MODELS = {
    "llama": "FastLlamaModel",
    "mistral": "FastMistralModel",
    "qwen2": "FastQwen2Model",
    "qwen3": "FastQwen3Model",
    "gemma2": "FastGemma2Model",
}
_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def without_launches() -> None:
    """Have Triton's kernels compute nothing."""
    runtime: Any = library("triton.runtime")
    for kind in (runtime.JITFunction, runtime.Autotuner, runtime.Heuristics):
        kind.run = lambda *_, **__: None
