"""What a checkpoint holds, in which layouts it can be continued, and that it continues bit for bit.

Reference for every layout: `torch.optim.AdamW` on whole tensors in one process.
"""

from __future__ import annotations

import math
import os
import random
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemWriter

from megatron_vlm.checkpoint.manager import Resumed, load_weights
from megatron_vlm.checkpoint.run_folder import Manifest
from megatron_vlm.checkpoint.torch_dist import TorchDistReader
from megatron_vlm.errors import CheckpointError
from tests.checkpoint.tiny_run import (
    BETAS,
    EMBEDDING,
    EPS,
    FROZEN,
    IDENTITY,
    LEARNING_RATE,
    PER_LAYER_NORM,
    WEIGHT_DECAY,
    Run,
    Settings,
    gradient,
    gradient_norm_at,
    initial_value,
    parameter_shapes,
)
from tests.checkpoint.whole_state import Pieces, assemble, assert_same
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import full

SOURCE = TestLayout(4, tensor=2, pipeline=2, expert=2)
STEPS, MORE_STEPS = 3, 2


# Functions that run on ranks.


def train_and_save(settings: Settings, folder: str) -> Pieces:
    run = Run(settings, folder)
    run.train(STEPS)
    run.save()
    return run.pieces()


def load_and_continue(settings: Settings, folder: str) -> tuple[Pieces, Pieces, Resumed, list[float]]:
    run = Run(settings, folder)
    resumed = run.load()
    loaded = run.pieces()
    run.train(MORE_STEPS)
    return loaded, run.pieces(), resumed, run.norms


def straight_and_resumed(settings: Settings, folder: str) -> tuple[dict, dict]:
    """Local state after STEPS + MORE_STEPS: without a stop, and with a save, a load into new objects, and the rest."""

    def draws() -> dict:
        return {"python": random.random(), "torch": torch.rand(3)}

    straight = Run(settings, folder)
    straight.train(STEPS)
    straight.save()
    expected_draws = draws()
    straight.train(MORE_STEPS)
    resumed = Run(settings, folder)
    assert resumed.load().same_layout
    state = draws()
    resumed.train(MORE_STEPS)
    return expected_draws | straight.local_state(), state | resumed.local_state()


def save_without_step(settings: Settings, folder: str) -> None:
    run = Run(settings, folder)
    run.train(STEPS)
    if run.groups.pp.rank() == 0:
        # As FusedAdam leaves a group of which this rank has no parameters.
        run.optimizer.param_groups[1].pop("step", None)
    run.save()


def load_only_weights(settings: Settings, folder: str) -> dict[str, torch.Tensor]:
    run = Run(settings, folder + "/new")
    with torch.no_grad():
        for chunk in run.chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
    load_weights(folder, run.chunks, run.groups, IDENTITY, run.optimizer)
    return run.local_state()


