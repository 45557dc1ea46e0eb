"""Training: objectives, the loop, refinement, and how they run on several processes.

Nothing here scores a forecast or draws a picture.
"""
