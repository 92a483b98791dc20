"""Conversion of Qwen3-VL both ways, dense and with experts in both layouts of files, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from megatron_vlm.checkpoint import torch_dist
from megatron_vlm.checkpoint.torch_dist import TorchDistReader
from megatron_vlm.conversion.convert import export_checkpoint, import_checkpoint, verify_checkpoint
from megatron_vlm.errors import CheckpointError
from tests.checkpoint import qwen3_vl_files
from tests.checkpoint.hf_files import (
    Change,
    Tensors,
    change_manifest,
    change_nothing,
    check_holds,
    files,
    load,
    load_tensors,
    logits,
    read_config,
    rename,
    rewrite,
    without_weights,
)
from tests.checkpoint.qwen3_vl_files import SQUARE_DOWN, SQUARE_GATE_UP, transpose_experts

EXPERTS = "model.language_model.layers.2.mlp.experts."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_vl_files.saved(tmp_path_factory.mktemp("saved") / "hf")


@pytest.fixture(scope="module")
def imported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_checkpoint(saved, checkpoint)
    return checkpoint


def check_round_trip(source: Path, folder: Path, tensors: Tensors) -> None:
    """Import, verify, export; `tensors` is what transformers saves of the same model."""
    import_checkpoint(source, folder / "checkpoint")
    check_holds(folder / "checkpoint", qwen3_vl_files.ours(tensors))
    assert verify_checkpoint(source, folder / "checkpoint").differences == ()
    export_checkpoint(folder / "checkpoint", source, folder / "again")
    assert files(folder / "again") == files(source)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_dense_model_round_trips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    monkeypatch.setattr(torch_dist, "RECORD_BYTES", 2048)  # a few rows each, one of the three of a fused projection
    source = qwen3_vl_files.saved(tmp_path / "hf", moe=False, tied=tied)
    tensors = load_tensors(source)
    assert ("lm_head.weight" in tensors) != tied
    check_round_trip(source, tmp_path, tensors)


def transpose_one_layer(tensors: Tensors) -> Tensors:
    return {name: transpose_experts(tensors)[name] if ".layers.2." in name else tensors[name] for name in tensors}


@pytest.mark.parametrize("change", [change_nothing, transpose_experts, transpose_one_layer])
def test_experts_round_trip_in_every_layout_of_files(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    monkeypatch.setattr(torch_dist, "RECORD_BYTES", 3072)  # one expert's gate and up, or two experts' down
    check_round_trip(rewrite(saved, tmp_path / "hf", change), tmp_path, load_tensors(saved))


def test_tensors_of_several_precisions(saved: Path, tmp_path: Path) -> None:
    def mix(tensors: Tensors) -> Tensors:
        return {name: tensor.float() if "down_proj" in name else tensor for name, tensor in tensors.items()}

    source = rewrite(saved, tmp_path / "hf", lambda tensors: mix(transpose_experts(tensors)))
    check_round_trip(source, tmp_path, mix(load_tensors(saved)))


@pytest.mark.parametrize("change", [change_nothing, transpose_experts])
@pytest.mark.parametrize("square", [SQUARE_DOWN, SQUARE_GATE_UP], ids=["square down", "square gate and up"])
def test_square_experts_are_told_apart_by_the_other_matrix(
    tmp_path: Path, square: dict[str, int], change: Change
) -> None:
    source = qwen3_vl_files.saved(tmp_path / "saved", **square)
    check_round_trip(rewrite(source, tmp_path / "hf", change), tmp_path, load_tensors(source))


@pytest.mark.parametrize(
    "settings", [{}, SQUARE_DOWN, SQUARE_GATE_UP], ids=["rectangular", "square down", "square gate and up"]
)
def test_transformers_reads_what_is_exported_without_an_example(tmp_path: Path, settings: dict[str, int]) -> None:
    source = qwen3_vl_files.saved(tmp_path / "hf", **settings)
    import_checkpoint(source, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", without_weights(source, tmp_path / "bare"), tmp_path / "out")
    expected = Qwen3VLMoeForConditionalGeneration.from_pretrained(source)
    assert logits(load(tmp_path / "out", Qwen3VLMoeForConditionalGeneration)).equal(logits(expected))
    # As published, unless transformers would take square matrices for what it saves itself.
    tensors = load_tensors(source)
    expected_tensors = tensors if settings else transpose_experts(tensors)
    written = load_tensors(tmp_path / "out")
    assert set(written) == set(tensors)
    assert all(written[name].equal(tensor) for name, tensor in expected_tensors.items())


@pytest.mark.parametrize("square", [SQUARE_DOWN, SQUARE_GATE_UP], ids=["square down", "square gate and up"])
def test_transformers_still_misreads_published_square_experts(tmp_path: Path, square: dict[str, int]) -> None:
    """Why an export avoids them; when this fails, `written_transposed` need not look at the sizes any more."""
    source = qwen3_vl_files.saved(tmp_path / "saved", **square)
    misread = Qwen3VLMoeForConditionalGeneration.from_pretrained(qwen3_vl_files.published(source, tmp_path / "hf"))
    assert not logits(misread).equal(logits(Qwen3VLMoeForConditionalGeneration.from_pretrained(source)))


@pytest.mark.parametrize("has_example", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize(("moe", "tied"), [(True, False), (False, True)], ids=["experts", "dense"])
def test_the_language_model_alone_is_a_qwen3_model(tmp_path: Path, moe: bool, tied: bool, has_example: bool) -> None:
    rope = {"rope_type": "default", "rope_theta": 5_000.0, "mrope_section": [4, 2, 2]}  # no class has this by default
    source = qwen3_vl_files.saved(tmp_path / "saved", moe, tied=tied, rope_parameters=rope)
    if moe:
        source = qwen3_vl_files.published(source, tmp_path / "hf")
    import_checkpoint(source, tmp_path / "whole")
    change_manifest(tmp_path / "whole", tmp_path / "checkpoint", text_only=True)
    reference = source if has_example else without_weights(source, tmp_path / "bare")
    export_checkpoint(tmp_path / "checkpoint", reference, tmp_path / "out")
    model = load(tmp_path / "out", AutoModelForCausalLM)
    assert type(model).__name__ == ("Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM")
    assert model.dtype == torch.bfloat16
    whole_class = Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration
    # The same arithmetic on the same bits, without an image: equal to the last bit.
    assert logits(model).equal(logits(whole_class.from_pretrained(source)))
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "processor_config.json").exists()


def test_a_model_saved_without_its_head(tmp_path: Path) -> None:
    """transformers takes it for the whole model when the head is tied."""
    source = qwen3_vl_files.saved(tmp_path / "saved", tied=True)
    tensors = load_tensors(source)
    without_head = rename({"model.language_model.": "language_model.", "model.visual.": "visual."})
    bare = rewrite(source, tmp_path / "hf", without_head)
    assert set(load_tensors(bare)) == set(Qwen3VLMoeForConditionalGeneration.from_pretrained(source).model.state_dict())
    check_round_trip(bare, tmp_path, tensors)


class TestTiedHead:
    def test_a_copy_is_kept(self, tmp_path: Path) -> None:
        source = qwen3_vl_files.saved(tmp_path / "saved", tied=True)
        tensors = load_tensors(source)
        head = {"lm_head.weight": tensors["model.language_model.embed_tokens.weight"].clone()}
        check_round_trip(rewrite(source, tmp_path / "hf", lambda tensors: tensors | head), tmp_path, tensors)

    def test_another_one_is_refused(self, tmp_path: Path) -> None:
        source = qwen3_vl_files.saved(tmp_path / "saved", tied=True)
        head = {"lm_head.weight": torch.zeros(152, 48, dtype=torch.bfloat16)}
        source = rewrite(source, tmp_path / "hf", lambda tensors: tensors | head)
        with pytest.raises(CheckpointError, match=r"lm_head.weight and .*embed_tokens.weight differ"):
            import_checkpoint(source, tmp_path / "checkpoint")

    def test_only_the_flag_of_the_whole_model_decides(self, saved: Path, tmp_path: Path) -> None:
        """The text configuration's own flag says true here, and so it does in files that transformers writes."""
        assert read_config(saved)["text_config"]["tie_word_embeddings"] is True
        import_checkpoint(saved, tmp_path / "checkpoint")
        assert "language_model.lm_head.weight" in TorchDistReader(tmp_path / "checkpoint").tensors


