"""What replies leave open, and what refusals teach."""

import asyncio
import logging

import pytest
from remote.endpoint import Endpoint, expected, gives, logit_of, speaks

from mistral_rerank import RemoteReranker, errors
from mistral_rerank.protocols import PROTOCOLS
from mistral_rerank.remote import endpoint as endpoint_module
from mistral_rerank.scores import sigmoid

PASSAGES = [f"passage {number}" for number in range(100)]


@pytest.fixture(autouse=True)
def each_warning_anew():
    endpoint_module._warn_once.cache_clear()


def scores_by(protocol, score, *, key=None):
    """Answers with a score of one's choice, in the words of servers that are not ours."""

    def behave(exchange):
        request = PROTOCOLS[protocol].read_request(exchange.request.body)
        name = key or {"nvidia": "logit", "tei": "score"}.get(protocol, "relevance_score")
        entries = [{"index": index, name: score(text)} for index, text in enumerate(request.passages)]
        exchange.respond(200, entries if protocol == "tei" else {"results": entries})

    return behave


def ask(reranker, passages, how="sync"):
    pairs = [("q", passage) for passage in passages]
    return reranker.score_pairs(pairs) if how == "sync" else asyncio.run(reranker.ascore_pairs(pairs))


both = pytest.mark.parametrize("how", ["sync", "async"])


@both
@pytest.mark.parametrize("protocol", ["nvidia", "vllm", "tei"])
def test_logits_of_unknown_calibration_are_warned_of_once(protocol, how, caplog):
    caplog.set_level(logging.WARNING)
    with Endpoint(scores_by(protocol, logit_of)) as endpoint:
        for _ in range(2):
            with RemoteReranker("m", base_url=endpoint.url, protocol=protocol) as reranker:
                scores = ask(reranker, PASSAGES, how)
                assert ask(reranker, PASSAGES, how) == scores
    assert [score.probability for score in scores] == [sigmoid(logit_of(passage)) for passage in PASSAGES]
    assert ["without a calibration" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_calibrated_scores_are_not_warned_of(protocol, caplog):
    caplog.set_level(logging.WARNING)
    with (
        Endpoint(speaks(protocol)) as endpoint,
        RemoteReranker("m", base_url=endpoint.url, protocol=protocol) as reranker,
    ):
        ask(reranker, PASSAGES)
    assert caplog.records == []


@both
@pytest.mark.parametrize("protocol", ["vllm", "tei"])
def test_probabilities_where_logits_were_asked_for_are_taken_as_they_are(protocol, how, caplog):
    caplog.set_level(logging.WARNING)
    behave = scores_by(protocol, lambda text: sigmoid(logit_of(text)))
    with Endpoint(behave) as endpoint, RemoteReranker("m", base_url=endpoint.url, protocol=protocol) as reranker:
        several = ask(reranker, PASSAGES, how)
        single = ask(reranker, PASSAGES[:1], how)
    assert [score.probability for score in several] == [sigmoid(logit_of(passage)) for passage in PASSAGES]
    assert single == several[:1]
    assert len(caplog.records) == 1
    assert "score_unit='probability'" in caplog.text


def test_one_score_outside_the_range_shows_that_all_are_logits_in_whichever_batch_it_is():
    logits = dict.fromkeys(PASSAGES, 0.5) | {PASSAGES[-1]: 3.0}
    with Endpoint(scores_by("tei", logits.get)) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="tei") as reranker:
            assert {score.probability for score in ask(reranker, PASSAGES)} == {sigmoid(0.5), sigmoid(3.0)}
            assert {score.probability for score in ask(reranker, PASSAGES[:9])} == {sigmoid(0.5)}
    assert len(endpoint.requests) > 2


@pytest.mark.parametrize(("protocol", "unit"), [("nvidia", "auto"), ("tei", "logit")])
def test_scores_that_are_said_to_be_logits_are_logits_whatever_their_range(protocol, unit):
    with Endpoint(scores_by(protocol, lambda _: 0.5)) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol=protocol, score_unit=unit) as reranker:
            assert {score.probability for score in ask(reranker, PASSAGES)} == {sigmoid(0.5)}


