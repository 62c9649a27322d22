"""The records of a `Family`, one for each concern: what libraries and engines do differently for one model_type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from memplan.core.frozen import FrozenDict
from memplan.core.records import NamedTuple
from memplan.models.tensor_plans import TensorParallelPlan

EMPTY: Mapping[str, Any] = FrozenDict()
DECODER = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # required keys of a decoder

# What a layer caches while it generates: a function of `memplan.catalogue.inference.caches`.
Cache = Literal[
    "attention",
    "chunked",
    "compressed",
    "convolution",
    "cross_layers",
    "delta",
    "indexed_blocks",
    "latent",
    "mamba-1",
    "mamba-2",
    "side_by_side",
    "two_widths",
]
NO_CLASS = "its class does not support it"  # why an attention implementation does not run
# The cache of the code published with the weights: always tuples, never of fixed size, or any of transformers'.
PublishedCache = Literal["", "tuples", "grows", "any"]


class ConfigKeys(NamedTuple):
    """How the family's configs are read.

    names     standard name -> keys of its configs, in the order they are looked up; () if it has no such key
    required  standard names that a config must have
    decoder   key of the nested config whose keys are read as the config's own
    renamed   aliases of keys that are not sizes: older names, and names that its config class writes
    fixed     keys that its classes ignore, with the value they behave as
    """

    names: Mapping[str, tuple[str, ...]] = EMPTY
    required: tuple[str, ...] = DECODER
    decoder: str = ""
    renamed: Mapping[str, str] = EMPTY
    fixed: Mapping[str, Any] = EMPTY


class AttentionFacts(NamedTuple):
    """How its attention runs.

    unsupported      attention implementations that its classes support, and its stack does not yet
    no_flash_2       why it does not run with flash_attention_2; "" if it does
    flash_3          a kernel of the Hub, named for FlashAttention 3, runs it nevertheless
    flex             its steps with flex_attention were traced
    rotary           queries and keys are rotated in a serving engine
    single_sequence  what a batch of one sequence changes: views, if a view of the heads takes the place of a copy with
                     every kernel, as with eager attention and the reference kernel; or layers, for its own layers
    """

    unsupported: tuple[str, ...] = ()
    no_flash_2: str = ""
    flash_3: bool = False
    flex: bool = False
    rotary: bool = True
    single_sequence: Literal["", "views", "layers"] = ""


class DirectReads(NamedTuple):
    """Linear layers whose weights the family's forward reads or changes itself, so they cannot be quantised.

    verb    what it does with them
    layers  their names
    key     key of the config that these layers depend on; "" if they are always there
    """

    verb: str
    layers: tuple[str, ...]
    key: str = ""


class TrainingFacts(NamedTuple):
    """How adapters, quantisation and placement treat its modules.

    never_quantised  modules that transformers never quantises, and loads in fp32 if the others are fp16
                     (`_keep_in_fp32_modules`)
    direct_reads     linear layers whose weights its forward uses itself
    skips            layers that must not be quantised, because the model multiplies by their weights
    fused_mixers     peft refuses out_proj and conv1d, whose weights fused kernels read
    all_linear_note  what goes wrong with peft's all-linear; "" if nothing
    experts_were     experts were modules before transformers 5, which is modelled too
    fuses_experts    peft takes gate_proj, up_proj and down_proj for experts' matrices, even if all layers are dense
    no_checkpoints   its class does not support gradient checkpointing
    shares_a_graph   its blocks read embeddings that train, whose graph the first reentrant checkpoint frees
    late_dropout     embeddings' dropout runs on the GPU of the last layer (device_map)
    packages         packages whose kernels its layers run if they are installed (`kernels.packages`)
    scans_alone      mamba_ssm computes only the scan, not all of a layer after its first projection
    """

    never_quantised: tuple[str, ...] = ()
    direct_reads: DirectReads | None = None
    skips: tuple[str, ...] = ()
    fused_mixers: bool = False
    all_linear_note: str = ""
    experts_were: bool = False
    fuses_experts: bool = False
    no_checkpoints: bool = False
    shares_a_graph: bool = False
    late_dropout: bool = False
    packages: tuple[str, ...] = ()
    scans_alone: bool = False


class GenerationFacts(NamedTuple):
    """How it generates.

    is_modelled         memplan models its decoding
    cache               what its layers cache
    published_cache     the cache of its published code, which transformers does not run; "" if transformers has it
    suppresses          its generation config suppresses tokens, which makes a further row of scores without them
    prompt_tokens       tokens that an encoder-decoder's decoder starts from
    ignores_early_exit  all layers run, whatever number of layers an early exit lowers the config's to
    all_logits          its class has no logits_to_keep: the head reads all tokens of a prompt
    """

    is_modelled: bool = True
    cache: Cache = "attention"
    published_cache: PublishedCache = ""
    suppresses: bool = False
    prompt_tokens: int = 1
    ignores_early_exit: bool = False
    all_logits: bool = False


class CheckpointFacts(NamedTuple):
    """How its weights are stored.

    experts        how a checkpoint stores experts that transformers fuses: gate and up separately, or transposed
    half_scales    its own FP8 checkpoints have block scales in the model's dtype
    runs_mxfp4     transformers runs its mxfp4 experts
    gguf           its architecture in GGUF files, general.architecture; "" if their tensor names are not known
    gguf_keys      keys of its GGUF files -> config keys, besides those that most families share; None leaves a key out.
                   None instead of a mapping if its files are not read, or read as another family
    gguf_switches  boolean config keys, each with the tensor of the first layer that exists if it is true
    gguf_modules   names of modules in GGUF files that mean something else than in other families
    gguf_fuses     gate and up projections are one matrix in its GGUF files
    gguf_rolls     llama.cpp keeps its states from before each proposed token, to roll back to
    """

    experts: Literal["", "split", "transposed"] = ""
    half_scales: bool = False
    runs_mxfp4: bool = False
    gguf: str = ""
    gguf_keys: Mapping[str, str | None] | None = None
    gguf_switches: Mapping[str, str] = EMPTY
    gguf_modules: Mapping[str, str] = EMPTY
    gguf_fuses: bool = False
    gguf_rolls: bool = False


class ParallelFacts(NamedTuple):
    """How libraries divide it among GPUs.

    plan            transformers' tensor-parallel plan; None if it has none
    fails           why transformers' own code fails with its plan; "" if it does not
    megatron        Megatron-core's plan, if it is not the same
    experts         transformers has an expert-parallel plan
    context         context parallelism works: attention is one call on the heads of the projections
    wraps_twice     accelerate wraps its embeddings for FSDP2, and then the table inside them
    wrapped_stem    prefix of the weights outside of blocks that FSDP wraps as a separate unit
    gpt             what Megatron-Bridge sets of Megatron-core's GPT for it, in addition to its sizes, in the keys of
                    `megatron_gpt`; None if Megatron-core does not have it or it was not read
    """

    plan: TensorParallelPlan | None = None
    fails: str = ""
    megatron: TensorParallelPlan | None = None
    experts: bool = False
    context: bool = False
    wraps_twice: bool = False
    wrapped_stem: str = ""
    gpt: Mapping[str, Any] | None = None


class ServingFacts(NamedTuple):
    """The differences that serving engines make for it.

    is_modelled       memplan has read its cache layout in engines
    adapts_tables     embeddings and head take adapters in vLLM
    shares_gate_a     gate and up of an expert share an adapter's A
    whole             parts of names of weights that every tensor-parallel rank has whole
    fp32_states       recurrent states are in fp32, unless the config says otherwise
    draft_tokens      tokens that SGLang proposes by default with a draft head
    has_draft_heads   draft heads (EAGLE) are configs of this family
    llama_cpp_window  llama.cpp's graph observes its sliding window
    """

    is_modelled: bool = True
    adapts_tables: bool = False
    shares_gate_a: bool = False
    whole: frozenset[str] = frozenset()
    fp32_states: bool = False
    draft_tokens: int = 4
    has_draft_heads: bool = False
    llama_cpp_window: bool = True


class Picture(NamedTuple):
    """One image as the vision tower sees it.

    rows        rows of patches, of each tile
    columns     columns of patches, of each tile
    tokens      tokens of the sequence that stand for the image
    merge       patches per side that are merged into one token
    tiles       tiles that the image is cut into
    added_rows  rows that the tower adds to each tile
    """

    rows: int
    columns: int
    tokens: int
    merge: int = 1
    tiles: int = 1
    added_rows: int = 0

    @property
    def patches(self) -> int:
        return self.rows * self.columns
