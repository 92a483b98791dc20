"""What only a GPU can tell, in stages: `python -m benchmarks.gpu` (`make gpu`)."""
