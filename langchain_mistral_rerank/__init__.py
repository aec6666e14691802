"""mistral-rerank as a LangChain document compressor."""

from langchain_mistral_rerank.rerank import MistralRerank

__all__ = ["MistralRerank"]
