"""One tensor of a file that is several weights, scalars, buffers and tensors that are only carried through.

The family is thrown away (toy_family.py): its weights are cut out of the files by plain indexing, and everything is
compared with that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_vlm.checkpoint import hf, torch_dist
from megatron_vlm.checkpoint.hf import SafetensorsReader
from megatron_vlm.checkpoint.manager import CheckpointManager, load_weights
from megatron_vlm.conversion import export_plan, running_model
from megatron_vlm.conversion.convert import export_checkpoint, identity_of, import_checkpoint, verify_checkpoint
from megatron_vlm.conversion.running_model import export_hf_from_model, load_hf_into_model
from megatron_vlm.families import registry
from megatron_vlm.files.safetensors_headers import StoredTensor, row_blocks
from megatron_vlm.model import hf_tensors
from megatron_vlm.model.hf_tensors import tensors_of
from megatron_vlm.model.weight_tables import PartOf, Weight, WeightGroup
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from tests.checkpoint import toy_family
from tests.checkpoint.hf_files import Tensors, check_holds, content, files, load_tensors, rewrite, without_weights
from tests.checkpoint.test_expert_memory import MIB, growth_bytes
from tests.checkpoint.toy_family import FAMILY, Stage
from tests.ranks import run_ranks
from tests.sizes import full, two_sizes

TABLE = "model.embed_tokens_per_layer.weight"
LAYOUTS = {
    "one rank": Layout(),
    "TP2": Layout(tensor_size=2),
    "PP2": Layout(pipeline_size=2),
    "TP2 x PP2": Layout(tensor_size=2, pipeline_size=2),
    "DP2 x PP2": Layout(data_size=2, pipeline_size=2),
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with toy_family.registered():
        yield


@pytest.fixture(scope="module", params=[full("tied"), "copied", full("untied")])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_family.write(tmp_path_factory.mktemp(request.param) / "hf", toy_family.hf_tensors(request.param))


@contextmanager
def small_blocks(num_bytes: int) -> Iterator[None]:
    """Everything that goes by in blocks goes by in blocks of this size, records of checkpoints too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (hf, hf_tensors):
            patch.setattr(module, "row_blocks", lambda shape, dtype, *_: row_blocks(shape, dtype, num_bytes))
        patch.setattr(hf, "BLOCK_BYTES", num_bytes)
        patch.setattr(torch_dist, "RECORD_BYTES", 4 * num_bytes)
        patch.setattr(running_model, "GATHERED_BYTES", num_bytes)
        yield


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Bytes read of every tensor of a Hugging Face directory."""
    num_bytes: Counter[str] = Counter()
    read_range = SafetensorsReader._read_range

    def counted(reader: SafetensorsReader, stored: StoredTensor, begin: int, end: int, *rest: object) -> torch.Tensor:
        num_bytes[stored.name] += end - begin
        return read_range(reader, stored, begin, end, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsReader, "_read_range", counted)
        yield num_bytes


def sizes(tensors: Tensors) -> Counter[str]:
    """Bytes of every tensor; a tied embedding and its copy are read once more, to be compared."""
    num_bytes = Counter({name: tensor.nbytes for name, tensor in tensors.items()})
    if "lm_head.weight" in tensors and toy_family.is_tied(tensors):
        num_bytes["model.embed_tokens.weight"] *= 2
    return num_bytes


def carried(tensors: Tensors) -> set[str]:
    return {name for name in tensors if name.startswith("mtp.") or name.endswith("inv_freq")}


@pytest.mark.parametrize("block_bytes", [70, 2**20])
def test_conversion_reproduces_every_file_and_reads_each_tensor_once(
    source: Path, tmp_path: Path, block_bytes: int
) -> None:
    tensors = load_tensors(source)
    with small_blocks(block_bytes):
        with counted_reads() as num_bytes:
            import_checkpoint(source, tmp_path / "checkpoint")
        assert num_bytes == sizes(tensors)
        check_holds(tmp_path / "checkpoint", toy_family.ours(tensors))
        with counted_reads() as num_bytes:
            result = verify_checkpoint(source, tmp_path / "checkpoint")
        assert result.differences == () and result.num_tensors == len(tensors)
        on_both_sides = {name: 2 * tensors[name].nbytes for name in carried(tensors)}
        assert num_bytes == {name: tensor.nbytes for name, tensor in tensors.items()} | on_both_sides
        assert set(export_checkpoint(tmp_path / "checkpoint", source, tmp_path / "out")) == carried(tensors)
    assert files(tmp_path / "out") == files(source)


@pytest.mark.parametrize("name", ["model.layers.2.linear_attn.in_proj_qkv.weight", TABLE, "mtp.fc.weight"])
def test_verify_finds_a_single_changed_bit(source: Path, tmp_path: Path, name: str) -> None:
    import_checkpoint(source, tmp_path / "checkpoint")

    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(torch.uint8)[7, -1] ^= 1
        return tensors

    (difference,) = verify_checkpoint(rewrite(source, tmp_path / "hf", change), tmp_path / "checkpoint").differences
    assert difference.hf_name == name and difference.reason.startswith("1 bytes differ")


def test_an_export_without_an_example_joins_the_parts(source: Path, tmp_path: Path) -> None:
    import_checkpoint(source, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", without_weights(source, tmp_path / "bare"), tmp_path / "out")
    expected, actual = load_tensors(source), load_tensors(tmp_path / "out")
    assert actual.keys() == expected.keys() - ({"lm_head.weight"} if toy_family.is_tied(expected) else set())
    for name in actual:
        tensor = expected[name]
        assert actual[name].dtype == tensor.dtype and actual[name].equal(tensor), name


# On ranks.


def load_and_export(source: Path, target: Path, layout: Layout, block_bytes: int, dtype: torch.dtype | None) -> None:
    """Load into a running model, compare, export."""
    groups = build_groups(layout)
    initialize_megatron(0, groups)
    whole = toy_family.ours(load_tensors(source))
    stage = Stage(whole, groups, dtype)
    with toy_family.registered(), small_blocks(block_bytes):
        config = FAMILY.config_from_hf(registry.load_hf_config(source), True)
        load_hf_into_model([stage], source, FAMILY, config, groups)
        stage.check(whole, groups)
        export_hf_from_model([stage], source, target, FAMILY, config, groups)


@pytest.mark.parametrize("block_bytes", [70, 2**20])
@pytest.mark.parametrize("name", two_sizes(LAYOUTS, "TP2", "PP2"))
def test_a_running_model_exports_the_files_it_was_loaded_from(
    source: Path, tmp_path: Path, name: str, block_bytes: int
) -> None:
    dtype = torch.float32 if name == "TP2" else None
    layout = LAYOUTS[name]
    run_ranks(layout.world_size, load_and_export, source, tmp_path / "out", layout, block_bytes, dtype)
    assert files(tmp_path / "out") == files(source)


def export_divided(source: Path, target: Path, layout: Layout) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_plan, "UNDIVIDED_BYTES", 0)
        load_and_export(source, target, layout, 70, None)


def test_stages_write_files_of_their_own(source: Path, tmp_path: Path) -> None:
    """A tensor of which several stages have parts is written by the first of them."""
    run_ranks(2, export_divided, source, tmp_path / "out", LAYOUTS["PP2"])
    assert content(tmp_path / "out") == content(source)


def bytes_loaded(source: Path, layout: Layout, block_bytes: int) -> tuple[Counter[str], Counter[str]]:
    """What a rank reads while it loads, by tensor, and the bytes of its parameters, by parameter, without padding."""
    groups = build_groups(layout)
    initialize_megatron(0, groups)
    stage = Stage(toy_family.ours(load_tensors(source)), groups)
    with toy_family.registered(), small_blocks(block_bytes), counted_reads() as num_bytes:
        config = FAMILY.config_from_hf(registry.load_hf_config(source), True)
        load_hf_into_model([stage], source, FAMILY, config, groups)
    held: Counter[str] = Counter()
    for name, parameter in stage.named_parameters():
        rows = parameter.shape[0] if parameter.dim() else 1
        if name.endswith(("embed_tokens.weight", "per_layer_embedding.weight", "lm_head.weight")):
            rows = min(rows, max(0, toy_family.VOCABULARY - groups.tp.rank() * rows))
        held[name] = rows * parameter[0].nbytes if parameter.dim() else parameter.nbytes
    return num_bytes, held


@pytest.mark.parametrize("name", ["one rank", "TP2", "PP2", full("TP2 x PP2")])
def test_a_rank_reads_its_part_of_a_tensor_once(source: Path, name: str) -> None:
    tensors, layout = load_tensors(source), LAYOUTS[name]
    # Every rank compares an embedding with its copy.
    compared = (
        2 * tensors["lm_head.weight"].nbytes if "lm_head.weight" in tensors and toy_family.is_tied(tensors) else 0
    )
    # Blocks smaller than the rows that ranks take a part of: nothing is read besides the rank's parameters.
    for num_bytes, held in run_ranks(layout.world_size, bytes_loaded, source, layout, 15):
        assert num_bytes.total() == held.total() + compared
    # Where rows are smaller than a block, whole rows are read, for all layers of a stage together.
    for num_bytes, held in run_ranks(layout.world_size, bytes_loaded, source, layout, 2**20):
        of_one_layer = next(size for own_name, size in held.items() if "per_layer_embedding" in own_name)
        assert num_bytes[TABLE] == toy_family.LAYERS * of_one_layer
        assert set(num_bytes).isdisjoint(carried(tensors))
        if layout == Layout():
            model = {name: size for name, size in sizes(tensors).items() if name not in carried(tensors)}
            assert num_bytes == model


def save(source: Path, folder: Path, layout: Layout) -> None:
    """A checkpoint as a run saves it."""
    groups = build_groups(layout)
    initialize_megatron(0, groups)
    stage = Stage(toy_family.ours(load_tensors(source)), groups)
    with toy_family.registered():
        config = FAMILY.config_from_hf(registry.load_hf_config(source), True)
        load_hf_into_model([stage], source, FAMILY, config, groups)
        identity = identity_of(source, FAMILY.name, config)
    manager = CheckpointManager(folder, groups, identity, layout.sizes(), "fp32", async_save=False)
    manager.save(3, [stage], None, None, data_state={}, config_yaml="")


def load_saved(source: Path, checkpoint: Path, layout: Layout) -> None:
    """Parameters from a checkpoint, in another layout."""
    groups = build_groups(layout)
    initialize_megatron(0, groups)
    whole = toy_family.ours(load_tensors(source))
    stage = Stage(whole, groups)
    with toy_family.registered():
        config = FAMILY.config_from_hf(registry.load_hf_config(source), True)
        load_weights(checkpoint, [stage], groups, identity_of(source, FAMILY.name, config))
    stage.check(whole, groups)


@pytest.mark.parametrize(
    ("first", "second"),
    [("TP2", "PP2"), full("PP2", "TP2"), ("TP2 x PP2", "one rank")],
)
def test_checkpoints_reshard_and_are_exported_without_ranks(
    source: Path, tmp_path: Path, first: str, second: str
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    run_ranks(LAYOUTS[first].world_size, save, source, checkpoints, LAYOUTS[first])
    run_ranks(LAYOUTS[second].world_size, load_saved, source, checkpoints, LAYOUTS[second])
    export_checkpoint(tmp_path / "run", source, tmp_path / "out")
    assert files(tmp_path / "out") == files(source)


def test_an_import_is_loaded_in_any_layout(source: Path, tmp_path: Path) -> None:
    import_checkpoint(source, tmp_path / "checkpoint")
    run_ranks(4, load_saved, source, tmp_path / "checkpoint", LAYOUTS["TP2 x PP2"])


@pytest.mark.parametrize(
    ("shapes", "slices", "message"),
    [
        ([(4, 8), (4, 8)], [(0, 0, 4), (0, 5, 9)], "does not follow"),
        ([(4, 8), (4, 8)], [(0, 0, 4), (1, 4, 8)], "does not follow"),
        ([(4, 8), (4, 8)], [(0, 0, 4), (0, 4, 9)], r"is \(4, 8\)"),
        ([(4, 8), (4, 7)], [(0, 0, 4), (0, 4, 8)], r"is \(4, 7\)"),
    ],
)
def test_parts_that_do_not_make_a_tensor(
    shapes: list[tuple[int, int]], slices: list[tuple[int, int, int]], message: str
) -> None:
    """A mistake in a family's tables is found when its map meets files."""
    weights = tuple(
        Weight(f"{index}", shape, part_of=PartOf("both", *section))
        for index, (shape, section) in enumerate(zip(shapes, slices, strict=True))
    )
    with pytest.raises(AssertionError, match=message):
        tensors_of(WeightGroup("ours.", ("theirs.",), weights), "theirs.")


