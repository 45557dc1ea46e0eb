"""Planning with a trained model: planners, policies, and the protocol of its evaluation in an environment.

Nothing here trains a world model.
"""
