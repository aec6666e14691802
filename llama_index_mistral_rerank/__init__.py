"""mistral-rerank as a LlamaIndex node postprocessor."""

from llama_index_mistral_rerank.rerank import MistralRerank

__all__ = ["MistralRerank"]
