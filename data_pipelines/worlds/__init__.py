"""Worlds with known laws, the environments of our own, and the recorder of others.

Nothing here knows a model.
"""
