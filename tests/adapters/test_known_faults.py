"""Faults of rerankers in use today. Each check fails on what they do, shown by a few lines of ours, and passes on us."""

import copy

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from support import LengthReranker

import langchain_mistral_rerank
import llama_index_mistral_rerank


def ours(documents, query="q"):
    compressor = langchain_mistral_rerank.MistralRerank(reranker=LengthReranker(), top_n=None)
    return compressor.compress_documents(documents, query)


def our_nodes(nodes, **options):
    options = {"reranker": LengthReranker(), "top_n": None} | options
    return llama_index_mistral_rerank.MistralRerank(**options).postprocess_nodes(nodes, query_str="q")


def by_length(documents):
    return sorted(documents, key=lambda document: -len(document.page_content))


# LangChain


def writes_into_inputs(documents):
    """langchain-nvidia-ai-endpoints up to 1.4.3, langchain-zerank, rerankers."""
    for document in documents:
        document.metadata["relevance_score"] = float(len(document.page_content))
    return by_length(documents)


def shares_nested_metadata(documents):
    """langchain-nvidia-ai-endpoints 1.5: a shallow copy."""
    return [document.model_copy(update={"metadata": dict(document.metadata)}) for document in by_length(documents)]


def drops_ids(documents):
    """langchain-cohere, -voyageai, -pinecone, JinaRerank, InfinityRerank."""
    return [Document(page_content=d.page_content, metadata=copy.deepcopy(d.metadata)) for d in by_length(documents)]


def keeps_the_old_score(documents):
    """FlashrankRerank: the old metadata is spread over the new score."""
    return [
        Document(page_content=d.page_content, id=d.id, metadata={"relevance_score": 0.5, **d.metadata})
        for d in by_length(documents)
    ]


def inputs_stay_as_they_are(rerank):
    documents = [Document(page_content="a", metadata={"nested": {"list": [1]}}), Document(page_content="bb")]
    before = copy.deepcopy(documents)
    for document in rerank(documents):
        document.metadata.setdefault("nested", {}).setdefault("list", []).append(2)
        document.metadata["new"] = True
    assert documents == before


def ids_survive(rerank):
    reranked = rerank([Document(page_content="a", id="1"), Document(page_content="bb", id="2")])
    assert [document.id for document in reranked] == ["2", "1"]


def a_second_pass_has_its_own_scores(rerank):
    (first,) = rerank([Document(page_content="bb")])
    (second,) = rerank([first.model_copy(update={"page_content": "bbbb"})])
    (alone,) = rerank([Document(page_content="bbbb", metadata={"relevance_score": 99})])
    assert second.metadata["relevance_score"] == alone.metadata["relevance_score"] != 99


@pytest.mark.parametrize(
    ("check", "faulty"),
    [
        (inputs_stay_as_they_are, writes_into_inputs),
        (inputs_stay_as_they_are, shares_nested_metadata),
        (ids_survive, drops_ids),
        (a_second_pass_has_its_own_scores, keeps_the_old_score),
    ],
)
def test_langchain(check, faulty):
    with pytest.raises(AssertionError):
        check(faulty)
    check(ours)


# LlamaIndex


def writes_scores_into_inputs(nodes):
    """FlagEmbedding, sbert, TEI, OpenVINO, FlashRank postprocessors."""
    for node in nodes:
        node.score = float(len(node.node.get_content()))
    return sorted(nodes, key=lambda node: -node.score)


def feeds_its_own_score_to_the_model(nodes):
    """keep_retrieval_score of the sbert and OpenVINO postprocessors: it lands in what the next pass reads."""
    read = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
    for node in nodes:
        node.node.metadata["retrieval_score"] = node.score
    scored = zip(nodes, read, strict=True)
    return [NodeWithScore(node=node.node, score=float(len(text))) for node, text in scored]


def ours_keeping_scores(nodes):
    return our_nodes(nodes, keep_retrieval_score=True)


def wrappers_stay_as_they_are(rerank):
    nodes = [NodeWithScore(node=TextNode(text=text, metadata={"k": [1]}), score=0.25) for text in ("a", "bb")]
    before = [node.to_dict() for node in nodes]
    assert [node.node.text for node in rerank(nodes)] == ["bb", "a"]
    assert [node.to_dict() for node in nodes] == before


def nodes_of_the_index_stay_as_they_are(rerank):
    nodes = [NodeWithScore(node=TextNode(text="a"), score=0.25)]
    before = nodes[0].node.to_dict()
    rerank(nodes)
    assert nodes[0].node.to_dict() == before


def a_second_pass_reads_the_same_text(rerank):
    first = rerank([NodeWithScore(node=TextNode(text="a"), score=0.25)])
    assert [node.score for node in rerank(first)] == [node.score for node in first]


@pytest.mark.parametrize(
    ("check", "faulty", "sound"),
    [
        (wrappers_stay_as_they_are, writes_scores_into_inputs, our_nodes),
        (nodes_of_the_index_stay_as_they_are, feeds_its_own_score_to_the_model, ours_keeping_scores),
        (a_second_pass_reads_the_same_text, feeds_its_own_score_to_the_model, ours_keeping_scores),
    ],
)
def test_llama_index(check, faulty, sound):
    with pytest.raises(AssertionError):
        check(faulty)
    check(sound)


@pytest.mark.parametrize("mode", list(MetadataMode))
def test_a_retrieval_score_is_not_part_of_the_text_in_any_metadata_mode(mode):
    node = TextNode(text="a", metadata={"title": "t"}, excluded_llm_metadata_keys=["title"])
    first = our_nodes([NodeWithScore(node=node, score=0.25)], keep_retrieval_score=True, metadata_mode=mode)
    assert first[0].node.metadata == {"title": "t", "retrieval_score": 0.25}
    second = our_nodes(first, keep_retrieval_score=True, metadata_mode=mode)
    assert second[0].score == first[0].score
    assert second[0].node.metadata["retrieval_score"] == first[0].score
    for read in (MetadataMode.EMBED, MetadataMode.LLM):
        assert first[0].node.get_content(read) == node.get_content(read)
