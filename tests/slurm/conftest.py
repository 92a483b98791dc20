"""A Slurm for the tests of this folder, started once per test process."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_unavailable

FIRST_PORTS = range(17000, 19000, 10)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes; without Slurm tests are skipped, or fail where MEGATRON_VLM_SLURM is "required"."""
    reason = why_unavailable()
    if reason is not None:
        if os.environ.get("MEGATRON_VLM_SLURM") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="vlm"))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))  # which would leave daemons
    try:
        with Cluster(root, next(port for port in random.sample(FIRST_PORTS, 100) if _is_free(port))) as running:
            yield running
    finally:
        shutil.rmtree(root, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def _is_free(port: int) -> bool:
    """Whether nothing listens there, as a Slurm of another test process would."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0
