"""What needs newer packages than the lower bounds of `pyproject.toml`; `make test_lower_bounds` skips it."""

import pytest
import transformers
import triton
from packaging.version import Version

TRANSFORMERS = Version(transformers.__version__)

# Before: transformers' own masks of answers behind images are misplaced, rotation angles are a matrix product, which
# torch counts as FLOPs, audio is decoded by another package, and messages and private functions are others.
needs_transformers_5_23 = pytest.mark.skipif(Version("5.23") > TRANSFORMERS, reason="needs transformers 5.23")
# Before, transformers' own loader ignored the orientation of photographs.
needs_transformers_5_21 = pytest.mark.skipif(Version("5.21") > TRANSFORMERS, reason="needs transformers 5.21")
# Seen with 3.6: to the interpreter a loop bound that was loaded is no number, beside numpy 2.5. On GPUs it is one.
needs_triton_3_9 = pytest.mark.skipif(Version(triton.__version__) < Version("3.9"), reason="needs Triton 3.9")
