"""Load the processor of a model directory, check it against the model, and set the run's limits on it."""

from __future__ import annotations

import math
from functools import reduce
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer
from transformers.processing_utils import AudioKwargs, TextKwargs

from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import ConfigError

# Attribute names of the tokens that processors write around, and in place of, an image, a video or audio.
MEDIA_TOKEN_NAMES = (
    "boi_token eoi_token image_token video_token vision_start_token vision_end_token image_break_token image_end_token "
    "boa_token eoa_token audio_token"
).split()
# Files of which one set must be there.
VOCABULARY_FILES = (("tokenizer.json",), ("tokenizer.model",), ("tekken.json",), ("vocab.json", "merges.txt"))
LARGEST_PROCESSOR_NUMBER = 2**40
# A tekken.json has these tokens but no names for them; transformers' converter of single files assigns the same.
TEKKEN_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
# Arguments of calls that change no id of one text, and the one that all callers of a processor share.
HARMLESS_ARGUMENTS = ("padding_side", "truncation_side", "verbose")
MOST_TOKENS_LISTED = 5
KEPT_ARGUMENTS = ("add_special_tokens",)


def load_processor(hf_path: str, rules: PromptRules, min_pixels: int | None, max_pixels: int | None) -> Any:
    """Load the processor of a directory, or the tokenizer if the model is text-only.

    Args:
        hf_path: directory with tokenizer and processor files.
        rules: the family's rules.
        min_pixels: see `PromptBuilder`.
        max_pixels: see `PromptBuilder`.

    Raises:
        ConfigError: the processor cannot be loaded, or does not fit the model or the limits.
    """
    _check_pixel_limits(rules, min_pixels, max_pixels)
    _check_tokenizer_files(Path(hf_path))
    sentencepiece_model = _sentencepiece(Path(hf_path))
    processor = _load(hf_path, has_media=rules.media is not None)
    if sentencepiece_model is not None:
        _check_symbols(getattr(processor, "tokenizer", processor), sentencepiece_model, hf_path)
    _check_tokens_and_patches(processor, hf_path, rules)
    _check_numbers(processor, hf_path)
    if rules.media is not None and (min_pixels, max_pixels) != (None, None):
        rules.media.limit_pixels(processor, min_pixels, max_pixels)
    return processor


