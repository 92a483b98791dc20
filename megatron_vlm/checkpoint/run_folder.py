"""The checkpoints of a run on disk: names, the manifest, atomic publishing, retention and clean-up.

    run_dir/checkpoints/step_00000100/                    complete: the name exists only once everything is on disk
    run_dir/checkpoints/step_00000200.incomplete.3f9ac2/  being written, or left behind by a killed run
    run_dir/checkpoints/step_00000050.removed.81bc04/     being deleted
    run_dir/checkpoints/step_00000300.damaged.0c91fe/     was incomplete at a start, which took an earlier one
    run_dir/checkpoints/passthrough/                      tensors that are only carried through, for all checkpoints

A checkpoint is a folder in megatron-core's `torch_dist` format plus `megatron_vlm.json`, the manifest, and
`passthrough/`, safetensors that are only carried through, for models that have such. Nothing here
uses torch.distributed: these functions run on one rank (or in a tool), and `manager.py` shares the outcome.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint.torch_dist import TorchDistReader
from megatron_vlm.errors import CheckpointError
from megatron_vlm.files.durable import write_durably
from megatron_vlm.files.small_files import read_small, sync_directory

FORMAT_VERSION = 1
MANIFEST_NAME = "megatron_vlm.json"
CHECKPOINTS_NAME = "checkpoints"
PASSTHROUGH_NAME = "passthrough"
CRC_KEY = "crc32"
METADATA_CRC_KEY = "metadata_crc32"
RUN_FILES = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "stopped.json", "exported.json", "wandb_run_id")
_PUBLISHED = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"step_\d{8,}\.(incomplete|removed)\.[0-9a-f]+|\.passthrough\.partial-\d+")


@dataclass(frozen=True)
class ModelIdentity:
    """What a checkpoint is a checkpoint of."""

    family: str
    model_type: str
    text_only: bool
    tied: bool
    hf_config: Mapping[str, Any] = field(default_factory=dict)

    def check_family(self, wanted: ModelIdentity, folder: Path) -> None:
        """Make sure that a checkpoint of this model in `folder` can fill the model `wanted`, or a part of it.

        Raises:
            CheckpointError: they are of different families.
        """
        if self.family != wanted.family:
            raise CheckpointError(
                f"checkpoint of family {self.family} ({self.model_type}), this run trains {wanted.family}"
                f" ({wanted.model_type})",
                str(folder),
                "give a checkpoint of the same family, or another model.hf_path",
            )


@dataclass(frozen=True)
class Manifest:
    """Contents of `megatron_vlm.json`: everything about a checkpoint but its tensors, readable by people.

    Args:
        identity: the model.
        step: optimizer steps done; 0 for an imported model.
        layout: parallel sizes it was saved with; empty for an imported model.
        precision: type of the parameters, `fp32` or `bf16`.
        optimizer: kind of the optimizer (`name`, `distributed`), or None when the checkpoint holds only weights.
        scheduler: state of the learning-rate schedule, or None.
        data: position in the data, or None.
        extra: what the training loop wants back.
        config: the resolved configuration, YAML.
        passthrough: names of the tensors that are only carried through; None in manifests that do not say so.
    """

    identity: ModelIdentity
    step: int = 0
    layout: Mapping[str, int] = field(default_factory=dict)
    precision: str = ""
    optimizer: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    passthrough: Sequence[str] | None = None

    def to_json(self, metadata_crc32: int | None = None) -> str:
        """Return the file's text: the fields, the CRC-32 of megatron-core's metadata, and the CRC-32 of all that."""
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        identity = dataclasses.asdict(fields.pop("identity"))
        content = {"format_version": FORMAT_VERSION, **identity, **fields, METADATA_CRC_KEY: metadata_crc32}
        return json.dumps({**content, CRC_KEY: _crc_of_content(content)}, indent=1)

    def write(self, folder: Path) -> None:
        """Write into `folder`, which has the tensors already, durably."""
        metadata = folder / TorchDistReader.METADATA_FILE
        metadata_crc32 = zlib.crc32(metadata.read_bytes()) if metadata.exists() else None
        write_durably(folder / MANIFEST_NAME, self.to_json(metadata_crc32).encode())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read from a checkpoint folder.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another format version.
        """
        path = folder / MANIFEST_NAME
        content = read_json(path, "use another checkpoint")
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"format version {version}, this program reads {FORMAT_VERSION}", str(path), "use a matching version"
            )
        _check_checksums(content, path)
        return Manifest._from_content(content, path)

    @staticmethod
    def _from_content(content: dict[str, Any], path: Path) -> Manifest:
        kinds: dict[str, tuple[type, ...]] = {
            "family": (str,),
            "model_type": (str,),
            "text_only": (bool,),
            "tied": (bool,),
            "hf_config": (dict,),
            "step": (int,),
            "layout": (dict,),
            "precision": (str,),
            "config": (str,),
            "extra": (dict,),
            **dict.fromkeys(("optimizer", "scheduler", "data"), (dict, type(None))),
            "passthrough": (list, type(None)),
        }
        identity_names = [entry.name for entry in dataclasses.fields(ModelIdentity)]
        missing = [name for name in identity_names if name not in content]
        wrong = [name for name, kind in kinds.items() if name in content and not isinstance(content[name], kind)]
        if missing or wrong:
            problem = f"{missing[0]!r} is missing" if missing else f"{wrong[0]!r} is {str(content[wrong[0]])[:80]!r}"
            raise CheckpointError(f"damaged: {problem}", str(path), "use another checkpoint")
        fields = {name: value for name, value in content.items() if name in kinds and name not in identity_names}
        return Manifest(ModelIdentity(**{name: content[name] for name in identity_names}), **fields)


