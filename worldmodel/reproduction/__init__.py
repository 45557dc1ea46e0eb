"""The figures of docs/results.md, with the commands that make them, and their comparison with reproduced figures.

`steps.yaml` holds the commands, `tables/` one file per section of docs/results.md. Nothing here runs a command:
worldmodel/commands/reproduce.py does.
"""
