"""Directories with float8 weights: read as transformers dequantises them, written as bfloat16, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Mistral3ForConditionalGeneration
from transformers.quantizers import quantizer_finegrained_fp8

from megatron_vlm.checkpoint import float8, hf
from megatron_vlm.checkpoint.float8 import open_weights
from megatron_vlm.conversion.convert import export_checkpoint, import_checkpoint, verify_checkpoint
from megatron_vlm.errors import CheckpointError
from tests.checkpoint import gemma3_files, mistral3_files, qwen3_vl_files
from tests.checkpoint.hf_files import Tensors, check_holds, load_tensors, read_config, rename, rewrite, write_config
from tests.checkpoint.mistral3_files import FLOAT8_MAXIMUM, saved_float8

try:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
except ImportError:
    pytest.skip("this transformers dequantises float8 elsewhere", allow_module_level=True)

GATE = "language_model.model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mistral3_files.saved(tmp_path_factory.mktemp("saved") / "hf", tied=True)


@pytest.fixture(scope="module")
def published(saved: Path) -> Path:
    """As Ministral-3-3B-Instruct: one scale for each weight, one for what it is multiplied with, a tied head."""
    return saved_float8(saved, saved.parent / "float8", None, scale_dtype=torch.bfloat16)


@pytest.fixture
def without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for a package that dequantising on the host makes no use of."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)


def expected_values(directory: Path, block_size: tuple[int, int] | None) -> Tensors:
    """All tensors but the scales, with transformers' product for training on top of float8 weights."""
    tensors = load_tensors(directory)
    values = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_scale_inv", "_scale"))}
    for name, tensor in values.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[name + "_scale_inv"]
            values[name] = _dequantize_fp8_weight(tensor, scale, block_size, torch.float32).bfloat16()
    return values


def check_close(actual: torch.Tensor, original: torch.Tensor) -> None:
    """A float8 number has three bits of mantissa: off by at most a sixteenth, by a third of that on average."""
    assert (actual.float() - original.float()).norm() / original.float().norm() < 1 / 32


