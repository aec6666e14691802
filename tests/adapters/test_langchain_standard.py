"""langchain-tests' suite for retrievers, over a retriever that this compressor reorders."""

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests
from support import LengthReranker

from langchain_mistral_rerank import MistralRerank


class Words(BaseRetriever):
    """Finds ten documents for anything."""

    def _get_relevant_documents(self, query, *, run_manager, **_):
        return [Document(page_content="word " * number) for number in range(10)]


def reordered(**options):
    compressor = MistralRerank(reranker=LengthReranker(), **options)
    return ContextualCompressionRetriever(base_compressor=compressor, base_retriever=Words())


class TestReorderedRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self):
        return reordered

    @property
    def retriever_query_example(self):
        return "word"

    @property
    def num_results_arg_name(self):
        return "top_n"

    @pytest.mark.xfail(reason="ContextualCompressionRetriever passes keyword arguments to the base retriever alone")
    def test_invoke_with_k_kwarg(self, retriever):
        super().test_invoke_with_k_kwarg(retriever)
