"""Embeddings of whole collections of videos as Parquet files: the folder, its parts, and the engines that make them.

Nothing here trains or evaluates.
"""
