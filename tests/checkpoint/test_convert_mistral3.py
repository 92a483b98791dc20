"""Conversion of Mistral3 both ways, against transformers: both texts, both styles of names, tied or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Mistral3ForConditionalGeneration, PreTrainedModel

from megatron_vlm.checkpoint import torch_dist
from megatron_vlm.conversion.convert import export_checkpoint, import_checkpoint, verify_checkpoint
from megatron_vlm.errors import CheckpointError
from megatron_vlm.families import registry
from tests.checkpoint import hf_files, mistral3_files
from tests.checkpoint.hf_files import (
    Change,
    Tensors,
    change_manifest,
    change_nothing,
    check_holds,
    files,
    load_tensors,
    logits,
    read_config,
    rewrite,
    without_weights,
    write_config,
)
from tests.checkpoint.mistral3_files import IN_MEMORY_STYLE

HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mistral3_files.saved(tmp_path_factory.mktemp("untied") / "hf")


def load(directory: Path, auto_class: Any = Mistral3ForConditionalGeneration) -> PreTrainedModel:
    return hf_files.load(directory, auto_class)


def is_tied(model: PreTrainedModel) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding is not None and head is not None
    return head.weight is embedding.weight


def ties(directory: Path) -> list[object]:
    """What config.json says at each of its levels."""
    config = read_config(directory)
    return [part.get("tie_word_embeddings") for part in (config, config.get("text_config")) if part is not None]


def check_round_trip(source: Path, folder: Path, tensors: Tensors) -> None:
    """Import, verify, export: the same files but for the ties in config.json."""
    import_checkpoint(source, folder / "checkpoint")
    check_holds(folder / "checkpoint", mistral3_files.ours(tensors))
    assert verify_checkpoint(source, folder / "checkpoint").differences == ()
    export_checkpoint(folder / "checkpoint", source, folder / "again")
    exported, original = files(folder / "again"), files(source)
    assert exported.keys() == original.keys()
    assert {name for name in original if exported[name] != original[name]} <= {"config.json"}
    has_head = any(name.endswith("lm_head.weight") for name in tensors)
    assert set(ties(folder / "again")) == {not has_head}


@pytest.mark.parametrize(
    ("ministral", "tied", "style"),
    [
        (True, True, change_nothing),
        (True, False, IN_MEMORY_STYLE),
        (False, True, IN_MEMORY_STYLE),
        (False, False, change_nothing),
    ],
    ids=["ministral3 tied", "ministral3 in memory", "mistral tied in memory", "mistral"],
)
def test_every_style_round_trips_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ministral: bool, tied: bool, style: Change
) -> None:
    monkeypatch.setattr(torch_dist, "RECORD_BYTES", 4096)  # a few rows each
    saved = mistral3_files.saved(tmp_path / "saved", ministral, tied=tied)
    source = rewrite(saved, tmp_path / "hf", style)
    check_round_trip(source, tmp_path, load_tensors(saved))
    again = load(tmp_path / "again")
    assert is_tied(again) == tied
    assert logits(again).equal(logits(load(source)))


def test_names_in_memory_are_those_of_the_modules(untied: Path) -> None:
    """What `save_pretrained(save_original_format=False)` writes."""
    assert set(IN_MEMORY_STYLE(load_tensors(untied))) == set(load(untied).state_dict())


def test_a_projector_with_biases_and_another_precision(tmp_path: Path) -> None:
    source = mistral3_files.saved(tmp_path / "saved", dtype=torch.float32)
    config = read_config(source) | {"multimodal_projector_bias": True}

    def add_biases(tensors: Tensors) -> Tensors:
        return tensors | {f"multi_modal_projector.linear_{number}.bias": torch.randn(48) for number in (1, 2)}

    source = rewrite(source, tmp_path / "hf", add_biases)
    write_config(source, config)
    check_round_trip(source, tmp_path, load_tensors(source))
    load(tmp_path / "again")


@pytest.mark.parametrize(("ministral", "tied"), [(True, False), (False, True)], ids=["ministral3", "mistral tied"])
def test_a_language_model_that_never_had_a_tower(tmp_path: Path, ministral: bool, tied: bool) -> None:
    source = mistral3_files.saved_text_only(tmp_path / "hf", ministral, tied)
    check_round_trip(source, tmp_path, load_tensors(source))
    assert files(tmp_path / "again") == files(source)  # configuration and all
    again = load(tmp_path / "again", AutoModelForCausalLM)
    assert is_tied(again) == tied and logits(again).equal(logits(load(source, AutoModelForCausalLM)))


@pytest.mark.parametrize(
    ("ministral", "tied", "has_example", "text", "rope"),
    [
        (True, True, True, {}, {}),
        (True, False, False, {}, {}),
        (False, False, True, {}, {}),
        (False, True, False, {"sliding_window": 5}, {}),
        (True, False, True, {}, {"llama_4_scaling_beta": 0}),
    ],
    ids=["ministral3 tied", "ministral3 no example", "mistral", "mistral window", "queries that do not grow"],
)
def test_the_language_model_of_a_multimodal_model(
    tmp_path: Path, ministral: bool, tied: bool, has_example: bool, text: dict[str, Any], rope: dict[str, Any]
) -> None:
    source = mistral3_files.saved(tmp_path / "hf", ministral, tied=tied, **text)
    config = read_config(source)
    config["text_config"]["rope_parameters"] |= rope
    write_config(source, config)
    import_checkpoint(source, tmp_path / "whole")
    change_manifest(tmp_path / "whole", tmp_path / "checkpoint", text_only=True)
    reference = source if has_example else without_weights(source, tmp_path / "bare")
    export_checkpoint(tmp_path / "checkpoint", reference, tmp_path / "out")
    model = load(tmp_path / "out", AutoModelForCausalLM)
    assert type(model).__name__ == ("Ministral3ForCausalLM" if ministral and not rope else "MistralForCausalLM")
    assert model.dtype == torch.bfloat16 and is_tied(model) == tied and ties(tmp_path / "out") == [tied]
    # The same arithmetic on the same bits, without an image: equal to the last bit.
    assert logits(model).equal(logits(load(source)))
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "processor_config.json").exists()
    # And what was exported is a checkpoint like any other.
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    assert verify_checkpoint(tmp_path / "out", tmp_path / "checkpoint").differences == ()


class TestTies:
    """Embedding and head are tied if and only if the files hold no head."""

    @pytest.mark.parametrize("flag", [None, True, False], ids=["no flag", "says tied", "says untied"])
    @pytest.mark.parametrize("has_head", [True, False], ids=["head", "no head"])
    def test_the_head_tells_and_an_export_says_so(
        self, untied: Path, tmp_path: Path, has_head: bool, flag: bool | None
    ) -> None:
        def change(tensors: Tensors) -> Tensors:
            return {name: tensor for name, tensor in tensors.items() if has_head or name != HEAD}

        source = rewrite(untied, tmp_path / "hf", change)
        for text_flag in (None, not has_head, has_head):  # the last one lies
            set_flags(source, flag, text_flag)
            family, hf_config = registry.detect(source), registry.load_hf_config(source)
            for text_only in (False, True):
                assert family.config_from_hf(hf_config, text_only).text.tie_word_embeddings is not has_head
        check_round_trip(source, tmp_path, load_tensors(source))
        again = load(tmp_path / "again")
        assert is_tied(again) is not has_head
        assert ties(tmp_path / "again") == [not has_head] * 2
        # The same weights in a model that transformers itself ties, or does not.
        expected = load(untied)
        if not has_head:
            expected.lm_head.weight = expected.model.language_model.embed_tokens.weight
        assert logits(again).equal(logits(expected))

    @pytest.mark.parametrize("flag", [None, True, False], ids=["no flag", "says tied", "says untied"])
    @pytest.mark.parametrize("has_head", [True, False], ids=["head", "no head"])
    def test_in_a_language_model_alone(self, tmp_path: Path, has_head: bool, flag: bool | None) -> None:
        source = mistral3_files.saved_text_only(tmp_path / "hf", True, tied=not has_head)
        expected = logits(load(source, AutoModelForCausalLM))
        set_flags(source, flag, None)
        check_round_trip(source, tmp_path, load_tensors(source))
        again = load(tmp_path / "again", AutoModelForCausalLM)
        assert is_tied(again) is not has_head and logits(again).equal(expected)

    @pytest.mark.parametrize(
        ("flag", "text_flag", "tied"),
        [
            (None, None, False),  # Mistral-Small-3.1 and 3.2
            (None, True, True),  # Ministral-3-3B
            (None, False, False),  # Ministral-3-8B and 14B
            (True, False, True),  # what transformers saves of a tied model
            (False, True, False),
        ],
    )
    def test_without_weights_the_configuration_decides(
        self, untied: Path, tmp_path: Path, flag: bool | None, text_flag: bool | None, tied: bool
    ) -> None:
        source = without_weights(untied, tmp_path / "bare")
        set_flags(source, flag, text_flag)
        hf_config = registry.load_hf_config(source)
        assert registry.detect(hf_config).config_from_hf(hf_config, False).text.tie_word_embeddings is tied

    def test_the_index_tells_where_its_shards_are_not_there_yet(self, untied: Path, tmp_path: Path) -> None:
        source = without_weights(untied, tmp_path / "bare")
        set_flags(source, True, True)
        index = "model.safetensors.index.json"
        (source / index).write_bytes((untied / index).read_bytes())
        assert registry.load_hf_config(source).tie_word_embeddings is False
        (source / index).write_text("{}")
        with pytest.raises(CheckpointError, match="not JSON with a filled weight_map"):
            registry.load_hf_config(source)

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_an_export_without_an_example_follows_the_checkpoint(self, tmp_path: Path, tied: bool) -> None:
        source = mistral3_files.saved(tmp_path / "hf", tied=tied)
        import_checkpoint(source, tmp_path / "checkpoint")
        bare = without_weights(source, tmp_path / "bare")
        set_flags(bare, not tied, not tied)
        export_checkpoint(tmp_path / "checkpoint", bare, tmp_path / "out")
        assert ties(tmp_path / "out") == [tied, tied]
        again = load(tmp_path / "out")
        assert is_tied(again) == tied and logits(again).equal(logits(load(source)))
        # Names as published.
        assert set(load_tensors(tmp_path / "out")) == set(load_tensors(source))

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_an_example_that_is_tied_otherwise_is_refused(self, tmp_path: Path, tied: bool) -> None:
        import_checkpoint(mistral3_files.saved(tmp_path / "hf", tied=tied), tmp_path / "checkpoint")
        example = mistral3_files.saved(tmp_path / "other", tied=not tied)
        found = "missing" if tied else "unexpected"
        with pytest.raises(CheckpointError, match=rf"1 {found} \(language_model.lm_head.weight\)"):
            export_checkpoint(tmp_path / "checkpoint", example, tmp_path / "out")


def set_flags(directory: Path, flag: bool | None, text_flag: bool | None) -> None:
    """Write, or leave out, both levels' statement on ties."""
    config = read_config(directory)
    for part, value in ((config, flag), (config.get("text_config"), text_flag)):
        if part is not None:
            part.pop("tie_word_embeddings", None)
            part |= {} if value is None else {"tie_word_embeddings": value}
    write_config(directory, config)


def test_the_tokenizer_of_mistral_common_is_copied(untied: Path, tmp_path: Path) -> None:
    import_checkpoint(untied, tmp_path / "checkpoint")
    source = without_weights(untied, tmp_path / "bare")
    (source / "tekken.json").write_text("{}")
    export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "out")
    assert (tmp_path / "out" / "tekken.json").read_text() == "{}"
