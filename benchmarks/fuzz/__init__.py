"""Inputs damaged at random, and what the library makes of them: one module for the rounds, one for each group of kinds.

Start it with -m benchmarks.fuzz. Nothing here is imported by the library.
"""
