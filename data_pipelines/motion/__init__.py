"""Labels from motion: the positions of what moves in videos of a fixed camera, written into their metadata.

Nothing in this folder learns from examples.
"""
