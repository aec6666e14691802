"""Batching: prefix groups, batch planning, and packing into rows without padding."""
