"""Operators, each with a reference in plain PyTorch; models call these and nothing else that depends on a kernel."""
