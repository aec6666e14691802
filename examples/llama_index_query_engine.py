"""A LlamaIndex query engine: BM25 finds nodes, MistralRerank keeps the best two for the LLM.

pip install 'mistral-rerank[local,llama-index]' llama-index-retrievers-bm25
"""

from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.retrievers.bm25 import BM25Retriever

from llama_index_mistral_rerank import MistralRerank

TEXTS = [
    "The router's light is red while it has no connection to the provider. Wait five minutes, then restart it.",
    "Hold the reset button for ten seconds to restore the factory settings of the router.",
    "The light of the router can be turned off at night in the settings, under Display.",
    "A mesh repeater extends the wireless network to rooms that the router does not reach.",
    "The router is connected to the socket in the wall with the grey cable.",
    "Guests get a wireless network of their own, with another password.",
]


def main() -> None:
    """Print the nodes that the LLM reads, and where BM25 had them."""
    nodes = [TextNode(text=text, id_=str(number)) for number, text in enumerate(TEXTS, start=1)]
    retriever = BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=6)
    engine = RetrieverQueryEngine.from_args(
        retriever,
        llm=MockLLM(),  # repeats its prompt: replace it with your LLM
        node_postprocessors=[MistralRerank(top_n=2, highlight=True)],
    )
    query = "Why is the light of my router red?"
    before = [result.node_id for result in retriever.retrieve(query)]
    response = engine.query(query)
    print(query)
    for result in response.source_nodes:
        text = result.node.get_content(MetadataMode.NONE)
        start, end = result.metadata["rerank_highlight"]
        print(f"  {result.score:.2f}  was {before.index(result.node_id) + 1}  {text[start:end]}")


if __name__ == "__main__":
    main()
