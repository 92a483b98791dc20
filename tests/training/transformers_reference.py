"""What transformers makes of the same rows: batch, labels, loss, gradients. Nothing here is read through our code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from tests.families.tiny_family import TinyFamily
from tests.training.tiny_run_config import TinyFiles

NO_LOSS = -100
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def load_multimodal(family: TinyFamily, folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The vision-language model in a directory, with attention as it is written in its source."""
    return _load(AutoModelForImageTextToText, type(family.model()), folder, dtype)


def load_text(family: TinyFamily, folder: Path) -> PreTrainedModel:
    """The language model in a text-only directory."""
    return _load(AutoModelForCausalLM, family.text_class, folder, "auto")


def _load(auto_class: Any, expected: type[PreTrainedModel], folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    model, loading = auto_class.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    assert type(model) is expected
    assert not any(loading.values()), loading
    return model.train()


def multimodal_batch(files: TinyFiles, rows: list[dict[str, Any]]) -> Batch:
    """Rows through `processor.apply_chat_template`, padded on the right to one batch; and labels."""
    processor = AutoProcessor.from_pretrained(files.model, local_files_only=True)
    encoded = [_encode(processor, row["messages"], files.data.parent) for row in rows]
    ids = [output["input_ids"][0] for output in encoded]
    inputs, labels = _pad(ids, processor.tokenizer, files.family.turn)
    for name in {name for output in encoded for name in output} - inputs.keys():
        values = [output[name] for output in encoded if name in output]
        per_token = all(
            output.get(name, torch.empty(0)).shape[:2] == output["input_ids"].shape[:2] for output in encoded
        )
        # Kinds of tokens, or images, videos and their sizes, in a row.
        inputs[name] = _stack([value[0] for value in values], 0) if per_token else _join(values)
    return inputs, labels


def _encode(processor: Any, messages: list[dict[str, Any]], folder: Path) -> dict[str, torch.Tensor]:
    """Images as paths; videos as lists of frames, all of which are taken, at the row's rate where it names one."""
    rates: list[tuple[int, float | None]] = []
    rendered = []
    for message in messages:
        parts = message["content"]
        content = []
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            if part["type"] == "image":
                part = {"type": "image", "image": str(folder / part["image"])}
            elif part["type"] == "audio":
                part = {"type": "audio", "audio": str(folder / part["audio"])}
            elif part["type"] == "video":
                rates.append((len(part["video"]), part.get("fps")))
                part = {"type": "video", "video": [str(folder / frame) for frame in part["video"]]}
            content.append(part)
        rendered.append(message | {"content": content})
    options: dict[str, Any] = {}
    if rates:
        metadata = [
            {"total_num_frames": count, "fps": rate or 24.0, "frames_indices": list(range(count))}
            for count, rate in rates
        ]
        options["processor_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
    output = processor.apply_chat_template(rendered, tokenize=True, return_dict=True, return_tensors="pt", **options)
    return dict(output)


def text_batch(files: TinyFiles, rows: list[dict[str, Any]]) -> Batch:
    """Rows of text through `tokenizer.apply_chat_template`, padded on the right to one batch; and labels."""
    tokenizer = AutoTokenizer.from_pretrained(files.model, local_files_only=True)
    ids = [
        tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_tensors="pt")
        for row in rows
    ]
    return _pad([output["input_ids"][0] for output in ids], tokenizer, files.family.turn)


def mean_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean over all label tokens of the batch."""
    inputs, labels = batch
    logits = model(**inputs).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=NO_LOSS)


def without_key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter, or what belongs to it, without what no loss depends on.

    Softmax does not change when one number is added to all scores of a query, so a key bias has no gradient but
    rounding noise, out of which Adam makes steps of full length. Some towers have it in one with those of queries and
    values.
    """
    if "k_proj.bias" in name:
        return tensor[:0]
    if "attn.qkv.bias" in name:
        query, _, value = tensor.flatten().chunk(3)
        return torch.cat((query, value))
    return tensor


def _pad(
    rows: list[torch.Tensor], tokenizer: Any, turn: tuple[str, str]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs = {
        "input_ids": _stack(rows, tokenizer.pad_token_id),
        "attention_mask": _stack([torch.ones_like(ids) for ids in rows], 0),
    }
    return inputs, _stack([answers(ids, tokenizer, turn) for ids in rows], NO_LOSS)


def _join(values: list[torch.Tensor]) -> torch.Tensor:
    """One after another, padded with zeros to the largest: processors that pad images do it row by row here."""
    sides = [max(value.shape[dim] for value in values) for dim in range(1, values[0].dim())]
    padded = []
    for value in values:
        missing = [size - own for size, own in zip(sides, value.shape[1:], strict=True)]
        # torch takes the last dimension first.
        padding = [amount for size in reversed(missing) for amount in (0, size)]
        padded.append(torch.nn.functional.pad(value, padding))
    return torch.cat(padded)


def _stack(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def answers(ids: torch.Tensor, tokenizer: Any, turn: tuple[str, str]) -> torch.Tensor:
    """`ids` where an assistant speaks, its end-of-turn token included, else -100: read off the token ids alone."""
    opening = tokenizer(turn[0], add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(turn[1])
    labels = torch.full_like(ids, NO_LOSS)
    inside = False
    for place, token in enumerate(ids.tolist()):
        if inside:
            labels[place] = token
            inside = token != end
        elif ids[: place + 1].tolist()[-len(opening) :] == opening:
            inside = True
    return labels
