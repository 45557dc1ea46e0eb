"""Data sets of other programs -> folders of our videos: one file per layout, and the registry that finds the layout.

Nothing here trains, and nothing here is needed to read the videos that were written.
"""