@pytest.mark.parametrize("block_size", [None, (16, 16)], ids=["per tensor", "per block"])
def test_the_weights_are_those_that_transformers_dequantises(
    saved: Path, tmp_path: Path, without_accelerate: None, block_size: tuple[int, int] | None
) -> None:
    source = saved_float8(saved, tmp_path / "float8", block_size)
    import_checkpoint(source, tmp_path / "checkpoint")
    check_holds(tmp_path / "checkpoint", mistral3_files.ours(expected_values(source, block_size)))
    assert verify_checkpoint(source, tmp_path / "checkpoint").differences == ()
    export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "out")
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    expected = Mistral3ForConditionalGeneration.from_pretrained(source)
    actual, information = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(information[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert actual.dtype == torch.bfloat16 and set(actual.state_dict()) == set(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert actual.state_dict()[name].equal(tensor), name
    check_close(load_tensors(tmp_path / "out")[GATE], load_tensors(saved)[GATE])


@pytest.mark.parametrize("block_size", [(16, 32), (20, 24), (128, 128)])
def test_blocks_that_do_not_divide_a_weight(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_size: tuple[int, int]
) -> None:
    """transformers' `Fp8Dequantize` divides the columns by the number of scales: 48 columns are two times 24 to it."""
    monkeypatch.setattr(hf, "BLOCK_BYTES", 50)
    source = saved_float8(saved, tmp_path / "float8", block_size)
    expected = expected_values(source, block_size)
    check_close(expected[GATE], load_tensors(saved)[GATE])
    import_checkpoint(source, tmp_path / "checkpoint")
    check_holds(tmp_path / "checkpoint", mistral3_files.ours(expected))


def test_any_part_of_a_weight_can_be_read(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's columns, in pieces that begin and end inside rows and blocks."""
    source = saved_float8(saved, tmp_path / "float8", (20, 24))
    expected = expected_values(source, (20, 24))[GATE]
    monkeypatch.setattr(hf, "BLOCK_BYTES", 14)  # seven columns of 48
    with open_weights(source) as reader:
        for columns in (slice(0, 48), slice(5, 30), slice(47, 48)):
            part = torch.empty(30, columns.stop - columns.start)
            reader.read_part(GATE, part, expected.shape, [(11, 41), (columns.start, columns.stop)])
            assert part.equal(expected[11:41, columns].float())
        assert reader.read(GATE).equal(expected)


def test_stacked_experts(tmp_path: Path) -> None:
    """Blocks lie within one expert's matrix, also in another family."""
    block_size = (32, 24)

    def quantize(tensors: Tensors) -> Tensors:
        for name in [name for name in tensors if ".experts." in name]:
            weight = tensors[name]
            grid = [-(-size // block) for size, block in zip(weight.shape[1:], block_size, strict=True)]
            scales = torch.rand(len(weight), *grid) / FLOAT8_MAXIMUM + 1e-4
            tensors |= {name: (weight.float() * 1000).to(torch.float8_e4m3fn), name + "_scale_inv": scales}
        return tensors

    saved = qwen3_vl_files.saved(tmp_path / "saved")
    published = qwen3_vl_files.published(saved, tmp_path / "published")
    source = rewrite(published, tmp_path / "float8", quantize)
    scheme = {"quant_method": "fp8", "weight_block_size": list(block_size)}
    write_config(source, read_config(source) | {"quantization_config": scheme})
    expected = qwen3_vl_files.ours(qwen3_vl_files.transpose_experts(expected_values(source, block_size)))
    import_checkpoint(source, tmp_path / "checkpoint")
    assert expected["language_model.layers.2.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    check_holds(tmp_path / "checkpoint", expected)


def test_a_language_model_alone(tmp_path: Path, without_accelerate: None) -> None:
    """As Devstral-2: float8 weights under the names of Ministral3ForCausalLM."""
    saved = mistral3_files.saved_text_only(tmp_path / "saved", True, tied=False)

    def quantize(tensors: Tensors) -> Tensors:
        renamed = rename({"model.": "language_model.model."})(tensors)
        quantized = mistral3_files.quantize(renamed, None)
        return rename({"language_model.model.": "model."})(quantized)

    source = rewrite(saved, tmp_path / "float8", quantize)
    scheme = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    scheme["modules_to_not_convert"] = ["lm_head"]
    write_config(source, read_config(source) | {"quantization_config": scheme})
    import_checkpoint(source, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert set(actual) == set(expected)
    assert all(actual[name].equal(tensor) for name, tensor in expected.items())


def test_an_export_without_an_example_drops_the_scheme(published: Path, tmp_path: Path) -> None:
    import_checkpoint(published, tmp_path / "checkpoint")
    bare = tmp_path / "bare"
    bare.mkdir()
    config = read_config(published)
    config["text_config"]["quantization_config"] = config.pop("quantization_config")  # where transformers looks, too
    write_config(bare, config)
    export_checkpoint(tmp_path / "checkpoint", bare, tmp_path / "out")
    written = read_config(tmp_path / "out")
    assert "quantization_config" not in written and "quantization_config" not in written["text_config"]
    expected = expected_values(published, None)
    assert load_tensors(tmp_path / "out").keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in load_tensors(tmp_path / "out").items())


def drop_scale(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != GATE + "_scale_inv"}


def scale_of_rows(tensors: Tensors) -> Tensors:
    return tensors | {GATE + "_scale_inv": torch.ones(64, 1)}


def scale_of_bytes(tensors: Tensors) -> Tensors:
    return tensors | {GATE + "_scale_inv": torch.tensor(127, dtype=torch.uint8)}


def scale_not_finite(tensors: Tensors) -> Tensors:
    return tensors | {GATE + "_scale_inv": torch.tensor(float("inf"))}


def weight_in_bytes(tensors: Tensors) -> Tensors:
    return tensors | {GATE: tensors[GATE].view(torch.int8)}


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (drop_scale, rf"1 quantised tensors without the scales.*\({GATE} torch.float8_e4m3fn\)"),
            (scale_of_rows, r"gate_proj.weight_scale_inv is torch.float32 \[64, 1\]: for blocks of 64 x 48"),
            (scale_of_bytes, r"gate_proj.weight_scale_inv is torch.uint8 \[\]"),
            (scale_not_finite, r"gate_proj.weight_scale_inv is not finite"),
            (weight_in_bytes, r"gate_proj.weight torch.int8"),
        ],
    )
    def test_scales_that_are_missing_or_do_not_fit(
        self, published: Path, tmp_path: Path, change: Any, message: str
    ) -> None:
        source = rewrite(published, tmp_path / "hf", change)
        with pytest.raises(CheckpointError, match=message) as caught:
            import_checkpoint(source, tmp_path / "checkpoint")
        assert "unquantised weights" in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "checkpoint").exists()

    @pytest.mark.parametrize(
        ("scheme", "message"),
        [
            ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
            ({"quant_method": "compressed-tensors"}, "quant_method 'compressed-tensors'"),
            ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "quant_method 'fp8' with scale_fmt 'ue8m0'"),
            ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
            ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size 128 is not"),
            ({"quant_method": "fp8", "weight_block_size": [True, 128]}, r"weight_block_size \[True, 128\]"),
            ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size \[128, 0\]"),
        ],
    )
    def test_another_scheme(self, published: Path, tmp_path: Path, scheme: dict[str, Any], message: str) -> None:
        source = rewrite(published, tmp_path / "hf", lambda tensors: tensors)
        write_config(source, read_config(source) | {"quantization_config": scheme})
        with pytest.raises(CheckpointError, match=message) as caught:
            import_checkpoint(source, tmp_path / "checkpoint")
        assert "unquantised weights" in str(caught.value)

    def test_a_scheme_that_is_no_object(self, published: Path, tmp_path: Path) -> None:
        """Read alone: `load_hf_config` asks transformers first, which has no words for it."""
        source = rewrite(published, tmp_path / "hf", lambda tensors: tensors)
        write_config(source, read_config(source) | {"quantization_config": ["fp8"]})
        with pytest.raises(CheckpointError, match=r"quantization_config is a JSON list.*unquantised weights"):
            open_weights(source)

    @pytest.mark.parametrize("dtype", float8.FLOAT8)
    def test_float8_without_scales_in_every_family(self, tmp_path: Path, dtype: torch.dtype) -> None:
        def cast(tensors: Tensors) -> Tensors:
            return {name: t.to(dtype) if "mlp.gate_proj" in name else t for name, t in tensors.items()}

        sources = [
            gemma3_files.multimodal(tmp_path / "gemma3"),
            qwen3_vl_files.saved(tmp_path / "qwen3_vl", moe=False),
            mistral3_files.saved(tmp_path / "mistral3", ministral=False),
        ]
        for source in sources:
            directory = rewrite(source, tmp_path / f"{source.name}_float8", cast)
            with pytest.raises(CheckpointError, match=r"quantised tensors without the scales .*gate_proj.weight"):
                import_checkpoint(directory, tmp_path / "checkpoint")

    def test_scales_that_no_configuration_speaks_of(self, published: Path, tmp_path: Path) -> None:
        source = rewrite(published, tmp_path / "hf", lambda tensors: tensors)
        config = read_config(source)
        del config["quantization_config"]
        write_config(source, config)
        with pytest.raises(CheckpointError, match=r"read where config\.json has a quantization_config"):
            import_checkpoint(source, tmp_path / "checkpoint")
