"""Gemma 4: ids, patches, audio and trained tokens equal the processor's; what it would cut or ignore is refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Gemma4AudioFeatureExtractor, Gemma4UnifiedAudioFeatureExtractor
from transformers.video_utils import load_video as load_video_of_transformers

from megatron_vlm.data.audio import load_audio
from megatron_vlm.data.collate import collate
from megatron_vlm.data.conversation import AudioSource, ImageSize
from megatron_vlm.data.describe import check_rows, describe_sample
from megatron_vlm.data.prompts import PromptBuilder, Sample
from megatron_vlm.data.rows import RowReader
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.urls import UrlAccess
from megatron_vlm.errors import DataError
from megatron_vlm.families.gemma4.audio_config import MOST_AUDIO_SAMPLES
from megatron_vlm.families.gemma4.prompt import prompt_rules
from megatron_vlm.layers.patches import patch_positions, split_frames
from tests.data.references import (
    GEMMA4_VARIANTS,
    check_trained,
    draw_pictures,
    encode,
    gemma4_config,
    reference,
    refusal,
    trained_text,
)
from tests.data.rows import CONVERSATIONS, assistant, audio, image, row, text, user, video
from tests.data.sounds import encoded, tone, write_tones
from tests.data.tiny_processor import GEMMA4_TEMPLATE
from tests.versions import needs_transformers_5_23

PATCH, POOLING = 4, 2
# Patches of pixels per side of a block that is a token: in 12B the processor merges them into one.
MERGE = {"E2B": POOLING, "12B": 1}
# Width and height: taller, wider, square, as thin as it may be, and of the very size that the processor makes.
SIZES = {"0": (20, 30), "1": (70, 25), "2": (48, 48), "thin": (200, 1), "kept": (88, 96)}
SECONDS = {"short": 0.02, "a": 0.5, "b": 1.234, "long": 30.0}

AUDIO_CONVERSATIONS = {
    "one clip": [user(audio("a.wav"), "What?"), assistant("A tone.")],
    "clips of several lengths": [user(audio("b.wav"), audio("short.wav"), "?", audio("a.wav")), assistant("Tones.")],
    "the longest clip": [user("Hear:", audio("long.wav")), assistant("A tone.")],
    "several turns": [user(audio("a.wav")), assistant("One."), user("And?", audio("b.wav")), assistant("Two.")],
    "clip and images": [user(image("0.png"), audio("b.wav"), image("1.png"), "?"), assistant("Both.")],
    "images of many sizes": [user(*(image(f"{name}.png") for name in SIZES), "?"), assistant("Many.")],
    "clip in an answer": [user("Sing."), assistant("La:", audio("a.wav"), "!")],
}
ALL = CONVERSATIONS | AUDIO_CONVERSATIONS


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(draw_pictures(tmp_path_factory.mktemp("media"), SIZES), SECONDS)


def check_patches(sample: Sample, theirs: dict[str, Any], merge: int) -> None:
    """Every patch of ours is theirs at the same column and row, and we have no others."""
    kinds = {"image": ("pixel_values", "image_position_ids"), "video": ("pixel_values_videos", "video_position_ids")}
    remaining = {
        kind: iter(zip(theirs[pixels].flatten(0, -3), theirs[positions].flatten(0, -3), strict=True))
        for kind, (pixels, positions) in kinds.items()
        if pixels in theirs
    }
    media = [medium for medium in sample.media if medium.kind != "audio"]
    assert ("pixel_values" in sample.media_inputs) == bool(media)
    start = 0
    for medium in media:
        for frame in split_frames([medium.grid]):
            padded, positions = next(remaining[medium.kind])
            is_real = positions[:, 0] >= 0
            ours = sample.media_inputs["pixel_values"][start : start + frame[1] * frame[2]]
            places = patch_positions([frame], merge, torch.device("cpu"))
            found = {(int(x), int(y)): patch for (x, y), patch in zip(positions[is_real], padded[is_real], strict=True)}
            expected = torch.stack(
                [found[x, y] for x, y in zip(places.column.tolist(), places.row.tolist(), strict=True)]
            )
            assert len(found) == len(ours) and torch.equal(ours, expected)
            start += len(ours)
    assert start == len(sample.media_inputs.get("pixel_values", ()))
    assert all(next(frames, None) is None for frames in remaining.values())


def check_sample(sample: Sample, theirs: dict[str, Any], variant: str) -> None:
    assert sample.input_ids.tolist() == np.asarray(theirs["input_ids"][0]).tolist()
    check_patches(sample, theirs, MERGE[variant])
    masks = [np.asarray(mask, bool) for mask in theirs.get("input_features_mask", ())]
    clips = [np.asarray(clip)[mask] for clip, mask in zip(theirs.get("input_features", ()), masks, strict=True)]
    assert [medium.grid for medium in sample.media if medium.kind == "audio"] == [(len(clip), 1, 1) for clip in clips]
    assert ("audio_features" in sample.media_inputs) == bool(clips)
    if clips:
        features = sample.media_inputs["audio_features"]
        assert features.dtype == torch.float32 and np.array_equal(features.numpy(), np.concatenate(clips))
    frames_of_audio = [len(clip) if variant == "12B" else ((len(clip) + 1) // 2 + 1) // 2 for clip in clips]
    audio_token_id = gemma4_config(variant).audio_token_id
    assert (sample.input_ids == audio_token_id).sum() == sum(frames_of_audio)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_transformers_5_23 if "audio" in str(ALL[name]) else ()) for name in ALL]
)
def test_sample_equals_the_processor(
    gemma4_builder: PromptBuilder, gemma4_path: Path, gemma4_variant: str, media_folder: Path, name: str
) -> None:
    sample = encode(gemma4_builder, ALL[name], media_folder)
    check_sample(sample, reference(gemma4_path, ALL[name], media_folder), gemma4_variant)
    assert not (sample.trained & np.isin(sample.input_ids, gemma4_builder.rules.media_token_ids)).any()


@needs_transformers_5_23
@pytest.mark.parametrize("name", [name for name in ALL if name != "clip in an answer"])
def test_trained_tokens_equal_the_assistant_mask(
    tagged_gemma4_builder: PromptBuilder,
    gemma4_builder: PromptBuilder,
    tagged_gemma4_path: Path,
    media_folder: Path,
    name: str,
) -> None:
    theirs = reference(tagged_gemma4_path, ALL[name], media_folder, return_assistant_tokens_mask=True)
    for builder in (tagged_gemma4_builder, gemma4_builder):
        check_trained(builder, theirs, ALL[name], media_folder)


def test_answers_end_with_their_turn(gemma4_builder: PromptBuilder, media_folder: Path) -> None:
    sample = encode(gemma4_builder, AUDIO_CONVERSATIONS["several turns"], media_folder)
    assert trained_text(gemma4_builder, sample) == ["One.<turn|>", "Two.<turn|>"]


@needs_transformers_5_23
def test_videos_as_frames_with_images_and_audio(
    gemma4_builder: PromptBuilder, gemma4_path: Path, gemma4_variant: str, media_folder: Path
) -> None:
    """Frames are written with their time; all media of a row at once."""
    names = ["0.png", "1.png", "2.png"]
    for name in names:
        Image.open(media_folder / name).resize((40, 24)).save(media_folder / f"frame{name}")
    frames = [f"frame{name}" for name in names]
    messages = [user(video(frames, fps=0.04), image("1.png"), audio("a.wav"), video(frames[:1])), assistant("b")]
    sample = encode(gemma4_builder, messages, media_folder)
    pictures = [np.asarray(Image.open(media_folder / name)) for name in frames]
    given = [
        user(
            {"type": "video", "video": np.stack(pictures)},
            image(media_folder / "1.png"),
            audio(media_folder / "a.wav"),
            {"type": "video", "video": np.stack(pictures[:1])},
        ),
        assistant("b"),
    ]
    metadata = [
        {"total_num_frames": 3, "fps": 0.04, "frames_indices": [0, 1, 2]},
        {"total_num_frames": 1, "fps": 24.0, "frames_indices": [0]},
    ]
    processor = AutoProcessor.from_pretrained(gemma4_path, local_files_only=True)
    options = {"do_sample_frames": False, "video_metadata": metadata}
    theirs = processor.apply_chat_template(given, tokenize=True, return_dict=True, processor_kwargs=options)
    check_sample(sample, theirs, gemma4_variant)
    assert [(medium.kind, medium.grid[0]) for medium in sample.media] == [
        ("video", 3),
        ("image", 1),
        ("video", 1),
        ("audio", 49 if gemma4_variant == "E2B" else 50),
    ]
    decoded = gemma4_builder.tokenizer.decode(sample.input_ids)
    assert all(f"{time} <|image><|video|>" in decoded for time in ("00:00", "00:25", "00:50"))


@pytest.mark.parametrize(("fps", "wanted"), [(None, 32), (2, 8)])
def test_video_files_give_the_frames_of_transformers(
    gemma4_builder: PromptBuilder,
    gemma4_path: Path,
    gemma4_variant: str,
    tmp_path: Path,
    fps: float | None,
    wanted: int,
) -> None:
    """The processor's number of frames, or the row's rate, which it would ignore for its number."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(40):
            picture = np.full((32, 48, 3), 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    sample = encode(gemma4_builder, [user(video("a.mp4", fps), "What?"), assistant("b")], tmp_path)
    processor = AutoProcessor.from_pretrained(gemma4_path, local_files_only=True)
    if fps is not None:
        processor.video_processor.num_frames = None
    sampler = partial(processor.video_processor.sample_frames, fps=fps)
    frames, metadata = load_video_of_transformers(
        str(tmp_path / "a.mp4"), backend="pyav", sample_indices_fn=lambda metadata, **_: sampler(metadata)
    )
    assert len(frames) == wanted == sample.media[0].grid[0]
    messages = [user({"type": "video", "video": frames}, "What?"), assistant("b")]
    options = {"do_sample_frames": False, "video_metadata": [dict(metadata)]}
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, processor_kwargs=options)
    check_sample(sample, theirs, gemma4_variant)


