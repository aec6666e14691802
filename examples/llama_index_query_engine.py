"""A LlamaIndex query engine: BM25 finds nodes, MistralRerank keeps the best two for the LLM.

pip install '.[local,llama-index]' llama-index-retrievers-bm25
"""

from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.retrievers.bm25 import BM25Retriever

from llama_index_mistral_rerank import MistralRerank

QUERY = "Why does ice float on water?"
TEXTS = [
    "Warm water freezes into ice more slowly than cold water.",
    "Ice on the road melts when salt water is sprayed on it. It then freezes only at lower temperatures.",
    "Lakes freeze from the top. Water expands as it freezes, so ice is less dense than the liquid around it.",
    "Icebergs break off glaciers and drift with the current.",
    "Ice skates have blades of steel.",
]


def main() -> None:
    """Print the nodes that the LLM reads, and where BM25 had them."""
    nodes = [TextNode(text=text, id_=str(number)) for number, text in enumerate(TEXTS, start=1)]
    retriever = BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=5)
    engine = RetrieverQueryEngine.from_args(
        retriever,
        llm=MockLLM(),  # repeats its prompt: replace it with your LLM
        node_postprocessors=[MistralRerank(top_n=2, highlight=True)],
    )
    before = [result.node_id for result in retriever.retrieve(QUERY)]
    response = engine.query(QUERY)
    print(QUERY)
    for result in response.source_nodes:
        text = result.node.get_content(MetadataMode.NONE)
        start, end = result.metadata["rerank_highlight"]
        print(f"  {result.score:.2f}  was {before.index(result.node_id) + 1}  {text[start:end]}")


if __name__ == "__main__":
    main()
