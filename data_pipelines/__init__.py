"""From video files to batches of clips. Nothing in this package knows a model."""
