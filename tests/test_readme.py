"""The documentation names only what exists: files, make targets, configuration keys, and commands that parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlm.cli import load_config, parse_command_line
from megatron_vlm.config_keys import valid_keys
from megatron_vlm.sweeps.sweep_file import read_sweep_file
from tools import compare_loss, config_reference, convert, inspect_data, plan, report, runs, sweep

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text(encoding="utf-8")

# What a reader, a run or the demo makes, and names that stand for something.
NOT_IN_THE_REPOSITORY = re.compile(
    r"^(demo_out|runs|images|data|models|run_dir|points|logs|attempts|stacks|heartbeats|\.venv)/"
    r"|^(checkpoints|tensorboard|profile)/$|NAME"
)
SECTIONS = sorted({key.partition(".")[0] for key in valid_keys() if "." in key})
KEY = re.compile(rf"\b((?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[a-z_]+)?)\b(?!\()")


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def code_spans(text: str) -> list[str]:
    """Contents of `...` outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def commands(text: str) -> Iterator[str]:
    """Command lines of indented and fenced code blocks, continued lines joined."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        found = re.match(r"    ((?:[A-Z_]+=\S+ )*(?:(?:make|python|torchrun|source|srun|sbatch) |scripts/).*)", line)
        if found:
            yield found[1].split("   #")[0].strip().rstrip("'")


@pytest.fixture
def my_run(tmp_path: Path) -> Path:
    """README's example configuration as a file."""
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    path = tmp_path / "my_run.yaml"
    path.write_text(block[1], encoding="utf-8")
    return path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document: Path) -> None:
    text = text_of(document)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [link for link in links if not link.startswith("http") and not (document.parent / link).exists()]
    for span in code_spans(text):
        is_path = re.fullmatch(r"[\w./-]+/[\w.-]*|[\w./-]+\.(py|yaml|md|txt|toml)", span) is not None
        if not is_path or "/" not in span or NOT_IN_THE_REPOSITORY.search(span):
            continue
        # The tables of architecture.md name files below a folder that stands before them.
        if not any((REPOSITORY / folder / span).exists() for folder in ("", "megatron_vlm")):
            missing.append(span)
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_configuration_keys_exist(document: Path) -> None:
    keys = {*valid_keys()}
    # Names of parts follow the first; the others begin names of tensors.
    free = {"optimizer.lr_multipliers", "optimizer.state", "model.language_model"}
    without_files = re.sub(r"[\w/*]+\.(py|md|yaml|json|safetensors)\b|\w+/[\w./]*", "", text_of(document))
    named = {found for found in KEY.findall(without_files) if not any(found.startswith(prefix) for prefix in free)}
    assert named - keys == set()


def test_the_key_test_sees_keys() -> None:
    assert {"train.exit_interval", "checkpoint.keep_last", "model.text_only"} <= {*KEY.findall(README)}


def test_every_recipe_is_listed() -> None:
    for recipe in (REPOSITORY / "configs").glob("*.yaml"):
        assert f"`configs/{recipe.name}`" in README, f"README does not list {recipe.name}"


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = {*re.findall(r"^([a-z_0-9]+):", makefile, re.MULTILINE)}
    named = {
        target for document in DOCUMENTS for target in re.findall(r"(?:`|^ {4})make ([a-z_0-9]+)", text_of(document))
    }
    assert {"demo", "test", "lint"} <= named <= targets


def test_the_example_configuration_is_valid(my_run: Path) -> None:
    assert load_config(["--config", str(my_run)]).data.seq_length == 72


def test_training_commands_parse(my_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    clusters = (REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8")
    starts = re.compile(r"pretrain_vlm\.py|scripts/train\.sbatch|scripts/torchrun_node\.sh")
    found = [command for text in (README, clusters) for command in commands(text) if starts.search(command)]
    assert len(found) >= 10
    for command in found:
        arguments = shlex.split(starts.split(command, maxsplit=1)[1])
        parse_command_line([str(my_run) if argument == "my_run.yaml" else argument for argument in arguments])


def test_tool_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    text = README + "".join(text_of(REPOSITORY / "docs" / name) for name in ("sweeps.md", "planning.md"))
    found = [shlex.split(command) for command in commands(text) if "tools/" in command]
    tools = ("compare_loss", "convert", "inspect_data", "plan", "report", "runs", "sweep")
    assert {words[1] for words in found} == {f"tools/{name}.py" for name in tools}
    for words in found:
        monkeypatch.setattr("sys.argv", words[1:])
        if words[1] == "tools/convert.py":
            convert._parse(words[2:])
        elif words[1] in ("tools/plan.py", "tools/report.py", "tools/runs.py", "tools/sweep.py"):
            {"plan": plan, "report": report, "runs": runs, "sweep": sweep}[Path(words[1]).stem]._parse(words[2:])
        elif words[1] == "tools/compare_loss.py":
            compare_loss._parse_arguments(words[2:])
        else:
            inspect_data._parse_arguments()


def test_the_example_sweep_is_the_one_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/sweeps trains it."""
    block = re.search(r"```yaml\n(.*?)```", text_of(REPOSITORY / "docs" / "sweeps.md"), re.DOTALL)
    assert block is not None and text_of(REPOSITORY / "examples" / "sweep.yaml").endswith(block[1])
    monkeypatch.chdir(REPOSITORY)
    settings, _ = read_sweep_file("examples/sweep.yaml")
    assert settings.resources.world_size == 1


def test_configuration_reference_is_current() -> None:
    written = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == config_reference.reference(), "run: python tools/config_reference.py > docs/config.md"
