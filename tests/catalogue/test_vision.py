"""Vision-language models: image tokens, towers that run or do not, and frozen parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import compared_with_trace
from benchmarks.golden import trace_figures
from memplan import RunSpec, estimate
from memplan.core.errors import ConfigError, MemplanError, SpecError, UnknownNameError, UnsupportedModelError
from memplan.models.cards import find_model
from memplan.models.configs.images import axes_of, picture_of, pictures_of, takes_images
from memplan.models.model import ModelSpec
from memplan.program.training.passes import pass_of
from memplan.resolve.decide import decide
from tests.cases import in_groups
from tests.sampling import sampled
from tests.tiny import TINY as DECODERS
from tests.tiny_towers import TINY as RESTING
from tests.tiny_vision import TINY

GOLDEN = Path(__file__).parents[1] / "golden" / "traced_vision.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in GOLDEN.read_text("utf-8").splitlines()][1:]


def model(model_type: str) -> dict[str, Any]:
    return {"config": {"model_type": model_type, **TINY[model_type]}}


def run(model_type: str = "qwen2_vl", **fields: Any) -> RunSpec:
    return RunSpec.model_validate({"model": model(model_type), "batch": {"sequence": 512}, **fields})


def omni(model_type: str, **audio: Any) -> dict[str, Any]:
    """Return a model with other sizes of its audio encoder."""
    sizes = {**TINY[model_type]["audio_config"], **audio}
    return {"config": {**model(model_type)["config"], "audio_config": sizes}}


def label(case: dict[str, Any]) -> str:
    asked = case["run"]
    batch = asked.get("batch", {})
    images = f"{batch['frames']} frames" if "frames" in batch else batch.get("images", batch.get("clips", 0))
    frozen = "".join(asked.get("method", {}).get("frozen", ()))
    kernels = asked.get("kernels", {})
    return f"{case['name']}-{kernels.get('checkpointing', 'full')}-{images}-{frozen}{kernels.get('attention', '')}"


@in_groups(sampled(ROWS), label)
def test_an_estimate_equals_the_trace(case: dict[str, Any]) -> None:
    answer = trace_figures(case["run"])
    assert answer.parameters.total == case["parameters"]
    assert answer.parameters.trainable == case["trainable"]
    compared = compared_with_trace(case)
    peak, phase = case.get("within", (2e-4, 1e-3))
    assert (peak > 2e-4) == bool(case.get("cause"))
    assert compared.peak <= peak, compared
    assert compared.phase <= phase, compared


def test_every_family_is_traced_on_text_and_with_the_images_it_takes() -> None:
    traced = {
        (case["run"]["model"]["config"]["model_type"], not {"images", "clips"}.isdisjoint(case["run"].get("batch", {})))
        for case in ROWS
        if isinstance(case["run"]["model"], dict)
    }
    assert {family for family, images in traced if not images} == set(TINY)
    specs = {family: ModelSpec({"model_type": family, **config}) for family, config in TINY.items()}
    pictured = {family for family, spec in specs.items() if takes_images(spec) or takes_images(spec, hears=True)}
    assert {family for family, images in traced if images} == pictured
    for family in set(TINY) - pictured:
        with pytest.raises(SpecError, match=r"batch\.images: images are not supported yet"):
            estimate(run(family, batch={"images": 1, "image_size": 280}))


# 1024 / 28 is 36.57: 37 x 37 squares of 2 x 2 patches. 28 pixels are enlarged to 56; 14 x 700, which would have no
# rows, to 3136 pixels in total (by 0.566). The largest image is 3584 x 3584, 128 squares per side.
@pytest.mark.parametrize(
    ("size", "tokens"),
    [(1024, 37 * 37), ((644, 28), 23 * 1), (28, 2 * 2), (8000, 128 * 128), ((14, 700), 1 * 15)],
)
def test_an_image_of_qwen2_vl_is_a_token_for_every_four_patches(size: Any, tokens: int) -> None:
    spec = ModelSpec({"model_type": "qwen2_vl", **TINY["qwen2_vl"]})
    picture = picture_of(spec, size)
    assert picture.tokens == tokens
    assert picture.patches == 4 * tokens


# A Qwen3-VL patch has 16 pixels per side by default, so a token covers 32; 100 x 100 is enlarged to 256 x 256, 640 x 96
# by 1.03 to 672 x 128, and 6000 x 6000 shrunk to 4096 x 4096.
@pytest.mark.parametrize(("size", "tokens"), [(1024, 32 * 32), ((640, 96), 21 * 4), (100, 8 * 8), (6000, 128 * 128)])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_a_qwen3_image_has_one_token_per_32_pixel_square(family: str, size: Any, tokens: int) -> None:
    picture = picture_of(ModelSpec({"model_type": family, **TINY[family]}), size)
    assert (picture.tokens, picture.patches) == (tokens, 4 * tokens)


# A token covers 28 x 28 pixels. 14 x 700 is first enlarged to 28 x 1400; 56 x 84, which is less than 6272 pixels, by
# 1.15; 4000 x 3000 shrunk by 1.58 to 2520 x 1876, 9633792 / 2 pixels or less.
@pytest.mark.parametrize(
    ("size", "tokens"), [(336, 12 * 12), ((14, 700), 1 * 50), ((56, 84), 3 * 4), ((4000, 3000), 90 * 67)]
)
@pytest.mark.parametrize("family", ["glm46v", "glm4v", "glm_ocr"])
def test_an_image_of_glm_is_a_token_for_every_four_patches(family: str, size: Any, tokens: int) -> None:
    picture = picture_of(ModelSpec({"model_type": family, **TINY[family]}), size)
    assert (picture.tokens, picture.patches) == (tokens, 4 * tokens)


def test_a_glm_4_6v_with_experts_is_refused() -> None:
    text = {**TINY["glm46v"]["text_config"], "model_type": "glm4v_moe_text"}
    with pytest.raises(UnsupportedModelError, match=r'^text_config\.model_type: "glm4v_moe_text" is not supported yet'):
        ModelSpec({"model_type": "glm46v", **TINY["glm46v"], "text_config": text}).axes()


def test_a_tower_of_glm_must_be_as_wide_as_the_text() -> None:
    vision = {**TINY["glm_ocr"]["vision_config"], "out_hidden_size": 96}
    with pytest.raises(ConfigError, match="out_hidden_size 96 must be the text's hidden_size 128"):
        ModelSpec({"model_type": "glm_ocr", **TINY["glm_ocr"], "vision_config": vision}).axes()


# Two frames make one picture of 28 (Qwen2-VL) or 32 pixels per token; 200 frames of Qwen3-VL share 6 x 2048 x 2048
# pixels, 354 a side, which is 11 tokens a side. InternVL and SmolVLM read each frame as a tile.
@pytest.mark.parametrize(
    ("family", "frames", "side", "pictures", "tokens"),
    [
        ("qwen2_vl", 8, 280, 4, 10 * 10),
        ("qwen2_5_vl", 7, 280, 4, 10 * 10),
        ("qwen3_vl", 8, 320, 4, 10 * 10),
        ("qwen3_5", 200, 2048, 100, 11 * 11),
        ("internvl", 8, None, 8, 4 * 4),
        ("smolvlm", 8, None, 8, 4 * 4),
    ],
)
def test_a_video_is_a_picture_for_every_pair_of_frames(
    family: str, frames: int, side: int | None, pictures: int, tokens: int
) -> None:
    count, picture = pictures_of(ModelSpec({"model_type": family, **TINY[family]}), 0, frames, side)
    assert (count, picture.tokens) == (pictures, tokens)
    sequence = pictures * tokens
    with pytest.raises(SpecError, match=rf"batch\.frames: {pictures} pictures of .* must be at least {sequence}"):
        estimate(run(family, batch={"sequence": sequence - 1, "frames": frames, "image_size": side}))


# Images are shrunk to 560 pixels on the long side; a token covers 28 x 28, and each row ends with one more token.
# 112 per side: 64 patches are 16 tokens and the end of a line, and two tokens frame the image. 200 x 100 is enlarged to
# 2 x 1 tiles, 300 x 420 to 3 x 4, and 2000 x 100 shrunk to 12 x 1; several tiles are followed by the whole image.
@pytest.mark.parametrize(
    ("size", "tiles"), [(100, 1), (112, 1), ((200, 100), 3), ((300, 420), 13), ((2000, 100), 13), ((113, 112), 3)]
)
def test_an_image_of_command_a_vision_is_cut_into_tiles(size: Any, tiles: int) -> None:
    picture = picture_of(ModelSpec({"model_type": "cohere2_vision", **TINY["cohere2_vision"]}), size)
    assert (picture.tiles, picture.tokens) == (tiles, tiles * 17 + 2)


# A token covers 32 pixels, and two frame the image: 9 x 13; 8 x 8, which 100 x 100 is enlarged to; 16 x 16. 1000 x 1200
# is shrunk to 14 x 17, next to 3 x 3 tiles of 256 tokens, each with one more as the whole image has.
@pytest.mark.parametrize(
    ("size", "tiles", "tokens", "unread"),
    [
        ((300, 420), 1, 9 * 13 + 2, 256 - 9 * 13),
        (100, 1, 8 * 8 + 2, 256 - 8 * 8),
        (512, 1, 256 + 2, 0),
        ((1000, 1200), 10, 14 * 17 + 9 * 256 + 10 + 2, 256 - 14 * 17),
    ],
)
def test_every_tile_of_lfm2_vl_has_as_many_rows(size: Any, tiles: int, tokens: int, unread: int) -> None:
    spec = ModelSpec({"model_type": "lfm2_vl", **TINY["lfm2_vl"]})
    picture = picture_of(spec, size)
    assert (picture.tiles, picture.tokens, picture.patches) == (tiles, tokens, 1024)
    assert axes_of(spec, 3, picture)["unread"] == 3 * unread
    asked = run("lfm2_vl", batch={"sequence": tokens, "images": 1, "image_size": size})
    assert decide(asked).structure.graph.wiring.pads_tower is (unread > 0)


# Two tokens frame at most 280, in whole rows and columns: 14.14 x 19.8 of an image of 200 x 280, and 8.4 x 33.5 of
# 100 x 400. 1 x 300 would have no row, and keeps one.
@pytest.mark.parametrize(("size", "tokens"), [((200, 280), 14 * 19), ((100, 400), 8 * 33), ((1, 300), 280)])
def test_an_image_of_the_unified_gemma_4_has_at_most_280_tokens(size: Any, tokens: int) -> None:
    spec = ModelSpec({"model_type": "gemma4_unified", **TINY["gemma4_unified"]})
    picture = picture_of(spec, size)
    axes = axes_of(spec, 2, picture)
    assert (picture.patches, picture.tokens, axes["merged"], axes["unread"]) == (
        280,
        tokens + 2,
        2 * tokens,
        2 * (280 - tokens),
    )


# 112 per side: 8 x 8 patches a tile. A single image of 300 x 420 is cut; of several, each is a tile and one more token.
def test_several_images_of_llava_onevision_are_not_cut() -> None:
    spec = ModelSpec({"model_type": "llava_onevision", **TINY["llava_onevision"]})
    seen = {n: pictures_of(spec, n, 0, (300, 420)) for n in (1, 2, 3)}
    assert seen[1][1].tiles > 1
    assert seen[2] == (2, picture_of(spec, 1)._replace(tiles=1, tokens=64 + 1))
    assert axes_of(spec, *seen[3])["merged"] == 3 * 65


def test_an_image_of_aya_vision_is_one_tile() -> None:
    spec = ModelSpec({"model_type": "aya_vision", **TINY["aya_vision"]})
    assert {picture_of(spec, size)[:4] for size in (None, 28, (8000, 100))} == {(8, 8, 16, 2)}


# Whisper's encoder reads 100 mel frames a second, two of which are a position; here its window is 2 s. Qwen2-Audio cuts
# longer clips and pools two positions, after (frames - 1) // 2 + 1; Voxtral joins 4 positions, and pads to windows.
@pytest.mark.parametrize(
    ("family", "seconds", "windows", "tokens"),
    [
        ("qwen2_audio", None, 1, 50),
        ("qwen2_audio", 1, 1, 25),
        ("qwen2_audio", 60, 1, 50),
        ("voxtral", None, 1, 25),
        ("voxtral", 1, 1, 25),
        ("voxtral", 5, 3, 25),
    ],
)
def test_a_clip_is_read_in_windows(family: str, seconds: int | None, windows: int, tokens: int) -> None:
    count, picture = pictures_of(ModelSpec({"model_type": family, **TINY[family]}), 0, 0, None, 2, seconds)
    assert (count, picture.tokens) == (2 * windows, tokens)
    batch = {"sequence": 2 * windows * tokens - 1, "clips": 2, "clip_seconds": seconds}
    with pytest.raises(SpecError, match=rf"batch\.clips: {2 * windows} windows of .* at least {2 * windows * tokens}"):
        estimate(run(family, batch=batch))


# 16,000 samples a second, 112 of which are a token here: 142.9 and 428.6, and two tokens frame the clip.
@pytest.mark.parametrize(("seconds", "tokens"), [(1, 143), (3, 429)])
def test_a_clip_of_the_unified_gemma_4_is_its_samples(seconds: int, tokens: int) -> None:
    spec = ModelSpec({"model_type": "gemma4_unified", **TINY["gemma4_unified"]})
    count, picture = pictures_of(spec, 0, 0, None, 2, seconds)
    assert (count, picture.tokens) == (2, tokens + 2)
    assert axes_of(spec, 2, picture)["merged"] == 2 * tokens
    asked = run("gemma4_unified", batch={"sequence": 2 * tokens + 4, "clips": 2, "clip_seconds": seconds})
    assert decide(asked).structure.graph.wiring.hears


# 639 samples of a second's 16,000 are two frames short of 100: 99, which two convolutions halve to 50 and 25. The
# processor cuts a clip at 30 seconds.
@pytest.mark.parametrize(("seconds", "tokens"), [(1, 25), (7, 175), (30, 750), (31, 750)])
def test_a_clip_of_gemma_4_is_25_tokens_a_second(seconds: int, tokens: int) -> None:
    spec = ModelSpec({"model_type": "gemma4", **TINY["gemma4"]})
    count, picture = pictures_of(spec, 0, 0, None, 2, seconds)
    axes = axes_of(spec, 2, picture)
    assert (count, picture.tokens, axes["merged"]) == (2, tokens + 2, 2 * tokens)
    assert (axes["uframes"], axes["uchunks"]) == (100 * min(seconds, 30) - 1, -(-tokens // 12))


# 100 frames a second. Qwen2.5-Omni halves them to 50 positions, and pools these by two: here in chunks of 64 frames, of
# which a second fills one and has 36 left, and three seconds four and 44. Qwen3-Omni's chunks are seconds of 13
# positions, 104 of which attend to each other: 15 seconds are 195, one window and 91 more.
@pytest.mark.parametrize(
    ("family", "seconds", "tokens", "chunks", "windows", "pairs"),
    [
        ("qwen2_5_omni_thinker", 1, 25, 2, 2, 32**2 + 18**2),
        ("qwen2_5_omni_thinker", 3, 75, 5, 5, 4 * 32**2 + 22**2),
        ("qwen2_5_omni_thinker", 301, 300 * 25, 469, 469, 468 * 32**2 + 24**2),
        ("qwen3_omni_moe_thinker", 1, 13, 1, 1, 13**2),
        ("qwen3_omni_moe_thinker", 15, 195, 15, 2, 104**2 + 91**2),
        ("qwen3_omni_moe_thinker", 301, 301 * 13, 301, 38, 37 * 104**2 + 65**2),
    ],
)
def test_a_clip_of_an_omni_is_cut_into_chunks(
    family: str, seconds: int, tokens: int, chunks: int, windows: int, pairs: int
) -> None:
    spec = ModelSpec({"model_type": family, **TINY[family]})
    count, picture = pictures_of(spec, 0, 0, None, 2, seconds)
    axes = axes_of(spec, count, picture)
    assert (count, picture.tokens, axes["merged"]) == (2, tokens, 2 * tokens)
    assert (axes["uchunks"], axes["windows"], axes["window_pairs"]) == (2 * chunks, 2 * windows, 2 * pairs)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_the_thinker_of_an_omni_is_the_model(name: str) -> None:
    part = model(f"{name}_thinker")["config"]
    entire = {"model_type": name, "thinker_config": part, "talker_config": {"model_type": f"{name}_talker"}}
    answer, thinker = estimate(RunSpec(model={"config": entire})), estimate(RunSpec(model={"config": part}))
    assert answer.bytes == thinker.bytes
    assert any(note.startswith("the thinker alone") for note in answer.notes)


@pytest.mark.parametrize(
    ("name", "sizes", "why"),
    [
        ("qwen3_omni_moe_thinker", {"n_window": 40}, "n_window must be 50: its class counts 13 positions a chunk"),
        ("qwen2_5_omni_thinker", {"output_dim": 64}, "output_dim 64 must be the text's hidden_size 128"),
        ("qwen2_5_omni_thinker", {"n_window": 101}, "n_window must be a whole number from 1 to 100, not 101"),
    ],
)
def test_an_encoder_that_the_class_of_an_omni_cannot_run_is_refused(name: str, sizes: Any, why: str) -> None:
    batch = {"clips": 1, "clip_seconds": 1}
    with pytest.raises(ConfigError, match=rf"^config: audio_config\.{why}"):
        estimate(run(model=omni(name, **sizes), batch=batch))


# Of 2 x 600 tokens, each with 2,000 logits in bf16.
@pytest.mark.parametrize("family", ["qwen2_5_omni_thinker", "qwen2_audio", "qwen3_omni_moe_thinker"])
def test_a_class_without_logits_to_keep_computes_those_of_the_prompt(family: str) -> None:
    batch = {"micro": 2, "sequence": 600, "new_tokens": 2}
    answer = estimate(RunSpec(model=model(family), task="generate", batch=batch))
    logits = [line.bytes for line in answer.ledger if line.what == "logits"]
    assert logits == [2 * 600 * 2000 * 2]


# The unified model merges the 9 patches of a token before it reads them.
@pytest.mark.parametrize("size", [(200, 280), (1, 300)])
def test_gemma_4_sees_nine_patches_where_the_unified_one_sees_a_token(size: Any) -> None:
    tower, unified = (picture_of(ModelSpec({"model_type": n, **TINY[n]}), size) for n in ("gemma4", "gemma4_unified"))
    assert tower.patches == 9 * unified.patches == 9 * 280
    assert tower.tokens == unified.tokens


@pytest.mark.parametrize(
    ("family", "seconds", "pads"), [("qwen2_audio", 1, True), ("qwen2_audio", 2, False), ("voxtral", 1, False)]
)
def test_silence_after_a_clip_is_masked_by_qwen2_audio_alone(family: str, seconds: int, pads: bool) -> None:
    asked = run(family, batch={"sequence": 50, "clips": 1, "clip_seconds": seconds})
    assert decide(asked).structure.graph.wiring.pads_tower is pads


@pytest.mark.parametrize(
    ("size", "tokens"), [(560, 20 * 21), ((1120, 560), 20 * (10 + 1)), ((100, 30), 4 * (2 + 1)), (28, 1 + 1)]
)
def test_an_image_of_mistral_3_has_a_token_more_a_row(size: Any, tokens: int) -> None:
    picture = picture_of(ModelSpec({"model_type": "mistral3", **TINY["mistral3"]}), size)
    assert picture.tokens == tokens


def test_a_gemma_3_image_has_the_configs_number_of_tokens() -> None:
    spec = ModelSpec({"model_type": "gemma3", **TINY["gemma3"]})
    (picture,) = {picture_of(spec, size) for size in (None, 28, (8000, 100))}
    assert (picture.patches, picture.tokens, axes_of(spec, 2, picture)["merged"]) == (8 * 8, 16, 2 * 16)


@pytest.mark.parametrize("fields", [{"batch": {"images": 1}}, {"task": "generate", "profile": "vllm", "gpu": "h100"}])
def test_fewer_patches_than_gemma_3_makes_tokens_of_are_refused(fields: dict[str, Any]) -> None:
    """The config class's default has fewer patches than tokens: torch cannot average empty windows."""
    config = {"model_type": "gemma3", **TINY["gemma3"], "vision_config": {}, "mm_tokens_per_image": 256}
    with pytest.raises(ConfigError, match=r"vision_config\.image_size: 14 x 14 patches cannot be ") as caught:
        estimate(RunSpec(model={"config": config}, **fields))
    assert caught.value.field == "image_size"


