"""Commands: arguments, one-line errors, and the effects on a whole process that only a command may have.

Nothing in the other rooms imports this one.
"""
