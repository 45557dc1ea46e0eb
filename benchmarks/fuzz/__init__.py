"""Randomly damaged inputs, and the library's reaction: one module for the rounds, one for each group of kinds.

Start it with -m benchmarks.fuzz. The library imports nothing from here.
"""
