"""State spaces: Mamba 2, and the hybrids that use its mixer.

transformers scans with mamba-ssm's and causal-conv1d's kernels if they are installed, otherwise chunk by chunk in
torch. This is the torch code, exact against a trace of it.

Axes (more in `memplan.program.axes.chunked`):

mh, mp     heads, and their width
mn         numbers in a state
mg         groups of heads
inner      `mh mp` channels
convolved  `inner` and the two projections of the state
projected  output channels of the input projection
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS
from memplan.catalogue.decoder.attention import llama_attention, rope
from memplan.catalogue.decoder.frame import after, before, decoder_block, inputs, lm_head, masks, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.rotation import attend_heads_first, partial_rope
from memplan.catalogue.decoder.scaling import scaled_branch, scaled_embeddings, scaled_logits
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.families.mixtures import granite_mixture, granite_mlp
from memplan.catalogue.kernels import ops, packages
from memplan.catalogue.kernels.activations import relu_squared
from memplan.catalogue.kernels.recurrent import (
    causal_conv,
    cumulate,
    differences,
    exp,
    negative_exp,
    pad,
    unpadded,
)
from memplan.catalogue.kernels.recurrent_step import cached_state, selective_state_update_2
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import UnsupportedModelError
from memplan.core.ir import Block, Op, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/mamba2/modeling_mamba2.py"
_X, _STATE, _STEPS = "b s mh mp", "b s mh mn", "b s mh"
_X_ROWS, _STATE_ROWS = "b s_chunks mh mp", "b s_chunks mh mn"
_ROWS, _PAIRS = "b mh s_chunks", "b mh s_chunks chunk"


def segment_sum(name: str, x: str, y: str, rows: str, columns: str) -> tuple[Op, ...]:
    """`exp` of the sums of x from every position of a chunk to every later one: masked, summed and masked again."""
    pairs, square = f"{rows} {columns}", f"{columns} {columns}"
    upper, above = f"{y}.upper", f"{y}.above"

    def mask(which: str) -> Op:
        return Op(
            f"{name}.{which.rpartition('.')[2]}",
            (),
            (Tensor(which, square, "bool"),),
            scratch=(Tensor("ones", square, "bool"), Tensor("lower", square, "bool")),
        )

    return (
        mask(upper),
        ops.masked_fill(f"{name}.first_mask", x, upper, f"{y}.terms", pairs),
        cumulate(f"{name}.sums", f"{y}.terms", f"{y}.sums", pairs),
        mask(above),
        ops.masked_fill(f"{name}.second_mask", f"{y}.sums", above, f"{y}.masked", pairs),
        ops.release_names(f"{y}.terms", f"{y}.sums"),
        exp(f"{name}.exp", f"{y}.masked", y, pairs)._replace(autocast="fp32"),
    )


def chunk_scan(name: str, y: str, wiring: Wiring) -> tuple[Op, ...]:
    """mamba2_chunk_scan: from `x`, `B` and `C` (`b s mg mn`), `dt` and `rate` to `b s_chunks mh mp` in fp32.

    Products read their operands head by head. Of a single chunk, x and the states lie so, and of a single sequence all.
    """
    of, new = name, "new"
    by_head = ops.view if wiring.scans_once else ops.copy
    any_by_head = by_head if wiring.is_single_sequence else ops.copy
    return (
        ops.add_weight(f"{of}.dt", "dt", "dt.biased", _STEPS, Weight(f"{of}.dt_bias", "mh", "mixer"), "=dt"),
        ops.activation(f"{of}.softplus", "dt.biased", "dt.plus", _STEPS)._replace(autocast="fp32"),
        ops.clamp(f"{of}.clamp", "dt.plus", "dt.step", _STEPS, 2),
        ops.cast(f"{of}.x_float", "x.heads", "x32", _X, "fp32"),
        *(
            op
            for t in "BC"
            for op in (
                ops.cast(f"{of}.{t}_float", t, f"{t}32", "b s mg mn", "fp32"),
                ops.copy(f"{of}.{t}_heads", f"{t}32", f"{t}.heads", _STATE, gradient=new),
            )
        ),
        pad(f"{of}.pad_x", "x32", "x.rows", _X_ROWS),
        _skip(f"{of}.D"),
        ops.cast(f"{of}.dt_float", "dt.step", "dt32", _STEPS, "fp32"),
        ops.spread(f"{of}.x_dt", "x32", "dt32", "x.dt", _X),
        ops.cast(f"{of}.dt_again", "dt.step", "dt32.again", _STEPS, "fp32"),
        ops.spread(f"{of}.steps", "dt32.again", "rate", "steps", _STEPS),
        pad(f"{of}.chunks_of_x", "x.dt", "x.chunks", _X_ROWS),
        pad(f"{of}.chunks_of_steps", "steps", "steps.rows", "b s_chunks mh"),
        pad(f"{of}.chunks_of_B", "B.heads", "B.rows", _STATE_ROWS),
        pad(f"{of}.chunks_of_C", "C.heads", "C.rows", _STATE_ROWS),
        ops.release_names("x.dt", "steps", "B.heads", "C.heads"),
        cumulate(f"{of}.cumsum", "steps.rows", "cum", _ROWS),
        *segment_sum(f"{of}.segments", "steps.rows", "decay", _ROWS, "chunk"),
        any_by_head(f"{of}.C_of_scores", "C.rows", "C.scores", _STATE_ROWS),
        any_by_head(f"{of}.B_of_scores", "B.rows", "B.scores", _STATE_ROWS),
        ops.matmul(f"{of}.scores", "C.scores", "B.scores", "scores", _PAIRS),
        ops.mul(f"{of}.decayed_scores", "scores", "decay", "scores.decayed", _PAIRS),
        by_head(f"{of}.values", "x.chunks", "x.values", _X_ROWS),
        ops.matmul(f"{of}.diagonal", "scores.decayed", "x.values", "diagonal", _X_ROWS),
        differences(f"{of}.to_the_end", "cum", "cum.left", _ROWS),
        exp(f"{of}.decay_of_states", "cum.left", "cum.decay", _ROWS)._replace(autocast="fp32"),
        ops.spread(f"{of}.B_decay", "B.rows", "cum.decay", "B.decayed", _STATE_ROWS),
        by_head(f"{of}.x_of_states", "x.chunks", "x.states", _X_ROWS),
        any_by_head(f"{of}.B_of_states", "B.decayed", "B.states", _STATE_ROWS),
        _uncounted(ops.matmul(f"{of}.states", "x.states", "B.states", "states.made", "b chunks mh mp mn")),
        Op(f"{of}.zeros", (), (Tensor("states.zero", "b 1 mh mp mn", "=states.made"),)),
        ops.cat(f"{of}.cat", ("states.zero", "states.made"), "states.all", "b borders mh mp mn", gradient="new"),
        pad(f"{of}.pad_decay", "cum", "cum.borders", "b mh borders"),
        *segment_sum(f"{of}.chunk_segments", "cum.borders", "decay.chunks", "b mh borders", "borders"),
        any_by_head(f"{of}.states_by_head", "states.all", "states.flat", "b borders mh mp mn"),
        ops.matmul(f"{of}.recurrence", "decay.chunks", "states.flat", "states.new", "b borders mh mp mn"),
        ops.release_names("states.all"),
        exp(f"{of}.decay_out", "cum", "cum.out", _ROWS)._replace(autocast="fp32"),
        any_by_head(f"{of}.C_of_states", "C.rows", "C.states", _STATE_ROWS),
        ops.view(f"{of}.before_chunks", "states.new", "states.start", "b chunks mh mp mn", gradient=new),
        by_head(f"{of}.states_in", "states.start", "states.in", "b chunks mh mp mn"),
        _uncounted(ops.matmul(f"{of}.C_times_states", "C.states", "states.in", "off", _X_ROWS)),
        ops.spread(f"{of}.off_diagonal", "off", "cum.out", "off.decayed", _X_ROWS),
        ops.add(f"{of}.add", "diagonal", "off.decayed", "sum", _X_ROWS),
        ops.copy(f"{of}.contiguous", "sum", "sum.flat", _X_ROWS),
        ops.release_names("sum"),
        ops.add(f"{of}.skip", "sum.flat", "x.skipped", y, _X_ROWS),
        ops.release_names("dt.step", "x.skipped", "steps.rows", "B.rows", "C.rows", "x.chunks", "cum", "decay"),
        ops.release_names(
            "diagonal", "B.decayed", "states.zero", "states.new", "decay.chunks", "cum.out", "off.decayed"
        ),
        ops.release_names("off", "cum.decay", "scores", "scores.decayed"),
    )


def _uncounted(product: Op) -> Op:
    """Return a product of rows with what exists once per chunk, without counting its arithmetic.

    By its axes it would be counted once per chunk for each row. It is a hundredth of the projections'.
    """
    return product._replace(product="")


def _skip(name: str) -> Op:
    w = Weight(name, "mh", "mixer")
    return ops.multiply_weight(name, "x.rows", "x.skipped", _X_ROWS, w)


def gated_norm(name: str, x: str, gate: str, y: str) -> tuple[Op, ...]:
    """MambaRMSNormGated: multiplied by silu of the gate in fp32, then normalised group by group."""
    shape = "b s mg grouped"
    return (
        ops.cast(f"{name}.gate_float", gate, f"{y}.gate32", shape, "fp32"),
        ops.activation(f"{name}.silu", f"{y}.gate32", f"{y}.act", shape),
        ops.mul(f"{name}.product", x, f"{y}.act", f"{y}.gated", shape),
        *ops.rms_norm(name, f"{y}.gated", y, shape, "inner"),
        ops.release_names(x, f"{y}.act"),
    )


def gated(name: str, x: str, gate: str, y: str) -> tuple[Op, ...]:
    """The scan's fp32 output times silu of the gate in its own dtype."""
    shape = "b s mg grouped"
    return (
        ops.activation(f"{name}.silu", gate, f"{y}.act", shape),
        ops.mul(f"{name}.product", x, f"{y}.act", y, shape),
        ops.release_names(x),
    )


