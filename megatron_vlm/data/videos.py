"""Load videos from files and lists of frames, with the times of their frames.

A file is sampled as the model's video processor says, and decoded by the optional package `av`; a list of frames is
taken as it is.

Source: `read_video_pyav` in transformers/video_utils.py, which differs in that it does not count frames where the
container stores no count, and does not rotate videos that a phone took upright; a test compares the frames.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from megatron_vlm.data.conversation import VideoSource
from megatron_vlm.data.images import check_file, image_sides, load_image, refuse_damage
from megatron_vlm.data.urls import UrlAccess
from megatron_vlm.errors import ConfigError, DataError

DEFAULT_FRAMES_PER_SECOND = 24.0
"""Rate that transformers assumes for frames whose rate is not known."""
MAX_VIDEO_PIXELS = 2**29
"""Most pixels over all frames that are kept of a video; they take 1.6 GB of memory."""
# Containers that consist of one file; none that refers to other files, as playlists do.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,flv,ogg,asf,gif"

Sampler = Callable[[VideoMetadata, float | None], np.ndarray]
"""Returns the indices of the frames to take from a file, given its metadata and the rate that the row asks for."""


@dataclass(frozen=True)
class Video:
    """Decoded frames of one video: [frames, 3, height, width] uint8, their indices in it, and its frame rate."""

    frames: torch.Tensor
    frames_indices: tuple[int, ...]
    frames_per_second: float
    total_num_frames: int

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata from which the video processor calculates the times of frames."""
        return {
            "total_num_frames": self.total_num_frames,
            "fps": self.frames_per_second,
            # A new list each time: the processor appends to it where the number of frames is odd.
            "frames_indices": list(self.frames_indices),
        }


def load_video(source: VideoSource, row_name: str, access: UrlAccess, sample_frames: Sampler) -> Video:
    """Read and decode one video.

    Args:
        source: a file, or a list of frames.
        row_name: file and line of the row, for error messages.
        access: which URLs of frames are fetched.
        sample_frames: chooses the frames to take from a file.

    Raises:
        DataError: the video is missing, damaged or too large, or its frames differ in size.
        ConfigError: the package that decodes files is not installed.
    """
    if source.path is None:
        frames = [np.asarray(load_image(frame, row_name, access)) for frame in source.frames]
        _check_alike([frame.shape[:2] for frame in frames], source, row_name)
        return _of_list(_stack(frames), source)
    check_video_file(source, row_name)
    with refuse_damage(f"video {source}", row_name):
        return _decode(source, row_name, sample_frames)


def measure_video(source: VideoSource, row_name: str, access: UrlAccess, sample_frames: Sampler) -> Video:
    """Return what `load_video` gives, but with frames that have their size and no contents (device "meta").

    Of lists of frames only headers are read, of a file the first frame is decoded, which alone tells how it is turned.
    Arguments and errors are those of `load_video`, but for damage that only decoding all of it shows.
    """
    if source.path is None:
        sides = [image_sides(frame, row_name, access) for frame in source.frames]
        _check_alike(sides, source, row_name)
        return _of_list(_blank(len(sides), *sides[0]), source)
    check_video_file(source, row_name)
    with refuse_damage(f"video {source}", row_name), _open(source.path) as container:
        indices, rate, total = _sample(container, source, row_name, sample_frames)
        first = next(container.decode(container.streams.video[0]), None)
        _check_found(0 if first is None else len({*indices}), indices, source, row_name)
        assert first is not None
        height, width = (first.width, first.height) if first.rotation // 90 % 2 else (first.height, first.width)
        return Video(_blank(len(indices), height, width), tuple(indices), rate, total)


def check_video_file(source: VideoSource, row_name: str) -> None:
    """Check that the file exists and that the package that decodes it is installed.

    Raises:
        DataError, ConfigError: see `load_video`.
    """
    require_decoder(row_name)
    assert source.path is not None
    check_file(source.path, f"video {source}", row_name)


def require_decoder(row_name: str) -> None:
    """Refuse to go on without the optional package `av`: every video file would be a bad row.

    Raises:
        ConfigError: the package is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise ConfigError(
            "video files need the package av, which is not installed",
            row_name,
            "install the extra: pip install -c constraints.txt -e '.[video]'; or give lists of frames",
        )


def _decode(source: VideoSource, row_name: str, sample_frames: Sampler) -> Video:
    with _open(source.path) as container:
        indices, rate, total = _sample(container, source, row_name, sample_frames)
        wanted, frames = set(indices), []
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in wanted:
                # A phone held upright stores landscape frames and the angle to rotate them by.
                frames.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
            if number == indices[-1]:
                break
    _check_found(len(frames), indices, source, row_name)
    return Video(_stack(frames), tuple(indices), rate, total)


def _open(path: Path | None) -> Any:
    """Open a file's container."""
    import av  # an optional package

    # Nothing but the file itself is opened, whatever it refers to.
    return av.open(str(path), options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS})


def _sample(container: Any, source: VideoSource, row_name: str, sample_frames: Sampler) -> tuple[list[int], float, int]:
    """Return the indices of the frames to take from a container, its frame rate and its number of frames."""
    if not container.streams.video:
        raise DataError(f"video {source} has no picture", row_name, "repair or remove it")
    stream = container.streams.video[0]
    # Reading ahead is done by several workers, each of which would take all cores.
    stream.codec_context.thread_count = 1
    total = stream.frames or _count_frames(source.path)
    rate = float(stream.average_rate or DEFAULT_FRAMES_PER_SECOND)
    if total == 0:
        raise DataError(f"video {source} has no frames", row_name, "remove the row")
    metadata = VideoMetadata(total_num_frames=total, fps=rate)
    indices = sample_frames(metadata, source.frames_per_second).tolist()
    _check_size(len(indices), stream.height, stream.width, source, row_name)
    return indices, rate, total


def _count_frames(path: Path | None) -> int:
    """Count the frames of a file whose container does not store their number."""
    with _open(path) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


def _check_found(num_found: int, indices: Sequence[int], source: VideoSource, row_name: str) -> None:
    if num_found != len(indices):
        raise DataError(f"video {source} ends before its last frame", row_name, "repair or remove it")


def _check_alike(sides: Sequence[tuple[int, ...]], source: VideoSource, row_name: str) -> None:
    """Check the heights and widths of a list of frames."""
    if len({*sides}) > 1:
        sizes = sorted({f"{width} x {height}" for height, width in sides})
        raise DataError(f"the frames of a video differ in size: {', '.join(sizes)}", row_name, "scale them alike")
    height, width = sides[0]
    _check_size(len(sides), height, width, source, row_name)


def _check_size(num_frames: int, height: int, width: int, source: VideoSource, row_name: str) -> None:
    if num_frames * height * width > MAX_VIDEO_PIXELS:
        raise DataError(
            f"video {source} has {num_frames} frames of {width} x {height} pixels, more than {MAX_VIDEO_PIXELS} in all",
            row_name,
            "scale it down, or give a lower fps",
        )


def _of_list(frames: torch.Tensor, source: VideoSource) -> Video:
    """Return the video of a list of frames, all of which are taken."""
    rate = source.frames_per_second or DEFAULT_FRAMES_PER_SECOND
    return Video(frames, tuple(range(len(frames))), rate, len(frames))


def _blank(num_frames: int, height: int, width: int) -> torch.Tensor:
    return torch.empty(num_frames, 3, height, width, dtype=torch.uint8, device="meta")


def _stack(frames: list[np.ndarray]) -> torch.Tensor:
    """Stack frames, channels first, which the processor recognises at any height: [frames, 3, height, width]."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