def _crc_of_content(content: Mapping[str, Any]) -> int:
    """CRC-32 of the values as they are read again, however the file is laid out."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())


def _check_checksums(content: dict[str, Any], path: Path) -> None:
    """Compare a manifest, and megatron-core's metadata beside it, with their checksums; older ones have none."""
    if CRC_KEY in content and content.pop(CRC_KEY) != _crc_of_content(content):
        fix = f"use another checkpoint, or, if this was edited by hand, delete the key {CRC_KEY}"
        raise CheckpointError("its content is not what was saved: its checksum differs", str(path), fix)
    metadata = path.parent / TorchDistReader.METADATA_FILE
    metadata_crc32 = content.get(METADATA_CRC_KEY)
    if metadata_crc32 is not None and metadata.is_file() and zlib.crc32(metadata.read_bytes()) != metadata_crc32:
        what = "its content is not what was saved: its checksum differs"
        raise CheckpointError(what, str(metadata), "use another checkpoint")


def read_json(path: Path, fix: str) -> Any:
    """Read a small JSON file.

    Args:
        path: the file.
        fix: what to do if it is damaged.

    Raises:
        CheckpointError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_small(path))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", str(path), fix) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: {error}", str(path), fix) from None


@contextmanager
def reading_manifest(folder: Path, what: str) -> Iterator[None]:
    """Report errors inside the block, which takes over values of a checkpoint's manifest, as damage of the manifest.

    Args:
        folder: the checkpoint.
        what: what is taken over.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, OverflowError) as error:
        reason = f"{what} is unusable ({type(error).__name__}: {error})"
        raise CheckpointError(f"damaged: {reason}", str(folder / MANIFEST_NAME), "use another checkpoint") from error


def published_steps(directory: Path) -> list[int]:
    """Steps of the published checkpoints in `directory`, ascending.

    Raises:
        CheckpointError: a file has the name of one.
    """
    if not directory.is_dir():
        return []
    matches = [_PUBLISHED.fullmatch(entry.name) for entry in directory.iterdir()]
    for name in (match[0] for match in matches if match):
        if not (directory / name).is_dir():
            raise CheckpointError("a file stands where a checkpoint belongs", str(directory / name), "move it away")
    return sorted(int(match[1]) for match in matches if match)


def newest_complete(directory: Path) -> tuple[int | None, list[str]]:
    """Find the newest complete checkpoint in a folder of checkpoints.

    Returns:
        Its step, None if there is no checkpoint; and the reasons for which newer ones are incomplete.

    Raises:
        CheckpointError: there are checkpoints, but none is complete, or the newest complete one is damaged.
    """
    reasons: list[str] = []
    steps = published_steps(directory)
    for step in reversed(steps):
        reason = _incompleteness(step_folder(directory, step))
        if reason is None:
            return step, reasons
        reasons.append(f"{step_folder(directory, step).name} is incomplete ({reason})")
    if reasons:
        newest, fix = step_folder(directory, steps[-1]), "put the missing file back, or move these checkpoints away"
        raise CheckpointError(f"no checkpoint is complete: {'; '.join(reasons[:3])}", str(newest), fix)
    return None, []


def _incompleteness(folder: Path) -> str | None:
    """Why a published checkpoint cannot be read, judged by the files that it has (a copy that was interrupted)."""
    for name in (MANIFEST_NAME, *TorchDistReader.METADATA_FILES):
        if not (folder / name).exists():
            return f"{name} is missing"
    with TorchDistReader(folder) as reader:
        return reader.incompleteness()


