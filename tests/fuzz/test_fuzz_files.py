"""Configurations, model directories and run folders that nobody meant: taken, or refused in a line for each problem."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from megatron_vlm.checkpoint.float8 import open_weights
from megatron_vlm.checkpoint.run_owner import RunOwner
from megatron_vlm.cli import load_config
from megatron_vlm.config import to_dict
from megatron_vlm.errors import UserError
from megatron_vlm.families import registry
from megatron_vlm.training.loop import Trainer
from megatron_vlm.training.setup import set_up
from megatron_vlm.training.signals import StopRequests
from tests.checkpoint.tiny_run import prepare_process
from tests.fuzz.mutations import check_line, damaged, mutated, within_limits
from tests.ranks import run_ranks
from tests.refusals import check_refusal
from tests.training.loop_run import Place, build_place

CONFIGURATIONS, MODEL_CONFIGURATIONS, WEIGHT_FILES, RUN_FOLDERS = 60, 60, 60, 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def attempt(case: str, action: Callable[[], object]) -> str:
    """ "taken", or "refused" with lines for people."""
    with within_limits(case):
        try:
            action()
        except UserError as error:
            for line in check_refusal(str(error)).splitlines():
                check_line(case, line)
            return "refused"
    return "taken"


def test_configurations(place: Place, tmp_path: Path, factor: int) -> None:
    rng = random.Random("configurations")
    whole = to_dict(load_config(place.arguments(tmp_path / "run")))
    path, outcomes = tmp_path / "run.yaml", Counter[str]()
    for number in range(CONFIGURATIONS * factor):
        content = yaml.safe_dump(mutated(whole, rng), allow_unicode=True).encode(errors="surrogatepass")
        if rng.random() < 0.2:
            content = damaged(content, rng, head=3000)
        path.write_bytes(content)
        outcomes[attempt(f"configuration {number}", lambda: load_config(["--config", str(path)]))] += 1
    assert min(outcomes["taken"], outcomes["refused"]) > CONFIGURATIONS // 20, outcomes


def read_model(folder: Path) -> None:
    """Read all of a model directory that importing and loading read."""
    hf_config = registry.load_hf_config(folder)
    family = registry.detect(hf_config)
    config = family.config_from_hf(hf_config, text_only=False)
    with open_weights(folder) as reader:
        found = family.weight_map(config).match(reader)
        for tensor in found.tensors.values():
            reader.read(tensor.hf_name)


def test_model_configurations(place: Place, tmp_path: Path, factor: int) -> None:
    rng = random.Random("model configurations")
    folder = tmp_path / "model"
    shutil.copytree(place.model, folder)
    whole = json.loads((folder / "config.json").read_text())
    outcomes = Counter[str]()
    for number in range(MODEL_CONFIGURATIONS * factor):
        (folder / "config.json").write_text(json.dumps(mutated(whole, rng)))
        outcomes[attempt(f"model configuration {number}", lambda: read_model(folder))] += 1
    assert min(outcomes["taken"], outcomes["refused"]) > MODEL_CONFIGURATIONS // 20, outcomes


def test_weight_files(place: Place, tmp_path: Path, factor: int) -> None:
    rng = random.Random("weight files")
    folder = tmp_path / "model"
    shutil.copytree(place.model, folder)
    data = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, values = json.loads(data[8 : 8 + size]), data[8 + size :]
    outcomes = Counter[str]()
    for number in range(WEIGHT_FILES * factor):
        if rng.random() < 0.6:
            text = json.dumps(mutated(header, rng)).encode()
            changed = struct.pack("<Q", len(text)) + text + values
        else:
            changed = damaged(data, rng, head=size + 8)
        (folder / "model.safetensors").write_bytes(changed)
        outcomes[attempt(f"weight file {number}", lambda: read_model(folder))] += 1
    assert outcomes["refused"] > WEIGHT_FILES // 2, outcomes


def replace_file(path: Path, rng: random.Random) -> str:
    """Damage a file in one of many ways; returns which."""
    content = path.read_bytes()
    kind = rng.choice(("damaged", "damaged", "mutated", "empty", "gone", "folder", "pipe", "null", "deep", "binary"))
    path.unlink()
    if kind == "mutated":
        try:
            value = json.loads(content)
        except ValueError:
            value = None
        path.write_text(json.dumps(mutated(value, rng)) if isinstance(value, dict) and value else "[1]")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "gone":
        written = {"empty": b"", "null": b"null", "deep": b"[" * 100_000, "binary": bytes(range(256))}
        path.write_bytes(written.get(kind) or damaged(content, rng))
    return kind


def start(arguments: list[str]) -> str | None:
    """On a pool rank: the error of one start of a run, within the limits."""
    prepare_process()
    run, error = None, None
    with within_limits("the start"):
        try:
            config, requests = load_config(arguments), StopRequests()
            with RunOwner(config.run_dir) as owner:
                run = set_up(config, owner, requests)
                Trainer(run, requests).run()
        except UserError as problem:
            error = str(problem)
        finally:
            torch.use_deterministic_algorithms(False)
            if run is not None:
                run.train_loader.close()
    return error


def test_run_folders(place: Place, tmp_path: Path, factor: int) -> None:
    """A start on a damaged folder trains on, from an earlier checkpoint or from the beginning, or is refused."""
    rng, whole = random.Random("run folders"), tmp_path / "whole"
    arguments = place.arguments(whole, "train.exit_interval=2", "checkpoint.save_interval=1")
    assert run_ranks(1, start, arguments) == [None]
    outcomes = Counter[str]()
    for number in range(RUN_FOLDERS * factor):
        run_dir = tmp_path / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(whole, run_dir)
        files = sorted(path for path in run_dir.rglob("*") if path.is_file())
        path = rng.choice(files)
        case = f"run folder {number}: {path.relative_to(run_dir)} {replace_file(path, rng)}"
        (error,) = run_ranks(1, start, place.arguments(run_dir, "train.train_iters=3"))
        if error is not None:
            for line in check_refusal(error).splitlines():
                check_line(case, line)
            assert str(run_dir) in error, f"{case}: {error}"
        outcomes["taken" if error is None else "refused"] += 1
    assert min(outcomes["taken"], outcomes["refused"]) > 0, outcomes
