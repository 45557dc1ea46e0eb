"""Tar shards: their index file, packing them, and indexing those of other origin.

Nothing here fetches: data_pipelines/remote does.
"""
