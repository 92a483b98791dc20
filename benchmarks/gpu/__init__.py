"""Checks and benchmarks that need a GPU, in stages: `python -m benchmarks.gpu` (`make gpu`)."""
