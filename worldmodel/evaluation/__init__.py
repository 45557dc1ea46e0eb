"""Evaluation: forecasts of a trained run, scored against baselines; probes; surprise.

Numbers only: worldmodel/report draws them.
"""
