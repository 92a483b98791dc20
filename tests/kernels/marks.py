"""Marks of the kernels' tests."""

import pytest

from vlm_kernels import library

# Where there is a CUDA toolkit, test_extension.py fails if the extension is missing or made from other sources.
needs_extension = pytest.mark.skipif(not library.BINARY.exists(), reason="the extension was not built")
