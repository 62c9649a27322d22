"""Trainers that a profile does not have, references that cannot be, and what is not supported yet with them."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.inference.caches import caches
from memplan.catalogue.kernels.wiring import DISTILLING, GENERATING, TRAINERS
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.profiles.profiles import PROFILES, find_profile, library_behaviour
from memplan.core.errors import SpecError, refused
from memplan.resolve.defaults import defaults_of
from memplan.resolve.open_run import OpenRun
from memplan.resolve.parallelism import FSDP, WHOLE_WEIGHTS, ZERO
from memplan.resolve.refusals.refuse import not_yet_with
from memplan.spec.run import RunSpec


def trainer(run: OpenRun) -> Iterator[SpecError]:
    """Yield errors for a trainer, for its reference, and for what it cannot be combined with."""
    name, has_adapters, facts = run.trainer, run.method.kind in ADAPTERS, TRAINERS[run.trainer]
    if name == "sft":
        yield refused("reference", "sft has no reference model; set trainer (--trainer dpo)")
    if name not in run.library.trainer.trainers:
        having = [p.name for p in PROFILES if name in library_behaviour(p.name, "", False).trainer.trainers]
        yield refused("trainer", f"{run.profile} does not have {name}; {_of_others(run.profile, having)}")
    log_probs = run.library.trainer.log_probs
    if name == "distill" and log_probs != "tiled":  # the others were not read
        yield not_yet_with("trainer", f"{name} and {run.profile}", "trl-1.15")
    if facts.least > 1 and run.batch_facts.is_single_sequence and not run.library.trainer.takes_one:
        yield refused("batch.micro", "kto estimates a divergence from at least 2 completions; use 2 (--batch-size 2)")
    towers = [key for key in ("vision_config", "audio_config") if run.model.get(key)]
    if towers and (
        (log_probs == "joined" and facts.reference) or (name == "reward" and run.library.trainer.value_head)
    ):
        yield not_yet_with("trainer", f"{name}, {run.profile} and a vision or audio tower", "trl-1.15")
    if not facts.reference and run.reference not in (None, "none"):
        yield refused("reference", f"{name} has no reference model; use none, or trainer dpo")
    if run.reference == "adapters" and not has_adapters:
        yield refused("reference", f"method {run.method.kind} has no adapters to disable; use copy or precomputed")
    if run.reference == "none" and facts.reference and name not in GENERATING:
        choices = "adapters, copy or precomputed" if has_adapters else "copy or precomputed"
        yield refused("reference", f"{name} compares with a reference model; use {choices}")
    is_copy = run.reference == "copy" or (run.reference is None and facts.reference == "own" and not has_adapters)
    if (
        is_copy
        and run.is_sharded
        and run.parallelism.strategy == "fsdp2"
        and run.library.trainer.fsdp2_reference == "fails"
    ):
        text = "this TRL wraps a reference copy in FSDP1 with FSDP2's settings, which fails; use fsdp or zero3"
        yield refused("parallelism.strategy", text)
    if facts.own_loop:
        yield from _ppo(run, bool(towers), is_copy)
    if name in DISTILLING and run.roles.teacher is None:
        yield refused("roles.teacher", f"{name} learns from a teacher; name one (--teacher MODEL)")
    if name in GENERATING:
        yield from _generating(run, has_adapters)
    yield from _with_parts(run)


_SCORING = tuple(name for name, facts in TRAINERS.items() if "reward" in facts.models)
_ROLES = {"teacher": DISTILLING, "reward": _SCORING, "value": _SCORING}  # role -> trainers whose step may have it


def roles(run: RunSpec) -> Iterator[SpecError]:
    """Yield errors for other models that the trainer's step does not have, or not where they are."""
    for role, other in run.roles.named:
        if role != "value" and other.method is not None:
            yield refused(f"roles.{role}.method", "only applies to a value model, which trains; leave it out")
        if role not in _ROLES:
            kinds = "--reference copy, adapters or precomputed; or of a teacher, reward or value model"
            yield refused(f"roles.{role}", f"a checkpoint of its own is not supported yet; supported: {kinds}")
        elif run.trainer not in _ROLES[role]:
            yield refused(f"roles.{role}", f"only applies to trainer {' or '.join(_ROLES[role])}, not {run.trainer}")
        elif role == "value" and other.location == "server" and role in TRAINERS[run.trainer].models:
            yield not_yet_with(f"roles.{role}.location", f"trainer {run.trainer}", "gpu")
        elif role == "value" and other.quantization is not None:
            yield not_yet_with("roles.value.quantization", "a value model, which trains", "none")
        elif role == "value" and "parameters" in (run.serving.trainer_offload or ()):
            yield not_yet_with("serving.trainer_offload", "parameters and a value model", "optimizer")
        elif run.trainer == "gkd" and other.location == "server":
            yield refused("roles.teacher.location", "gkd reads all of a teacher's logits; use gpu, or trainer distill")
        elif (
            run.trainer == "distill"
            and other.location == "gpu"
            and run.parallelism.dp > 1
            and run.parallelism.strategy == "zero3"
        ):
            # trl 1.16.0 trainer/distillation_trainer.py _compute_loss; DeepSpeed 0.19.8 ZeROOrderedDict
            yield refused(
                "parallelism.strategy",
                "TRL's distill reads the teacher's head after its forward, when zero3 has freed it; use zero2 or fsdp2",
            )


