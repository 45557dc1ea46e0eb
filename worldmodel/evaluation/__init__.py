"""Evaluation of a trained run: forecasts scored against baselines, probes, surprise.

It yields numbers and arrays only; worldmodel/report draws them.
"""
