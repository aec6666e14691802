import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_rerank import InvalidInputError, Score
from mistral_rerank.protocols import PROTOCOLS, RerankReply, RerankRequest
from mistral_rerank.protocols.replies import read_scores
from mistral_rerank.reranker import ProtocolName
from mistral_rerank.scores import order

texts = st.text(max_size=30)
every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)

# From the documentation that each protocol names.
BODIES = {
    "nvidia": {"model": "m", "query": {"text": "q"}, "passages": [{"text": "a"}, {"text": "b"}], "truncate": "END"},
    "cohere": {"model": "m", "query": "q", "documents": ["a", "b"], "top_n": 2},
    "jina": {"model": "m", "query": "q", "documents": ["a", "b"], "top_n": 2, "return_documents": False},
    "vllm": {
        "model": "m",
        "query": "q",
        "documents": ["a", "b"],
        "top_n": 2,
        "use_activation": False,
        "truncate_prompt_tokens": -1,
        "truncation_side": "right",
    },
    "tei": {"query": "q", "texts": ["a", "b"], "raw_scores": True, "truncate": True},
    "voyage": {"model": "m", "query": "q", "documents": ["a", "b"], "top_k": 2, "truncation": True},
}


@every_protocol
def test_the_body_of_a_request(protocol):
    assert protocol.write_request(RerankRequest("q", ("a", "b"), model="m")) == BODIES[protocol.name]


@every_protocol
@given(query=texts, passages=st.lists(texts, min_size=1, max_size=5), model=st.none() | texts, truncate=st.booleans())
def test_a_server_reads_what_a_client_wrote(protocol, query, passages, model, truncate):
    request = RerankRequest(query, tuple(passages), model=model, truncate=truncate, unit=protocol.unit)
    read = protocol.read_request(json.loads(json.dumps(protocol.write_request(request))))
    assert (read.query, read.passages, read.unit) == (query, tuple(passages), protocol.unit)
    if protocol.name != "tei":
        assert read.model == (model if model and model.strip() else None)
    if protocol.name not in ("cohere", "jina"):  # they always cut
        assert read.truncate == truncate


@every_protocol
@given(logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=6))
def test_a_client_reads_what_a_server_wrote(protocol, logits):
    passages = [f"p{position}" for position in range(len(logits))]
    scores = [Score.from_logit(logit) for logit in logits]
    request = RerankRequest("q", tuple(passages), unit=protocol.unit)
    body = protocol.write_reply(request, RerankReply(tuple(order(passages, scores)), "m", "id"))
    reply = read_scores(json.dumps(body).encode(), count=len(passages), unit=protocol.unit)
    assert reply.scores == scores
    assert reply.calibrated


@every_protocol
def test_the_numbers_of_tokens_arrive(protocol):
    scores = [Score(1.0, 0.75, tokens=60, tokens_left_out=7), Score(0.0, 0.5, tokens=9)]
    request = RerankRequest("q", ("a", "b"), unit=protocol.unit)
    body = protocol.write_reply(request, RerankReply(tuple(order(["a", "b"], scores)), "m", "id"))
    reply = read_scores(json.dumps(body).encode(), count=2, unit=protocol.unit)
    assert [(score.tokens, score.tokens_left_out) for score in reply.scores] == [(60, 7), (9, 0)]


@pytest.mark.parametrize(
    ("name", "body", "named"),
    [
        ("nvidia", {"query": {"text": "q"}, "passages": ["a secret text"]}, r"passages\.0"),
        ("nvidia", {"messages": [{"role": "user", "content": "a secret text"}]}, "query"),
        ("nvidia", {"query": {"text": "q"}, "passages": []}, "passages"),
        ("nvidia", {"query": {"text": "q"}, "passages": [{"text": "a"}] * 513}, "passages"),
        ("nvidia", {"query": {"text": "q"}, "passages": [{"text": "a"}], "truncate": "START"}, "truncate"),
        ("nvidia", ["a secret text"], "body"),
        ("cohere", {"query": "q", "documents": [1]}, r"documents\.0"),
        ("cohere", {"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ("tei", {"query": "q"}, "texts"),
        ("voyage", {"query": None, "documents": ["a"]}, "query"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_by_field_without_its_content(name, body, named):
    with pytest.raises(InvalidInputError, match=named) as refused:
        PROTOCOLS[name].read_request(body)
    assert "secret" not in str(refused.value)


def test_fields_of_single_clients_are_understood():
    nvidia = {"query": {"text": "q"}, "passages": [{"text": "a"}], "top_k": 1, "unknown": 1}
    assert PROTOCOLS["nvidia"].read_request(nvidia).top_n == 1
    assert PROTOCOLS["nvidia"].read_request(nvidia).truncate is False
    cohere = {"query": "q", "documents": [{"text": "a"}, "b"], "return_documents": True, "rank_fields": ["text"]}
    assert PROTOCOLS["cohere"].read_request(cohere).passages == ("a", "b")
    assert PROTOCOLS["vllm"].read_request({"query": "q", "documents": ["a"], "top_n": 0}).top_n is None
    assert PROTOCOLS["voyage"].read_request({"query": "q", "documents": ["a"], "top_k": 3}).top_n == 3


@pytest.mark.parametrize(("name", "document"), [("jina", {"text": "a"}), ("voyage", "a")])
def test_documents_are_returned_if_requested(name, document):
    protocol = PROTOCOLS[name]
    request = protocol.read_request({"query": "q", "documents": ["a"], "return_documents": True})
    reply = protocol.write_reply(request, RerankReply(tuple(order(["a"], [Score.from_logit(0)])), "m", "id"))
    (entry,) = reply.get("results") or reply.get("data")
    assert entry == {"index": 0, "logit": 0.0, "probability": 0.5, "relevance_score": 0.5, "document": document}


def test_the_setting_names_every_protocol():
    assert get_args(ProtocolName) == tuple(PROTOCOLS)
