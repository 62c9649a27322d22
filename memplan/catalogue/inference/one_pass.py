"""One pass of inference: how it uses the cache, and how its model was loaded."""

from __future__ import annotations

from typing import Literal

from memplan.catalogue.inference.quantized_caches import CacheQuantization
from memplan.core.records import NamedTuple

Cache = Literal["", "dynamic", "static", "legacy", "quantized", "offloaded", "offloaded_static"]
PromptPart = Literal["", "first", "middle", "last"]


class LoadOptions(NamedTuple):
    """How weights are loaded to run a model.

    warms        allocated once and freed before loading: nothing, `half` of the weights' bytes, or `all`
    stores_head  the checkpoint has a head although it is tied; it is freed once the model is complete
    backend      the kernel of packed weights (`memplan.catalogue.quantization.packed_kernels`)
    """

    warms: str = ""
    stores_head: bool = False
    backend: str = ""


class Pass(NamedTuple):
    """One pass of inference.

    It has more than 20 fields because each changes the operations by itself, and a stack is cached by all of them.

    phase                 `forward`, `prefill` or `decode`; `encode` for an encoder whose decoder generates; `eval` for
                          a model in training, with its loss
    cache                 how keys and values are cached
    last_only             the head gets only the last token, as with transformers' logits_to_keep
    casts_logits          the model itself casts all its logits to fp32
    reads_capacity        attention has a mask, and reads a static cache's full capacity even in the prompt's pass
    longer                the sequence is longer than the window of a sliding layer
    few_rows              most rows of a product with 4-bit weights that may read the packed matrix
    beams                 beam search: sequences of a prompt are ranked and reordered
    samples               tokens are sampled
    has_encoder           the decoder of an encoder-decoder: the mask covers the encoder's tokens, not its own
    suppresses            some tokens are never chosen: suppressing them copies the scores
    holds_prompt_logits   the loop holds the prompt's logits until the next pass has returned its own
    first                 the first pass after a prompt that is cached without a copy: it finds all of what was cached
    spans_autocast        one autocast context spans all passes, and keeps its casts of weights from the first on
    keeps_skipped_casts   also those of what this pass skips, because an earlier one ran it
    unpacks               it has enough rows for the kernel of packed weights to dequantise matrices
    loaded                how the weights were loaded
    stored                how a quantised cache stores keys and values
    requantises_cache     the residual of a quantised cache is full, so all tokens are quantised again
    part                  `first`, `middle` or `last` part of a prompt that is read in chunks; otherwise empty
    allocated_dtype       dtype in which a static cache was allocated before the prompt, if the prompt's pass casts it
    follows_passes        passes came before it, whatever its phase, and its tokens follow theirs
    verifies              dtype of the logits if it verifies proposed tokens; the axis `verified` counts those logits
    follows               another round came before, whose logits the loop holds
    drafted               an assistant proposed the tokens, and its logits are kept; the axis `proposed` counts them
    uses_lookup           the tokens were proposed by prompt lookup
    proposes              it proposes a token, whose logits a list keeps
    stacks                the token is a round's last, and the round's logits are stacked
    batches_later_passes  every pass of the loop but the first sets `batches`
    batches               experts multiply copies of their matrices (`memplan.catalogue.experts.decoding_experts`)
    records               a sliding layer's cache keeps tokens outside the window until rejected tokens are cut off
    warps                 temperature, top-k and top-p change the scores from which tokens are sampled
    has_row_positions     positions are computed from the mask, for each sequence
    """

    phase: str
    cache: Cache = ""
    last_only: bool = True
    casts_logits: bool = False
    reads_capacity: bool = False
    longer: bool = False
    few_rows: int = 0
    beams: bool = False
    samples: bool = False
    has_encoder: bool = False
    suppresses: bool = False
    holds_prompt_logits: bool = False
    first: bool = False
    spans_autocast: bool = False
    keeps_skipped_casts: bool = False
    unpacks: bool = False
    loaded: LoadOptions = LoadOptions()
    stored: CacheQuantization | None = None
    requantises_cache: bool = False
    part: PromptPart = ""
    allocated_dtype: str = ""
    follows_passes: bool = False
    verifies: str = ""
    follows: bool = False
    drafted: bool = False
    uses_lookup: bool = False
    proposes: bool = False
    stacks: bool = False
    batches_later_passes: bool = False
    batches: bool = False
    records: bool = False
    warps: bool = True
    has_row_positions: bool = False

    @property
    def generates(self) -> bool:
        return self.phase in ("prefill", "decode")

    @property
    def encodes(self) -> bool:
        return self.phase == "encode"

    @property
    def evaluates(self) -> bool:
        return self.phase == "eval"

    @property
    def decodes(self) -> bool:
        return self.phase == "decode" or self.follows_passes

    @property
    def extends(self) -> bool:
        """Whether earlier tokens exist: it decodes, or continues a prompt."""
        return self.decodes or self.part in ("middle", "last")

    @property
    def chooses(self) -> bool:
        """Whether a token is chosen at its end."""
        return self.generates and self.part in ("", "last")

    @property
    def static(self) -> bool:
        """Whether the cache is allocated at full capacity from the start."""
        return self.cache in ("static", "offloaded_static")

    def offloads(self, axis: str) -> bool:
        """Return whether a layer's cache is offloaded to the host. A static cache's sliding layers are not."""
        return self.cache == "offloaded" or (self.cache == "offloaded_static" and axis == "kv")

    def keys(self, axis: str) -> str:
        """Return the axis of the keys attention reads, given the cache's axis; empty for only the pass's own keys."""
        if not self.static:
            return axis if self.extends else ""
        windowed = axis == "kv_window" and self.longer and not self.decodes
        return f"{axis}_static" if self.decodes or (self.reads_capacity and not windowed) else ""