def _ppo(run: OpenRun, has_tower: bool, is_copy: bool) -> Iterator[SpecError]:
    """Yield errors for what TRL's PPOTrainer cannot have, and for trainers that are another."""
    if run.library.trainer.prompt_logits:  # OpenRLHF's and verl's
        text = f"{run.profile} trains PPO's critic by itself; use grpo with a value model"
        yield refused("trainer", f"{text} (--trainer grpo --value-model MODEL)")
    if run.roles.reward is None:
        yield refused("roles.reward", "ppo scores completions with a reward model; name one (--reward-model MODEL)")
    if run.reference == "none":
        yield refused("reference", "ppo compares with a reference model; use copy, or adapters with a LoRA")
    if run.kernels.checkpointing not in (None, "none"):
        text = "PPOTrainer's own loop does not enable it, whatever its config says; use none"
        yield refused("kernels.checkpointing", text)
    if run.is_sharded and run.parallelism.strategy in FSDP:
        text = "PPOTrainer generates past FSDP, whose embeddings are then in parts, and fails; use ddp or zero"
        yield refused("parallelism.strategy", text)
    if run.parallelism.strategy == "ddp" and run.parallelism.dp > 1 and not is_copy:
        text = "PPOTrainer asks DDP for its policy, which fails, unless it has a reference model; use copy"
        yield refused("reference", text)
    published = run.model.family.generation.published_cache  # by code that transformers 5 does not run
    if has_tower or published or any(layer.kind == "state" for layer in caches(run.model)):
        yield not_yet_with("model", "trainer ppo", "transformers' text models without layers that keep a state")
    q = run.method.quantization
    if run.precision.autocast and q is not None and q.format in ("nf4", "fp4"):
        # trl 1.12.0 experimental/utils.py peft_module_casting_to_bf16: the final norm's fp32 output meets a bf16 head
        text = "PPOTrainer's bf16 casts a 4-bit model's norms to fp32, and its generation then fails outside autocast"
        yield refused("precision.autocast", f"{text}; set bf16=False there, and --precision bf16 here")
    if run.rollout != "transformers":
        yield refused("rollout", "PPOTrainer generates with transformers; use transformers")


def _generating(run: OpenRun, has_adapters: bool) -> Iterator[SpecError]:
    """Yield errors for completions, and for the reference of a trainer that generates."""
    if run.loop.entropy_bonus:
        behaviour = run.library.trainer
        has_entropies = behaviour.log_probs in ("tiled", "kernel", "shifted") and not behaviour.prompt_logits
        if not has_entropies or behaviour.divided_logits == "in_place":
            yield not_yet_with("loop.entropy_bonus", run.profile, "trl-1.10 and later")
        if run.kernels.loss == "fused" and behaviour.fused_gradients != "recomputed":
            yield refused("loop.entropy_bonus", "TRL refuses it with Liger's loss; use loss hf")
    if run.batch_facts.ungrouped:
        yield refused("batch.generations", run.batch_facts.ungrouped)
    if run.reference == "precomputed":
        own = "adapters" if has_adapters else "copy"
        yield refused("reference", f"{run.trainer} scores completions as it generates them; use none or {own}")
    if has_adapters and run.is_sharded and run.parallelism.strategy == "fsdp2" and run.rollout == "transformers":
        # accelerate 1.15 utils/fsdp_utils.py _find_final_norm finds none in a PeftModel; trl 1.16.0 distributed.py
        text = "peft generates past FSDP2's root, which is not gathered then, and fails; use fsdp, zero3 or vLLM"
        yield refused("parallelism.strategy", text)