def test_a_duplicate_deepstack_block_of_qwen3_is_refused() -> None:
    tower = {**TINY["qwen3_vl"]["vision_config"], "deepstack_visual_indexes": [1, 1]}
    with pytest.raises(ConfigError, match=r"deepstack_visual_indexes names a layer twice: \[1, 1\]"):
        estimate(RunSpec(model={"config": {"model_type": "qwen3_vl", **TINY["qwen3_vl"], "vision_config": tower}}))


def test_a_qwen2_5_vl_window_has_the_configs_size() -> None:
    tower = {**TINY["qwen2_5_vl"]["vision_config"], "window_size": 56}
    spec = ModelSpec({"model_type": "qwen2_5_vl", **TINY["qwen2_5_vl"], "vision_config": tower})
    axes = axes_of(spec, 3, picture_of(spec, (140, 420)))  # 5 x 15 merged patches, in windows of 2 x 2
    assert (axes["windows"], axes["window"], axes["window32"]) == (3 * 3 * 8, 4 * 4, 32)


def test_a_tower_without_deepstack_blocks_works_with_images() -> None:
    tower = {**TINY["qwen3_vl"]["vision_config"], "deepstack_visual_indexes": []}
    config = {"model_type": "qwen3_vl", **TINY["qwen3_vl"], "vision_config": tower}
    batch = {"sequence": 512, "images": 1, "image_size": 320}
    without = estimate(run("qwen3_vl", model={"config": config}, batch=batch))
    assert without.bytes.allocated < estimate(run("qwen3_vl", batch=batch)).bytes.allocated


