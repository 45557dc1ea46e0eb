"""Networks: encoders, latent variables, editors, scene code, temporal distance, and the world model made of them.

Nothing here knows a data source, a training loop or a run folder.
"""