def mamba2_mixer(
    m: ModelSpec,
    wiring: Wiring,
    y: str,
    name: str = "mixer",
    keys: tuple[str, ...] = ("use_bias", "use_conv_bias"),
    *,
    projected: tuple[Op, ...] = (),
    normed: bool = True,
) -> tuple[Op, ...]:
    """One projection to gate, convolved channels and time steps; the scan; a gated norm; the output projection.

    It reads `n1`.

    keys       keys of the config that say whether projections and convolution have biases, and the output projection,
               if it has its own
    projected  the projection from `real` to `zxbcdt`, if it is not only a linear layer
    normed     the gated output is normalised
    """
    x, n, bias, conv_bias = "n1", name, m.get(keys[0], False), m.get(keys[1], True)
    out_bias = m.get(keys[2], False) if keys[2:] else bias
    project = projected or (ops.linear(f"{n}.in_proj", "real", "zxbcdt", "projected", "h", "mixer", bias),)
    if "mamba_ssm" in wiring.packages:
        return (
            *unpadded(wiring, x, "real", "b s h"),
            *project,
            *negative_exp(f"{n}.A_log", "rate", "mh"),
            *packages.split_conv1d_scan(n, "zxbcdt", y, normed, conv_bias, out_bias),
            ops.release_names("real", "zxbcdt", "rate", x),
        )
    parts = (Tensor("gate.z", "b s inner"), Tensor("xbc", "b s convolved"), Tensor("dt", _STEPS))
    split = (Tensor("x.heads", _X), Tensor("B", "b s mg mn"), Tensor("C", "b s mg mn"))
    return (
        *unpadded(wiring, x, "real", "b s h"),
        *project,
        *negative_exp(f"{n}.A_log", "rate", "mh"),
        ops.split(f"{n}.split", "zxbcdt", parts),
        *causal_conv(f"{n}.conv1d", "xbc", "mixed", "convolved", conv_bias, wiring=wiring),
        *unpadded(wiring, "mixed", "mixed.real", "b s convolved"),
        ops.release_names("mixed"),
        ops.split(f"{n}.split_xbc", "mixed.real", split),
        ops.release_names("real"),  # its variable is rebound
        *(() if wiring.decodes else chunk_scan(n, "scanned", wiring)),
        *cached_state(wiring, f"{n}.state", "state", "b mh mp mn", "product", "dt"),
        *(selective_state_update_2(n, "scanned") if wiring.decodes else ()),
        ops.view(f"{n}.cut", "scanned", "scanned.rows", "b s mg grouped", gradient="new"),
        *(gated_norm if normed else gated)(f"{n}.norm", "scanned.rows", "gate.z", "normed"),
        ops.cast(f"{n}.cast", "normed", "normed.low", "b s inner", f"={x}"),
        ops.linear(f"{n}.out_proj", "normed.low", y, "h", "inner", "mixer", out_bias),
        ops.release_names("mixed.real", "scanned", "normed", "zxbcdt", "rate", x),
        *((ops.release_names("states.new"),) if wiring.caching and not wiring.decodes else ()),
    )


