"""Rerank in LangChain: an in-memory vector store finds ten documents, MistralRerank keeps the best three.

pip install 'mistral-rerank[local,langchain]' langchain-classic
"""

import json
import re
import zlib
from pathlib import Path

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from langchain_mistral_rerank import MistralRerank

FACTS = Path(__file__).parent / "facts"


class WordCounts(Embeddings):
    """Bag-of-words embeddings, which need no model."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed several texts."""
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """Count the words of one text in 2,048 hash buckets."""
        counts = [0.0] * 2048
        for word in re.findall(r"\w+", text.lower()):
            counts[zlib.crc32(word.encode()) % len(counts)] += 1.0
        return counts


def main() -> None:
    """Print the first document of every question before and after reranking, and how many questions it answers."""
    corpus = [json.loads(line) for line in (FACTS / "corpus.jsonl").read_text("utf-8").splitlines()]
    queries = [json.loads(line) for line in (FACTS / "queries.jsonl").read_text("utf-8").splitlines()]
    judged = [line.split("\t") for line in (FACTS / "qrels" / "test.tsv").read_text("utf-8").splitlines()[1:]]
    answers = {query: passage for query, passage, _ in judged}

    store = InMemoryVectorStore(WordCounts())
    store.add_documents([Document(page_content=p["text"], id=p["_id"], metadata={"title": p["title"]}) for p in corpus])
    base = store.as_retriever(search_kwargs={"k": 10})
    retriever = ContextualCompressionRetriever(base_compressor=MistralRerank(top_n=3), base_retriever=base)

    first_before = first_after = 0
    print(f"  {'first before':38}   {'first after':38}  score  question")
    for query in queries:
        before, after = base.invoke(query["text"])[0], retriever.invoke(query["text"])[0]
        marks = ["*" if document.id == answers[query["_id"]] else " " for document in (before, after)]
        first_before += marks[0] == "*"
        first_after += marks[1] == "*"
        score = after.metadata["relevance_score"]
        titles = f"{marks[0]} {before.metadata['title']:38.38} {marks[1]} {after.metadata['title']:38.38}"
        print(f"{titles}  {score:.2f}   {query['text']}")
    print(f"answered by the first document: {first_before} of {len(queries)} before, {first_after} after")


if __name__ == "__main__":
    main()
