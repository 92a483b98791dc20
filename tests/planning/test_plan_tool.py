"""`tools/plan.py` from the command line to its files, its table of hardware, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import Gemma3Config

from megatron_vlm.cli import load_config
from megatron_vlm.errors import ConfigError
from megatron_vlm.families import registry
from megatron_vlm.planning.hardware import GPUS, find_hardware
from megatron_vlm.planning.recorder import Collective, Operation
from megatron_vlm.planning.step_time import Clock, Span, crossing_bytes
from tests.test_recipes import CONFIGS, SIZES, record
from tests.training.test_memory import GEMMA3
from tools import plan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny Gemma 3's config.json."""
    folder = tmp_path_factory.mktemp("model")
    Gemma3Config(**GEMMA3).save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    return plan.main([str(argument) for argument in arguments])


def command(model: Path, *more: object) -> list[object]:
    sizes = ["--seq_length", 256, "--global_batch_size", 8, "--train.micro_batch_size", 1, "--model.recompute", "none"]
    return ["--model", model, "--gpus", 4, "--gpu", "A100-40", *sizes, *more]


def test_page_and_files(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hardware, json_path, yaml_path = tmp_path / "cluster.yaml", tmp_path / "plan.json", tmp_path / "best.yaml"
    hardware.write_text("A100-40: {gpus_per_node: 2, network_gb_per_second: 12.5}\n")
    files = ["--hardware", hardware, "--json", json_path, "--yaml", yaml_path]
    assert run(*command(model, *files, "--parallel.pipeline_model_parallel_size", 2, "--check", "sampled")) == 0
    page = capsys.readouterr().out
    for heading in (
        "step s",
        "limited by",
        "bubble",
        "embedding and towers take",
        "all on the first: bubble",
        "memory",
        "to other nodes",
        "ruled out",
    ):
        assert heading in page, heading
    assert "4 of 40 GiB on 2 nodes" in page and "nothing of this has been measured on a GPU" in page
    assert "as planned. Groups agree" in page
    written = json.loads(json_path.read_text())
    best = written["plans"][0]
    assert best["step_seconds"] == min(found["step_seconds"] for found in written["plans"])
    assert f"{best['step_seconds']:.3f}" in page and written["hardware"]["network_gb_per_second"] == 12.5
    assert best["layout"]["pipeline"] == 2 and len(best["memory"]) == 2
    spread, whole = (written["tower"][name] for name in ("spread", "whole"))
    assert sum(spread["tower_layers_per_chunk"]) == 3 and whole["tower_layers_per_chunk"] == []
    assert best["bubble"] in (spread["bubble"], whole["bubble"]) and f"bubble {whole['bubble']:.1%}" in page
    # Stages are on different nodes, so all that they exchange crosses.
    assert best["traffic"]["pipeline"]["sent"] == best["traffic"]["pipeline"]["crossing"] > 0
    # The settings are those of a run.
    required = ["--run_dir=run", f"--model.hf_path={model}", "--data.train=a.jsonl", "--data.seq_length=256"]
    required += ["--train.train_iters=1", "--train.global_batch_size=8"]
    config = load_config(["--config", str(yaml_path), *required])
    assert {key: best["settings"][f"parallel.{key}"] for key in yaml.safe_load(yaml_path.read_text())["parallel"]} == {
        key: getattr(config.parallel, key) for key in yaml.safe_load(yaml_path.read_text())["parallel"]
    }


def test_the_context_size_is_among_the_settings(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No search chooses it, but without it the others are another layout."""
    written = tmp_path / "best.yaml"
    given = ["--parallel.context_parallel_size", 2, "--parallel.tensor_model_parallel_size", 1]
    assert run(*command(model, *given, "--plans", 1, "--yaml", written)) == 0
    assert yaml.safe_load(written.read_text())["parallel"]["context_parallel_size"] == 2
    assert "context_parallel_size: 2" in capsys.readouterr().out


def test_a_recipe_keeps_its_layout(capsys: pytest.CaptureFixture[str]) -> None:
    """Its model's files are not there; its published sizes lie beside it."""
    recipe = CONFIGS / "qwen3_vl_2b.yaml"
    assert run("--model", recipe, "--gpus", 8, "--keep_layout", "--images_per_row", 4) == 0
    page = capsys.readouterr().out
    assert "1 layouts were estimated" in page
    said = recipe.read_text().replace("\n# ", " ").partition("with rows full of images, ")[2].partition(" GiB")[0]
    assert f"{float(said):.1f}" == page.split("\n")[5].split()[3]


def test_a_spread_tower_stays(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a file or the command line says it; what does not pay is said."""
    settings = {"pipeline_model_parallel_size": 2, "vision_pipeline_layout": [1, 2]}
    required = {"run_dir": "run", "model": {"hf_path": str(model)}, "data": {"train": "a.jsonl", "seq_length": 256}}
    train = {"train_iters": 1, "global_batch_size": 8}
    path, written = tmp_path / "run.yaml", tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(required | {"train": train, "parallel": settings}))
    assert run("--model", path, "--gpus", 2, "--keep_layout", "--check", "1", "--yaml", written) == 0
    page = capsys.readouterr().out
    assert "decoder layers per chunk: 0, " in page and "on 2 chunks (1, 2): bubble " in page
    assert "rank 1 has" in page and "as planned" in page
    assert yaml.safe_load(written.read_text())["parallel"]["vision_pipeline_layout"] == [1, 2]
    given = ["--parallel.vision_pipeline_layout", "[2,1]", "--parallel.pipeline_model_parallel_size", 2]
    assert run(*command(model, *given, "--parallel.tensor_model_parallel_size", 1, "--plans", 1)) == 0
    page = capsys.readouterr().out
    assert "on 2 chunks (2, 1)" in page and "vision_pipeline_layout: [2, 1]" in page


@pytest.mark.full
def test_nothing_else_is_printed(model: Path) -> None:
    """Neither torch nor megatron-core warns where there is no GPU."""
    arguments = command(model, "--parallel.pipeline_model_parallel_size", 1, "--plans", 1)
    done = subprocess.run(
        [sys.executable, plan.__file__, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    assert all("layouts estimated" in line or line.startswith("traced ") for line in done.stderr.splitlines())


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_beside_recipes(name: str) -> None:
    family, model_config, _ = record(name)
    hf_config = registry.load_hf_config(CONFIGS / "models" / name)
    assert registry.detect(hf_config) == family
    assert family.config_from_hf(hf_config, text_only=SIZES[name].model_type == "gemma3_text") == model_config


REFUSED: dict[str, tuple[list[object], str]] = {
    "no GPUs": (["--gpus", 0], "--gpus is 0"),
    "no number": (["--gpus", "many"], "invalid int value"),
    "unknown GPU": (["--gpu", "H1000"], "GPU 'H1000' is not known"),
    "unknown key": (["--parallel.tensor_size", 2], "tensor_size"),
    "impossible size": (["--parallel.tensor_model_parallel_size", 3], "cannot be divided"),
    "headroom": (["--headroom", 2], "--headroom is 2"),
    "images": (["--images_per_row", -1], "--images_per_row is -1"),
    "no plans": (["--plans", 0], "--plans is 0"),
    "precision": (["--train.precision", "fp32"], "train.precision is fp32"),
    "layout of a directory": (["--keep_layout"], "needs a layout to keep"),
    "file of hardware": (["--hardware", "absent.yaml"], "absent.yaml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(case: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, said = REFUSED[case]
    assert run(*command(model, *arguments)) == 2
    found = capsys.readouterr()
    lines = [line for line in found.err.splitlines() if "Error" in line]
    assert found.out == "" and len(lines) == 1 and said in lines[0] and " -- " in lines[0]


def test_what_is_missing(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("--model", model, "--gpus", 8) == 2
    assert "--seq_length and --global_batch_size must be given" in capsys.readouterr().err
    for absent in ("absent", "absent.yaml"):
        assert run("--model", tmp_path / absent, "--gpus", 8, "--seq_length", 8, "--global_batch_size", 8) == 2
        said = capsys.readouterr().err
        assert f"{absent} does not exist -- give a directory with config.json, or" in said and "configs/" in said
    assert run("--model", tmp_path, "--gpus", 8, "--seq_length", 8, "--global_batch_size", 8) == 2
    assert "no config.json" in capsys.readouterr().err
    assert run("--gpus", 8) == 2
    assert "--model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("X: {memory_gib: 80}", "X lacks bf16_tflops"),
        ("H100: {speed: 3}", "H100 has unknown fields speed"),
        ("H100: {matmul_fraction: 1.5}", "H100.matmul_fraction is 1.5"),
        ("H100: {gpus_per_node: 7.5}", "H100.gpus_per_node is 7.5"),
        ("H100: {memory_gib: yes}", "H100.memory_gib is True"),
        ("H100: 80", "H100 is no mapping"),
    ],
)
def test_hardware_files(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "hardware.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_hardware("H100", str(path))
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_hardware_is_extended_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "hardware.yaml"
    numbers = "memory_gib: 96, bf16_tflops: 148, memory_gb_per_second: 4000, node_gb_per_second: 450"
    path.write_text(f"H20: {{{numbers}, network_gb_per_second: 25}}\nH100: {{matmul_fraction: 0.5}}\n")
    assert find_hardware("H20", str(path)).memory_gib == 96
    changed = find_hardware("H100", str(path))
    assert changed.matmul_fraction == 0.5 and changed.bf16_tflops == GPUS["H100"].bf16_tflops
    assert all(hardware.bf16_tflops > 0 for hardware in GPUS.values())


def test_times_by_hand() -> None:
    """A matmul that computes, one that reads, and exchanges inside and between nodes."""
    hardware = GPUS["H100"]
    clock = Clock(hardware, {"data": Span(2, 4), "expert": Span(4, 2)})
    large, small = Operation("forward", "matmul", 10**15, 10**6), Operation("forward", "matmul", 10**6, 10**9)
    assert clock.operation_seconds(large) == pytest.approx(10**15 / (989e12 * 0.65))
    assert clock.operation_seconds(small) == pytest.approx(10**9 / (3350e9 * 0.75))
    inside = Collective("forward", "allgather", "tensor", 8, 8 * 10**9)
    assert clock.exchange_seconds(inside) == pytest.approx(10e-6 + 7e9 / (450e9 * 0.75))
    # Eight ranks on two nodes: the four of a node send over four adapters what a ring passes on.
    across = inside._replace(group="data")
    assert clock.exchange_seconds(across) == pytest.approx(10e-6 + 7e9 / (4 * 50e9 * 0.75))
    assert crossing_bytes(across, Span(2, 4)) == 7e9 / 4
    # Of an all-to-all over four nodes, six eighths leave the node, each over the rank's own adapter.
    everywhere = inside._replace(group="expert", kind="alltoall")
    assert clock.exchange_seconds(everywhere) == pytest.approx(10e-6 + 6e9 / (50e9 * 0.75))
