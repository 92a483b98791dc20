"""The configuration tree and its command line: contract keys, overrides, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_vlm.cli import load_config, parse_command_line
from megatron_vlm.config import Config, DataSource, to_yaml
from megatron_vlm.config_keys import valid_keys
from megatron_vlm.errors import ConfigError, UserError, combine
from megatron_vlm.key_aliases import ALIASES, WITHOUT_KEY
from tests.refusals import check_refusal

MINIMAL = {
    "run_dir": "runs/one",
    "model": {"hf_path": "model"},
    "data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 2}], "seq_length": 64},
    "train": {"train_iters": 10, "global_batch_size": 8},
}

# Section 5 of the design: keys may be added, never renamed. Written out here so that a renamed field fails.
CONTRACT_KEYS = """
run_dir
model.hf_path model.load_weights model.text_only model.vision_parallelism model.freeze model.recompute
model.moe_load_balancing model.moe_aux_loss_coeff model.loss_chunk_mib model.z_loss_coeff
parallel.moe_token_dispatcher_type
parallel.tensor_model_parallel_size parallel.sequence_parallel parallel.pipeline_model_parallel_size
parallel.virtual_pipeline_model_parallel_size parallel.pipeline_layout parallel.context_parallel_size
parallel.expert_model_parallel_size parallel.expert_tensor_parallel_size parallel.use_distributed_optimizer
parallel.overlap_grad_reduce parallel.overlap_param_gather parallel.distributed_timeout_minutes
data.train data.valid data.seq_length data.packing data.too_long data.min_pixels data.max_pixels data.num_workers
data.shuffle data.strict data.max_bad_fraction data.allow_urls
train.train_iters train.global_batch_size train.micro_batch_size train.precision train.seed train.eval_interval
train.eval_iters train.log_interval train.exit_interval train.nonfinite train.deterministic
optimizer.name optimizer.lr optimizer.min_lr optimizer.weight_decay optimizer.betas optimizer.eps optimizer.clip_grad
optimizer.schedule optimizer.warmup_iters optimizer.lr_multipliers
checkpoint.save_interval checkpoint.load checkpoint.keep_last checkpoint.async_save checkpoint.export_hf
logging.tensorboard logging.wandb logging.profile
""".split()


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


def refusal(*argv: str) -> str:
    """What a user sees for these arguments: one line, or the number of problems and a line for each."""
    with pytest.raises(ConfigError) as caught:
        parse_command_line(list(argv))
    return check_refusal(str(caught.value))


def test_contract_keys_exist() -> None:
    assert set(CONTRACT_KEYS) <= set(valid_keys())


def test_contract_defaults(config_file: str) -> None:
    config = load_config(["--config", config_file])
    assert config.data.valid == [] and config.model.freeze == [] and config.model.recompute == "none"
    assert config.data.min_pixels is None and config.data.max_pixels is None
    assert config.checkpoint.save_interval is None and config.train.log_interval == 1
    assert config.data.strict is False and config.data.max_bad_fraction == 0.01
    parallel = dataclasses.asdict(config.parallel)
    sizes = {name: size for name, size in parallel.items() if name.endswith("parallel_size")}
    assert len(sizes) == 6 and set(sizes.values()) == {1}


def test_file_then_overrides(config_file: str) -> None:
    command = parse_command_line(
        ["--config", config_file, "--optimizer.lr", "3e-4", "--model.freeze", "[vision_tower]", "--dry_run"]
        + ["--optimizer.lr_multipliers.projector", "2", "--parallel.pipeline_layout=[1,0]"]
        + ["--parallel.pipeline_model_parallel_size", "2", "--data.valid", "[{path: v.jsonl}]"]
    )
    config = command.config
    assert command.dry_run
    assert config.optimizer.lr == 3e-4
    assert config.model.freeze == ["vision_tower"]
    assert config.optimizer.lr_multipliers == {"projector": 2.0}
    assert config.parallel.pipeline_layout == [1, 0]
    assert [source.weight for source in config.data.train] == [1.0, 2.0]
    assert config.data.valid[0].path == "v.jsonl"


def test_home_at_the_start_of_a_path(config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    paths = ["--model.hf_path=~/model", "--checkpoint.load=~/first", "--checkpoint.export_hf=~/out/hf"]
    sources = ["--data.train=[{path: ~/a.jsonl, weight: 3}, {path: b~.jsonl}]", "--data.valid=[{path: ~/c.jsonl}]"]
    config = load_config(["--config", config_file, "--run_dir=~/run", *paths, *sources])
    assert (config.run_dir, config.model.hf_path) == ("/home/someone/run", "/home/someone/model")
    assert (config.checkpoint.load, config.checkpoint.export_hf) == ("/home/someone/first", "/home/someone/out/hf")
    assert [source.path for source in config.data.train] == ["/home/someone/a.jsonl", "b~.jsonl"]
    assert config.data.train[0].weight == 3
    assert [source.path for source in config.data.valid] == ["/home/someone/c.jsonl"]
    config = load_config(["--config", config_file])
    assert config.checkpoint.load is None and config.checkpoint.export_hf is None


def test_yaml_round_trip(config_file: str, tmp_path: Path) -> None:
    config = load_config(["--config", config_file, "--optimizer.betas", "[0.8, 0.9]", "--run_dir", "läuft"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(["--config", str(resolved)]) == config


def test_print_config_can_be_read_back(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_command_line(["--config", config_file, "--train.seed", "7", "--print_config"])
    assert stopped.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(["--config", str(printed)]).train.seed == 7


def test_help_documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_command_line(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in CONTRACT_KEYS:
        assert f"--{key} " in text
    assert "Most tokens that one row may have." in text


def test_config_is_frozen(config_file: str) -> None:
    config = load_config(["--config", config_file])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run_dir = "elsewhere"  # type: ignore[misc]


def test_missing_keys_are_all_listed() -> None:
    message = refusal("--model.hf_path", "model")
    for key in ("run_dir", "data.train", "data.seq_length", "train.train_iters", "train.global_batch_size"):
        assert key in message
    assert "model.hf_path" not in message


@pytest.mark.parametrize("written", ["a.jsonl", "[a.jsonl]", "{path: a.jsonl}", "[{path: a.jsonl}]"])
def test_sources_may_be_paths(config_file: str, tmp_path: Path, written: str) -> None:
    expected = [DataSource("a.jsonl")]
    assert load_config(["--config", config_file, f"--data.train={written}"]).data.train == expected
    assert load_config(["--config", config_file, "--data.train", written]).data.train == expected
    content = yaml.safe_load(Path(config_file).read_text())
    content["data"]["train"] = content["data"]["valid"] = yaml.safe_load(written)
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(content))
    data = load_config(["--config", str(tmp_path / "short.yaml")]).data
    assert data.train == data.valid == expected
    pattern = load_config(["--config", config_file, "--data.train=data/*.jsonl"]).data.train
    assert pattern == [DataSource("data/*.jsonl")]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--data.seqlength=3", "unknown key data.seqlength [command line] -- did you mean data.seq_length?"),
        ("--optim.lr=3", "did you mean optimizer.lr?"),
        ("--tensor_model_parallel_size=2", "did you mean parallel.tensor_model_parallel_size?"),
        ("--parallel.width=2", "parallel has tensor_model_parallel_size, sequence_parallel"),
        ("--dryrun", "did you mean dry_run?"),
        ("--data.train=[{pth: a}]", "did you mean data.train.path?"),
        ("--data.train=[{path: a, class_path: os.path}]", "unknown key data.train.class_path"),
        (
            "--data.train=[3]",
            "data.train cannot hold 3 [command line] -- expected a list of {path",
        ),
        (
            "--data.train=3",
            "data.train cannot be 3 [command line] -- expected a list of {path, weight, name}",
        ),
        ("--train.train_iters=1.5", "train.train_iters cannot be '1.5' [command line] -- expected a whole number"),
        ("--train.train_iters=many", "expected a whole number"),
        ("--data.shuffle=perhaps", "data.shuffle cannot be 'perhaps' [command line] -- expected true or false"),
        ("--model.recompute=some", "expected one of none, selective, full"),
        (
            "--checkpoint.keep_last=x",
            "checkpoint.keep_last cannot be 'x' [command line] -- expected a whole number or",
        ),
        ("--parallel.pipeline_layout=[1,a]", "expected a list such as [1, 2] or null"),
        ("--optimizer.betas=[0.9]", "expected a list of 2 numbers"),
        ("--optimizer.lr=nan", "optimizer.lr"),
        ("--optimizer.eps=.nan", "optimizer.eps is nan"),
        ("--run_dir=null", "run_dir is null [command line] -- expected text"),
        ("--train.seed=null", "train.seed is null [command line] -- expected a whole number"),
        ("--train.seed=010", "train.seed cannot be '010'"),
        ("--train.seed=1:30", "train.seed cannot be '1:30'"),
        (f"--train.seed={'9' * 5000}", "train.seed cannot be '99"),
        ("--optimizer=null", "section optimizer is empty"),
        ("--optimizer=adamw", "optimizer cannot be 'adamw' [command line] -- did you mean optimizer.name?"),
        ("--train.seed", "--train.seed has no value [command line] -- write --train.seed VALUE"),
        ("--config", "--config has no value"),
        ("--dry_run=true", "--dry_run takes no value"),
        ("--data.train=[{weight: 2}]", "item 1 of data.train has no path"),
        ("--data.train=[{path: a, weight: null}]", "data.train.weight is null"),
        ("stray", "cannot understand 'stray'"),
    ],
)
def test_unknown_and_ill_typed(config_file: str, argument: str, expected: str) -> None:
    assert expected in refusal("--config", config_file, argument)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--train.micro_batch_size=3"], "use a global batch of 6 or 9"),
        (["--optimizer.muon_momentum=0.9"], "optimizer.muon_momentum has no effect -- set optimizer.name to muon"),
        (["--optimizer.name=muon", "--optimizer.muon_momentum=1"], "optimizer.muon_momentum is 1.0"),
        (["--optimizer.name=muon", "--optimizer.muon_num_ns_steps=0"], "optimizer.muon_num_ns_steps is 0"),
        (["--optimizer.name=muon", "--optimizer.muon_extra_scale_factor=0"], "muon_extra_scale_factor is 0.0"),
        (["--parallel.expert_model_parallel_size=0"], "parallel.expert_model_parallel_size is 0"),
        (["--parallel.expert_tensor_parallel_size=-1"], "parallel.expert_tensor_parallel_size is -1"),
        (["--model.moe_aux_loss_coeff=-1"], "model.moe_aux_loss_coeff is -1.0"),
        (["--model.loss_chunk_mib=0"], "model.loss_chunk_mib is 0"),
        (["--model.z_loss_coeff=-1"], "model.z_loss_coeff is -1.0"),
        (["--optimizer.name=sgd"], "set parallel.use_distributed_optimizer to false"),
        (["--parallel.tensor_model_parallel_size=0"], "at least 1"),
        (["--parallel.context_parallel_size=0"], "parallel.context_parallel_size is 0"),
        (["--parallel.virtual_pipeline_model_parallel_size=2"], "a pipeline of one rank"),
        (["--parallel.pipeline_layout=[4,4]"], "1 pipeline ranks x 1 virtual = 1"),
        (["--parallel.vision_pipeline_layout=[1,1]"], "[1, 1] does not fit 1 pipeline chunks -- give at most 1"),
        (["--parallel.vision_pipeline_layout=[-1]"], "[-1] does not fit 1 pipeline chunks"),
        (["--parallel.vision_pipeline_layout=[1]", "--model.text_only=true"], "but model.text_only is true"),
        (["--parallel.overlap_param_gather=true"], "overlap_grad_reduce"),
        (["--model.freeze=[vision]"], "'vision', which is no part"),
        (["--model.freeze=[language_model]", "--model.text_only=true"], "nothing to train"),
        (["--optimizer.lr_multipliers={tower: 1}"], "'tower', which is no part"),
        (["--optimizer.lr_multipliers={projector: -1}"], "lr_multipliers.projector is -1.0"),
        (["--optimizer.min_lr=1"], "above optimizer.lr"),
        (["--optimizer.warmup_iters=10"], "use at most 9"),
        (["--optimizer.wsd_decay_iters=3"], "set optimizer.schedule to wsd"),
        (["--optimizer.schedule=wsd", "--optimizer.warmup_iters=5", "--optimizer.wsd_decay_iters=6"], "exceed"),
        (["--optimizer.betas=[0.9,1.0]"], "below 1"),
        (["--data.train=[]"], "data.train is empty"),
        (["--data.train=[{path: a, weight: 0}]"], "above 0"),
        (["--data.min_pixels=10", "--data.max_pixels=5"], "above data.max_pixels"),
        (["--data.max_bad_fraction=2"], "between 0 and 1"),
        (["--logging.profile=[5,2]"], "first step, last step"),
        (["--run_dir="], "run_dir is empty"),
        (
            ["--data.num_workers=2147483648"],
            "data.num_workers is 2147483648 -- give a number of at least 0",
        ),
        (["--train.train_iters=99999999999999999999"], "train.train_iters is 99999999999999999999"),
        (["--parallel.pipeline_model_parallel_size=2147483648"], "at least 1 and at most 1000000"),
        (["--optimizer.lr=1e400"], "optimizer.lr is inf"),
        (["--data.train=[{path: a, weight: .inf}]"], "the weight of a is inf"),
        (["--run_dir", "a\0b"], "run_dir has a zero byte: 'a\\x00b'"),
        (["--data.train=[{path: ''}]"], "the path of a source in data.train is empty"),
        (["--model.hf_path", "a\ud800b"], "model.hf_path has characters that are no text"),
        (["--run_dir", "a" * 300], "run_dir is longer than a path can be"),
    ],
)
def test_values_that_cannot_work(config_file: str, overrides: list[str], expected: str) -> None:
    assert expected in refusal("--config", config_file, *overrides)


def test_values_that_do_work(config_file: str) -> None:
    for overrides in (
        ["--parallel.sequence_parallel=true"],  # no effect at tensor size 1
        ["--parallel.expert_model_parallel_size=8", "--parallel.expert_tensor_parallel_size=2"],
        ["--parallel.moe_token_dispatcher_type=allgather", "--model.moe_load_balancing=megatron"],
        ["--optimizer.name=sgd", "--parallel.use_distributed_optimizer=false", "--optimizer.clip_grad=0"],
        ["--optimizer.schedule=wsd", "--optimizer.warmup_iters=5", "--optimizer.wsd_decay_iters=5"],
        ["--optimizer.schedule=constant", "--optimizer.lr=1", "--optimizer.weight_decay=0"],
        ["--model.freeze=[language_model,vision_tower,projector]"],  # a model may have an audio tower besides
    ):
        load_config(["--config", config_file, *overrides])


def test_all_problems_in_one_message(config_file: str) -> None:
    message = refusal("--config", config_file, "--optimizer.name=sgd", "--data.max_pixels=0", "--optimizer.eps=0")
    assert message.startswith("3 problems:\n  (1) ")
    assert "sgd" in message and "max_pixels" in message and "eps" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("run_dir: [", "not valid YAML"),
        ("- a", "holds no mapping"),
        ("", "holds no mapping"),
        ("[" * 5000, "not valid YAML: maximum recursion depth"),
        ("run_dir: a\nmodel: {hf_path: b}\nrun_dir: c", "key run_dir stands twice, in lines 1 and 3"),
        ("model:\n  freeze: []\n  freeze: []", "key model.freeze stands twice, in lines 2 and 3"),
        ("data:\n  train:\n    - {path: a,\n       path: b}", "key path stands twice, in lines 3 and 4"),
        ("optimizer:\ntrain:", "section optimizer is empty"),
        ("model:\n  load_weights: null", "bad.yaml:2] -- expected true or false"),
        ("optimizer:\n  betas: null\n  lr_multipliers:\n", "optimizer.lr_multipliers is null"),
        ("optimizer: [1]", "optimizer cannot be [1]"),
        ("train: {seed: 1:30}", "train.seed cannot be '1:30'"),
        ("train: {seed: 010}", "train.seed cannot be '010'"),
        ("print_config:", "unknown key print_config"),
        ("print_config:", "it belongs on the command line: --print_config"),
        ("dry_run: 1", "unknown key dry_run"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nmodel: {freeze: *b}", "model.freeze cannot be [[1, 1], [1, 1]]"),
        ("run_dir: &a [*a]", "run_dir cannot be [[[[...]]]]"),
        ("modell: {hf_path: x}", "unknown key modell"),
        ("data: {train: [{path: a, wieght: 2}]}", "did you mean data.train.weight?"),
        ("data: {train: [{path: a, class_path: os.path}]}", "unknown key data.train.class_path"),
        ("train: {train_iters: {a: 1}}", "train.train_iters cannot be {'a': 1}"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    message = refusal("--config", str(path))
    assert expected in message and "bad.yaml" in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A pipe without a writer must not block, and a device that never ends must not fill the memory."""
    assert "No such file" in refusal("--config", str(tmp_path / "none.yaml"))
    assert "this is a directory, not a file" in refusal("--config", str(tmp_path))
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "a pipe or device" in refusal("--config", str(tmp_path / "pipe.yaml"))
    assert "a pipe or device" in refusal("--config", "/dev/zero")
    (tmp_path / "large.yaml").write_bytes(b"a: 1\n" * 100_000)
    assert "500000 bytes are too many" in refusal("--config", str(tmp_path / "large.yaml"))
    (tmp_path / "latin.yaml").write_bytes("run_dir: läuft".encode("latin-1"))
    assert "not UTF-8" in refusal("--config", str(tmp_path / "latin.yaml"))


