"""The training script that is traced and measured: one, for tensors without data and for the GPU at hand.

    script = build(run, torch.device("cuda"))
    script.step()

It is what transformers' users write: forward, backward, clipping, the optimizer's step, gradients set to None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from memplan.probe.libraries import library
from memplan.probe.refusals import settled
from memplan.probe.script.assisted import assist, build_assistant
from memplan.probe.script.distributed_wrapping import accumulating, clip, home, wrap
from memplan.probe.script.images import pictures
from memplan.probe.script.inputs import inputs_of, labels_of
from memplan.probe.script.losses import compute
from memplan.probe.script.model import base_of, build_model, lower_of
from memplan.probe.script.next_token import choosing
from memplan.probe.script.optimizers import OnHost, make_optimizer, spare_embeddings
from memplan.probe.script.parameter_counts import parameters
from memplan.probe.script.tensor_parallel import attends_around, exchanges_heads, group_by_mesh, part_of_tokens
from memplan.resolve.batches import prompt_of_decoder
from memplan.resolve.decide import objective_of
from memplan.spec.run import RunSpec

Phase = Callable[[str], AbstractContextManager[None]]
PHASES = ("load", "forward", "backward", "clip", "step", "eval", "generate", "save", "merge")


def no_phase(name: str) -> AbstractContextManager[None]:
    """A phase that nobody watches."""
    return nullcontext()


def build(run: RunSpec, device: torch.device | str, phase: Phase = no_phase) -> Script:
    """The script of a run, its model loaded on `device` in the phase `load`.

    Raises SpecError for what the script does not run, ProbeError where a library or a model class is missing.
    """
    return Script(settled(run), torch.device(device), phase)


def _context(run: RunSpec) -> AbstractContextManager[None]:
    """How ranks attend that divide sequences."""
    cp = run.parallelism.cp
    return exchanges_heads(cp) if run.parallelism.context == "ulysses" else attends_around(cp)


class Script:
    """A run's model and optimizer, and its step.

    `phase` is entered around every part of a step, by the names of `PHASES`; `micro` is called before the first
    forward pass and every further one of an accumulated step. For the task `forward` a step is one forward pass, for
    `generate` the phases are `prefill` and `decode`, and before them `encode` where there is an encoder. `counted` are
    the parameters of the model without adapters, all and active ones, and `trainable` those that train, before ranks
    divide them.
    """

    def __init__(self, run: RunSpec, device: torch.device, phase: Phase = no_phase) -> None:
        self.run, self.device, self.phase = part_of_tokens(run), device, phase
        self.model: Any
        with phase("load"):
            model = build_model(run, home(run, device))
            self.counted = parameters(base_of(model))
            self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.model = wrap(model, run, device)
            self.assistant: Any = build_assistant(run, device)
            del model
            training = run.task == "train"
            self.parameters = [p for p in self.model.parameters() if p.requires_grad] if training else []
            self.optimizers: list[Any] = []  # all there are: one, or of every parameter its own
            self.optimizer = self._optimizer() if training else None
        scales = training and run.loop.grad_scaler
        self.scaler: Any = torch.amp.GradScaler(device.type) if scales else None  # pyright: ignore[reportPrivateImportUsage]

    def step(self) -> None:
        """One step of the task, all its phases; nothing of it is left but what training keeps."""
        cp = self.run.parallelism.cp
        with self.attends(), _context(self.run) if cp > 1 else nullcontext():
            match self.run.task:
                case "train":
                    self._train()
                case "forward":
                    self._forward()
                case "generate":
                    self.generate()

    def predict(self) -> tuple[Any, Any, Any]:
        """The loss of a batch, what the model returned with it, and the labels."""
        inputs, options = self._inputs()
        labels = labels_of(self.run, objective_of(self.run), self.model, inputs, self.device)
        return *self._computed(inputs, labels, options), labels

    def _optimizer(self) -> Any:
        run = self.run
        if run.loop.trainer:
            spare_embeddings(self.model, run.optimizer)
        make = OnHost if run.parallelism.offload.optimizer else make_optimizer
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
            waits = run.loop.trainer and micro  # the gradients are reduced in the last micro-batch only
            with accumulating(self.model, run) if waits else nullcontext():
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
        """The loss of one micro-batch as backward takes it, and what the script holds meanwhile."""
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
        """The loss, and what the model returned, under autocast where the run has it."""
        run, precision = self.run, self.run.precision
        with self._cast(), self._saving():
            loss, outputs = compute(str(run.kernels.loss), self.model, inputs, labels, **options)
        alone = run.parallelism.dp == 1  # else the model is wrapped so
        if run.loop.trainer and precision.autocast and outputs is not None and alone:  # as accelerate wraps its forward
            outputs = library("accelerate.utils.operations").convert_to_fp32(outputs)
        return loss, outputs

    def _cast(self) -> AbstractContextManager[Any]:
        """Autocast, where the run has it."""
        if not self.run.precision.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=lower_of(self.run.precision))

    def _saving(self) -> AbstractContextManager[Any]:
        """Where autograd saves what it keeps of a forward pass: in host memory, where the run offloads activations."""
        if not self.run.parallelism.offload.activations:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=True, device_type=self.device.type)

    def _inputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the model is given, and the mask, images and cache options of the run."""
        inputs = inputs_of(self.run, self.model, self.device)
        options: dict[str, Any] = {}
        if "use_cache" in inspect.signature(base_of(self.model).forward).parameters:  # it decodes
            options["use_cache"] = bool(self.run.loop.use_cache)
        if self.run.batch.images:
            options |= pictures(self.run, base_of(self.model), inputs["input_ids"])
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
        """As transformers' `generate` does it: the prompt at once, then a token at a time with the cache.

        Only the last token's logits are asked for, where the model can be asked, and are copied in fp32; names keep
        them until those of the next token are there. A mask of ones is kept beside the tokens; a card that looks at it
        makes no other of it, and so the model is given none.
        """
        if self.run.generation.assisted:
            self._assist()
            return
        if base_of(self.model).config.is_encoder_decoder:
            self._generate_from_source()
            return
        model = self.model
        known = inspect.signature(base_of(model).forward).parameters
        keeps = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        given_as = next((name for name in ("cache_params", "cache") if name in known), "past_key_values")
        chooser = choosing(self.run.generation, base_of(model).config.model_type)
        with torch.no_grad(), self._cast():
            with self.phase("prefill"):
                inputs, options = self._inputs()
                ids, options["use_cache"] = inputs["input_ids"], True
                options |= self._cache(given_as)
                mask = options.pop("attention_mask", None)
                padded, mask = mask is not None, torch.ones_like(ids) if mask is None else mask
                outputs = self._read(ids, mask, padded, given_as, {**options, **keeps})
                across = _Across(options) if "cross_attention_mask" in options else None
                del inputs, options
                held = [outputs]
                del outputs
                cache, token = getattr(held[0], given_as), chooser.token(held)
                held.clear()
                chooser.reorder(cache)
            switched = getattr(base_of(model), "_optimize_model_for_decode", nullcontext)  # since transformers 5
            # of one token nothing is padding, and state spaces alone are given no mask of those before
            sees = padded and base_of(model).config.model_type not in ("falcon_mamba", "mamba", "mamba2")
            with self.phase("decode"), switched():
                for _ in range(self.run.batch.new_tokens - 1):
                    ids = torch.cat([ids, token], dim=-1)
                    mask = torch.cat([mask, torch.ones_like(token)], dim=-1)
                    given = {"attention_mask": mask if sees else None, **(across.next() if across else {})}
                    outputs = model(input_ids=token, **given, **{given_as: cache}, use_cache=True, **keeps)
                    del given
                    held.append(outputs)
                    del outputs
                    cache, token = getattr(held[0], given_as), chooser.token(held)
                    held.clear()
                    chooser.reorder(cache)
                del token, cache, across
                chooser.forget()

    def _assist(self) -> None:
        inputs, options = self._inputs()
        options.pop("use_cache", None)
        with torch.no_grad():
            assist(self.model, self.assistant, self.run, inputs["input_ids"], options, self.phase)

    def _generate_from_source(self) -> None:
        """The same of an encoder-decoder: the encoder reads every source once, and what it returns is kept, repeated
        for every beam, beside the sources; the decoder's prompt follows, and a token at a time.

        Source: transformers 5.24 generation/utils.py _prepare_text_encoder_decoder_kwargs_for_generation,
        _expand_inputs_for_generation.
        """
        model, run = self.model, self.run
        base = base_of(model)
        beams = run.generation.num_beams
        chooser = choosing(run.generation, base.config.model_type)
        with torch.no_grad(), self._cast():
            with self.phase("encode"):
                sources, options = self._inputs()
                mask = options.get("attention_mask")
                padded, tokens = mask is not None, base.main_input_name == "input_ids"
                if tokens and mask is None:
                    mask = torch.ones_like(sources["input_ids"])
                given = {"attention_mask": mask} if padded else {}
                encoded = base.get_encoder()(**sources, **given, return_dict=True)
                prompt = prompt_of_decoder(run.batch, base.config.model_type)
                ids = torch.ones((run.batch.micro, prompt), dtype=torch.int64, device=self.device)
                del given, options
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

    def _read(self, ids: Any, mask: Any, padded: bool, given_as: str, options: dict[str, Any]) -> Any:
        """What the model returns of a prompt, or of the last part of one that is read in parts; the name of what it
        returned of a part stays until it has returned the next. With those after the first a mask of ones goes, too, at
        which flash attention 2 looks to leave it out.

        Source: transformers 5.24 generation/utils.py _prefill.
        """
        parts = torch.split(ids, self.run.generation.prefill_chunk_size or ids.shape[-1], dim=-1)
        outputs, read = None, 0
        looks = self.run.kernels.attention == "flash_attention_2"
        for part in parts:
            seen = mask[:, : read + part.shape[-1]] if padded or (read and not looks) else None
            read += part.shape[-1]
            outputs = self.model(input_ids=part, attention_mask=seen, **options)
            options[given_as] = getattr(outputs, given_as)
        return outputs

    def _cache(self, name: str) -> dict[str, Any]:
        """The cache that generation makes before the model is called, by the name the model has for it.

        Source: transformers 5.24 generation/utils.py _prepare_cache_for_generation.
        """
        from memplan.probe.script.caches import cache_of

        config = base_of(self.model).config
        made = cache_of(self.run, config.get_text_config(decoder=True), getattr(config, "vision_config", None))
        return {} if made is None else {name: made}

    def _crossing_cache(self) -> Any:
        """The two caches of an encoder-decoder: of its own tokens, and of those that the encoder has read.

        Source: transformers 5.24 generation/utils.py _prepare_static_cache, _prepare_cache_for_generation.
        """
        made: Any = library("transformers")
        batch, base = self.run.batch, base_of(self.model)
        config = base.config.get_text_config(decoder=True)
        if self.run.generation.cache_implementation != "static":
            return made.EncoderDecoderCache(made.DynamicCache(config=config), made.DynamicCache(config=config))
        longest = prompt_of_decoder(batch, base.config.model_type) + batch.new_tokens - 1
        read = getattr(base.config, "max_source_positions", None) or batch.sequence
        caches = (made.StaticCache(config=config, max_cache_len=n) for n in (longest, read))
        return made.EncoderDecoderCache(*caches)

    def attends(self) -> AbstractContextManager[None]:
        """torch's choice of attention kernel, narrowed where the run names one."""
        attention: Any = library("torch.nn.attention")
        backend = attention.SDPBackend
        match self.run.kernels.attention:
            case "sdpa_math":
                return attention.sdpa_kernel([backend.MATH])
            case "sdpa_efficient":
                return attention.sdpa_kernel([backend.EFFICIENT_ATTENTION, backend.MATH])
            case _:
                return nullcontext()


class _Across:
    """What generation keeps of the images that a prompt came with, whose keys and values are cached, and the mask over
    them, which has another row for every token.

    Source: transformers 5.24 models/mllama/modeling_mllama.py prepare_inputs_for_generation,
    _update_model_kwargs_for_generation.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.images = {name: options[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        self.mask = options["cross_attention_mask"]

    def next(self) -> dict[str, Any]:
        """What the model is given of it for the next token."""
        self.mask = torch.cat([self.mask, self.mask[:, -1:]], dim=1)
        return {"cross_attention_mask": self.mask[:, -1:].clone()}


def _step_in_backward(parameter: Any, optimizer: Any) -> None:
    """The parameter is updated as soon as its gradient is whole, and the gradient goes."""

    def update(updated: torch.Tensor) -> None:
        optimizer.step()
        updated.grad = None

    parameter.register_post_accumulate_grad_hook(update)
