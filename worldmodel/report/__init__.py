"""Presentation: tables, figures and HTML pages of a run or of several.

Nothing here computes a score; work on models needs none of it.
"""