def test_numbers_and_merges_mean_what_they_say(config_file: str, tmp_path: Path) -> None:
    """1e-4 is a number, though YAML 1.1 calls it text; quoted numbers are numbers; merge keys are no duplicates."""
    path = tmp_path / "second.yaml"
    path.write_text("optimizer: &o\n  lr: 1e-4\n  eps: '1e-6'\ntrain: {seed: 1_000}\n")
    config = load_config(["--config", config_file, "--config", str(path), "--train.eval_iters", "0x10"])
    assert (config.optimizer.lr, config.optimizer.eps) == (1e-4, 1e-6)
    assert (config.train.seed, config.train.eval_iters) == (1000, 16)
    path.write_text("optimizer:\n  <<: {lr: 2, eps: 3}\n  lr: 0.5\n")
    optimizer = load_config(["--config", config_file, "--config", str(path)]).optimizer
    assert (optimizer.lr, optimizer.eps) == (0.5, 3)


# As the manuals of these stacks write them.
OTHER_STACKS = {
    "Hugging Face Trainer": (
        "learning_rate optimizer.lr, per_device_train_batch_size train.micro_batch_size, output_dir run_dir, "
        "max_steps train.train_iters, warmup_steps optimizer.warmup_iters, save_total_limit checkpoint.keep_last, "
        "logging_steps train.log_interval, eval_steps train.eval_interval, save_steps checkpoint.save_interval, "
        "max_grad_norm optimizer.clip_grad, bf16 train.precision, lr_scheduler_type optimizer.schedule, "
        "adam_epsilon optimizer.eps, dataloader_num_workers data.num_workers, gradient_checkpointing model.recompute"
    ),
    "axolotl": "sequence_len data.seq_length, base_model model.hf_path, sample_packing data.packing",
    "LLaMA-Factory": "model_name_or_path model.hf_path, cutoff_len data.seq_length, image_max_pixels data.max_pixels",
    "ms-swift": "max_length data.seq_length, freeze_vit model.freeze, vit_lr optimizer.lr_multipliers",
    "Megatron-LM": (
        "tensor-model-parallel-size parallel.tensor_model_parallel_size, seq-length data.seq_length, "
        "lr-decay-style optimizer.schedule, lr-warmup-iters optimizer.warmup_iters, adam-eps optimizer.eps, "
        "micro-batch-size train.micro_batch_size, num-workers data.num_workers, data-path data.train, "
        "recompute-granularity model.recompute, use-distributed-optimizer parallel.use_distributed_optimizer"
    ),
    "torchtitan": (
        "training.steps train.train_iters, training.local_batch_size train.micro_batch_size, "
        "training.seq_len data.seq_length, parallelism.tensor_parallel_degree parallel.tensor_model_parallel_size, "
        "training.max_norm optimizer.clip_grad, lr_scheduler.warmup_steps optimizer.warmup_iters, "
        "validation.steps train.eval_iters, checkpoint.interval checkpoint.save_interval"
    ),
}
PAIRS = [pair.split() for pairs in OTHER_STACKS.values() for pair in pairs.split(", ")]


