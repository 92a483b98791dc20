"""Imports megatron-core once, before worker processes are forked."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from megatron_vlm import platform

platform.initialize()
