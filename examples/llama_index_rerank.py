"""Rerank in LlamaIndex: BM25 finds ten nodes, MistralRerank keeps the best three for the query engine.

pip install 'mistral-rerank[local,llama-index]' llama-index-retrievers-bm25
"""

import json
from pathlib import Path

from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode
from llama_index.retrievers.bm25 import BM25Retriever

from llama_index_mistral_rerank import MistralRerank

FACTS = Path(__file__).parent / "facts"


def main() -> None:
    """Print the first node of every question before and after reranking, and how many questions it answers."""
    corpus = [json.loads(line) for line in (FACTS / "corpus.jsonl").read_text("utf-8").splitlines()]
    queries = [json.loads(line) for line in (FACTS / "queries.jsonl").read_text("utf-8").splitlines()]
    judged = [line.split("\t") for line in (FACTS / "qrels" / "test.tsv").read_text("utf-8").splitlines()[1:]]
    answers = {query: passage for query, passage, _ in judged}

    nodes = [TextNode(id_=p["_id"], text=p["text"], metadata={"title": p["title"]}) for p in corpus]
    retriever = BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=10)
    engine = RetrieverQueryEngine.from_args(
        retriever,
        llm=MockLLM(),  # generates no answer: the example shows the sources that an LLM would read
        node_postprocessors=[MistralRerank(top_n=3)],
    )

    first_before = first_after = 0
    print(f"  {'first before':38}   {'first after':38}  score  question")
    for query in queries:
        before, after = retriever.retrieve(query["text"])[0], engine.query(query["text"]).source_nodes[0]
        marks = ["*" if node.node_id == answers[query["_id"]] else " " for node in (before, after)]
        first_before += marks[0] == "*"
        first_after += marks[1] == "*"
        titles = f"{marks[0]} {before.metadata['title']:38.38} {marks[1]} {after.metadata['title']:38.38}"
        print(f"{titles}  {after.score:.2f}   {query['text']}")
    print(f"answered by the first node: {first_before} of {len(queries)} before, {first_after} after")


if __name__ == "__main__":
    main()
