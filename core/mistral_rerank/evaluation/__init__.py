"""Judged data sets and first-stage retrieval."""