@pytest.mark.parametrize(("foreign", "ours"), PAIRS)
def test_keys_of_other_stacks_have_a_hint(config_file: str, foreign: str, ours: str) -> None:
    assert f"did you mean {ours}?" in refusal("--config", config_file, f"--{foreign}=1")


def test_hints_name_keys_that_exist(config_file: str) -> None:
    keys = valid_keys()
    assert set(ALIASES.values()) <= set(keys)
    # A name that is a key here would never be looked up, but for sections that got a single value.
    assert set(ALIASES) & set(keys) == {"model", "optimizer"}
    assert not set(WITHOUT_KEY) & set(ALIASES)
    for name, remedy in WITHOUT_KEY.items():
        assert f"-- {remedy}" in refusal("--config", config_file, f"--{name}=1")
        assert set(re.findall(r"\b[a-z]+\.[a-z_]+\b", remedy)) <= set(keys)


def test_error_text_has_what_where_fix() -> None:
    error = UserError("size 3\nis odd", where="a.yaml:4", fix="use 4")
    assert str(error) == "size 3 is odd [a.yaml:4] -- use 4"
    assert str(combine(ConfigError, [error])) == str(error)


def test_configuration_is_quick_to_import() -> None:
    """`--help` and refusals must not wait for torch."""
    code = "import sys, megatron_vlm.config, megatron_vlm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_field_has_a_default_or_is_required_by_contract() -> None:
    required = {
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Config)
        if section.name not in ("run_dir", "device")
        for key in dataclasses.fields(valid_keys()[section.name])
        if key.default is dataclasses.MISSING and key.default_factory is dataclasses.MISSING
    }
    assert required == {
        "model.hf_path",
        "data.train",
        "data.seq_length",
        "train.train_iters",
        "train.global_batch_size",
    }


def test_muon_without_its_package(config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal("--config", config_file, "--optimizer.name=muon")
    assert "needs the package emerging-optimizers, which is not installed" in message and "'.[muon]'" in message
