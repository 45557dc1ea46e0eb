"""Formats of data sets: one file per format, and the registry that finds the format of a data set.

Nothing here decodes a frame; docs for a new format: registry.py.
"""