@both
@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ({"error": "the model crashed"}, "RequestRefusedError", "the model crashed"),
        ({"error": {"message": "bad key", "code": 401}}, "AuthenticationError", "bad key"),
        ({"errors": [{"message": "first"}, {"message": "second"}]}, "RequestRefusedError", "first; second"),
        ({"results": [], "message": "out of memory", "code": 500}, "ServerError", "out of memory"),
        ({"results": None, "error": "slow down", "status": 429}, "RateLimitError", "slow down"),
        ({"detail": "Input length 600 exceeds maximum allowed token size 512"}, "RemoteInputTooLongError", "512"),
    ],
)
def test_an_error_in_a_200_is_shown_in_its_own_words_and_not_sent_again(body, kind, said, how):
    with Endpoint(gives(200, body)) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="jina") as reranker:
            with pytest.raises(errors.RemoteError) as raised:
                ask(reranker, PASSAGES[:2], how)
    assert type(raised.value).__name__ == kind
    assert (raised.value.status, len(endpoint.requests)) == (200, 1)
    assert said in str(raised.value)


def test_null_errors_are_no_errors():
    body = {"error": None, "message": None, "results": [{"index": 0, "relevance_score": 0.5}]}
    with Endpoint(gives(200, body)) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="jina") as reranker:
            assert [score.probability for score in ask(reranker, ["one"])] == [0.5]


@pytest.mark.parametrize(
    ("protocol", "field"), [("cohere", "top_n"), ("jina", "top_n"), ("vllm", "top_n"), ("voyage", "top_k")]
)
def test_a_servers_own_default_of_top_n_cuts_nothing(protocol, field):
    def cuts(exchange):
        body = exchange.request.body
        speaks(protocol)(exchange) if field in body else exchange.respond(200, {"results": []})

    with Endpoint(cuts) as endpoint, RemoteReranker("m", base_url=endpoint.url, protocol=protocol) as reranker:
        assert len(ask(reranker, PASSAGES)) == 100
    assert all(body[field] == len(body["documents"]) for body in endpoint.bodies)


def sizes(endpoint):
    return [len(body["passages"]) for body in endpoint.bodies]


def refuses_over(most, words):
    def behave(exchange):
        count = len(exchange.request.body["passages"])
        refused = gives(422, {"detail": words.format(count=count, most=most)})
        (refused if count > most else speaks("nvidia"))(exchange)

    return behave


@both
@pytest.mark.parametrize(
    "words",
    [
        "batch size {count} > maximum allowed batch size {most}",
        "send at most {most} passages at once, not {count}",
        "passages: List should have at most {most} items after validation, not {count}",
        "too many documents: {count}, the limit is {most}",
    ],
)
def test_a_limit_that_a_refusal_names_is_remembered(words, how):
    with Endpoint(refuses_over(30, words)) as endpoint:
        options = {"base_url": endpoint.url, "protocol": "nvidia", "max_concurrency": 1, "max_passages": 600}
        with RemoteReranker("m", **options) as reranker:
            assert [score.logit for score in ask(reranker, PASSAGES, how)] == [logit_of(text) for text in PASSAGES]
            assert sizes(endpoint) == [100, 30, 30, 30, 10]
            ask(reranker, PASSAGES, how)
    assert sizes(endpoint)[5:] == [30, 30, 30, 10]


def test_a_limit_that_a_refusal_does_not_name_is_remembered_as_it_was_found():
    with Endpoint(refuses_over(30, "too many passages")) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia", max_concurrency=1) as reranker:
            ask(reranker, PASSAGES)
            first = len(endpoint.requests)
            ask(reranker, PASSAGES)
    assert sizes(endpoint)[first:] == [25, 25, 25, 25]


def test_a_limit_of_bytes_is_remembered():
    def behave(exchange):
        long = int(exchange.request.headers["content-length"]) > 30_000
        (gives(413, b"length limit exceeded") if long else speaks("nvidia"))(exchange)

    passages = [f"{number} " + "x" * 1000 for number in range(64)]
    with Endpoint(behave) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia", max_concurrency=1) as reranker:
            assert [score.logit for score in ask(reranker, passages)] == [logit_of(text) for text in passages]
            first = len(endpoint.requests)
            ask(reranker, passages)
    assert max(int(request.headers["content-length"]) for request in endpoint.requests[first:]) <= 30_000


def test_more_passages_than_the_protocols_limit_are_sent_when_they_are_asked_for():
    passages = [f"passage {number}" for number in range(600)]
    with Endpoint(speaks("tei")) as endpoint:
        options = {"base_url": endpoint.url, "protocol": "tei", "max_passages": 1000, "max_concurrency": 1}
        with RemoteReranker("m", **options) as reranker:
            assert reranker.rank("q", passages) == expected(passages)
    assert len(endpoint.requests) == 1
