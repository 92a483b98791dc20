"""Load the media of a row and encode it: decoded, or with their sizes alone, from which its length follows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from megatron_vlm.data.audio import count_samples, load_audio
from megatron_vlm.data.conversation import AudioSource, Conversation, ImagePart, VideoSource
from megatron_vlm.data.images import image_sides, load_image
from megatron_vlm.data.prompts import PromptBuilder, Sample
from megatron_vlm.data.urls import UrlAccess
from megatron_vlm.data.videos import Video, load_video, measure_video


class MediaLoader:
    """Decodes the media of rows.

    Args:
        builder: encodes conversations with the model's processor and chat template.
        access: which URLs of images and audio are fetched.
    """

    def __init__(self, builder: PromptBuilder, access: UrlAccess) -> None:
        self.builder = builder
        self.access = access

    def load(self, conversation: Conversation) -> tuple[list[Any], list[Video], list[np.ndarray]]:
        """Return a row's images, videos and audio as `PromptBuilder.encode` takes them.

        Raises:
            DataError: one of them cannot be used.
            ConfigError: a package that decodes them is not installed.
        """
        name = conversation.row_name
        images = [self._image(part, name) for part in conversation.image_parts if part.source is not None]
        videos = [self._video(source, name) for source in conversation.videos]
        audio = [self._audio(source, name) for source in conversation.audio]
        return images, videos, audio

    def encode(self, conversation: Conversation) -> Sample:
        """Return the sample of a row; errors are those of `load` and `PromptBuilder.encode`."""
        return self.builder.encode(conversation, *self.load(conversation))

    def _image(self, part: ImagePart, row_name: str) -> Any:
        assert part.source is not None
        image = load_image(part.source, row_name, self.access)
        return self.builder.resized(image, part.size, row_name)

    def _video(self, source: VideoSource, row_name: str) -> Video:
        return load_video(source, row_name, self.access, self.builder.sample_frames)

    def _audio(self, source: AudioSource, row_name: str) -> np.ndarray:
        return load_audio(source, row_name, self.access, *self.builder.audio_limits)


class MediaMeasurer(MediaLoader):
    """Gives the media of rows their sizes, by what the files say of themselves, and no contents.

    Its samples have the ids and media that decoding gives, and inputs of the towers without values (device "meta").
    What is decoded all the same: MP3, the first frame of a video file, and a PNG file whose orientation may stand
    behind its pixels. Damage that only decoding shows is not seen.

    Arguments are those of `MediaLoader`.
    """

    def __init__(self, builder: PromptBuilder, access: UrlAccess) -> None:
        super().__init__(_without_spectra(builder), access)

    def encode(self, conversation: Conversation) -> Sample:
        with _SizesOnly():
            return super().encode(conversation)

    def _image(self, part: ImagePart, row_name: str) -> Any:
        assert part.source is not None
        sides = image_sides(part.source, row_name, self.access)
        height, width = self.builder.sides_of_row(sides, part.size, row_name)
        return torch.empty(3, height, width, dtype=torch.uint8, device="meta")

    def _video(self, source: VideoSource, row_name: str) -> Video:
        return measure_video(source, row_name, self.access, self.builder.sample_frames)

    def _audio(self, source: AudioSource, row_name: str) -> np.ndarray:
        return np.zeros(count_samples(source, row_name, self.access, *self.builder.audio_limits), np.float32)


class _SizesOnly(TorchFunctionMode):
    """Context in which image and video processors take tensors without values.

    What they count has values: they number patches on the device of the pixels. Of what they compute, all is right
    that depends on shapes, and the slowest is left out.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.arange:
            kwargs.pop("device", None)
        elif args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            if function in (torch.Tensor.clamp_, torch.Tensor.round_):
                return args[0]
            size = kwargs.get("size")
            if function is torch.nn.functional.interpolate and isinstance(size, list | tuple):
                return args[0].new_empty((*args[0].shape[: -len(size)], *size))
        return function(*args, **kwargs)


def _without_spectra(builder: PromptBuilder) -> PromptBuilder:
    """Return a builder whose processor counts the frames of audio and takes almost no time for what is in them."""
    extractor: Any = getattr(builder.processor, "feature_extractor", None)
    if not hasattr(extractor, "mel_filters"):
        return builder
    builder, processor, extractor = copy.copy(builder), copy.copy(builder.processor), copy.copy(extractor)
    # Fourier transforms of the shortest length.
    extractor.fft_length, extractor.mel_filters = 2, np.zeros((2, extractor.feature_size))
    builder.processor, processor.feature_extractor = processor, extractor
    return builder
