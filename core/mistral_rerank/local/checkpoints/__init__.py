"""Checkpoint folders: what they say of themselves, where weights come from, loading, export."""
