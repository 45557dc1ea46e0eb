"""The `worldmodel` command: one module per command, one-line errors, effects on the whole process.

Nothing in the other folders imports this one.
"""