def one_matrix_transposed(tensors: Tensors) -> Tensors:
    return tensors | {EXPERTS + "down_proj": tensors[EXPERTS + "down_proj"].transpose(1, 2).contiguous()}


def unknown_shape(tensors: Tensors) -> Tensors:
    return tensors | {EXPERTS + "gate_up_proj": torch.zeros(8, 2, 16, 48, dtype=torch.bfloat16)}


def one_per_expert(tensors: Tensors) -> Tensors:
    stacked = tensors.pop(EXPERTS + "down_proj")
    return tensors | {f"{EXPERTS}{expert}.down_proj.weight": stacked[expert].clone() for expert in range(8)}


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (one_matrix_transposed, "experts.down_proj [8, 16, 48]"),
        (unknown_shape, "experts.gate_up_proj [8, 2, 16, 48]"),
        (one_per_expert, "experts.0.down_proj.weight [48, 16]"),
    ],
)
def test_unknown_layouts_of_experts_are_refused(saved: Path, tmp_path: Path, change: Change, culprit: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(rewrite(saved, tmp_path / "hf", change), tmp_path / "checkpoint")
    message = str(caught.value)
    assert culprit in message and "\n" not in message
    assert "gate_up_proj [8, 32, 48] with down_proj [8, 48, 16]" in message
    assert "gate_up_proj [8, 48, 32] with down_proj [8, 16, 48]" in message
    assert not (tmp_path / "checkpoint").exists()


def test_missing_and_truncated_experts(saved: Path, tmp_path: Path) -> None:
    def remove(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name != EXPERTS + "down_proj"}

    with pytest.raises(CheckpointError, match=r"1 missing \(model.language_model.layers.2.mlp.experts.down_proj\)"):
        import_checkpoint(rewrite(saved, tmp_path / "missing", remove), tmp_path / "checkpoint")
    truncated = qwen3_vl_files.published(saved, tmp_path / "truncated")
    with open(truncated / "model.safetensors", "r+b") as stream:
        stream.truncate((truncated / "model.safetensors").stat().st_size - 8)
    with pytest.raises(CheckpointError, match="truncated"):
        import_checkpoint(truncated, tmp_path / "checkpoint")


def test_verify_finds_a_changed_bit_of_a_transposed_expert(saved: Path, imported: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors = transpose_experts(tensors)
        tensors[EXPERTS + "gate_up_proj"].view(torch.uint8)[7, 47, 63] ^= 1
        return tensors

    result = verify_checkpoint(rewrite(saved, tmp_path / "hf", change), imported)
    assert [difference.hf_name for difference in result.differences] == [EXPERTS + "gate_up_proj"]
    assert result.differences[0].reason.startswith("1 bytes differ")
