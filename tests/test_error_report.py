"""The entry point's errors under torchrun: said once for all ranks, also by a rank that alone has one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_vlm import error_report
from megatron_vlm.errors import ConfigError, UserError, combine

Report = Callable[[int, UserError], list[str]]


@pytest.fixture
def store() -> Iterator[TCPStore]:
    """What torchrun's agent offers."""
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def report(store: TCPStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """Lets one rank of 16 on two nodes report an error; gives the lines that it prints."""
    monkeypatch.setattr(error_report, "SECONDS_FOR_THE_FIRST_RANK", 0.3)
    monkeypatch.setattr(error_report.signal, "signal", lambda *_: None)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": 16}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def one(rank: int, error: UserError) -> list[str]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 8))
        error_report.report(error)
        return capsys.readouterr().err.splitlines()

    return one


def test_an_error_of_all_ranks_is_printed_by_the_first(report: Report) -> None:
    error = combine(ConfigError, [ConfigError("a is 1", fix="use 2"), ConfigError("b is 1", fix="use 2")])
    expected = ["ConfigError: 2 problems:", "  (1) a is 1 -- use 2", "  (2) b is 1 -- use 2"]
    assert [report(rank, error) for rank in (0, 1, 8, 15)] == [expected, [], [], []]


def test_other_ranks_wait_for_the_first(report: Report, store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank of the second node is quicker than the first rank of all."""
    monkeypatch.setattr(error_report, "SECONDS_FOR_THE_FIRST_RANK", 10.0)
    error = ConfigError("a is 1")
    with ThreadPoolExecutor() as pool:
        monkeypatch.setenv("RANK", "8")
        text = f"ConfigError: {error}"
        later = pool.submit(error_report._is_mine_to_print, text, 8)
        assert not later.done() and report(0, error) == [text]
        assert later.result() is False


def test_an_error_of_one_node_is_printed_by_one_of_its_ranks(report: Report) -> None:
    """Also where the first rank has another one."""
    assert report(0, ConfigError("something else")) == ["ConfigError: something else"]
    lines = [report(rank, ConfigError("no such folder", "/data")) for rank in (9, 8, 15)]
    assert lines == [["[rank 9] ConfigError: no such folder [/data]"], [], []]


def test_silence_after_the_agent_has_ended(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")  # nobody listens there
    assert report(8, ConfigError("a is 1")) == []
    assert report(0, ConfigError("a is 1")) == ["ConfigError: a is 1"]


def test_without_an_agent_the_first_rank_has_a_store(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under srun: others begin to look before the first rank is there, and it stays until they have."""
    monkeypatch.setattr(error_report, "SECONDS_FOR_THE_FIRST_RANK", 10.0)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("WORLD_SIZE", "3")
    text = "ConfigError: a is 1"
    with ThreadPoolExecutor() as pool:
        later = [pool.submit(error_report._is_mine_to_print, text, rank) for rank in (1, 2)]
        assert report(0, ConfigError("a is 1")) == [text]
        assert [one.result() for one in later] == [False, False]


def test_without_any_store_every_rank_prints_that_is_not_ended(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert report(3, ConfigError("a is 1")) == ["[rank 3] ConfigError: a is 1"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert report(0, ConfigError("a is 1")) == ["ConfigError: a is 1"]


def test_errors_are_left_where_a_script_finds_them(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the rank that prints, and a place that cannot be written hides nothing."""
    monkeypatch.setenv(error_report.ERROR_FILE_VARIABLE, str(tmp_path / "errors.txt"))
    error = ConfigError("a is 1", fix="use 2")
    assert [report(rank, error) for rank in (0, 8)] == [["ConfigError: a is 1 -- use 2"], []]
    assert (tmp_path / "errors.txt").read_text() == "ConfigError: a is 1 -- use 2\n"
    monkeypatch.setenv(error_report.ERROR_FILE_VARIABLE, str(tmp_path / "missing" / "errors.txt"))
    assert report(0, ConfigError("b is 1")) == ["ConfigError: b is 1"]
