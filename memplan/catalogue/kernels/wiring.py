"""How a model's operations are wired: what a run's kernels, loop and degrees change in every family."""

from __future__ import annotations

from typing import NamedTuple


class Wiring(NamedTuple):
    """Which attention kernel runs where. `backend` without a mask, `masked` with one.

    padded: a 2-D mask with zeros comes with the batch. windowed: the sequence is longer than the sliding window.
    target: the dtype that flash attention 2 is given. copies: what is copied before a kernel: `heads`, k and v
    repeated for every query head; `all`, q, k and v, one after the other. caches: the model returns k and v of
    every layer though it trains. triangles: every layer holds a causal mask for all positions, used or not.
    half_math: the plain product stays in the dtype of what it is given. whole_rotary: Phi-3 rotates whole heads,
    and joins nothing. one_mask: eager's mask is one for the whole batch, unless it is padded. scales_apart: Gemma's
    model scales the embeddings, not their module. float_masks: masks of torch's attention are of numbers, as
    eager's. uncapped: torch's attention is taken where scores should be capped, and does not cap them. single: the
    batch is one sequence, which only families in SINGLE treat differently. wide: what it is given is fp32. images:
    the batch has some. tower: the kernel of the attention in the tower that sees them. causal: no token sees those
    after it; an encoder's do, and there is a mask for padding only. checkpoints: blocks are checkpointed, as T5's
    code asks. by_name: they are given masks and positions by name. recomputes: what attention makes of q, k and v
    is made again on the way back. uneven: what tokens see of images is no multiple of 8 rows, to which the kernel
    pads their mask. drops: the config's attention_dropout is above 0; the fused kernels have it inside them.
    records: autograd does, and kernels hand it what it asks for. tables: every layer keeps rotary tables of its own
    (`memplan.catalogue.attention.old_rotary_tables`). caching: keys and values join those of earlier tokens, and lie
    head by head; but where they are handed_back as they came. decodes: there is one token a sequence, which sees all
    before it; with `several` there are more, which come after those. last_only: the logits of a sequence's last token
    are all that is asked for. generates: the pass is one of generation. part: of an encoder-decoder the `encoder` alone
    runs, or the `decoder` over what the encoder has left; beams: several of each prompt read that; crossed: its keys
    and values are cached already; static: of its own there is room for all tokens, which one token sees through a mask.
    begins, fills: where keys stand for windows of tokens, the kinds of windows that the token is the first of, and the
    last of.
    """

    backend: str
    masked: str
    padded: bool = False
    windowed: bool = False
    target: str = ""
    copies: str = ""
    caches: bool = False
    triangles: bool = False
    tables: str = ""
    half_math: bool = False
    whole_rotary: bool = False
    uncapped: bool = False
    one_mask: bool = False
    scales_apart: bool = False
    float_masks: bool = False
    single: bool = False
    wide: bool = False
    images: bool = False
    tower: str = "flash"
    causal: bool = True
    checkpoints: bool = False
    uneven: bool = False
    by_name: bool = False
    recomputes: bool = False
    drops: bool = False
    records: bool = True
    caching: bool = False
    handed_back: bool = False
    decodes: bool = False
    generates: bool = False
    several: bool = False
    last_only: bool = False
    part: str = ""
    beams: bool = False
    crossed: bool = False
    static: bool = False
    begins: tuple[str, ...] = ()
    fills: tuple[str, ...] = ()

    @property
    def lays(self) -> bool:
        """Whether a cache hands on keys and values that lie head by head."""
        return self.caching and not self.handed_back

    @property
    def one(self) -> bool:
        """Whether a sequence has one query, whose heads lie one after another as they are."""
        return self.decodes and not self.several

    def has_mask(self, sliding: bool = False) -> bool:
        """Whether transformers hands the attention of a layer a mask: a causal eager one always, and for padding and
        windows sdpa too."""
        if self.backend == "flash_2":
            return False
        causal = self.causal and (self.backend == "eager" or (self.static and self.decodes))
        return causal or self.padded or (sliding and self.windowed)