def load_fails(settings: Settings, folder: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Run(settings, folder).load()
    return str(caught.value)


def load_weights_fails(settings: Settings, folder: str, identity) -> str:
    run = Run(settings, folder + "/new")
    with pytest.raises(CheckpointError) as caught:
        load_weights(folder, run.chunks, run.groups, identity)
    return str(caught.value)


# Comparing.


def learning_rate(step: int) -> float:
    """Warm-up over 2 steps, then cosine to 0 at step 100, as tiny_run configures it."""
    if step <= 2:
        return LEARNING_RATE * step / 2
    return LEARNING_RATE * 0.5 * (math.cos(math.pi * (step - 2) / 98) + 1)


def reference(num_steps: int, clip_grad: float = math.inf) -> dict[str, torch.Tensor]:
    """Parameters and AdamW's moments after `num_steps`, from torch, on whole tensors, under the checkpoint's keys."""
    result = {}
    for name, shape in parameter_shapes().items():
        parameter = torch.nn.Parameter(initial_value(name, shape.sizes))
        result[name] = parameter.detach()
        if name == FROZEN or not shape.trains:
            continue
        decay = WEIGHT_DECAY if len(shape.sizes) > 1 and not name.endswith(".bias") else 0.0
        optimizer = torch.optim.AdamW([parameter], betas=BETAS, eps=EPS, weight_decay=decay)
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            parameter.grad = gradient(name, shape.sizes, step) * min(1.0, clip_grad / gradient_norm_at(step))
            optimizer.step()
        for kind in ("exp_avg", "exp_avg_sq"):
            result[f"optimizer.state.{kind}.{name}"] = optimizer.state[parameter][kind]
    return result


def assert_follows_reference(whole: dict[str, torch.Tensor], num_steps: int, clip_grad: float = math.inf) -> None:
    expected = reference(num_steps, clip_grad)
    assert expected.keys() == {key for key in whole if ".param." not in key and ".fp32_param." not in key}
    for key, value in expected.items():
        # The same formula in fp32, but evaluated on shards of other lengths and in other order of operations than
        # torch's kernel on the whole tensor: a few units in the last place per step.
        torch.testing.assert_close(whole[key], value, rtol=2e-6, atol=1e-7, msg=key)


# Tests.


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:
    folder = str(tmp_path_factory.mktemp("source"))
    return folder, assemble(run_ranks(SOURCE.world_size, train_and_save, Settings(SOURCE), folder))


def test_saved_state_follows_torch_adamw(source):
    assert_follows_reference(source[1], STEPS)


@pytest.mark.parametrize(
    "layout",
    [
        TestLayout(),
        full(TestLayout(4, pipeline=4)),
        full(TestLayout(4, tensor=2)),
        TestLayout(2, pipeline=2, virtual=2),
        full(TestLayout(4)),
        TestLayout(4, expert=4),
        full(TestLayout(2, tensor=2, expert=2)),
        full(TestLayout(2, tensor=2, expert_tensor=2)),
        TestLayout(4, tensor=2, expert=2, expert_tensor=2),
        TestLayout(4, pipeline=2, expert=2),
    ],
    ids=str,
)
def test_continues_in_another_layout(source, layout):
    folder, saved = source
    results = run_ranks(layout.world_size, load_and_continue, Settings(layout), folder)
    assert_same(saved, assemble([loaded for loaded, *_ in results]))
    assert_follows_reference(assemble([after for _, after, *_ in results]), STEPS + MORE_STEPS)
    for _, _, resumed, norms in results:
        # A parameter left out or counted twice moves it by 1e-2 or more; sums of squares in another order by 1e-7.
        assert norms == pytest.approx([gradient_norm_at(STEPS + step) for step in range(MORE_STEPS)], rel=1e-6)
        assert (resumed.step, dict(resumed.data), resumed.same_layout) == (STEPS, {"seed": 1, "step": STEPS}, False)


@pytest.mark.parametrize(
    ("layout", "bf16"),
    [
        (TestLayout(2, tensor=2, expert_tensor=2), False),
        (TestLayout(2, pipeline=2), True),
        (TestLayout(4, pipeline=2, virtual=2), True),
        (TestLayout(2, expert=2), False),
        (TestLayout(4, tensor=2, expert=2), True),
    ],
    ids=str,
)
def test_same_layout_continues_bit_for_bit(tmp_path, layout, bf16):
    settings = Settings(layout, bf16=bf16)
    for straight, resumed in run_ranks(layout.world_size, straight_and_resumed, settings, str(tmp_path)):
        assert any(key.startswith("exp_avg_sq.") for key in straight)
        assert_same(straight, resumed)


@pytest.mark.parametrize(("optimizer", "bf16"), [("adamw", False), ("adamw", True), ("sgd", False)])
def test_plain_optimizers_continue_bit_for_bit(tmp_path, optimizer, bf16):
    settings = Settings(TestLayout(2, tensor=2, expert=2), optimizer=optimizer, distributed_optimizer=False, bf16=bf16)
    for straight, resumed in run_ranks(2, straight_and_resumed, settings, str(tmp_path)):
        assert_same(straight, resumed)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize(
    ("freeze", "trained_tensors_by_stage"),
    [
        ("language_model|vision_tower", [4, 0]),
        # The second stage trains norms, biases and experts: of its dense groups the first is empty. The first
        # stage has no experts.
        (r"vision_tower|.*embed_tokens|.*layers\.[23]\..*proj\.weight", [13, 10]),
    ],
    ids=["no parameter", "no parameter of a group"],
)
def test_partly_frozen_stages_continue_bit_for_bit(tmp_path, freeze, trained_tensors_by_stage, distributed_optimizer):
    settings = Settings(
        TestLayout(2, pipeline=2), freeze=freeze, distributed_optimizer=distributed_optimizer, bf16=True
    )
    results = run_ranks(2, straight_and_resumed, settings, str(tmp_path))
    for straight, resumed in results:
        assert_same(straight, resumed)
    assert [sum(key.startswith("exp_avg.") for key in run) for run, _ in results] == trained_tensors_by_stage


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("distributed_first", [False, True])
def test_distributed_optimizer_can_be_switched(tmp_path, bf16, distributed_first):
    first = Settings(TestLayout(2, tensor=2, expert=2), bf16=bf16, distributed_optimizer=distributed_first)
    second = Settings(TestLayout(2), bf16=bf16, distributed_optimizer=not distributed_first)
    saved = assemble(run_ranks(2, train_and_save, first, str(tmp_path)))
    results = run_ranks(2, load_and_continue, second, str(tmp_path))
    loaded = assemble([before for before, *_ in results])

    def canonical(whole: dict) -> dict:
        whole = {key.replace(".fp32_param.", ".param."): value for key, value in whole.items()}
        return whole if bf16 else {key: value for key, value in whole.items() if ".param." not in key}

    assert_same(canonical(saved), canonical(loaded))
    if not bf16:
        assert_follows_reference(assemble([after for _, after, *_ in results]), STEPS + MORE_STEPS)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_copies_on_all_chunks_are_saved_once(tmp_path, distributed_optimizer):
    """And are equal after loading and in the steps that follow: `assemble` compares them."""
    settings = Settings(TestLayout(4, pipeline=2, virtual=2), distributed_optimizer=distributed_optimizer)
    saved = assemble(run_ranks(4, train_and_save, settings, str(tmp_path)))
    assert_follows_reference(saved, STEPS)
    with TorchDistReader(tmp_path / f"step_{STEPS:08d}") as reader:
        for key in (PER_LAYER_NORM, f"optimizer.state.exp_avg.{PER_LAYER_NORM}"):
            records = [index for index in reader._storage if index.fqn == key]
            assert len(records) == len(reader.tensors[key].chunks) == 1, key
    results = run_ranks(4, load_and_continue, settings, str(tmp_path))
    assert_same(saved, assemble([loaded for loaded, *_ in results]))
    assert_follows_reference(assemble([after for _, after, *_ in results]), STEPS + MORE_STEPS)


def test_buffers_are_saved_and_never_trained(source):
    for name, shape in parameter_shapes().items():
        if not shape.trains:
            assert torch.equal(source[1][name], initial_value(name, shape.sizes)), name
            assert [key for key in source[1] if key.endswith(name)] == [name]


def test_step_is_saved_for_a_group_without_parameters_on_the_first_rank(tmp_path):
    run_ranks(2, save_without_step, Settings(TestLayout(2, pipeline=2), distributed_optimizer=False), str(tmp_path))
    description = Manifest.read(tmp_path / f"step_{STEPS:08d}").optimizer
    assert [group["step"] for group in description["groups"]] == [STEPS] * 3


def test_parameters_still_to_be_gathered_are_saved_up_to_date(tmp_path):
    settings = Settings(TestLayout(2, expert=2), overlap_param_gather=True)
    assert_follows_reference(assemble(run_ranks(2, train_and_save, settings, str(tmp_path))), STEPS)
    ((loaded, *_),) = run_ranks(1, load_and_continue, Settings(), str(tmp_path))
    assert_follows_reference(assemble([loaded]), STEPS)


def test_weights_only_converts_the_type(source):
    folder, saved = source
    (state,) = run_ranks(1, load_only_weights, Settings(bf16=True), folder)
    name = "language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(state[f"parameter.0.{name}"], saved[name].bfloat16())
    assert not any(key.startswith("exp_avg") for key in state)
    mains = [value for key, value in state.items() if key.startswith("main.")]
    assert any(value.numel() and value.abs().sum() > 0 for value in mains), "main parameters still hold the old values"


def test_experts_may_be_frozen_but_not_thawed(source, tmp_path):
    frozen = Settings(TestLayout(2), freeze=rf"{FROZEN}|.*\.experts\.")
    results = run_ranks(2, load_and_continue, frozen, source[0])
    loaded = assemble([found for found, *_ in results])
    assert_same({key: source[1][key] for key in loaded}, loaded)
    assert source[1].keys() - loaded.keys() == {
        key for key in source[1] if ".experts." in key and key.startswith("optimizer.")
    }
    run_ranks(2, train_and_save, frozen, str(tmp_path))
    message = run_ranks(1, load_fails, Settings(), str(tmp_path))[0]
    assert "is_expert_parallel" in message and "checkpoint.load" in message


def test_model_of_other_shape_is_refused(source):
    message = run_ranks(2, load_fails, Settings(TestLayout(2, tensor=2), num_layers=8), source[0])[1]
    assert "language_model.layers.4.mlp.up_proj.bias is missing" in message and " more" in message
    assert "model.hf_path" in message


def test_model_with_fewer_layers_is_refused(source):
    smaller = Settings(TestLayout(2, pipeline=2), num_layers=2)
    message = run_ranks(2, load_weights_fails, smaller, source[0], IDENTITY)[0]
    assert "language_model.layers.2.mlp.up_proj.bias is in it and not in the model" in message


def test_weights_come_from_a_checkpoint_of_weights_only(tmp_path):
    """In bf16, as torch writes it in one process, with a part that the model does not have."""
    names = {name: shape.sizes for name, shape in parameter_shapes().items()} | {"audio_tower.conv.weight": (4, 4)}
    values = {name: initial_value(name + "/imported", shape).bfloat16() for name, shape in names.items()}
    torch.distributed.checkpoint.save(values, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(tmp_path))
    Manifest(IDENTITY).write(tmp_path)
    states = run_ranks(4, load_only_weights, Settings(SOURCE), str(tmp_path))
    experts = "language_model.layers.3.mlp.experts.down_proj"
    assert torch.equal(torch.cat([states[rank][f"parameter.0.{experts}"] for rank in (2, 3)]), values[experts].float())
    first, last_copy = values[EMBEDDING].float().chunk(2)
    assert torch.equal(states[0][f"parameter.0.{EMBEDDING}"], first)
    assert torch.equal(states[-1][f"parameter.0.{EMBEDDING}"], last_copy), "the last stage's copy"


@pytest.mark.parametrize("damage", ["truncated", "removed", "metadata", "overwritten"])
def test_damage_is_reported_on_every_rank(source, tmp_path, damage):
    shutil.copytree(source[0], tmp_path, dirs_exist_ok=True)
    checkpoint = tmp_path / f"step_{STEPS:08d}"
    file = checkpoint / ".metadata" if damage == "metadata" else max(checkpoint.glob("*.distcp"))
    if damage == "overwritten":
        file.write_bytes(bytes(file.stat().st_size))
    else:
        file.unlink() if damage == "removed" else os.truncate(file, 300)
    for fails in (load_fails, partial(load_weights_fails, identity=IDENTITY)):
        for message in run_ranks(2, fails, Settings(TestLayout(2, pipeline=2)), str(tmp_path)):
            assert str(checkpoint) in message and any(word in message for word in ("damaged", "metadata", "incomplete"))
            assert ("cannot be read, rank" in message) == (damage == "overwritten")
            assert "\n" not in message


def test_other_family_is_refused(source):
    other = replace(IDENTITY, family="qwen3_vl", model_type="qwen3_vl")
    (message,) = run_ranks(1, load_weights_fails, Settings(), source[0], other)
    assert "family gemma3" in message and "qwen3_vl" in message


def test_other_settings_are_refused(source):
    folder, _ = source
    assert "precision fp32" in run_ranks(1, load_fails, Settings(bf16=True), folder)[0]
    message = run_ranks(1, load_fails, Settings(learning_rate=0.5), folder)[0]
    assert "max_lr 0.01 there, 0.5 here" in message and "checkpoint.load" in message
    sgd = Settings(optimizer="sgd", distributed_optimizer=False)
    assert "saved by optimizer adam" in run_ranks(1, load_fails, sgd, folder)[0]


def test_keys_are_parameter_names(source):
    names = set(parameter_shapes())
    assert {key for key in source[1] if not key.startswith("optimizer.")} == names
    assert f"optimizer.state.exp_avg.{EMBEDDING}" in source[1]
    assert not any(FROZEN in key for key in source[1] if key.startswith("optimizer."))
