"""Pairs of images: which images are related, and batches of such pairs, as clips of one-frame segments.

Images are indexed and decoded as videos of one frame. No model is known here.
"""