# 336 per side: 576 patches are 144 tokens, plus three delimiters. 1024 is enlarged to 4 x 4 tiles and an overview;
# 700 x 1000 to 3 x 3; 6000 x 300 is shrunk to 16 x 1; every tile except the overview has a separator.
@pytest.mark.parametrize(
    ("size", "tiles", "tokens"),
    [
        (336, 1, 144 + 3),
        (1024, 17, 17 * 144 + 16 + 3),
        ((700, 1000), 10, 10 * 144 + 9 + 3),
        ((6000, 300), 17, 17 * 144 + 16 + 3),
        ((337, 336), 3, 3 * 144 + 2 + 3),
    ],
)
def test_an_image_of_llama_4_is_cut_into_tiles(size: Any, tiles: int, tokens: int) -> None:
    picture = picture_of(find_model("llama-4-scout"), size)
    assert (picture.tiles, picture.tokens) == (tiles, tokens)
    assert picture.patches == 24 * 24


@pytest.mark.parametrize("key", ["intermediate_size", "projector_output_dim", "vision_output_dim"])
def test_an_inconsistent_llama_4_tower_is_refused_with_images(key: str) -> None:
    tower = {**TINY["llama4"]["vision_config"], key: 100}
    config = {"model_type": "llama4", **TINY["llama4"], "vision_config": tower}
    with pytest.raises(ConfigError, match=key):
        estimate(RunSpec(model={"config": config}, batch={"images": 1, "image_size": 56}))


