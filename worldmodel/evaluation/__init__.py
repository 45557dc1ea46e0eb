"""Judging a trained world model: forecasts scored as probability forecasts, and the report."""
