"""One pass of inference: what it reads and writes of the cache, and how its model was loaded."""

from __future__ import annotations

from typing import Literal, NamedTuple

from memplan.catalogue.inference.quantized_caches import Stored

Cache = Literal["", "dynamic", "static", "legacy", "quantized", "offloaded", "offloaded_static"]
Part = Literal["", "first", "middle", "last"]


class Loaded(NamedTuple):
    """How weights are loaded to run a model.

    warms        what is allocated once and given back before it: nothing, `half` of the weights' bytes, or `all`
    stores_head  the checkpoint has a head though it is tied, which goes when the model is whole
    backend      the kernel of packed weights (`memplan.catalogue.quantization.packed_kernels`)
    """

    warms: str = ""
    stores_head: bool = False
    backend: str = ""


class Pass(NamedTuple):
    """One pass of inference: `forward`, `prefill` or `decode`, and what keeps its keys and values; `encode`, of an
    encoder whose decoder generates; or `eval`, of a model that trains, with its loss.

    last_only   the head is given the last token alone, as transformers' logits_to_keep has it
    wide        the model itself makes its logits fp32, all of them
    room        of a prompt, attention has a mask, and so all keys that a static cache has room for
    longer      the sequence is longer than the window of a layer that has one
    few_rows    as many as a product with 4-bit weights has at most where it makes no whole matrix of them
    beams       every sequence of the batch is one of several of a prompt, which are ranked and put in another order
    samples     tokens are drawn, after temperature, top-k and top-p
    crosses     an encoder has read what the sequences are about: their mask is of that, and not of their own tokens
    suppresses  some tokens are never chosen: their scores are taken out in another tensor
    lingers     the loop has a name for the prompt's logits, until the pass after it has returned its own
    first       of the passes of a token, over what the prompt's left
    around      autocast stands around all passes, and keeps its casts of weights from the first on
    unpacks     it has so many rows that the kernel of packed weights makes whole matrices
    loaded      how the weights came there
    stored      how a quantised cache stores keys and values
    anew        there are so many that were not quantised that all are, anew
    part        of a prompt that is read in parts the `first`, a `middle` or the `last`; empty of one that is not
    made        the dtype that a static cache was made in before the prompt, where the prompt's pass casts it
    goes_on     there were passes before it, whatever its phase, and its tokens come after theirs
    verifies    it reads tokens that were proposed, and has logits of the token before them and of each of them: as many
                as the axis `verified` says. Its dtype, where it does
    follows     another round was before this one, whose logits the loop has names for
    drafted     those that proposed the tokens had logits for them: as many as the axis `proposed` says
    looks       they were looked up in those before
    proposes    it proposes a token, whose logits a list keeps
    stacks      the token is a round's last, and the logits of all are joined
    switches    every pass of the loop but its first `batches`
    batches     experts are multiplied by copies of their matrices (`memplan.catalogue.experts.decoding_experts`)
    records     a cache of a window keeps what that leaves out until tokens that were not accepted are cut off
    """

    phase: str
    cache: Cache = ""
    last_only: bool = True
    wide: bool = False
    room: bool = False
    longer: bool = False
    few_rows: int = 0
    beams: bool = False
    samples: bool = False
    crosses: bool = False
    suppresses: bool = False
    lingers: bool = False
    first: bool = False
    around: bool = False
    unpacks: bool = False
    loaded: Loaded = Loaded()
    stored: Stored | None = None
    anew: bool = False
    part: Part = ""
    made: str = ""
    goes_on: bool = False
    verifies: str = ""
    follows: bool = False
    drafted: bool = False
    looks: bool = False
    proposes: bool = False
    stacks: bool = False
    switches: bool = False
    batches: bool = False
    records: bool = False

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
        return self.phase == "decode" or self.goes_on

    @property
    def extends(self) -> bool:
        """Whether there are earlier tokens: it decodes, or goes on with a prompt."""
        return self.decodes or self.part in ("middle", "last")

    @property
    def chooses(self) -> bool:
        """Whether a token is chosen when it is over."""
        return self.generates and self.part in ("", "last")

    @property
    def static(self) -> bool:
        """Whether the cache has its whole room from the start."""
        return self.cache in ("static", "offloaded_static")

    def offloads(self, axis: str) -> bool:
        """Whether what a layer keeps goes to the host: of a cache of fixed size not what a window keeps."""
        return self.cache == "offloaded" or (self.cache == "offloaded_static" and axis == "kv")

    def keys(self, axis: str) -> str:
        """The tokens of keys that attention is given, by the axis that a cache of them has; empty where they are those
        of the pass itself."""
        if not self.static:
            return axis if self.extends else ""
        windowed = axis == "kv_window" and self.longer and not self.decodes
        return f"{axis}_static" if self.decodes or (self.room and not windowed) else ""