def test_a_llama_3_2_image_has_one_token_and_always_all_tiles() -> None:
    spec = ModelSpec({"model_type": "mllama", **TINY["mllama"]})
    pictures = {picture_of(spec, size) for size in (None, 28, (8000, 100))}
    (picture,) = pictures
    assert (picture.patches, picture.tokens) == (4 * (56 // 14) ** 2, 1)
    # each tile is a row of its own, padded from 17 to 24 patches: the language model sees 4 x 17 per image
    axes = axes_of(spec, 2, picture)
    assert (axes["grid"], axes["seen"]) == (4 * 24, 2 * 4 * 17)


def test_a_tower_that_is_never_checkpointed_takes_the_same_either_way() -> None:
    def more(checkpointing: str) -> int:
        batch = {"micro": 2, "sequence": 64}
        peaks = [
            estimate(run("mllama", batch={**batch, "images": n}, kernels={"checkpointing": checkpointing}))
            for n in (4, 5)
        ]
        return peaks[1].bytes.allocated - peaks[0].bytes.allocated

    rows, kept = 2 * 4 * 24, 4 * 160 + 2 * 432  # per image: at least q, k, v, o, and two of the MLP
    assert more("full") > 6 * rows * kept * 2


def test_without_images_a_tower_is_loaded_without_gradients() -> None:
    whole, still = (
        estimate(run(method={"kind": "full", "frozen": f}, task="train")) for f in ((), ("vision", "projector"))
    )
    assert whole.bytes == still.bytes
    assert whole.parameters.total == still.parameters.total
    tower = whole.parameters.trainable - still.parameters.trainable
    language = estimate(run(method={"frozen": ("language",)})).parameters.trainable
    assert tower == language > 0


@pytest.mark.parametrize("family", sorted(TINY))
def test_layers_are_numbered_as_their_own_module_does(family: str) -> None:
    """The tower's blocks before them are numbered separately."""
    low = pass_of(decide(run(family)).structure)
    numbers = {m.where.split(".layers.")[1].partition(".")[0] for m in low.moments if "model.layers." in m.where}
    layers = find_model(run(family).model).num_hidden_layers
    assert max(map(int, numbers)) == layers - 1


@pytest.mark.parametrize("kind", sampled(["lora", "full", "qlora"], 3))
@pytest.mark.parametrize("family", sampled(["qwen2_vl", "qwen2_5_vl"], 2))
def test_more_images_take_more_and_a_frozen_tower_less(family: str, kind: str) -> None:
    def peak(images: int, size: int = 280, frozen: tuple[str, ...] = ()) -> int:
        batch = {"sequence": 512, "micro": 2, **({"images": images, "image_size": size} if images else {})}
        checkpointing = {"checkpointing": "none"}
        answer = estimate(run(family, method={"kind": kind, "frozen": frozen}, batch=batch, kernels=checkpointing))
        return answer.bytes.allocated

    assert peak(0) < peak(1) < peak(2) < peak(2, 420)
    assert peak(2, frozen=("vision",)) < peak(2)


ONEVISION = TINY["llava_onevision"]
CUT: dict[str, tuple[str, dict[str, Any], str]] = {
    "no pairs": (
        "llava_next",
        {"image_grid_pinpoints": [[112, 111]]},
        "config: image_grid_pinpoints must be pairs of ",
    ),
    "no limit": (
        "llava_onevision",
        {"vision_aspect_ratio": "square"},
        "config: vision_aspect_ratio must be anyres_max_",
    ),
    "a layer": (
        "llava_onevision",
        {"vision_feature_layer": -2},
        "vision_feature_layer: llava_onevision's images are only ",
    ),
    "a head": (
        "cohere2_vision",
        {"vision_config": {**TINY["cohere2_vision"]["vision_config"], "vision_use_head": True}},
        "vision_feature_layer: cohere2_vision's images are only supported with -1, and vision_use_head false",
    ),
    "a head of LFM2-VL": (
        "lfm2_vl",
        {"vision_config": {**TINY["lfm2_vl"]["vision_config"], "vision_use_head": True}},
        "vision_config.vision_use_head: lfm2_vl's images are only supported with false",
    ),
    "a rest of patches": (
        "aya_vision",
        {"downsample_factor": 3},
        "config: downsample_factor 3 does not divide 8 patches",
    ),
    "no patch": (
        "llava_onevision",
        {"vision_config": {**ONEVISION["vision_config"], "image_size": 1}},
        "config: vision_config.image_size: an image has no patch",
    ),
}


@pytest.mark.parametrize(("family", "keys", "start"), CUT.values(), ids=CUT.keys())
def test_a_config_that_cuts_images_otherwise_is_refused(family: str, keys: dict[str, Any], start: str) -> None:
    config = {**model(family)["config"], **keys}
    with pytest.raises(MemplanError) as caught:
        estimate(RunSpec(model={"config": config}, batch={"images": 1, "image_size": 56}))
    assert str(caught.value).startswith(start)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tower": ({"model": "qwen2-7b", "batch": {"images": 1}}, "batch.images: qwen2-7b has no vision tower"),
    "a tower that rests": (
        {"model": {"config": RESTING["llava_next_video"]}, "batch": {"images": 1, "image_size": 64}},
        "batch.images: images are not supported yet for llava_next_video",
    ),
    "a tower that is missing": (
        {
            "model": {"config": {**RESTING["gemma4-small"], "vision_config": None}},
            "batch": {"images": 1, "image_size": 64},
        },
        "batch.images: gemma4 has no vision tower; use 0",
    ),
    "grouped heads in the tower": (
        {
            "model": {"config": {**model("gemma4")["config"], "vision_config": {"num_key_value_heads": 2}}},
            "batch": {"images": 1, "image_size": 64},
        },
        "vision_config.num_key_value_heads: a number other than that of heads is not supported yet",
    ),
    "no size": ({"batch": {"images": 1}}, "batch.image_size: "),
    "a strip": (
        {"batch": {"images": 1, "image_size": [14, 2801], "sequence": 8192}},
        "batch.image_size: qwen2_vl takes no image with a side more than 200 times the other, such as 14 x 2801",
    ),
    "a size alone": ({"batch": {"image_size": 64}}, "batch.image_size: there are no images; set batch.images too"),
    "too many": (
        {"batch": {"images": 3, "image_size": 280, "sequence": 128}},
        "batch.images: 3 images of 100 tokens each do not fit batch.sequence 128, which must be at least 300",
    ),
    "sdpa_math": (
        {"batch": {"images": 1, "image_size": 56}, "kernels": {"attention": "sdpa_math"}},
        "kernels.attention: sdpa_math is not supported yet with images of qwen2_vl; supported: sdpa, sdpa_efficient, ",
    ),
    "a mask on the host": (
        {
            "model": model("mistral3"),
            "batch": {"images": 1, "image_size": 56},
            "kernels": {"checkpointing": "offload"},
        },
        "kernels.checkpointing: offload is not supported yet with images of mistral3",
    ),
    "masks on the host": (
        {"model": model("mllama"), "batch": {"images": 1}, "kernels": {"checkpointing": "offload"}},
        "kernels.checkpointing: offload is not supported yet with images of mllama",
    ),
    "four dimensions": (
        {"model": model("mllama"), "kernels": {"attention": "flash_attention_2"}},
        "kernels.attention: mllama does not run with flash_attention_2",
    ),
    "nothing to adapt": (
        {"method": {"kind": "lora", "targets": ["q_proj"], "frozen": ["language"]}},
        "method.frozen: freezes all of method.targets, so nothing is left to adapt",
    ),
    "states by name": (
        {"model": model("llama4"), "batch": {"images": 1, "image_size": 56}, "kernels": {"checkpointing": "offload"}},
        "kernels.checkpointing: offload is not supported yet with images of llama4",
    ),
    "states by name, reentrant": (
        {"model": model("llama4"), "batch": {"images": 1, "image_size": 56}, "kernels": {"reentrant": True}},
        "kernels.reentrant: true is not supported yet with images of llama4",
    ),
    "pixels in half": (
        {"model": model("llama4"), "batch": {"images": 1, "image_size": 56}, "precision": "fp32"},
        "precision.weights: llama4's processor returns bf16 pixels, which a vision tower in fp32 rejects",
    ),
    "another version": (
        {"batch": {"images": 1, "image_size": 56}, "profile": "transformers-4.51"},
        "batch.images: needs profile transformers-5",
    ),
    "nothing to train": (
        {"method": {"frozen": ["language", "vision", "projector"]}},
        "method.frozen: nothing is left to train",
    ),
    "no parts": (
        {"model": "qwen2-7b", "method": {"frozen": ["vision"]}},
        "method.frozen: qwen2 only has a language model",
    ),
    "several GPUs": (
        {"parallelism": {"world": 2, "dp": 2, "strategy": "ddp"}},
        "parallelism.find_unused_parameters: without images the vision tower gets no gradients",
    ),
    "several GPUs and no clips": (
        {
            "model": {"config": RESTING["gemma4-small"]},
            "batch": {"images": 1, "image_size": 96},
            "parallelism": {"world": 2, "dp": 2, "strategy": "ddp"},
        },
        "parallelism.find_unused_parameters: without clips the audio encoder gets no gradients",
    ),
    "a video and images": (
        {"batch": {"images": 1, "frames": 4, "image_size": 56}},
        "batch.frames: a sequence has images or a video, not both",
    ),
    "audio without an encoder": ({"batch": {"clips": 1}}, "batch.clips: qwen2_vl has no audio encoder"),
    "seconds alone": ({"batch": {"clip_seconds": 3}}, "batch.clip_seconds: there are no audio clips"),
    "an encoder that is missing": (
        {"model": {"config": RESTING["gemma4-experts"]}, "batch": {"clips": 1}},
        "batch.clips: gemma4 has no audio encoder; use 0",
    ),
    "no length": (
        {"model": model("gemma4_unified"), "batch": {"clips": 1}},
        "batch.clip_seconds: the tokens of a clip of gemma4_unified depend on its length",
    ),
    "no length of an omni's": (
        {"model": model("qwen3_omni_moe_thinker"), "batch": {"clips": 1}},
        "batch.clip_seconds: the tokens of a clip of qwen3_omni_moe_thinker depend on its length",
    ),
    "layers named by numbers": (
        {"model": model("qwen3_omni_moe_thinker"), "method": "lora"},
        "method.targets: all-linear fails in peft, which takes every module 0 for visual.merger_list.0.mlp.0; name ",
    ),
    "images that are heard": (
        {"model": model("voxtral"), "batch": {"images": 1}},
        "batch.images: voxtral has no vision tower",
    ),
    "images and audio": (
        {"model": model("voxtral"), "batch": {"images": 1, "clips": 1}},
        "batch.images: voxtral has no vision tower",
    ),
    "pixels as integers": (
        {"model": model("lfm2_vl"), "batch": {"images": 1, "image_size": 56}, "method": "qlora"},
        "method.quantization.skip: lfm2_vl casts pixels to the dtype of patch_embedding, which is an integer if ",
    ),
    "a clip's mask on the host": (
        {"model": model("qwen2_audio"), "batch": {"clips": 1}, "kernels": {"checkpointing": "offload"}},
        "kernels.checkpointing: offload is not supported yet with clips of qwen2_audio",
    ),
    "a part of other models": ({"method": {"frozen": ["audio"]}}, "method.frozen: unknown name 'audio'"),
    "a video": (
        {"model": model("gemma3"), "batch": {"frames": 4}},
        "batch.frames: a video is not supported yet for gemma3",
    ),
}


@pytest.mark.parametrize("asked", REFUSED.values(), ids=REFUSED)
def test_impossible_image_runs_are_refused_in_one_line(asked: tuple[dict[str, Any], str]) -> None:
    fields, start = asked
    with pytest.raises(MemplanError) as caught:
        estimate(run(**fields))
    assert str(caught.value).startswith(start)
    assert caught.value.field == start.partition(":")[0]
    assert "\n" not in str(caught.value)


def test_an_unknown_part_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="vision"):
        estimate(run(method={"frozen": ["visin"]}))


