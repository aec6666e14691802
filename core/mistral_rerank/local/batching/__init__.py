"""Batching: planning batches, and packing them into rows without padding."""
