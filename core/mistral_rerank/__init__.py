"""Rerank retrieved passages with a Mistral-architecture cross-encoder."""
