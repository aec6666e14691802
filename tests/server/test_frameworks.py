"""The clients of LiteLLM and Haystack, unmodified, in front of one real server.

They bring half a gigabyte, so `make test-clients` installs them apart from everything else; without them this file is
skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from server.running import running

from mistral_rerank import LocalReranker

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no look at the network on import
REASON = "not installed: make test-clients"
litellm = pytest.importorskip("litellm", reason=REASON)
haystack = pytest.importorskip("haystack", reason=REASON)
nvidia = pytest.importorskip("haystack_integrations.components.rankers.nvidia", reason=REASON)

QUERY = "which is it?"
PASSAGES = ["a passage", "another one, and a longer one", "short", "the last of them " * 8]
HAYSTACKS_TESTS = next(Path(nvidia.__file__).parents[4].glob("nvidia_haystack-*/tests/test_ranker.py"), None)

ROUTES = {
    "cohere": ("cohere/tiny", "/v2/rerank", "probability"),
    "jina": ("jina_ai/tiny", "/v1/rerank", "probability"),
    "vllm": ("hosted_vllm/tiny", "", "probability"),
    "voyage": ("voyage/tiny", "/v1", "probability"),
    "infinity": ("infinity/tiny", "", "probability"),
    "huggingface": ("huggingface/tiny", "", "probability"),
    "nim": ("nvidia_nim/tiny", "", "logit"),
    "nim ranking": ("nvidia_nim/ranking/tiny", "", "logit"),
}
"""LiteLLM's providers: the model, where each expects the server, and the score that it hands on."""


@pytest.fixture(scope="module")
def served(tiny):
    """A local reranker in fp32, and the URL of a server in front of it."""
    with LocalReranker(str(tiny), device="cpu", dtype="float32", share_batches=True) as reranker:
        with running(reranker, model_id="tiny") as url:
            yield reranker, url


@pytest.fixture(scope="module")
def expected(served):
    return served[0].rank(QUERY, PASSAGES)


def ask_litellm(url: str, route: str, query: str = QUERY, suffix: str = ""):
    model, path, _ = ROUTES[route]
    return litellm.rerank(
        model=model + suffix,
        query=query,
        documents=PASSAGES,
        top_n=3,
        return_documents=route != "infinity",  # whose documents come back as bare texts, and which no mark tells apart
        api_base=url + path,
        api_key="any",
        max_retries=0,
    )


@pytest.mark.parametrize("route", ROUTES)
def test_litellms_rerank_routes(served, expected, route):
    found = ask_litellm(served[1], route).results
    if route == "huggingface":  # TEI's protocol has no top_n
        assert len(found) == len(PASSAGES)
        found = found[:3]
    assert [place["index"] for place in found] == [place.index for place in expected[:3]]
    wanted = [getattr(place.score, ROUTES[route][2]) for place in expected[:3]]
    assert [place["relevance_score"] for place in found] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("route", sorted(set(ROUTES) - {"huggingface", "nim"}))
def test_litellm_gives_an_unknown_model_as_not_found(served, route):
    """TEI's bodies name no model; the hosted NVIDIA path takes any."""
    with pytest.raises(litellm.NotFoundError, match="no such model"):
        ask_litellm(served[1], route, suffix="-not")


@pytest.mark.parametrize("route", ROUTES)
def test_litellm_gives_an_empty_question_as_a_bad_request(served, route):
    error = litellm.APIError if route == "huggingface" else litellm.BadRequestError
    with pytest.raises(error, match="question is empty"):
        ask_litellm(served[1], route, query=" ")


def test_haystacks_nvidia_ranker(served, expected):
    ranker = nvidia.NvidiaRanker(model="tiny", api_url=f"{served[1]}/v1", api_key=None, top_k=3)
    documents = [haystack.Document(content=text) for text in PASSAGES]
    found = ranker.run(query=QUERY, documents=documents)["documents"]
    assert [document.content for document in found] == [place.text for place in expected[:3]]
    assert [document.score for document in found] == pytest.approx(
        [place.score.logit for place in expected[:3]], abs=1e-4
    )


@pytest.mark.parametrize(
    ("model", "query", "says"),
    [("another", QUERY, "no such model; there is tiny"), ("tiny", " ", "question is empty")],
)
def test_haystacks_nvidia_ranker_says_what_is_wrong(served, model, query, says):
    ranker = nvidia.NvidiaRanker(model=model, api_url=f"{served[1]}/v1", api_key=None)
    with pytest.raises(ValueError, match=says):
        ranker.run(query=query, documents=[haystack.Document(content="a passage")])


@pytest.mark.skipif(HAYSTACKS_TESTS is None, reason="nvidia-haystack's sdist is not unpacked: make test-clients")
def test_haystacks_own_test_of_a_nim_passes():
    """Over mini: it wants certain two of three empty phrases first, which is the model's affair."""
    with LocalReranker("mini", device="cpu") as reranker, running(reranker, model_id="nim") as url:
        environment = os.environ | {
            "NVIDIA_NIM_RANKER_MODEL": "nim",
            "NVIDIA_NIM_RANKER_ENDPOINT_URL": f"{url}/v1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_nim_integration"]
        found = subprocess.run(
            [*command, str(HAYSTACKS_TESTS)],
            env=environment,
            cwd=HAYSTACKS_TESTS.parents[1],
            capture_output=True,
            text=True,
        )
    assert "1 passed" in found.stdout, found.stdout + found.stderr