def _with_parts(run: OpenRun) -> Iterator[SpecError]:
    """Yield errors for settings that are not supported yet with the trainer."""
    name = run.trainer
    scores_alone = name == "reward" and not run.library.trainer.value_head
    objective = "sequence_classification" if scores_alone else "causal_lm"
    if run.model.objective != objective:
        yield not_yet_with("objective", f"trainer {name}", objective)
    loss = defaults_of(run.library, name).kernels_loss
    behaviour, is_fused = run.library.trainer, run.kernels.loss == "fused"
    recomputes = behaviour.fused_gradients == "recomputed"
    losses = (loss, "fused") if behaviour.fused_gradients and name in behaviour.fused_trainers else (loss,)
    if run.kernels.loss not in (None, *losses):
        yield not_yet_with("kernels.loss", f"trainer {name} and {run.profile}", ", ".join(losses))
    if "cross_entropy" in (run.kernels.fused or ()):
        yield not_yet_with("kernels.fused", f"cross_entropy and trainer {name}", "rope, rms_norm, swiglu, lora")
    p = run.parallelism
    if p.world > 1 and (p.dp != p.world or p.strategy not in ("ddp", *FSDP, *ZERO)):
        yield not_yet_with("parallelism", f"trainer {name}", "one GPU, or data parallelism: ddp, fsdp or zero")
    # FSDP's traces with adapters fail where checkpoints are computed again; ZeRO 3 gathers the head for the loss
    strategies = (*WHOLE_WEIGHTS, *(() if run.method.kind in ADAPTERS or name != "grpo" or recomputes else FSDP))
    heads = {"lm_head", "embed_tokens"}.intersection(run.method.modules_to_save or ())
    if behaviour.log_probs == "chunked" and (heads or run.method.kind not in ADAPTERS):
        yield not_yet_with("method", f"trainer {name}, {run.profile} and a head that trains", "adapters, or trl-1.15")
    if is_fused and run.reference == "precomputed" and not recomputes:
        yield refused("reference", "Liger's loss of pairs reads the reference's hidden states; use copy or adapters")
    if is_fused and name in ("dpo", "kto") and run.method.kind in ADAPTERS and not behaviour.fused_adapters:
        text = f"{run.profile}'s {name.upper()} fails with Liger's loss and adapters; use hf, or trl-1.10"
        yield refused("kernels.loss", text)
    if is_fused and p.world > 1 and p.strategy not in strategies:
        yield not_yet_with("parallelism.strategy", f"{run.method.kind} and loss fused", ", ".join(strategies))
    if name == "gkd" and p.world > 1 and p.strategy in FSDP and run.library.trainer.log_probs == "rolled":
        yield not_yet_with(
            "parallelism.strategy", f"trainer gkd and {run.profile}, whose teacher FSDP divides", "zero3"
        )
    if p.offload.activations:
        yield not_yet_with("parallelism.offload.activations", f"trainer {name}", "false")
    if run.batch_facts.media:
        yield not_yet_with("batch.images", f"trainer {name}", "0")
    if run.method.virtual_tokens:
        yield not_yet_with("method.kind", f"trainer {name}", "methods without virtual tokens")


def _of_others(profile: str, having: list[str]) -> str:
    """Return which profiles have a trainer: the last one, if newer versions of the framework dropped it."""
    names, framework = [p.name for p in PROFILES], profile.rpartition("-")[0]
    newest = dict(reversed([(name.rpartition("-")[0], name) for name in having]))  # of each framework
    if framework in newest and names.index(profile) < names.index(newest[framework]):
        last = newest[framework]
        return f"the last with it is {find_profile(last).title} (--profile {last})"
    return f"use {' or '.join(reversed(newest.values()))}" if having else "no profile has it"