# Memory: the table is 64 MiB, of which every layer has 16.

ROWS, COLUMNS = 2**16, 128
ALLOWED_BYTES = 16 * MIB


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small directory, and one with the large table."""
    folder = tmp_path_factory.mktemp("tables")
    sizes = {"small": {}, "large": {"vocabulary": ROWS, "per_layer": COLUMNS}}
    return [
        toy_family.write(folder / name, toy_family.hf_tensors(**given), **given)  # type: ignore[arg-type]
        for name, given in sizes.items()
    ]


@pytest.mark.full
def test_conversion_takes_a_block_of_the_table_at_a_time(tables: list[Path], tmp_path: Path) -> None:
    for source in tables:  # the small one first, for the pages of libraries
        folder = tmp_path / source.name
        growths = [
            growth_bytes(lambda: import_checkpoint(source, folder / "checkpoint")),  # noqa: B023
            growth_bytes(lambda: export_checkpoint(folder / "checkpoint", source, folder / "out")),  # noqa: B023
            growth_bytes(lambda: verify_checkpoint(source, folder / "checkpoint")),  # noqa: B023
        ]
        print(source.name, [f"{growth / MIB:.1f} MiB" for growth in growths])
        assert (folder / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert max(growths) < ALLOWED_BYTES
    with SafetensorsReader(tables[-1]) as reader:  # and this measurement would have seen more
        assert growth_bytes(lambda: reader.read(TABLE)) > 60 * MIB


def memory_of_a_rank(sources: list[Path], target: Path, layout: Layout) -> tuple[int, int]:
    """How far it rises while the last model is loaded, and exported."""
    groups = build_groups(layout)
    initialize_megatron(0, groups)
    for source in sources:
        stage = Stage(toy_family.ours(load_tensors(source)), groups)
        with toy_family.registered(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(running_model, "GATHERED_BYTES", MIB)
            config = FAMILY.config_from_hf(registry.load_hf_config(source), True)
            loading = growth_bytes(lambda: load_hf_into_model([stage], source, FAMILY, config, groups))  # noqa: B023
            out = target / source.name
            exporting = growth_bytes(
                lambda: export_hf_from_model([stage], source, out, FAMILY, config, groups)  # noqa: B023
            )
    return loading, exporting


@pytest.mark.parametrize("name", ["TP2", "PP2"])
def test_a_running_model_moves_a_block_of_the_table_at_a_time(tables: list[Path], tmp_path: Path, name: str) -> None:
    growths = run_ranks(2, memory_of_a_rank, tables, tmp_path, LAYOUTS[name])
    print([[f"{growth / MIB:.1f} MiB" for growth in rank] for rank in growths])
    for source in tables:
        written = (tmp_path / source.name / "model.safetensors").read_bytes()
        assert written == (source / "model.safetensors").read_bytes()
    assert max(max(rank) for rank in growths) < ALLOWED_BYTES