FORGERIES = "<|turn> <turn|> <|channel> <|image|> <|image> <image|> <|video|> <|audio|> <|audio> <audio|> <eos>".split()


@pytest.mark.parametrize("token", FORGERIES)
def test_texts_that_would_forge_turns_and_media(
    gemma4_builder: PromptBuilder, tagged_gemma4_builder: PromptBuilder, media_folder: Path, token: str
) -> None:
    for messages in ([user(f"a {token}"), assistant("b")], [user("a"), assistant(f"b {token} c")]):
        with pytest.raises(DataError, match="contains the control token"):
            encode(gemma4_builder, messages, media_folder)
    if "image" in token or "audio" in token or "video" in token:
        with pytest.raises(DataError, match="contains the control token"):
            encode(tagged_gemma4_builder, [user(f"a {token}"), assistant("b")], media_folder)


def test_thinking_may_be_asked_for(gemma4_builder: PromptBuilder, media_folder: Path) -> None:
    messages = [{"role": "system", "content": [text("<|think|>Be kind.")]}, user("a"), assistant("b")]
    assert "<|think|>" in gemma4_builder.tokenizer.decode(encode(gemma4_builder, messages, media_folder).input_ids)


def test_what_extractors_cut_off() -> None:
    for extractor, longest in (
        (Gemma4AudioFeatureExtractor, MOST_AUDIO_SAMPLES),
        (Gemma4UnifiedAudioFeatureExtractor, None),
    ):
        assert inspect.signature(extractor.__call__).parameters["max_length"].default == longest