def mamba2(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Mamba 2: a norm and the mixer in every block, and the residual stream in fp32."""
    return mixer_model(m, wiring, mamba2_mixer(m, wiring, "mo"))


def mixer_model(m: ModelSpec, wiring: Wiring, mixer: tuple[Op, ...]) -> Stack:
    """Assemble a model of mixers only, each from `n1` to `mo`.

    Its head casts its input to its weight's dtype, and its output to fp32.
    """
    wide = m.get("residual_in_fp32", True)
    block = Block(
        "backbone.layers",
        (
            ops.cast("to_weight", "x", "x.low", "b s h", "=embeds"),
            *ops.rms_norm("norm", "x.low", "n1", "b s h", "h"),
            *((ops.cast("residual", "x", "stream", "b s h", "fp32"),) if wide else ()),
            ops.release_names("x.low"),
            *mixer,
            ops.add("add", "stream" if wide else "x", "mo", "y", "b s h"),
        ),
    )
    *norm, weighed, returns = ops.rms_norm("backbone.norm_f", "x", "n.wide", "b s h", "h")
    head = lm_head("n", "backbone.embeddings.weight" if m.tie_word_embeddings else "")
    last = (
        *norm,
        weighed._replace(holds="call"),
        returns,
        ops.release_names("x", "embeds"),
        ops.cast("head_input", "n.wide", "n", "b s h", "=embeds"),
        head._replace(writes=(head.writes[0]._replace(name="logits.low"),)),
        ops.release_names("n"),
        ops.cast("logits_float", "logits.low", "logits", "b s v", "fp32"),
    )
    first = (inputs(wiring.padded), ops.embedding("backbone.embeddings", "ids", "embeds", "v", "h"))
    return Stack(first, runs(m, lambda _: block), last)


def granite(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Granite 4: Granite with attention or Mamba 2's mixer in a layer, and experts, if any, next to a dense MLP.

    Few checkpoints use rotation.
    """
    rotary = m.get("position_embedding_type") == "rope"
    table = ("cos", "sin") if rotary else ()
    bias = m.get("attention_bias", False)
    mixer = mamba2_mixer(m, wiring, "ao", "mamba", ("mamba_proj_bias", "mamba_conv_bias"))
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias, rotary=rotary)
    ffn = granite_mixture("f") if m.config_int("num_local_experts", 8, least=0) else granite_mlp("mo")

    def block(layer: Layer) -> Block:
        attends = layer.mixer == "attention"
        held = (*table, *(returned(wiring) if attends else ()))
        return decoder_block(heads if attends else mixer, ffn, branch=scaled_branch, held=held, given="")

    first = before(wiring, embedded=scaled_embeddings(), table=None if rotary else ())
    return Stack(first, runs(m, block), scaled_logits(after(m, wiring, table=table)))