def set_aside(directory: Path) -> list[str]:
    """Rename checkpoints that are incomplete and newer than the newest complete one; return what was done, in words.

    Otherwise the run that goes on from the older one could not save these steps.
    """
    step, reasons = newest_complete(directory)
    done = []
    for newer, reason in zip(reversed(published_steps(directory)), reasons, strict=False):
        folder = step_folder(directory, newer)
        name = f"{folder.name}.damaged.{secrets.token_hex(3)}"
        os.rename(folder, directory / name)
        done.append(f"checkpoint {reason}; it is now {name}, and step {step} is resumed from")
    return done


def step_folder(directory: Path, step: int) -> Path:
    """Where the complete checkpoint of `step` is, or will be."""
    return directory / f"step_{step:08d}"


def begin(directory: Path, step: int) -> int:
    """Make the folder in which the checkpoint of `step` is written before it is published; see `incomplete_folder`.

    Returns:
        Its number, which is new each time: a writer that outlived a killed run cannot reach into this one.
    """
    number = secrets.randbits(24)
    incomplete_folder(directory, step, number).mkdir(parents=True)
    return number


def incomplete_folder(directory: Path, step: int, number: int) -> Path:
    """Return the folder that `begin` made."""
    return directory / f"{step_folder(directory, step).name}.incomplete.{number:06x}"


def share_passthrough(directory: Path, folder: Path) -> None:
    """Give a checkpoint in `folder` the tensors that all checkpoints in `directory` carry through, if there are any.

    The files are linked: they take up no more room. Where the file system has no links they are copied.
    """
    source, target = directory / PASSTHROUGH_NAME, folder / PASSTHROUGH_NAME
    if not source.is_dir():
        return
    target.mkdir()
    for path in source.iterdir():
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)


def publish(incomplete: Path, final: Path) -> None:
    """Give a completely written folder its final name, durably.

    Raises:
        CheckpointError: `final` exists; a published checkpoint is never overwritten.
    """
    if final.exists():
        raise CheckpointError("a checkpoint of this step exists", str(final), "move it away, or use another run_dir")
    for entry in (*incomplete.rglob("*"), incomplete):
        if entry.is_dir():
            sync_directory(entry)
        else:
            _sync_file(entry)
    os.rename(incomplete, final)
    sync_directory(final.parent)


def retire(directory: Path, keep_last: int | None) -> None:
    """Delete complete checkpoints older than the newest `keep_last`; None keeps all."""
    if keep_last is None:
        return
    for step in published_steps(directory)[:-keep_last]:
        folder = step_folder(directory, step)
        # Renamed first, so that a kill half-way leaves no published name on an incomplete folder.
        removed = directory / f"{folder.name}.removed.{secrets.token_hex(3)}"
        os.rename(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)


def check_in_the_way(run_dir: Path) -> None:
    """Make sure that folders and files of a run folder are of the kind that a run expects.

    Raises:
        CheckpointError: something else has the name of one.
    """
    for name in ("", CHECKPOINTS_NAME, f"{CHECKPOINTS_NAME}/{PASSTHROUGH_NAME}", "tensorboard", "profile"):
        path = run_dir / name
        if os.path.lexists(path) and not path.is_dir():
            raise CheckpointError("this is no folder, which a run needs there", str(path), "move it away")
    for name in RUN_FILES:
        path = run_dir / name
        if os.path.lexists(path) and not path.is_file():
            raise CheckpointError("this is no regular file, which a run writes there", str(path), "move it away")


def clean(directory: Path) -> list[str]:
    """Delete what killed runs left behind; returns the names. Only for the one run that writes to `directory`."""
    leftovers = []
    if directory.is_dir():
        leftovers = sorted(entry for entry in directory.iterdir() if _LEFTOVER.fullmatch(entry.name))
    for entry in leftovers:
        shutil.rmtree(entry, ignore_errors=True)
    return [entry.name for entry in leftovers]


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: itself, or the newest complete one of a run folder, with a line about others.

    Args:
        path: a checkpoint, a run folder, or a run's `checkpoints` folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path)
    if os.path.lexists(folder / MANIFEST_NAME):
        return folder
    for directory in (folder / CHECKPOINTS_NAME, folder):
        step, reasons = newest_complete(directory)
        if step is not None:
            found = step_folder(directory, step)
            for reason in reasons:
                print(f"checkpoint {reason}; {found.name} is taken instead", flush=True)
            return found
    if not folder.is_dir():
        raise CheckpointError("no such folder", str(folder), "give a run folder or a checkpoint")
    if (folder / "config.json").is_file():
        raise CheckpointError(
            "an HF directory, not a checkpoint", str(folder), "set model.hf_path to it, or use tools/convert.py import"
        )
    raise CheckpointError("holds no complete checkpoint", str(folder), "give a run folder or a checkpoint")


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
