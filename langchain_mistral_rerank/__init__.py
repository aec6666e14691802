"""mistral-rerank as a LangChain document compressor, and as a cross encoder."""

from langchain_mistral_rerank.cross_encoder import MistralCrossEncoder
from langchain_mistral_rerank.rerank import MistralRerank

__all__ = ["MistralCrossEncoder", "MistralRerank"]