@needs_transformers_5_23
def test_samples_are_kept_whole(media_folder: Path, tmp_path: Path) -> None:
    """12B takes clips of any length: a last frame that is not full ends in zeros, and nothing is cut off."""
    GEMMA4_VARIANTS["12B"](tmp_path)
    builder = PromptBuilder(tmp_path, prompt_rules(gemma4_config("12B")))
    write_tones(media_folder, {"one sample": 1 / 1600, "minute": 60.003})
    messages = [user(audio("one sample.wav"), audio("minute.wav"), "?"), assistant("b")]
    sample = encode(builder, messages, media_folder)
    check_sample(sample, reference(tmp_path, messages, media_folder), "12B")
    features = sample.media_inputs["audio_features"]
    samples = load_audio(AudioSource(media_folder / "minute.wav"), "row", UrlAccess.NONE, *builder.audio_limits)
    assert len(samples) == 60 * 1600 + 5 and features.shape == (1 + 6001, 16)
    assert features[0, 0] != 0 and not features[0, 1:].any()
    assert np.array_equal(features[1:].flatten()[: len(samples)].numpy(), samples) and not features[-1, 5:].any()


def test_bad_clips_are_bad_rows(
    make_gemma4_reader: Callable[..., RowReader], folder: Path, gemma4_variant: str
) -> None:
    write_tones(folder, {"good": 0.3, "brief": 0.01, "long": 30.001})
    data = (folder / "good.wav").read_bytes()
    (folder / "cut.wav").write_bytes(data[: len(data) // 2])
    (folder / "text.wav").write_text("no audio")
    (folder / "empty.wav").write_bytes(encoded(np.zeros((0, 1))))
    (folder / "infinite.wav").write_bytes(encoded(np.full((4000, 1), np.inf), subtype="FLOAT"))
    limits = {
        "brief": "clip 1 of audio is too short to be heard",
        "long": "takes 30.001 seconds, more than the 30 that",
    }
    names = (limits if gemma4_variant == "E2B" else {}) | {
        "cut": "cut.wav ends before its last sample",
        "text": "text.wav cannot be decoded",
        "empty": "empty.wav has no samples",
        "infinite": "infinite.wav has samples that are not finite",
        "missing": "missing.wav does not exist",
    }
    rows = [row(user(audio(f"{name}.wav"), "?"), assistant("b")) for name in [*names, "good"]]
    reader = make_gemma4_reader(rows, max_bad_fraction=0.5, seq_length=1024)
    for number, reason in enumerate(names.values()):
        loaded = reader.read(0, number)
        assert loaded.bad and loaded.problem and reason in loaded.problem and "\n" not in loaded.problem
        assert f"rows.jsonl:{number + 1}]" in loaded.problem and not loaded.sample.media_inputs
    assert not reader.read(0, len(names)).bad
    found = check_rows(reader)
    count = len(rows)
    assert (found.audio_clips, found.bad_rows) == (count, 1)
    assert str(found) == f"{count} rows, 0 images, {count} audio clips, 1 bad rows"


def test_batches_and_reports(make_gemma4_reader: Callable[..., RowReader], folder: Path, gemma4_variant: str) -> None:
    is_unified = gemma4_variant == "12B"
    frames = [50, 100, 30] if is_unified else [49, 99, 29]
    tokens = [50, 100, 30] if is_unified else [13, 25, 8]
    write_tones(folder, {"a": 0.5, "b": 0.3})
    (folder / "voice.mp3").write_bytes(encoded(tone(1, 44100, 2), "MP3", 44100))
    contents: list[list[Any]] = [[audio("a.wav"), image("0.png")], ["?"], [audio("voice.mp3"), "and", audio("b.wav")]]
    reader = make_gemma4_reader([row(user(*parts), assistant("b")) for parts in contents], seq_length=1024)
    loaded = [reader.read(0, number) for number in range(3)]
    rules = reader.builder.rules
    batch = collate([[each] for each in loaded], rules, reader.builder.padding_token_id)
    assert (batch.counters["audio_clips"], batch.counters["images"], batch.counters["bad_rows"]) == (3, 1, 0)
    assert batch.audio_frames == frames
    assert batch.media_inputs["audio_features"].shape == (sum(frames), 16)
    image_tokens = int((batch.input_ids == rules.image_token_id).sum())
    assert image_tokens == batch.media_inputs["pixel_values"].shape[0] // MERGE[gemma4_variant] ** 2 == 126
    is_audio = batch.input_ids == rules.audio_token_id
    assert batch.feature_index[is_audio].tolist() == list(range(image_tokens, image_tokens + sum(tokens)))
    described = describe_sample(loaded[0], reader.builder)
    patches = "126x192" if is_unified else "504x48"
    assert f"1 images and 1 audio clips (pixel_values {patches}, audio_features {frames[0]}x16))" in described
    assert f"<|audio|> x {tokens[0]}" in described


def test_rows_too_long_lose_whole_clips(
    make_gemma4_reader: Callable[..., RowReader], folder: Path, gemma4_variant: str
) -> None:
    seconds, frames = {"E2B": (1.0, 99), "12B": (0.25, 25)}[gemma4_variant]  # either way 25 tokens
    write_tones(folder, {"a": seconds})
    turns = [turn for _ in range(3) for turn in (user(audio("a.wav"), "?"), assistant("b"))]
    loaded = make_gemma4_reader([row(*turns)], seq_length=100, too_long="truncate").read(0, 0)
    assert loaded.truncated and loaded.sample.count("audio") == 2
    assert len(loaded.sample.media_inputs["audio_features"]) == 2 * frames


def test_models_without_audio(gemma4_path: Path, gemma4_variant: str, media_folder: Path) -> None:
    """26B and 31B have no audio tower, though their processor takes audio."""
    silent = prompt_rules(gemma4_config(gemma4_variant, audio_config=None))
    assert silent.audio_token_id is None
    for name in ("text", "one image"):
        sample = encode(PromptBuilder(gemma4_path, silent), ALL[name], media_folder)
        check_sample(sample, reference(gemma4_path, ALL[name], media_folder), gemma4_variant)
    with pytest.raises(DataError, match=r"control token <\|audio\|>"):
        encode(PromptBuilder(gemma4_path, silent), [user("<|audio|>"), assistant("b")], media_folder)


@needs_transformers_5_23
def test_models_without_images(gemma4_path: Path, gemma4_variant: str, media_folder: Path) -> None:
    blind = prompt_rules(gemma4_config(gemma4_variant, vision_config=None))
    assert (blind.image_token_id, blind.video_token_id, blind.bidirectional_images) == (None, None, False)
    for name in ("text", "several turns"):
        sample = encode(PromptBuilder(gemma4_path, blind), ALL[name], media_folder)
        check_sample(sample, reference(gemma4_path, ALL[name], media_folder), gemma4_variant)
    with pytest.raises(DataError, match=r"control token <\|image\|>"):
        encode(PromptBuilder(gemma4_path, blind), [user("<|image|>"), assistant("b")], media_folder)
    assert "data.max_pixels is 4480, but this model takes no images" in refusal(gemma4_path, blind, max_pixels=4480)


def test_text_only(gemma4_path: Path, gemma4_variant: str, media_folder: Path) -> None:
    words = prompt_rules(gemma4_config(gemma4_variant, text_only=True))
    assert words.media is None and words.media_token_ids == [] and not words.bidirectional_images
    sample = encode(PromptBuilder(gemma4_path, words), ALL["text"], media_folder)
    assert sample.input_ids.tolist() == reference(gemma4_path, ALL["text"], media_folder)["input_ids"][0]


def test_limits_of_images(
    gemma4_path: Path, gemma4_rules: PromptRules, gemma4_variant: str, media_folder: Path
) -> None:
    """70 tokens of 8 x 8 pixels are the least, and the next larger limit counts only as a whole."""
    for max_pixels, budget in {4480: 70, 8959: 70, 8960: 140, 40_000: 560, 10**7: 1120}.items():
        processor = PromptBuilder(gemma4_path, gemma4_rules, max_pixels=max_pixels).processor
        assert processor.image_processor.max_soft_tokens == budget and processor.video_processor.max_soft_tokens == 70
    builder = PromptBuilder(gemma4_path, gemma4_rules, max_pixels=4480)
    grids = [medium.grid for medium in encode(builder, ALL["images of many sizes"], media_folder).media]
    assert all(height * width <= 70 * MERGE[gemma4_variant] ** 2 for _, height, width in grids)
    assert "fewer than the 4480 of 70 tokens, this model's smallest limit" in refusal(
        gemma4_path, gemma4_rules, max_pixels=4479
    )
    assert "min_pixels is 9, but this model's processor scales every image" in refusal(
        gemma4_path, gemma4_rules, min_pixels=9
    )


def test_images_that_are_not_resized(gemma4_path: Path, gemma4_rules: PromptRules, tmp_path: Path) -> None:
    """Those of whole tokens are taken; of others, a processor may mix up the patches, or fail."""
    builder = PromptBuilder(gemma4_path, gemma4_rules)
    builder.processor.image_processor.do_resize = False
    messages = [user(image("a.png"), "?"), assistant("b")]
    outcomes = {(16, 24): None, (12, 16): "set do_resize to true", (20, 30): "processor refuses the row: shape"}
    for size, reason in outcomes.items():
        Image.new("RGB", size).save(tmp_path / "a.png")
        if reason is None:
            assert (encode(builder, messages, tmp_path).input_ids == gemma4_rules.image_token_id).sum() == 2 * 3
            continue
        with pytest.raises(DataError, match=reason):
            encode(builder, messages, tmp_path)


def test_sizes_that_rows_ask_for(gemma4_builder: PromptBuilder) -> None:
    """Only those that the processor, which scales every image to its own limit, keeps."""
    picture = Image.new("RGB", (20, 30))
    resized = partial(gemma4_builder.resized, picture, row_name="rows.jsonl:7")
    assert resized(ImageSize(max_pixels=10**6)) is picture
    assert resized(ImageSize(resized_height=96, resized_width=88)).size == (88, 96)
    for size, reason in {
        ImageSize(max_pixels=4480): "an image of 80 x 48 pixels, which the processor would make",
        ImageSize(resized_height=16, resized_width=16): "an image of 16 x 16 pixels, which the processor would make",
        ImageSize(max_pixels=63): "fewer than the 64 of one token",
        ImageSize(min_pixels=64): "`min_pixels` has no meaning for this model",
    }.items():
        with pytest.raises(DataError, match=reason):
            resized(size)


def test_directories_that_do_not_fit(
    tmp_path: Path, gemma4_path: Path, gemma4_rules: PromptRules, gemma4_variant: str
) -> None:
    build = GEMMA4_VARIANTS[gemma4_variant]
    build(tmp_path / "large", patch_size=8)
    build(tmp_path / "pooled", pooling_size=3)
    build(tmp_path / "framed", **({"bins": 8} if gemma4_variant == "E2B" else {"samples_per_token": 8}))
    build(tmp_path / "noisy")
    file = tmp_path / "noisy" / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["feature_extractor"]["dither"] = 0.0001
    file.write_text(json.dumps(settings))
    assert "image_processor.patch_size is 8, config.json says 4" in refusal(tmp_path / "large", gemma4_rules)
    assert "pooling_kernel_size is 3, config.json says 2" in refusal(tmp_path / "pooled", gemma4_rules)
    assert "feature_extractor.feature_size is 8, config.json says 16" in refusal(tmp_path / "framed", gemma4_rules)
    assert "adds random noise to audio (dither 0.0001)" in refusal(tmp_path / "noisy", gemma4_rules)
    other = dataclasses.replace(gemma4_rules, audio_token_id=3)
    assert "the tokenizer's audio token is" in refusal(gemma4_path, other)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("{{- '<|audio|>' -}}", ""), "refuses the row"),
        (("{{- '<|audio|>' -}}", "{{- '<|audio|><|audio|>' -}}"), "refuses the row"),
    ],
)
@needs_transformers_5_23
def test_templates_that_do_not_write_all_audio(
    tmp_path: Path,
    gemma4_rules: PromptRules,
    gemma4_variant: str,
    media_folder: Path,
    change: tuple[str, str],
    reason: str,
) -> None:
    GEMMA4_VARIANTS[gemma4_variant](tmp_path / "odd", chat_template=GEMMA4_TEMPLATE.replace(*change))
    builder = PromptBuilder(tmp_path / "odd", gemma4_rules)
    with pytest.raises(DataError, match=reason):
        encode(builder, AUDIO_CONVERSATIONS["one clip"], media_folder)
