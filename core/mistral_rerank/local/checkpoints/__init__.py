"""Checkpoints: configuration, bases, what may be opened, loading, updating and export."""
