"""Writes a model card from a config and its checkpoint's headers: TOML that `memplan.models.cards` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from memplan.core.records import NamedTuple
from memplan.models.headers import StoredTensor
from memplan.models.model import ModelSpec
from memplan.program.stored.checkpoint import built_tensors, compare_checkpoint

# Config keys that no model's memory depends on: token ids, generation, labels, and how it was saved.
_IGNORED = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path auto_map bad_words_ids
    begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_pen exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id generation_config initializer_range label2id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tokenizer_class top_k top_p transformers.js_config transformers_version typical_p unk_token_id
    unsloth_fixed use_cache
"""
# A Hub id: owner and name, each starting with a letter or digit, then also dots, underscores and hyphens.
ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_UNPACKED = ("BF16", "F16", "F32", "F64")  # safetensors dtypes with one parameter per element


class CardFacts(NamedTuple):
    """The fields of a card other than the config.

    hf_id     id at Hugging Face; if empty, the card has a line to fill in
    source    where the config is from
    checked   today's date, YYYY-MM-DD
    licence   the model's licence, if known
    """

    hf_id: str
    source: str
    checked: str
    licence: str


def card(model: ModelSpec, config: Mapping[str, Any], facts: CardFacts) -> str:
    """Return the card of a model as TOML, given its published config."""
    kept = {key: value for key, value in config.items() if key not in _IGNORED.split()}
    values = {key: value for key, value in kept.items() if value is not None}
    nulls = list(_nulls(kept))
    parameters = sum(built.elements for built in built_tensors(model).values())
    lines = [_id(facts.hf_id), f"source = {_value(facts.source)}", f"checked = {facts.checked}"]
    if facts.licence:
        lines.append(f"licence = {_value(facts.licence)}")
    lines += [f"parameters = {parameters}", *_published(model, parameters)]
    if nulls:
        lines.append(f"nulls = {_value(nulls)}")
    return "\n".join([*lines, *_table("config", values)]) + "\n"


def _nulls(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that are null but have a default in memplan; nested ones as `text_config.sliding_window`."""
    parts = {key: cast(Mapping[str, Any], value) for key, value in config.items() if isinstance(value, Mapping)}
    plain = {part: {key: value for key, value in inner.items() if value is not None} for part, inner in parts.items()}
    filled = ModelSpec({**{key: value for key, value in config.items() if value is not None}, **plain}).config
    yield from (key for key, value in config.items() if value is None and filled.get(key) is not None)
    for part, inner in parts.items():
        filled_part = cast(Mapping[str, Any], filled.get(part) or {})
        for key, value in inner.items():
            if value is None and (
                filled_part.get(key) is not None or (part == "text_config" and filled.get(key) is not None)
            ):
                yield f"{part}.{key}"


def _id(hf_id: str) -> str:
    line = f"hf_id = {_value(hf_id or 'owner/name')}"
    return line if hf_id else f"{line}  # to be filled in: its id at Hugging Face; --hf-id writes it"


def id_in(config: Mapping[str, Any]) -> str:
    """Return the Hub id that a config was saved from (`_name_or_path`); empty if it is a path."""
    name = config.get("_name_or_path")
    return name if isinstance(name, str) and re.fullmatch(ID, name) else ""


def _published(model: ModelSpec, parameters: int) -> Iterator[str]:
    """Yield the parameter count from the checkpoint's headers, and why it differs from what the model builds."""
    checkpoint = model.checkpoint
    stored = checkpoint.tensors if checkpoint is not None and checkpoint.kind == "safetensors" else ()
    if checkpoint is None or not stored or any(tensor.dtype not in _UNPACKED for tensor in stored):
        yield "# published: the publisher's parameter count, with published_source, and difference if it differs"
        return
    published = sum(tensor.elements for tensor in stored)
    yield f"published = {published}"
    yield f"published_source = {_value(f'headers of the safetensors, {checkpoint.where}')}"
    if published != parameters:
        yield f"difference = {_value(_difference(model, stored, published - parameters))}"


def _difference(model: ModelSpec, stored: tuple[StoredTensor, ...], difference: int) -> str:
    """Return which tensors are stored but not built, with their sizes, or which are built but not stored."""
    comparison, parameters = compare_checkpoint(model, stored), built_tensors(model)
    extra = [*comparison.extra, *comparison.buffers]
    if comparison.missing:
        missing = [f"{name} {parameters[name].elements}" for name in comparison.missing[:3]]
        more = f"; it also stores {', '.join(_kinds(extra))}" if extra else ""
        return f"the checkpoint does not store {', '.join(missing)}{more}, {difference:+}"
    kinds = _kinds(extra)
    return f"the checkpoint also stores {' and '.join(kinds)}, {' + '.join(kinds.values())} = {difference}"


def _kinds(tensors: Iterable[StoredTensor]) -> dict[str, str]:
    """Group tensors that differ only in their layer; values are number and size, such as `32 x 64`."""
    counted: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.name), tensor.elements
        counted[kind] = counted.get(kind, 0) + 1
    return {name: f"{number} x {elements}" for (name, elements), number in counted.items()}


def _table(path: str, mapping: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a TOML table: its values, then its nested tables."""
    tables = {key: cast(Mapping[str, Any], value) for key, value in mapping.items() if isinstance(value, Mapping)}
    yield ""
    yield f"[{path}]"
    for key, value in mapping.items():
        if key not in tables and value is not None:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in tables.items():
        yield from _table(f"{path}.{_key(key)}", value)


def _value(value: Any) -> str:
    """Return a value as TOML. Nulls in lists and inline tables are dropped, as TOML has none."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)  # inf, nan and 1e-05 are valid TOML
    if isinstance(value, Mapping):
        items = cast(Mapping[str, Any], value).items()
        return "{" + ", ".join(f"{_key(key)} = {_value(it)}" for key, it in items if it is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(it) for it in cast(list[Any], value) if it is not None) + "]"
    return str(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)
