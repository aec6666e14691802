"""An instruction reaches the model from every entrance, and is refused where there is no place for it."""

import httpx
import pytest
from families import qwen3_reranker
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from server.running import running
from support import LengthReranker

from langchain_mistral_rerank import MistralRerank as LangChainRerank
from llama_index_mistral_rerank import MistralRerank as LlamaIndexRerank
from mistral_rerank import InvalidInputError, RemoteReranker, open_reranker

INSTRUCTION = "Prefer the newest passage"
QUERY, PASSAGES = "who wrote it", ["she wrote it", "nobody knows", "it opened later"]


class Recorder(LengthReranker):
    """Records the instruction of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.instructions: list[str | None] = []

    async def ascore_pairs(self, pairs, *, overflow=None, instruction=None):
        self.instructions.append(instruction)
        return self.score_pairs(pairs)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory):
    return str(qwen3_reranker(tmp_path_factory.mktemp("qwen3")))


@pytest.fixture(scope="module")
def scores(qwen3):
    """The probability of each passage with the instruction, which differs from the one without it."""
    with open_reranker(qwen3, device="cpu", dtype="float32") as reranker:
        ranking = reranker.rank(QUERY, PASSAGES, instruction=INSTRUCTION)
        with_instruction = {passage.text: passage.score.probability for passage in ranking}
        without = {passage.text: passage.score.probability for passage in reranker.rank(QUERY, PASSAGES)}
    assert all(abs(with_instruction[text] - without[text]) > 1e-6 for text in PASSAGES)
    return with_instruction


def test_langchain_takes_an_instruction(qwen3, scores):
    compressor = LangChainRerank(model=qwen3, device="cpu", dtype="float32", instruction=INSTRUCTION)
    documents = compressor.compress_documents([Document(text) for text in PASSAGES], QUERY)
    assert {doc.page_content: doc.metadata[compressor.score_key] for doc in documents} == pytest.approx(scores)


def test_llama_index_takes_an_instruction(qwen3, scores):
    postprocessor = LlamaIndexRerank(model=qwen3, device="cpu", dtype="float32", instruction=INSTRUCTION)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in PASSAGES]
    ranked = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert {node.text: node.score for node in ranked} == pytest.approx(scores)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/ranking", {"query": {"text": QUERY}, "passages": [{"text": text} for text in PASSAGES]}),
        ("/v2/rerank", {"query": QUERY, "documents": PASSAGES}),
        ("/rerank", {"query": QUERY, "texts": PASSAGES}),
        ("/score", {"text_1": QUERY, "text_2": PASSAGES}),
    ],
)
def test_the_server_takes_an_instruction_in_every_protocol(path, body):
    recorder = Recorder()
    with running(recorder) as url:
        assert httpx.post(url + path, json=body | {"instruction": INSTRUCTION}).status_code == 200
        assert httpx.post(url + path, json=body).status_code == 200
    assert recorder.instructions[-2:] == [INSTRUCTION, None]


def test_the_vllm_protocol_carries_an_instruction_of_the_client():
    recorder = Recorder()
    with (
        running(recorder) as url,
        RemoteReranker("length", base_url=url, protocol="vllm", instruction=INSTRUCTION) as remote,
    ):
        remote.rank(QUERY, PASSAGES)
        remote.rank(QUERY, PASSAGES, instruction="of this call")
    assert recorder.instructions[-2:] == [INSTRUCTION, "of this call"]


def test_a_protocol_without_an_instruction_refuses_it():
    with (
        RemoteReranker("m", base_url="http://127.0.0.1:9", protocol="cohere") as remote,
        pytest.raises(InvalidInputError, match="the protocol 'cohere' has no instruction"),
    ):
        remote.rank(QUERY, PASSAGES, instruction=INSTRUCTION)


def test_a_model_without_a_place_for_an_instruction_refuses_it(tiny):
    with (
        open_reranker(str(tiny), backend="local", device="cpu") as reranker,
        pytest.raises(InvalidInputError, match="instruction"),
    ):
        reranker.rank(QUERY, PASSAGES, instruction=INSTRUCTION)
