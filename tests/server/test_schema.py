"""What the OpenAPI document promises is what the server does, for made-up requests, valid and not.

Far more is asked of a running server by `schemathesis run http://127.0.0.1:8000/openapi.json --checks all -n 400`.
"""

import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from server.running import running
from support import LengthReranker

from mistral_rerank.protocols import PROTOCOLS, RerankRequest
from mistral_rerank.protocols.cohere import CohereReply
from mistral_rerank.protocols.nvidia import RankingReply
from mistral_rerank.protocols.tei import TeiRank
from mistral_rerank.protocols.voyage import VoyageReply
from mistral_rerank.scores import BLANK_SCORE, sigmoid
from mistral_rerank.server.app import create_app
from mistral_rerank.server.errors import ErrorBody

REPLIES = {
    "nvidia": RankingReply,
    "cohere": CohereReply,
    "jina": CohereReply,
    "vllm": CohereReply,
    "tei": list[TeiRank],
    "voyage": VoyageReply,
}
ANY_REPLY = TypeAdapter(RankingReply | CohereReply | VoyageReply | list[TeiRank])
few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
requests = st.builds(
    RerankRequest,
    query=texts.filter(str.strip),
    passages=st.lists(texts, min_size=1, max_size=8).map(tuple),
    model=st.sampled_from([None, "length"]),
    truncate=st.booleans(),
    unit=st.sampled_from(["logit", "probability"]),
    return_texts=st.booleans(),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def client():
    with running(LengthReranker()) as url, httpx.Client(base_url=url) as client:
        yield client


def operations():
    api = schemathesis.openapi.from_dict(create_app(LengthReranker()).openapi())
    found = [result.ok() for result in api.get_all_operations()]
    return [
        pytest.param(operation, mode, id=f"{mode.value} {operation.label}")
        for operation in found
        for mode in schemathesis.GenerationMode
        if operation.method == "post" or mode is mode.POSITIVE  # the others take nothing that could be wrong
    ]


@pytest.mark.parametrize(("operation", "mode"), operations())
@given(data=st.data())
@few
def test_the_server_keeps_to_its_openapi_document(client, operation, mode, data):
    case = data.draw(operation.as_strategy(generation_mode=mode))
    if operation.path.endswith("/score") and isinstance(case.body, dict):
        first, second = (
            text if isinstance(text, list) else ["one"] for text in map(case.body.get, ("text_1", "text_2"))
        )
        assume(len(first) in (1, len(second)))  # JSON schema has no word for it
    case.call_and_validate(base_url=str(client.base_url))


@pytest.mark.parametrize("name", PROTOCOLS)
@given(request=requests)
@few
def test_every_valid_body_is_ranked(client, name, request):
    protocol = PROTOCOLS[name]
    reply = client.post(protocol.path, json=protocol.write_request(request))
    assert reply.status_code == 200, reply.text
    TypeAdapter(REPLIES[name]).validate_python(reply.json(), strict=True)
    lengths = [len(passage) if passage.strip() else -1 for passage in request.passages]
    wanted = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    places = reply.json() if name == "tei" else next(v for v in reply.json().values() if isinstance(v, list))
    assert [place["index"] for place in places] == wanted
    unit = request.unit if name in ("tei", "vllm") else protocol.unit
    for place in places:
        passage = request.passages[place["index"]]
        logit = float(len(passage)) if passage.strip() else BLANK_SCORE.logit
        score = next(place[key] for key in ("relevance_score", "score", "logit") if key in place)
        assert score == (logit if unit == "logit" else pytest.approx(sigmoid(logit)))


@st.composite
def spoiled(draw, body):
    """The body with one of its values, at any depth, left out or made another."""
    body = json.loads(json.dumps(body))
    node = body
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
            node = node[key]
            continue
        if draw(st.booleans()):
            del node[key]
        else:
            node[key] = draw(anything)
        return body


@pytest.mark.parametrize("name", PROTOCOLS)
@given(data=st.data(), request=requests)
@few
def test_a_spoiled_body_is_ranked_or_refused_with_the_error_object(client, name, data, request):
    protocol = PROTOCOLS[name]
    body = data.draw(spoiled(protocol.write_request(request)))
    reply = client.post(protocol.path, json=body)
    if reply.status_code == 200:
        ANY_REPLY.validate_python(reply.json(), strict=True)  # without its mark a body may be another protocol's
        return
    assert reply.status_code in (404, 422), reply.text
    error = ErrorBody.model_validate(reply.json(), strict=True)
    assert error.status == error.code == reply.status_code


@given(body=anything)
@few
def test_anything_else_is_refused(client, body):
    for path in {protocol.path for protocol in PROTOCOLS.values()}:
        reply = client.post(path, json=body)
        assert reply.status_code == 422, reply.text
        ErrorBody.model_validate(reply.json(), strict=True)
