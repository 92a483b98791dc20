"""Conversion both ways, against transformers (names, logits), megatron-core (loading) and torch (saving)."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.distributed.checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor, LocalShardsContainer
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from megatron_vlm.checkpoint import torch_dist
from megatron_vlm.checkpoint.run_folder import Manifest
from megatron_vlm.checkpoint.torch_dist import TorchDistReader
from megatron_vlm.conversion.convert import export_checkpoint, import_checkpoint, verify_checkpoint
from megatron_vlm.errors import CheckpointError, UserError
from tests.checkpoint import gemma3_files
from tests.checkpoint.hf_files import (
    Change,
    Tensors,
    change_manifest,
    change_nothing,
    files,
    load,
    load_tensors,
    logits,
    read_config,
    rename,
    rewrite,
    without_weights,
    write_config,
)
from tools import convert as convert_tool

REPOSITORY = Path(__file__).resolve().parents[2]

HUB_STYLE = rename({"vision_tower.": "vision_tower.vision_model."})
IN_MEMORY_STYLE = rename(
    {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma3_files.multimodal(tmp_path_factory.mktemp("multimodal") / "hf")


@pytest.fixture(scope="module")
def imported(multimodal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_checkpoint(multimodal, checkpoint)
    return checkpoint


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one, which megatron-core's loader asks for."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def ours(names: Tensors) -> Tensors:
    """Tensors of a fresh `save_pretrained` under our names, written down independently of the weight map."""
    prefixes = {"language_model.model.": "language_model.", "multi_modal_projector.": "projector."}
    return rename(prefixes)(names)


@pytest.mark.parametrize("block_bytes", [100, 2**20], ids=["small blocks", "whole tensors"])
@pytest.mark.parametrize("build", [gemma3_files.multimodal, gemma3_files.text_only])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_reproduces_every_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[..., Path],
    dtype: torch.dtype,
    tied: bool,
    block_bytes: int,
) -> None:
    source = build(tmp_path / "hf", dtype, tie_word_embeddings=tied)
    monkeypatch.setattr(torch_dist, "RECORD_BYTES", 8 * block_bytes)
    import_checkpoint(source, tmp_path / "checkpoint")
    assert verify_checkpoint(source, tmp_path / "checkpoint").differences == ()
    export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "again")
    assert files(tmp_path / "again") == files(source)
    assert any("lm_head" in name for name in load_tensors(source)) != tied


def add_tied_head(tensors: Tensors) -> Tensors:
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    return tensors | {"language_model.lm_head.weight": embedding.clone()}


def mixed_dtypes(tensors: Tensors) -> Tensors:
    return {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("change", [change_nothing, HUB_STYLE, IN_MEMORY_STYLE, add_tied_head, mixed_dtypes])
def test_every_style_of_names_round_trips_and_loads(multimodal: Path, tmp_path: Path, change: Change) -> None:
    source = rewrite(multimodal, tmp_path / "hf", change)
    import_checkpoint(source, tmp_path / "checkpoint")
    assert verify_checkpoint(source, tmp_path / "checkpoint").differences == ()
    export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "again")
    assert files(tmp_path / "again") == files(source)
    expected = logits(Gemma3ForConditionalGeneration.from_pretrained(source))
    assert logits(Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "again")).equal(expected)


def test_the_checkpoint_holds_our_names_with_padded_vocabulary(multimodal: Path, imported: Path) -> None:
    expected = ours(load_tensors(multimodal))
    reader = TorchDistReader(imported)
    assert set(reader.tensors) == set(expected)
    for name, tensor in expected.items():
        stored = reader.tensors[name]
        if name == "language_model.embed_tokens.weight":
            assert tuple(stored.size) == (128, 32)
            assert reader.read_rows(name, 0, gemma3_files.VOCABULARY).equal(tensor)
            assert not reader.read_rows(name, gemma3_files.VOCABULARY, 128).any()
        else:
            assert stored.size == tensor.shape and stored.properties.dtype == tensor.dtype


@pytest.mark.parametrize("tensor_ranks", [1, 2, 4])
def test_megatron_core_loads_it_in_any_layout(
    multimodal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None, tensor_ranks: int
) -> None:
    """Every tensor whose size divides is split by rows on even and by columns on odd places, one rank after another."""
    monkeypatch.setattr(torch_dist, "RECORD_BYTES", 700)  # many records per tensor, borders inside ranks' parts
    import_checkpoint(multimodal, tmp_path / "checkpoint")
    expected = ours(load_tensors(multimodal))
    embedding = expected["language_model.embed_tokens.weight"]
    padded = torch.cat([embedding, torch.zeros(28, 32, dtype=embedding.dtype)])
    expected["language_model.embed_tokens.weight"] = padded
    for rank in range(tensor_ranks):
        state, parts = {}, {}
        for place, (name, tensor) in enumerate(expected.items()):
            dim = place % tensor.dim()
            split = tensor.shape[dim] % tensor_ranks == 0
            parts[name] = tensor.chunk(tensor_ranks, dim)[rank] if split else tensor
            offsets = [(dim, rank, tensor_ranks)] if split else []
            data = torch.full_like(parts[name], float("nan"), memory_format=torch.contiguous_format)
            state[name] = ShardedTensor.from_rank_offsets(name, data, *offsets, replica_id=0)
        # Access integrity would ask for all ranks' parts in one call.
        loaded = dist_checkpointing.load(state, str(tmp_path / "checkpoint"), validate_access_integrity=False)
        for name, part in parts.items():
            assert loaded[name].equal(part), name


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_assembles_what_training_had_split(
    multimodal: Path, imported: Path, tmp_path: Path, dim: int, dtype: torch.dtype
) -> None:
    """A checkpoint as a tensor-parallel run writes it, in the run's precision, comes back in the source's."""
    expected = ours(load_tensors(multimodal))
    embedding = expected["language_model.embed_tokens.weight"]
    expected["language_model.embed_tokens.weight"] = torch.cat([embedding, torch.zeros(28, 32, dtype=embedding.dtype)])
    state: Tensors = {"optimizer.state.exp_avg.language_model.norm.weight": torch.ones(32)}
    for name, tensor in expected.items():
        split = dim < tensor.dim() and tensor.shape[dim] % 2 == 0
        parts = tensor.to(dtype).chunk(2, dim) if split else (tensor.to(dtype),)
        state[name] = LocalShardsContainer(
            [
                CheckpointableShardedTensor.from_sh_ten(
                    ShardedTensor.from_rank_offsets(name, part.clone(), *([(dim, rank, 2)] if split else []))
                )
                for rank, part in enumerate(parts)
            ]
        )
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000007"
    torch.distributed.checkpoint.save(state, checkpoint_id=checkpoint, no_dist=True)
    (checkpoint / "metadata.json").write_bytes((imported / "metadata.json").read_bytes())
    Manifest.read(imported).write(checkpoint)
    assert verify_checkpoint(multimodal, tmp_path / "run").differences == ()
    export_checkpoint(tmp_path / "run", multimodal, tmp_path / "out")
    assert files(tmp_path / "out") == files(multimodal)


def test_export_without_weights_beside_the_configuration(multimodal: Path, imported: Path, tmp_path: Path) -> None:
    """Published names, dtype of config.json; transformers loads it and computes the same."""
    without_weights(multimodal, tmp_path / "bare")
    write_config(tmp_path / "bare", read_config(multimodal) | {"dtype": "float32"})
    export_checkpoint(imported, tmp_path / "bare", tmp_path / "out")
    tensors = load_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert set(tensors) == set(HUB_STYLE(load_tensors(multimodal)))
    loaded = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert logits(loaded).equal(logits(Gemma3ForConditionalGeneration.from_pretrained(multimodal)))


@pytest.mark.parametrize("change", [change_nothing, IN_MEMORY_STYLE])
def test_the_language_model_of_a_multimodal_model_becomes_a_text_only_model(
    multimodal: Path, imported: Path, tmp_path: Path, change: Change
) -> None:
    source = rewrite(multimodal, tmp_path / "hf", change)
    checkpoint = change_manifest(imported, tmp_path / "checkpoint", text_only=True)
    export_checkpoint(checkpoint, source, tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert config["architectures"] == ["Gemma3ForCausalLM"] and config["model_type"] == "gemma3_text"
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "processor_config.json").exists()
    model = load(tmp_path / "out", Gemma3ForCausalLM)
    assert model.dtype == torch.bfloat16
    # The same arithmetic on the same bits, without an image: equal to the last bit.
    assert logits(model).equal(logits(Gemma3ForConditionalGeneration.from_pretrained(multimodal)))
    # And what was exported is a checkpoint like any other.
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    assert verify_checkpoint(tmp_path / "out", checkpoint).differences == ()


class TestRefusals:
    def test_tied_weights_that_differ(self, multimodal: Path, tmp_path: Path) -> None:
        def change(tensors: Tensors) -> Tensors:
            tensors = add_tied_head(tensors)
            tensors["language_model.lm_head.weight"][99, 31] += 1
            return tensors

        source = rewrite(multimodal, tmp_path / "hf", change)
        with pytest.raises(CheckpointError, match=r"lm_head.weight and .*embed_tokens.weight differ"):
            import_checkpoint(source, tmp_path / "checkpoint")
        assert not (tmp_path / "checkpoint").exists()

    def test_all_misfits_are_named_together(self, multimodal: Path, tmp_path: Path) -> None:
        def change(tensors: Tensors) -> Tensors:
            del tensors["language_model.model.norm.weight"], tensors["vision_tower.post_layernorm.bias"]
            tensors["extra.weight"] = torch.ones(3)
            tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(5)
            return tensors

        with pytest.raises(CheckpointError) as caught:
            import_checkpoint(rewrite(multimodal, tmp_path / "hf", change), tmp_path / "checkpoint")
        message = str(caught.value)
        assert "2 missing (language_model.model.norm.weight, vision_tower.post_layernorm.bias)" in message
        assert "1 unexpected (extra.weight)" in message
        assert "1 of another shape (multi_modal_projector.mm_soft_emb_norm.weight [5] instead of [24])" in message

    def test_a_target_that_is_not_empty(self, multimodal: Path, imported: Path, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("x")
        with pytest.raises(CheckpointError, match="not empty"):
            import_checkpoint(multimodal, tmp_path / "full")
        with pytest.raises(CheckpointError, match="not empty"):
            export_checkpoint(imported, multimodal, tmp_path / "full")
        assert (tmp_path / "full" / "mine").read_text() == "x"

    def test_a_directory_of_another_family(self, multimodal: Path, tmp_path: Path) -> None:
        source = rewrite(multimodal, tmp_path / "hf", change_nothing)
        (source / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["Gemma3ForCausalLM"]}))
        with pytest.raises(UserError, match="model_type 'llama' is not supported"):
            import_checkpoint(source, tmp_path / "checkpoint")

    def test_a_checkpoint_of_another_family(self, multimodal: Path, imported: Path, tmp_path: Path) -> None:
        checkpoint = change_manifest(imported, tmp_path / "checkpoint", family="qwen3_vl", model_type="qwen3_vl")
        with pytest.raises(CheckpointError, match="qwen3_vl checkpoint of family qwen3_vl"):
            export_checkpoint(checkpoint, multimodal, tmp_path / "out")

    def test_a_multimodal_checkpoint_with_a_text_only_reference(self, imported: Path, tmp_path: Path) -> None:
        reference = gemma3_files.text_only(tmp_path / "hf")
        with pytest.raises(CheckpointError, match="gemma3_text"):
            export_checkpoint(imported, reference, tmp_path / "out")

    def test_a_checkpoint_of_another_size(self, imported: Path, tmp_path: Path) -> None:
        reference = gemma3_files.multimodal(tmp_path / "hf", intermediate_size=64)
        with pytest.raises(
            CheckpointError, match=r"6 of another shape \(.*gate_proj.weight \[48, 32\] instead of \[64"
        ):
            export_checkpoint(imported, reference, tmp_path / "out")

    def test_something_that_is_no_checkpoint(self, multimodal: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="HF directory"):
            export_checkpoint(multimodal, multimodal, tmp_path / "out")

    def test_a_truncated_distributed_checkpoint(self, multimodal: Path, imported: Path, tmp_path: Path) -> None:
        checkpoint = change_manifest(imported, tmp_path / "checkpoint")
        with open(checkpoint / "__0_0.distcp", "r+b") as stream:
            stream.truncate(20_000)
        with pytest.raises(CheckpointError, match=r"cannot (be )?read"):
            export_checkpoint(checkpoint, multimodal, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_metadata_that_would_run_code(self, multimodal: Path, imported: Path, tmp_path: Path) -> None:
        class Malicious:
            def __reduce__(self) -> tuple[object, ...]:
                return os.mkdir, (str(tmp_path / "executed"),)

        checkpoint = change_manifest(imported, tmp_path / "checkpoint", metadata_crc32=None)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Malicious()))
        with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir"):
            export_checkpoint(checkpoint, multimodal, tmp_path / "out")
        assert not (tmp_path / "executed").exists()


def test_verify_finds_a_single_changed_bit(multimodal: Path, imported: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors["language_model.model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[47, 63] ^= 1
        return tensors

    result = verify_checkpoint(rewrite(multimodal, tmp_path / "hf", change), imported)
    assert [difference.hf_name for difference in result.differences] == [
        "language_model.model.layers.1.mlp.up_proj.weight"
    ]
    assert result.differences[0].reason.startswith("1 bytes differ")
    assert result.num_tensors == len(load_tensors(multimodal))


def test_the_command_line(multimodal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, checkpoint, out = str(multimodal), str(tmp_path / "new" / "checkpoint"), str(tmp_path / "new" / "hf")
    assert convert_tool.main(["import", "--hf", hf, "--out", checkpoint]) == 0
    assert convert_tool.main(["verify", "--hf", hf, "--ckpt", checkpoint]) == 0
    assert "67 of 67 tensors equal" in capsys.readouterr().out
    assert convert_tool.main(["export", "--ckpt", checkpoint, "--hf", hf, "--out", out]) == 0
    assert files(Path(out)) == files(multimodal)
    # A mistake, in a process as users start it: one line on stderr and exit code 2.
    command = [sys.executable, str(REPOSITORY / "tools" / "convert.py")]
    command += ["export", "--ckpt", checkpoint, "--hf", hf, "--out", out]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and "not empty" in refused.stderr


def test_verify_exits_with_2_on_a_difference(
    multimodal: Path, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: Tensors) -> Tensors:
        return tensors | {"language_model.model.norm.weight": torch.zeros(32, dtype=torch.bfloat16)}

    source = rewrite(multimodal, tmp_path / "hf", change)
    assert convert_tool.main(["verify", "--hf", str(source), "--ckpt", str(imported)]) == 2
    printed = capsys.readouterr().out
    assert "differs: language_model.model.norm.weight" in printed and "66 of 67 tensors equal" in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_in_one_line(multimodal: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Further ones do not disturb it while it removes what it has begun."""
    program = f"""
import os, runpy, shutil, sys
from megatron_vlm.checkpoint.torch_dist import TorchDistWriter
def write(*arguments):
    os.kill(os.getpid(), {int(number)})
rmtree = shutil.rmtree
def remove(*arguments, **settings):
    os.kill(os.getpid(), {int(number)})
    rmtree(*arguments, **settings)
TorchDistWriter.write, shutil.rmtree = write, remove
sys.argv = ["convert.py", "import", "--hf", {str(multimodal)!r}, "--out", {str(tmp_path / "out")!r}]
runpy.run_path({str(REPOSITORY / "tools" / "convert.py")!r}, run_name="__main__")
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (130, "") and result.stderr.endswith("interrupted\n"), result.stderr
    assert "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []
