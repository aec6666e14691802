"""What the adapters' methods take for items and queries, and what they say of what they do not take."""

import threading

import pytest
import torch
from langchain_core.documents import Document
from llama_index.core import QueryBundle
from llama_index.core.schema import NodeWithScore, TextNode

import langchain_mistral_rerank
import llama_index_mistral_rerank
from langchain_mistral_rerank import MistralCrossEncoder
from mistral_rerank import InvalidInputError

LANGCHAIN, LLAMA_INDEX = langchain_mistral_rerank.MistralRerank, llama_index_mistral_rerank.MistralRerank
BOTH = pytest.mark.parametrize("adapter", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama_index"])
TEXTS = ["a", "ccc", "bb"]


class Items:
    """Neither a list nor a tuple: iterated like a pandas Series."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def wrap(adapter, texts=TEXTS):
    if adapter is LANGCHAIN:
        return [Document(page_content=text) for text in texts]
    return [NodeWithScore(node=TextNode(text=text)) for text in texts]


async def both_ways(instance, items, query="q"):
    """Texts that the synchronous and the asynchronous method give; `items` makes them anew for each."""
    if isinstance(instance, LANGCHAIN):
        reranked = [instance.compress_documents(items(), query), await instance.acompress_documents(items(), query)]
        return [[document.page_content for document in documents] for documents in reranked]
    bundle = QueryBundle(query)
    reranked = [
        instance.postprocess_nodes(items(), query_str=query),
        await instance.apostprocess_nodes(items(), bundle),
    ]
    return [[item.node.get_content() for item in items] for items in reranked]


@BOTH
@pytest.mark.parametrize(
    "kind", [iter, tuple, Items, lambda items: dict(enumerate(items)).values(), lambda items: (i for i in items)]
)
async def test_items_may_be_any_iterable(adapter, kind, length_reranker):
    instance = adapter(reranker=length_reranker)
    assert await both_ways(instance, lambda: kind(wrap(adapter))) == [["ccc", "bb", "a"]] * 2
    assert [ranked.index for ranked in instance.rerank("q", kind(wrap(adapter)))] == [1, 2, 0]
    assert [ranked.index for ranked in await instance.arerank("q", kind(wrap(adapter)))] == [1, 2, 0]


def test_the_cross_encoder_accepts_pairs_from_a_generator(length_reranker):
    assert MistralCrossEncoder(reranker=length_reranker).score(("q", text) for text in ("", "")) == [0.5, 0.5]


@BOTH
@pytest.mark.parametrize(
    ("items", "said"),
    [
        (None, "got a NoneType"),
        (3, "got a int"),
        ({"a": 1}, "item 0 is a str"),
        (["a"], "item 0 is a str"),
        ("text", "got one str"),
    ],
)
async def test_what_is_no_list_of_items_is_named_before_scoring(adapter, items, said, length_reranker):
    with pytest.raises(InvalidInputError, match=said):
        await both_ways(adapter(reranker=length_reranker), lambda: items)
    assert length_reranker.calls == 0


@BOTH
async def test_one_item_instead_of_a_list_is_named(adapter, length_reranker):
    instance, item = adapter(reranker=length_reranker), wrap(adapter)[0]
    with pytest.raises(InvalidInputError, match=f"expected a list of {type(item).__name__}, got one"):
        await both_ways(instance, lambda: item)


async def test_swapped_arguments_are_named_in_the_error(length_reranker):
    instance, documents = LANGCHAIN(reranker=length_reranker), wrap(LANGCHAIN)
    with pytest.raises(InvalidInputError, match=r"swapped; call compress_documents\(documents, query\)"):
        instance.compress_documents("q", documents)
    with pytest.raises(InvalidInputError, match=r"swapped; call acompress_documents\(documents, query\)"):
        await instance.acompress_documents("q", documents)
    with pytest.raises(InvalidInputError, match=r"swapped; call rerank\(query, items\)"):
        instance.rerank(documents, "q")
    instance, nodes = LLAMA_INDEX(reranker=length_reranker), wrap(LLAMA_INDEX)
    for call in (
        lambda: instance.postprocess_nodes("q", nodes),
        lambda: instance.postprocess_nodes(QueryBundle("q"), nodes),
    ):
        with pytest.raises(InvalidInputError, match=r"swapped; call postprocess_nodes\(nodes, query_str=...\)"):
            call()
    with pytest.raises(InvalidInputError, match="swapped"):
        await instance.apostprocess_nodes("q", nodes)
    with pytest.raises(
        InvalidInputError, match="query_bundle is a str, expected a QueryBundle; give a string as query_str"
    ):
        instance.postprocess_nodes(nodes, "q")
    with pytest.raises(InvalidInputError, match="give the query once"):
        instance.postprocess_nodes(nodes, QueryBundle("q"), "q")
    assert length_reranker.calls == 0


@pytest.mark.parametrize("text_fn", [lambda _: None, lambda _: 3])
async def test_a_text_fn_without_a_text_is_an_error_before_scoring(text_fn, length_reranker):
    for keys in ((), ("title",)):
        instance = LANGCHAIN(reranker=length_reranker, text_fn=text_fn, metadata_keys=keys)
        documents = [Document(page_content="a", metadata={"title": "t"})]
        with pytest.raises(InvalidInputError, match="the text of item 0 is a (NoneType|int), .*text_fn"):
            await both_ways(instance, lambda documents=documents: documents)
    assert length_reranker.calls == 0


def test_a_document_without_content_is_an_error_before_scoring(length_reranker):
    instance = LANGCHAIN(reranker=length_reranker)
    with pytest.raises(InvalidInputError, match="the text of item 1 is a NoneType"):
        instance.compress_documents([*wrap(LANGCHAIN, ["a"]), Document.model_construct(page_content=None)], "q")
    assert length_reranker.calls == 0


def uncopyable(tmp_path):
    lock, tensor = threading.Lock(), torch.ones(2, requires_grad=True) * 2
    return {
        "lock": lock,
        "tensor": tensor,
        "file": (tmp_path / "f").open("w"),
        "lists": [1],
        "nested": {"l": [lock, [1]]},
    }


async def test_metadata_that_cannot_be_copied_is_shared_and_the_rest_is_not(tmp_path, length_reranker):
    metadata = uncopyable(tmp_path)
    metadata["cycle"] = [threading.Lock()]
    metadata["cycle"].append(metadata["cycle"])
    document = Document.model_construct(page_content="a", metadata=metadata)
    instance = LANGCHAIN(reranker=length_reranker)
    for reranked in (instance.compress_documents([document], "q"), await instance.acompress_documents([document], "q")):
        copied = reranked[0].metadata
        assert all(copied[name] is metadata[name] for name in ("lock", "tensor", "file"))
        assert copied["nested"]["l"][0] is metadata["lock"]
        copied["lists"].append(2)
        copied["nested"]["l"][1].append(2)
        assert metadata["lists"] == metadata["nested"]["l"][1] == [1]
    metadata["file"].close()


async def test_a_retrieval_score_is_added_to_metadata_that_cannot_be_copied(tmp_path, length_reranker):
    metadata = uncopyable(tmp_path)
    node = TextNode(text="a")
    node.metadata = metadata
    instance = LLAMA_INDEX(reranker=length_reranker, keep_retrieval_score=True)
    items = [NodeWithScore(node=node, score=0.25)]
    for (reranked,) in (
        instance.postprocess_nodes(items, query_str="q"),
        await instance.apostprocess_nodes(items, query_str="q"),
    ):
        assert reranked.node.metadata["retrieval_score"] == 0.25
        assert reranked.node.metadata["lock"] is metadata["lock"]
        assert reranked.node.metadata["lists"] is not metadata["lists"]
    metadata["file"].close()