def drop_stored_arguments(processor: Any) -> list[str]:
    """Remove the arguments of single calls that a tokenizer's files store, so that no call cuts, pads or splits a text.

    A tokenizer saved after a call that truncated or padded stores how in tokenizer.json, and tokenizer_config.json may
    have any argument; processors pass them on to every call, also to those of images and audio.

    Args:
        processor: a processor or tokenizer, which is changed.

    Returns:
        The arguments that would have changed ids, pixels or audio, each with its value.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    arguments = {*TextKwargs.__annotations__, *AudioKwargs.__annotations__}
    for part in ("image_processor", "video_processor"):
        arguments |= set(getattr(getattr(processor, part, None), "valid_kwargs", TextKwargs).__annotations__)
    arguments -= set(KEPT_ARGUMENTS)
    dropped = {name: tokenizer.init_kwargs.pop(name) for name in sorted(arguments & tokenizer.init_kwargs.keys())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is not None:
        dropped["truncation"] = f"to {backend.truncation['max_length']} tokens"
        backend.no_truncation()
    if backend is not None and backend.padding is not None:
        dropped["padding"] = backend.padding["length"] or "to the longest"
        backend.no_padding()
    if tokenizer.split_special_tokens:
        dropped["split_special_tokens"] = True
        tokenizer.split_special_tokens = False
    return [
        f"{name} {value}"
        for name, value in dropped.items()
        if value and name not in HARMLESS_ARGUMENTS and not name.startswith("return_")
    ]


def check_added_tokens(tokenizer: Any, rules: PromptRules, hf_path: str) -> str | None:
    """Check that every added token has a row in the model's embedding.

    Text-only models are published with the placeholders of their family's media, for which they may have no rows.

    Args:
        tokenizer: the tokenizer of `hf_path`.
        rules: the family's rules.
        hf_path: directory with tokenizer and model.

    Returns:
        A line that names such placeholders; None without any.

    Raises:
        ConfigError: another token has no row.
    """
    if rules.vocab_size is None:
        return None
    missing = {
        str(token): number for number, token in tokenizer.added_tokens_decoder.items() if number >= rules.vocab_size
    }
    harmless = rules.media_tokens if rules.media is None else ()
    refused = {token: number for token, number in missing.items() if token not in harmless}
    if refused:
        raise ConfigError(
            f"the tokenizer has added tokens for which the model's embedding of {rules.vocab_size} rows has none: "
            f"{_list_tokens(refused)}",
            hf_path,
            "remove them from the tokenizer, or resize the model's embedding (resize_token_embeddings in transformers)",
        )
    if not missing:
        return None
    return f"the text-only model has no rows for placeholders of media, which no row may have: {_list_tokens(missing)}"


def _list_tokens(tokens: dict[str, int]) -> str:
    shown = [f"{token} has id {number}" for token, number in list(tokens.items())[:MOST_TOKENS_LISTED]]
    more = len(tokens) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")


def _load(hf_path: str, has_media: bool) -> Any:
    try:
        if has_media:
            processor = AutoProcessor.from_pretrained(hf_path, local_files_only=True)
        else:
            # Not mistral-common's tokenizer, where that package happens to be installed: it renders no template and
            # does not say which text a token stands for. Processors never use it.
            processor = AutoTokenizer.from_pretrained(hf_path, local_files_only=True, mistral_format=False)
    # transformers raises many types on incomplete directories; all mean that this one cannot be used.
    except Exception as error:
        files = [
            "tokenizer_config.json",
            *(["processor_config.json or preprocessor_config.json"] if has_media else []),
        ]
        missing = [names for names in files if not any(Path(hf_path, name).is_file() for name in names.split(" or "))]
        raise ConfigError(
            f"no {'processor' if has_media else 'tokenizer'} can be loaded from {hf_path}: {str(error)[:300]}",
            "model.hf_path",
            f"add the tokenizer and processor files of the model, {' and '.join(filter(None, missing)) or 'undamaged'}",
        ) from None
    if has_media and not hasattr(processor, "image_processor"):
        raise ConfigError(
            f"{hf_path} has a tokenizer but no image processor",
            "model.hf_path",
            "add processor_config.json or preprocessor_config.json, or set model.text_only to true",
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.eos_token is None and Path(hf_path, "tekken.json").is_file():
        for name, token in TEKKEN_TOKENS.items():
            setattr(tokenizer, name, token)
    video_processor = getattr(processor, "video_processor", None)
    if video_processor is not None and getattr(video_processor, "cap_pixels_per_frame", False) is None:
        # Unset means False; setting it avoids the warning that transformers gives.
        video_processor.cap_pixels_per_frame = False
    return processor


def _check_tokenizer_files(directory: Path) -> None:
    """Refuse a directory without a vocabulary, from which transformers would make a tokenizer of two tokens."""
    if any(all((directory / name).is_file() for name in names) for names in VOCABULARY_FILES):
        return
    raise ConfigError(
        f"no tokenizer.json in {directory}, nor {', '.join(' with '.join(names) for names in VOCABULARY_FILES[1:])}",
        "model.hf_path",
        "add the tokenizer files of the model",
    )


def _sentencepiece(directory: Path) -> Any:
    """Return the SentencePiece model of a directory without tokenizer.json, else None.

    Raises:
        ConfigError: the file is no such model; transformers would ask for another library to read it.
    """
    path = directory / "tokenizer.model"
    if not path.is_file() or (directory / "tokenizer.json").is_file():
        return None
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError) as error:
        what = f"tokenizer.model is no SentencePiece model: {str(error)[:200]}"
        raise ConfigError(what, str(path), "download it again") from None
    return model


def _check_symbols(tokenizer: Any, model: Any, hf_path: str) -> None:
    """Check that a SentencePiece model's symbols (marks of turns and media) are tokens of the tokenizer made of it.

    What `extra_special_tokens` of tokenizer_config.json lists may replace them in transformers.
    """
    from sentencepiece import sentencepiece_model_pb2

    pieces = vars(sentencepiece_model_pb2)["ModelProto"].FromString(model.serialized_model_proto()).pieces
    symbols = [piece.piece for piece in pieces if piece.type == piece.USER_DEFINED and piece.piece.strip("▁\t\n ")]
    if not symbols:
        return
    for symbol, ids in zip(symbols, tokenizer(symbols, add_special_tokens=False)["input_ids"], strict=True):
        if ids != model.encode(symbol):
            raise ConfigError(
                f"the tokenizer made of tokenizer.model splits its symbol {symbol} into {len(ids)} tokens",
                hf_path,
                "use the tokenizer_config.json that was published with it, or add tokenizer.json",
            )


def _check_numbers(processor: Any, hf_path: str) -> None:
    """Refuse values of processors that make pixels infinite, or no numbers, or images empty, or audio random."""
    if dither := getattr(getattr(processor, "feature_extractor", None), "dither", 0):
        raise ConfigError(
            f"the feature extractor adds random noise to audio (dither {dither}): no run could be repeated or resumed",
            hf_path,
            "set dither to 0 in the processor's configuration",
        )
    for part in ("image_processor", "video_processor", "feature_extractor"):
        owner = getattr(processor, part, None)
        sizes = getattr(owner, "size", None)
        values: dict[str, Any] = {name: getattr(owner, name, None) for name in ("rescale_factor", "sampling_rate")}
        values |= {name: getattr(owner, name, None) for name in ("image_std", "image_mean")}
        values |= {f"size.{name}": size for name, size in (dict(sizes).items() if sizes else ())}
        for name, value in values.items():
            for number in value if isinstance(value, list | tuple) else (value,):
                if number is None:
                    continue
                is_number = isinstance(number, int | float) and math.isfinite(number)
                if not is_number or (number <= 0 and name != "image_mean") or abs(number) > LARGEST_PROCESSOR_NUMBER:
                    raise ConfigError(
                        f"the {part.replace('_', ' ')}'s {name} is {value}", hf_path, "download its configuration again"
                    )


def _check_tokens_and_patches(processor: Any, hf_path: str, rules: PromptRules) -> None:
    """Check that the processor's placeholders and patches are those that the model was configured with."""
    tokenizer = getattr(processor, "tokenizer", processor)
    kinds = {"image": rules.image_token_id, "video": rules.video_token_id, "audio": rules.audio_token_id}
    for kind, expected in kinds.items():
        # Some processors' image token is the marker that they expand; some tokenizers name no image token.
        own_ids = [getattr(owner, f"{kind}_token_id", None) for owner in (tokenizer, processor)]
        own_id = next((token for token in own_ids if token is not None), None)
        if expected is not None and own_id != expected:
            raise ConfigError(
                f"the tokenizer's {kind} token is {own_id}, config.json says {expected}",
                hf_path,
                "take config.json and the tokenizer's files from one model",
            )
    for name in MEDIA_TOKEN_NAMES:
        token = getattr(processor, name, None)
        if token is not None and tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ConfigError(
                f"the processor writes {token}, which is no token of the tokenizer",
                hf_path,
                "take the tokenizer's and the processor's files from one model",
            )
    for name, expected in rules.media.sizes.items() if rules.media is not None else ():
        own = reduce(lambda part, attribute: getattr(part, attribute, None), name.split("."), processor)
        if own != expected:
            raise ConfigError(
                f"the processor's {name} is {own}, config.json says {expected}",
                hf_path,
                "take config.json and the processor's files from one model",
            )


def _check_pixel_limits(rules: PromptRules, min_pixels: int | None, max_pixels: int | None) -> None:
    given = {"data.min_pixels": min_pixels, "data.max_pixels": max_pixels}
    for key, value in given.items():
        if value is not None and rules.image_token_id is None:
            raise ConfigError(f"{key} is {value}, but this model takes no images", key, "set it to null")
