"""Imports megatron-core once, before worker processes are forked.

The suite runs on the host also where there is a GPU, which forked ranks could not share; `make gpu` sets GPU_TESTS.
"""

import os

import pytest

if not os.environ.get("GPU_TESTS"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz_factor", type=int, default=1, help="how many times as many cases tests/fuzz runs")


def pytest_configure(config: pytest.Config) -> None:
    """Not in a process that hands tests to others: it imports none."""
    if not config.getoption("numprocesses", None):
        from megatron_vlm import platform

        platform.initialize()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Test modules are imported, and no test has run."""
    if not session.config.getoption("numprocesses", None) and session.items:
        from tests import ranks

        ranks.prepare()
