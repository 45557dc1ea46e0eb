"""Run folders: checkpoints, metrics, tracking, locks, and a trained run loaded from one.

Nothing here trains or evaluates.
"""
