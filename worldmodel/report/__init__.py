"""Presentation: tables, charts and HTML pages of a run or of several.

Nothing here computes a score. Work on models needs none of it.
"""
