"""Worlds whose law is known: they write real videos with labels, and serve fresh trajectories as tensors."""