_PRE_FF = ("input_layernorm", "", "pre_ff_layernorm", "")
_LAST = "model.final_layernorm"


def bamba(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Bamba: Mamba 2's mixer, or attention that rotates half of each head, and a dense MLP."""
    bias = m.get("attention_bias", False)
    mixer = mamba2_mixer(m, wiring, "ao", "mamba", ("mamba_proj_bias", "mamba_conv_bias"))
    heads = llama_attention(
        m, wiring, "n1", "ao", bias=bias, out_bias=bias, rotate=partial_rope, attend=attend_heads_first
    )
    mlp = gated_mlp("n2", "mo", "feed_forward", m.get("mlp_bias", False))

    def block(layer: Layer) -> Block:
        attends = layer.mixer == "attention"
        held = returned(wiring) if attends else ("cos", "sin")  # mixers get them too
        return decoder_block(heads if attends else mixer, mlp, norms=_PRE_FF, held=held)

    return Stack(before(wiring), runs(m, block), after(m, wiring, name=_LAST))


def falcon_h1(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Falcon-H1: attention next to Mamba 2's mixer in every layer, and numbers of the config that scale each."""
    normed, bias = m.get("mamba_rms_norm", False), m.get("attention_bias", False)
    if normed and m.get("mamba_norm_before_gate", True):
        raise UnsupportedModelError(
            "mamba_norm_before_gate: true is not supported yet with mamba_rms_norm; supported: false",
            "mamba_norm_before_gate",
        )
    n, shape = "mamba", "b s projected"
    multiplier = Weight(f"{n}.mup_vector", "projected", "buffer", trains=False)
    projected = (
        ops.scale(f"{n}.ssm_in_multiplier", "real", "real.scaled", "b s h"),
        ops.linear(f"{n}.in_proj", "real.scaled", "plain", "projected", "h", "mixer", m.get("mamba_proj_bias", False)),
        ops.multiply_weight(f"{n}.mup_vector", "plain", "zxbcdt", shape, multiplier),
        ops.release_names("plain", "real.scaled"),
    )

    def rotate(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
        scaled = ops.scale(f"{name}.key_multiplier", k, "k.scaled", KEYS)
        return (scaled, ops.release_names(k), *rope(m, name, q, "k.scaled"))

    keys = ("mamba_proj_bias", "mamba_conv_bias", "projectors_bias")
    mixer = renamed(  # both branches have scores
        mamba2_mixer(m, wiring, "so.whole", n, keys, projected=projected, normed=normed), {"scores": "scan.scores"}
    )
    heads = llama_attention(m, wiring, "n1.scaled", "go.whole", bias=bias, out_bias=bias, rotate=rotate)
    both = (
        *mixer[:-1],
        mixer[-1]._replace(reads=tuple(r for r in mixer[-1].reads if r != "n1")),
        ops.scale("ssm_out_multiplier", "so.whole", "so", "b s h"),
        ops.release_names("so.whole"),
        ops.scale("attention_in_multiplier", "n1", "n1.scaled", "b s h"),
        *heads,
        ops.scale("attention_out_multiplier", "go.whole", "go", "b s h"),
        ops.release_names("go.whole"),
        ops.add("add", "so", "go", "ao", "b s h"),
        ops.release_names("n1"),
    )
    name, mlp_bias = "feed_forward", m.get("mlp_bias", False)
    mlp = (
        ops.linear(f"{name}.up_proj", "n2", "up", "f", "h", "mlp", mlp_bias),
        ops.linear(f"{name}.gate_proj", "n2", "gate.whole", "f", "h", "mlp", mlp_bias),
        ops.scale(f"{name}.gate_multiplier", "gate.whole", "gate", "b s f"),
        ops.activation(f"{name}.act_fn", "gate", "act", "b s f"),
        ops.mul(f"{name}.product", "up", "act", "product", "b s f"),
        ops.linear(f"{name}.down_proj", "product", "mo.whole", "h", "f", "mlp", mlp_bias),
        ops.scale(f"{name}.down_multiplier", "mo.whole", "mo", "b s h"),
        ops.release_names("product", "n2"),
    )
    block = decoder_block(both, mlp, norms=_PRE_FF, held=("so", "go", *returned(wiring)))
    first = before(wiring, embedded=scaled_embeddings())
    return Stack(first, runs(m, lambda _: block), scaled_logits(after(m, wiring, name=_LAST)))


def wide_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """RMSNorm that multiplies by the weight in fp32, and keeps the weight's cast."""
    *normalise, _, _, returns = ops.rms_norm(name, x, y, shape, axis)
    n32, factor, wide = f"{y}.n32", f"{y}.factor", f"{y}.y32"
    weight = (Weight(f"{name}.weight", axis, "norm"),)
    source = "transformers 5.24 models/nemotron_h/modeling_nemotron_h.py NemotronHRMSNorm"
    return (
        *normalise,
        Op(f"{name}.weight_float", (), (Tensor(factor, axis, "fp32"),), weight, cast=True, source=source),
        ops.spread(f"{name}.weight", n32, factor, wide, shape),
        ops.cast(f"{name}.cast_back", wide, y, shape, f"={x}"),
        returns,
    )


def nemotron(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Nemotron-H: each block is a mixer or an MLP. Experts have no gates, and some read a narrower latent."""
    n, bias = "mixer", m.get("mlp_bias", False)
    bodies = {
        "mamba": mamba2_mixer(m, wiring, "mo"),
        "attention": llama_attention(m, wiring, "n1", "mo", rotary=False, name=n),
        "dense": _relu2_mlp("n1", "mo", n, "f", bias),
        "experts": _nemotron_experts(m, n, bias),
    }

    def block(layer: Layer) -> Block:
        kind = layer.mixer if layer.mixer != "none" else layer.ffn
        return Block(
            "model.layers",
            (
                ops.cast("to_weight", "x", "x.low", "b s h", "=norm.weight"),
                *wide_norm("norm", "x.low", "n1", "b s h", "h"),
                ops.release_names("x.low"),
                *bodies[kind],
                ops.add("add", "x", "mo", "y", "b s h"),
                ops.release_names("positions", *(returned(wiring) if kind == "attention" else ())),
            ),
        )

    masked = masks(wiring, "embeds")
    embedded = (ops.embedding("model.embeddings", "ids", "embeds", "v", "h"),)
    head = lm_head("n")
    last = (
        *wide_norm("model.norm_f", "x", "n", "b s h", "h"),
        ops.release_names("x", "embeds", "positions", *(op.name for op in masked)),
        head._replace(writes=(head.writes[0]._replace(name="logits.low"),)),
        ops.cast("logits_float", "logits.low", "logits", "b s v", "fp32"),
    )
    return Stack(before(wiring, embedded=embedded, table=()), runs(m, block), last)


def _relu2_mlp(x: str, y: str, name: str, width: str, bias: bool) -> tuple[Op, ...]:
    return (
        ops.linear(f"{name}.up_proj", x, "up", width, "h", "mlp", bias),
        *relu_squared(f"{name}.act_fn", "up", "act", f"b s {width}"),
        ops.linear(f"{name}.down_proj", "act", y, "h", width, "mlp", bias),
        ops.release_names(x),
    )


def _nemotron_experts(m: ModelSpec, n: str, bias: bool) -> tuple[Op, ...]:
    latent = m.config.get("moe_latent_size") is not None
    x, routed, width = ("latent", "routed.latent", "latent") if latent else ("n1", "routed", "h")
    expert_ops = experts.experts(x, routed, f"{n}.experts", (), (), plain=True, width=width)
    return (
        *routers.grouped_router(f"{n}.gate", "n1", m.get("norm_topk_prob", True)),
        *((ops.linear(f"{n}.fc1_latent_proj", "n1", "latent", width, "h", "mlp", bias, flat=True),) if latent else ()),
        *expert_ops,
        *((ops.release_names("latent"),) if latent else ()),
        *(
            (ops.linear(f"{n}.fc2_latent_proj", routed, "routed", "h", width, "mlp", bias, flat=True),)
            if latent
            else ()
        ),
        *_relu2_mlp("n1", "shared", f"{n}.shared_experts", "fs", bias),
        ops.add(f"{n}.add", "routed", "shared", "mo", "b s h"),
        ops.release_names("routed", "shared", *routers.HELD, "n1"),
    )


BUILDERS = {
    "bamba": bamba,
    "falcon_h1": falcon_h1,
    "granitemoehybrid": granite,
    "mamba2": mamba2,
    "nemotron_h": nemotron,
}