BROKEN: dict[str, tuple[str, Any]] = {
    "a side that is none": ("patch_size", 0),
    "a word": ("depth", "many"),
    "no list": ("fullatt_block_indexes", 3),
    "heads that do not divide": ("num_heads", 7),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_tower_is_refused_by_its_key(broken: tuple[str, Any]) -> None:
    key, value = broken
    tower = {**TINY["qwen2_5_vl"]["vision_config"], key: value}
    config = {"model_type": "qwen2_5_vl", **TINY["qwen2_5_vl"], "vision_config": tower}
    with pytest.raises(MemplanError, match="vision_config"):
        estimate(RunSpec(model={"config": config}))


@pytest.mark.parametrize("fields", [{"batch": {"images": 1}}, {"task": "generate", "profile": "vllm", "gpu": "h100"}])
@pytest.mark.parametrize("family", ["internvl", "llava", "paligemma", "smolvlm"])
def test_an_image_smaller_than_a_patch_is_refused(family: str, fields: dict[str, Any]) -> None:
    tower = {**TINY[family]["vision_config"], "image_size": 1}
    config = {"model_type": family, **TINY[family], "vision_config": tower}
    with pytest.raises(MemplanError, match=r"^config: vision_config.image_size"):
        estimate(RunSpec.model_validate({"model": {"config": config}, **fields}))


@pytest.mark.parametrize("text", ["llava", "qwen2_5_vl", "distilbert", "mt5", "vit"])
def test_a_tower_is_only_followed_by_a_decoder(text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"text_config.model_type {text} is not supported yet for llava"):
        estimate(RunSpec(model={"config": {"model_type": "llava", "text_config": {"model_type": text}}}))


@pytest.mark.parametrize("text", ["exaone", "bloom", "glm_moe_dsa"])
def test_a_decoder_with_a_stack_of_its_own_follows_a_tower(text: str) -> None:
    config = {"model_type": "llava", "text_config": {**DECODERS.get(text, {}), "model_type": text}}
    assert estimate(RunSpec(model={"config": config}, batch={"sequence": 64})).bytes.reserved > 0


def test_a_sweep_equals_its_runs_and_skips_sequences_shorter_than_an_image() -> None:
    pytest.importorskip("numpy")
    from memplan.planning.sweep import grid

    asked = run("gemma3", method="lora", batch={"images": 2, "sequence": 512})
    swept = grid(asked, batch=[1, 3], sequence=[16, 32, 300])
    for i, micro in enumerate((1, 3)):
        assert swept.allocated[i, 0] == -1  # 2 x 16 tokens
        for j, sequence in ((1, 32), (2, 300)):
            one = run("gemma3", method="lora", batch={"images": 2, "sequence": sequence, "micro": micro})
            assert swept.allocated[i, j] == estimate(one).bytes.allocated


def test_images_may_fill_the_sequence_but_not_exceed_it() -> None:
    one = {"images": 1, "image_size": 56}
    tokens = picture_of(ModelSpec(model("qwen2_vl")["config"]), 56).tokens
    assert estimate(run("qwen2_vl", batch={**one, "sequence": tokens})).bytes.allocated > 0
    with pytest.raises(SpecError, match=f"must be at least {tokens}"):
        estimate(run("qwen2_vl", batch={**one, "sequence": tokens - 1}))
