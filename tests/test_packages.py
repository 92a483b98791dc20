"""Our packages beside others that users have installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Hugging Face's `kernels`, which transformers imports where it is installed; its name is that of a folder here.
IMPORTS = """
import importlib.metadata
from unittest import mock
version = importlib.metadata.version
# transformers asks for a range of versions, whose releases the present one may not be among.
from transformers.utils.import_utils import KERNELS_MIN_VERSION, is_kernels_available
accepted = lambda name: KERNELS_MIN_VERSION if name == "kernels" else version(name)
with mock.patch.object(importlib.metadata, "version", accepted):
    from transformers.integrations import hub_kernels
    assert is_kernels_available() and hub_kernels.get_kernel
import kernels, megatron_vlm, vlm_kernels.rms_norm
assert callable(kernels.get_kernel), kernels
print(vlm_kernels.__file__, megatron_vlm.__file__, sep="\\n")
"""


def imported(folder: Path, **environment: str) -> list[Path]:
    """Where our packages are found by an interpreter that starts in a folder, `kernels` being Hugging Face's."""
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


@pytest.mark.full
def test_a_checkout_does_not_hide_the_package_called_kernels() -> None:
    expected = [ROOT / "kernels/vlm_kernels/__init__.py", ROOT / "megatron_vlm/__init__.py"]
    assert imported(ROOT, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}") == expected


def test_a_wheel_installs_beside_it(tmp_path: Path) -> None:
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "target"
    for name in ("megatron_vlm", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "_C.*")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy2(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    environment = os.environ | {"CUDA_HOME": "/no/toolkit"}
    options = ["--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}"]
    subprocess.run([*pip, "wheel", *options, str(source)], env=environment, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as file:
        folders = {name.partition("/")[0] for name in file.namelist()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"megatron_vlm", "vlm_kernels"}
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", f"--target={target}", wheel], check=True)
    expected = [target / "vlm_kernels/__init__.py", target / "megatron_vlm/__init__.py"]
    assert imported(tmp_path, PYTHONPATH=str(target)) == expected
