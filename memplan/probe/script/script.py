"""The training script that is traced on fake tensors and measured on a real GPU.

    script = build(run, torch.device("cuda"))
    script.step()

A step is what users of transformers write: forward, backward, clipping, optimizer step, gradients set to None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from memplan.probe.fake.tracker import scalar_answers
from memplan.probe.libraries import library, objective_of
from memplan.probe.refusals import checked_run
from memplan.probe.script.assisted import assist, build_assistant
from memplan.probe.script.distributed_wrapping import clip, load_device, unreduced_gradients, wrap
from memplan.probe.script.images import image_inputs
from memplan.probe.script.inputs import inputs_of, labels_of
from memplan.probe.script.losses import compute
from memplan.probe.script.model import base_of, build_model, facts_of, lower_of
from memplan.probe.script.next_token import token_chooser
from memplan.probe.script.optimizers import HostOptimizer, keep_embedding_states_in_32_bits, make_optimizer
from memplan.probe.script.parameter_counts import parameters
from memplan.probe.script.tensor_parallel import (
    group_by_mesh,
    part_of_tokens,
    ring_attention_backend,
    ulysses_attention,
)
from memplan.resolve.batches import decoder_prompt_tokens
from memplan.resolve.parallelism import is_wrapped
from memplan.spec.run import RunSpec

Phase = Callable[[str], AbstractContextManager[None]]
PHASES = (
    "load",
    "forward",
    "backward",
    "clip",
    "step",
    "metrics",
    "eval",
    "generate",
    "rollout",
    "reward",
    "save",
    "merge",
)


def no_phase(name: str) -> AbstractContextManager[None]:
    """Return a phase that records nothing."""
    return nullcontext()


def build(run: RunSpec, device: torch.device | str, phase: Phase = no_phase) -> Any:
    """Return the script of a run, with its model loaded on `device` in the phase `load`; TRL's own for its trainers.

    Raises SpecError for a run that the script cannot run, ProbeError if a library or a model class is missing.
    """
    run = checked_run(run)
    if run.trainer == "sft":
        return Script(run, torch.device(device), phase)
    from memplan.probe.script.trl_ppo import script_of

    return script_of(run)(run, device, phase)


def _context_parallel_attention(run: RunSpec) -> AbstractContextManager[None]:
    """Return the context in which context-parallel ranks run attention."""
    cp = run.parallelism.cp
    return ulysses_attention(cp) if run.parallelism.context == "ulysses" else ring_attention_backend(cp)


class Script:
    """A run's model and optimizer, and its step.

    phase       context entered around every part of a step, with a name from `PHASES`
    counted     total and active parameters of the model without adapters
    trainable   number of trained parameters, before ranks divide them

    For the task `forward` a step is one forward pass. For `generate` the phases are `prefill` and `decode`, preceded by
    `encode` if there is an encoder.
    """

    def __init__(self, run: RunSpec, device: torch.device, phase: Phase = no_phase) -> None:
        self.run, self.device, self.phase = part_of_tokens(run), device, phase
        self.model: Any
        with phase("load"):
            model = build_model(run, load_device(run, device))
            self.counted = parameters(base_of(model))
            self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.model = wrap(model, run, device)
            self.assistant: Any = build_assistant(run, device)
            del model
            training = run.task == "train"
            self.parameters = [p for p in self.model.parameters() if p.requires_grad] if training else []
            self.optimizers: list[Any] = []  # one, or one for each parameter
            self.optimizer = self._optimizer() if training else None
        scales = training and run.loop.grad_scaler
        self.scaler: Any = torch.amp.GradScaler(device.type) if scales else None  # pyright: ignore[reportPrivateImportUsage]

    def step(self) -> None:
        """Run one step of the task with all its phases; only what training keeps stays in memory."""
        cp = self.run.parallelism.cp
        with self.attention_backend(), _context_parallel_attention(self.run) if cp > 1 else nullcontext():
            match self.run.task:
                case "train":
                    self._train()
                case "forward":
                    self._forward()
                case "generate":
                    self.generate()

    def predict(self) -> tuple[Any, Any, Any]:
        """Return the loss of a batch, the model's outputs and the labels."""
        inputs, options = self._inputs()
        labels = labels_of(self.run, objective_of(self.run), self.model, inputs, self.device)
        return *self._computed(inputs, labels, options), labels

    def _optimizer(self) -> Any:
        run = self.run
        if run.loop.trainer:
            keep_embedding_states_in_32_bits(self.model, run.optimizer)
        make = HostOptimizer if run.parallelism.offload.optimizer else make_optimizer
        if not run.optimizer.in_backward:
            optimizer = make(run.optimizer, self.parameters)
            if optimizer is not None and max(run.parallelism.tp, run.parallelism.ep) > 1:
                group_by_mesh(optimizer)
            self.optimizers += [optimizer] if optimizer is not None else []
            return optimizer
        for parameter in self.parameters:
            alone = make(run.optimizer, [parameter])
            if alone is not None:
                _step_in_backward(parameter, alone)
                self.optimizers.append(alone)
        return None

    def _train(self) -> None:
        run, phase = self.run, self.phase
        for micro in reversed(range(run.batch.accumulation)):
            skips_reduction = run.loop.trainer and micro
            with unreduced_gradients(self.model, run) if skips_reduction else nullcontext():
                with phase("forward"):
                    loss, held = self._loss()
                with phase("backward"):
                    loss.backward()
                    del loss
                    if run.loop.hold_outputs != "step":
                        del held
        with phase("clip"):
            clips = run.loop.clip_grad_norm and not run.optimizer.in_backward
            if self.scaler is not None and self.optimizer is not None and clips:
                self.scaler.unscale_(self.optimizer)
            if clips:
                clip(self.model, run, self.parameters)
        with phase("step"):
            if self.optimizer is not None:
                if self.scaler is not None:
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                else:
                    self.optimizer.step()
            for parameter in self.parameters:
                parameter.grad = None

    def _loss(self) -> tuple[Any, Any]:
        """Return the scaled loss of one micro-batch, and the tensors that the script holds through backward."""
        run = self.run
        inputs, options = self._inputs()
        labels = labels_of(run, objective_of(run), self.model, inputs, self.device)
        loss, outputs = self._computed(inputs, labels, options)
        held = outputs if run.loop.hold_outputs or run.kernels.loss == "chunked_lm_head" else None
        del outputs
        if run.batch.accumulation > 1:
            loss = loss / run.batch.accumulation
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        return loss, (held, inputs, labels, options)

    def _computed(self, inputs: dict[str, Any], labels: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """Return the loss and the model's outputs, computed under autocast if the run uses it."""
        run, precision = self.run, self.run.precision
        alone = not is_wrapped(run.parallelism)  # otherwise the wrapped model casts its outputs
        in_fp32 = run.loop.trainer and precision.autocast and alone  # as accelerate wraps the model's forward
        with self._cast(), self._saving():
            loss, outputs = compute(str(run.kernels.loss), self.model, inputs, labels, in_fp32, **options)
        if in_fp32 and outputs is not None:
            outputs = library("accelerate.utils.operations").convert_to_fp32(outputs)
        return loss, outputs

    def _cast(self) -> AbstractContextManager[Any]:
        """Return the autocast context, if the run uses it."""
        if not self.run.precision.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=lower_of(self.run.precision))

    def _saving(self) -> AbstractContextManager[Any]:
        """Return a context that saves autograd's activations in host memory, if the run offloads them."""
        if not self.run.parallelism.offload.activations:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=True, device_type=self.device.type)

    def _inputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the model's inputs, and its options for mask, images and cache."""
        inputs = inputs_of(self.run, self.model, self.device)
        options: dict[str, Any] = {}
        base = base_of(self.model)
        names = inspect.signature(base.forward).parameters
        if self.run.loop.trainer and not self.model.training:  # transformers' Trainer sets the outer config alone
            base.config.use_cache = bool(self.run.loop.use_cache)
        elif "use_cache" in names or hasattr(
            base.config, "text_config"
        ):  # a decoder, or a model that passes it on to one
            options["use_cache"] = bool(self.run.loop.use_cache)
        elif hasattr(base.config, "use_cache"):  # it passes on keyword arguments, and reads its config
            base.config.use_cache = bool(self.run.loop.use_cache)
        if self.run.batch.sees:
            options |= image_inputs(self.run, base_of(self.model), inputs["input_ids"])
        if self.run.method.kind in ("multitask_prompt_tuning", "poly"):
            options["task_ids"] = torch.zeros(self.run.batch.micro, dtype=torch.int64, device=self.device)
        if self.run.loop.padded and "input_ids" in inputs:
            mask = torch.ones(inputs["input_ids"].shape, dtype=torch.int64)
            mask[0, -1] = 0
            options["attention_mask"] = mask.to(self.device)
        return inputs, options

    def _forward(self) -> None:
        with self.phase("forward"), torch.no_grad(), self._cast():
            inputs, options = self._inputs()
            if base_of(self.model).config.is_encoder_decoder:
                ids = labels_of(self.run, "seq2seq_lm", self.model, inputs, self.device)
                options["decoder_input_ids"] = ids
            self.model(**inputs, **options)

    def generate(self) -> None:
        """Generate as transformers' `generate` does: the prompt at once, then one token at a time with the cache.

        Only the last token's logits are computed, if the model supports it, and copied in fp32; local variables keep
        them until the next token's logits exist. A mask of ones stays in memory but is not passed to the model, which
        would skip it on a card.
        """
        if self.run.generation.assisted:
            self._assist()
            return
        if base_of(self.model).config.is_encoder_decoder:
            self._generate_from_source()
            return
        model = self.model
        accepted = inspect.signature(base_of(model).forward).parameters
        keeps = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        cache_argument = next((name for name in ("cache_params", "cache") if name in accepted), "past_key_values")
        facts = facts_of(model)
        chooser = token_chooser(self.run.generation, facts.generation.suppresses)
        with torch.no_grad(), self._cast():
            with self.phase("prefill"):
                inputs, options = self._inputs()
                ids, options["use_cache"] = inputs["input_ids"], True
                options |= self._cache(cache_argument)
                mask = options.pop("attention_mask", None)
                padded, mask = mask is not None, torch.ones_like(ids) if mask is None else mask
                outputs = self._read(ids, mask, padded, cache_argument, {**options, **keeps})
                cross_attention = _CrossAttentionInputs(options) if "cross_attention_mask" in options else None
                del inputs, options
                held = [outputs]
                del outputs
                cache, token = getattr(held[0], cache_argument), chooser.token(held)
                held.clear()
                chooser.reorder(cache)
            decode_mode = getattr(base_of(model), "_optimize_model_for_decode", nullcontext)  # since transformers 5
            # state space models get no mask while decoding, because the one new token is not padding
            passes_mask = padded and "num_attention_heads" in facts.keys.required
            with self.phase("decode"), decode_mode(), self._counting(lambda: ids.shape[-1]):
                for _ in range(self.run.batch.new_tokens - 1):
                    ids = torch.cat([ids, token], dim=-1)
                    mask = torch.cat([mask, torch.ones_like(token)], dim=-1)
                    arguments = {
                        "attention_mask": mask if passes_mask else None,
                        **(cross_attention.next() if cross_attention else {}),
                    }
                    outputs = model(input_ids=token, **arguments, **{cache_argument: cache}, use_cache=True, **keeps)
                    del arguments
                    held.append(outputs)
                    del outputs
                    cache, token = getattr(held[0], cache_argument), chooser.token(held)
                    held.clear()
                    chooser.reorder(cache)
                del token, cache, cross_attention
                chooser.forget()

    @contextmanager
    def _counting(self, tokens: Callable[[], int]) -> Generator[None]:
        """Answer a static cache's own count of its tokens, which BioGPT reads to make a mask, by `tokens`."""
        if "static" not in str(self.run.generation.cache_implementation):
            yield
            return
        scalar_answers.append(lambda tensor: tokens() if tensor.dtype == torch.int64 else 0)
        try:
            yield
        finally:
            scalar_answers.pop()

    def _assist(self) -> None:
        inputs, options = self._inputs()
        options.pop("use_cache", None)
        with torch.no_grad(), self._cast():
            assist(self.model, self.assistant, self.run, inputs["input_ids"], options, self.phase)

    def _generate_from_source(self) -> None:
        """Generate with an encoder-decoder: encode every source once, then decode the prompt and one token at a time.

        The sources and the encoder's outputs, repeated for every beam, stay in memory.

        Source: transformers 5.24 generation/utils.py _prepare_text_encoder_decoder_kwargs_for_generation,
        _expand_inputs_for_generation.
        """
        model, run = self.model, self.run
        base = base_of(model)
        beams = run.generation.num_beams
        facts = facts_of(model)
        chooser = token_chooser(run.generation, facts.generation.suppresses)
        with torch.no_grad(), self._cast():
            with self.phase("encode"):
                sources, options = self._inputs()
                mask = options.get("attention_mask")
                padded, tokens = mask is not None, base.main_input_name == "input_ids"
                if tokens and mask is None:
                    mask = torch.ones_like(sources["input_ids"])
                arguments = {"attention_mask": mask} if padded else {}
                encoded = base.get_encoder()(**sources, **arguments, return_dict=True)
                prompt = decoder_prompt_tokens(run.batch, facts)
                ids = torch.ones((run.batch.micro, prompt), dtype=torch.int64, device=self.device)
                del arguments, options
                if beams > 1:
                    ids = ids.repeat_interleave(beams, dim=0)
                    mask = mask.repeat_interleave(beams, dim=0) if mask is not None else None
                    for key in encoded:
                        encoded[key] = encoded[key].repeat_interleave(beams, dim=0)
                cache = self._crossing_cache()
            shared: dict[str, Any] = {"encoder_outputs": encoded, "cache": cache, "use_cache": True}
            if padded:
                shared["attention_mask"] = mask
            with self.phase("prefill"):
                held = [model(decoder_input_ids=ids, **shared)]
                token = chooser.token(held)
                held.clear()
                chooser.reorder(cache)
            with self.phase("decode"):
                for _ in range(run.batch.new_tokens - 1):
                    ids = torch.cat([ids, token], dim=-1)
                    held.append(model(decoder_input_ids=token, **shared))
                    token = chooser.token(held)
                    held.clear()
                    chooser.reorder(cache)
                del token, cache, shared, encoded, sources, mask
                chooser.forget()

    def _read(self, ids: Any, mask: Any, padded: bool, cache_argument: str, options: dict[str, Any]) -> Any:
        """Return the model's outputs for a prompt, or for its last chunk if it is read in chunks.

        A chunk's outputs stay alive until the next chunk's exist. Chunks after the first get a mask of ones, except
        with flash attention 2, which drops it.

        Source: transformers 5.24 generation/utils.py _prefill.
        """
        parts = torch.split(ids, self.run.generation.prefill_chunk_size or ids.shape[-1], dim=-1)
        outputs, read = None, 0
        drops_mask = self.run.kernels.attention == "flash_attention_2"
        for part in parts:
            visible = mask[:, : read + part.shape[-1]] if padded or (read and not drops_mask) else None
            read += part.shape[-1]
            outputs = self.model(input_ids=part, attention_mask=visible, **options)
            options[cache_argument] = getattr(outputs, cache_argument)
        return outputs

    def _cache(self, name: str) -> dict[str, Any]:
        """Return the cache that `generate` creates before it calls the model, by the model's name for it.

        Source: transformers 5.24 generation/utils.py _prepare_cache_for_generation.
        """
        from memplan.probe.script.caches import cache_of

        config = base_of(self.model).config
        cache = cache_of(self.run, config.get_text_config(decoder=True), getattr(config, "vision_config", None))
        return {} if cache is None else {name: cache}

    def _crossing_cache(self) -> Any:
        """Return the two caches of an encoder-decoder: for self-attention and for cross-attention.

        Source: transformers 5.24 generation/utils.py _prepare_static_cache, _prepare_cache_for_generation.
        """
        transformers: Any = library("transformers")
        batch, base = self.run.batch, base_of(self.model)
        config = base.config.get_text_config(decoder=True)
        if self.run.generation.cache_implementation != "static":
            return transformers.EncoderDecoderCache(
                transformers.DynamicCache(config=config), transformers.DynamicCache(config=config)
            )
        longest = decoder_prompt_tokens(batch, facts_of(self.model)) + batch.new_tokens - 1
        encoder_tokens = getattr(base.config, "max_source_positions", None) or batch.sequence
        caches = (transformers.StaticCache(config=config, max_cache_len=n) for n in (longest, encoder_tokens))
        return transformers.EncoderDecoderCache(*caches)

    def attention_backend(self) -> AbstractContextManager[None]:
        """Return a context that restricts torch's choice of attention kernel to the run's."""
        attention: Any = library("torch.nn.attention")
        backend = attention.SDPBackend
        match self.run.kernels.attention:
            case "sdpa_math":
                return attention.sdpa_kernel([backend.MATH])
            case "sdpa_cudnn":
                return attention.sdpa_kernel([backend.CUDNN_ATTENTION, backend.MATH])
            case "sdpa_efficient":
                return attention.sdpa_kernel([backend.EFFICIENT_ATTENTION, backend.MATH])
            case _:
                return nullcontext()


class _CrossAttentionInputs:
    """The image inputs and cross-attention mask that `generate` keeps; the mask grows by one row per token.

    Source: transformers 5.24 models/mllama/modeling_mllama.py prepare_inputs_for_generation,
    _update_model_kwargs_for_generation.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.images = {name: options[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        self.mask = options["cross_attention_mask"]

    def next(self) -> dict[str, Any]:
        """Return the model's options for the next token."""
        self.mask = torch.cat([self.mask, self.mask[:, -1:]], dim=1)
        return {"cross_attention_mask": self.mask[:, -1:].clone()}


def _step_in_backward(parameter: Any, optimizer: Any) -> None:
    """Update the parameter and free its gradient as soon as the gradient is accumulated."""

    def update(updated: torch.Tensor) -> None:
        optimizer.step()
        updated.grad = None

    parameter.register_post_accumulate_grad_hook(update)
