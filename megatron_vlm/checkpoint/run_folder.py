"""The checkpoints of a run on disk: names, the manifest, atomic publishing, retention and clean-up.

    run_dir/checkpoints/step_00000100/                    complete: the name exists only once everything is on disk
    run_dir/checkpoints/step_00000200.incomplete.3f9ac2/  being written, or left behind by a killed run
    run_dir/checkpoints/step_00000050.removed.81bc04/     being deleted
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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files.durable import sync_directory, write_durably

FORMAT_VERSION = 1
MANIFEST_NAME = "megatron_vlm.json"
CHECKPOINTS_NAME = "checkpoints"
PASSTHROUGH_NAME = "passthrough"
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

    def to_json(self) -> str:
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        identity = dataclasses.asdict(fields.pop("identity"))
        return json.dumps({"format_version": FORMAT_VERSION, **identity, **fields}, indent=1)

    def write(self, folder: Path) -> None:
        """Write into `folder`, durably."""
        write_durably(folder / MANIFEST_NAME, self.to_json().encode())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read from a checkpoint folder.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another format version.
        """
        path = folder / MANIFEST_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"no {MANIFEST_NAME}", str(folder), "give a run folder or a checkpoint that this program wrote"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be read: {error}", str(path), "use another checkpoint") from None
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"format version {version}, this program reads {FORMAT_VERSION}", str(path), "use a matching version"
            )
        return Manifest._from_content(content, path)

    @staticmethod
    def _from_content(content: dict[str, Any], path: Path) -> Manifest:
        identity_names = [entry.name for entry in dataclasses.fields(ModelIdentity)]
        names = [entry.name for entry in dataclasses.fields(Manifest) if entry.name != "identity"]
        try:
            identity = ModelIdentity(**{name: content[name] for name in identity_names})
        except KeyError as error:
            raise CheckpointError(f"key {error} is missing", str(path), "use another checkpoint") from None
        return Manifest(identity, **{name: content[name] for name in names if name in content})


def published_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in `directory`, ascending."""
    if not directory.is_dir():
        return []
    matches = (_PUBLISHED.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def step_folder(directory: Path, step: int) -> Path:
    """Where the complete checkpoint of `step` is, or will be."""
    return directory / f"step_{step:08d}"


def begin(directory: Path, step: int) -> Path:
    """Make the folder in which the checkpoint of `step` is written before it is published.

    The name is new each time: a writer that outlived a killed run cannot reach into this one.
    """
    folder = directory / f"{step_folder(directory, step).name}.incomplete.{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder


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


def clean(directory: Path) -> list[str]:
    """Delete what killed runs left behind; returns the names. Only for the one run that writes to `directory`."""
    leftovers = []
    if directory.is_dir():
        leftovers = sorted(entry for entry in directory.iterdir() if _LEFTOVER.fullmatch(entry.name))
    for entry in leftovers:
        shutil.rmtree(entry, ignore_errors=True)
    return [entry.name for entry in leftovers]


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: itself, or the newest complete one of a run folder.

    Args:
        path: a checkpoint, a run folder, or a run's `checkpoints` folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path)
    if (folder / MANIFEST_NAME).is_file():
        return folder
    for directory in (folder / CHECKPOINTS_NAME, folder):
        steps = published_steps(directory)
        if steps:
            return step_folder(directory, steps[-1])
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
