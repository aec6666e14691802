"""One model has one probability for a passage, whichever protocol asks for it, calibration included."""

import logging

import httpx
import pytest
from server.running import running
from support import LengthReranker

from mistral_rerank import RemoteReranker, Score
from mistral_rerank.protocols import PROTOCOLS, RerankRequest

PASSAGES = [f"{'x' * length}" for length in (1, 7, 3, 40, 90, 91, 2, 3)]


class CalibratedReranker(LengthReranker):
    """Its probability is not the sigmoid of its logit, and is 1.0 for more than one logit."""

    def score_pairs(self, pairs, *, overflow=None):
        return [Score.from_logit(len(passage) - 2.5, scale=0.5, bias=-1.7) for _, passage in pairs]


@pytest.fixture(scope="module")
def url():
    with running(CalibratedReranker()) as url:
        yield url


@pytest.fixture(scope="module")
def expected():
    return CalibratedReranker().rank("q", PASSAGES)


@pytest.mark.parametrize("min_score", [None, 0.5])
@pytest.mark.parametrize("score_unit", ["auto", "logit", "probability"])
@pytest.mark.parametrize("protocol", ["auto", *PROTOCOLS])
def test_our_client_gets_one_probability_and_one_order_in_every_protocol(
    url, expected, protocol, score_unit, min_score, caplog
):
    caplog.set_level(logging.WARNING, "mistral_rerank")
    with RemoteReranker("length", base_url=url, protocol=protocol, score_unit=score_unit) as remote:
        found = remote.rank("q", PASSAGES, min_score=min_score)
    wanted = [place for place in expected if min_score is None or place.score.probability >= min_score]
    assert [place.index for place in found] == [place.index for place in wanted]
    assert [place.score.probability for place in found] == pytest.approx(
        [place.score.probability for place in wanted], abs=1e-6
    )
    assert caplog.records == []


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_reply_keeps_the_protocols_own_score(url, name):
    protocol = PROTOCOLS[name]
    request = RerankRequest("q", tuple(PASSAGES), unit=protocol.unit)
    body = httpx.post(url + protocol.path, json=protocol.write_request(request)).json()
    entries = body if name == "tei" else next(value for value in body.values() if isinstance(value, list))
    field = {"nvidia": "logit", "tei": "score"}.get(name, "relevance_score")
    assert len(entries) == len(PASSAGES)
    for entry in entries:
        assert entry[field] == entry[protocol.unit]


def test_a_model_of_another_name_is_an_error_with_auto(url):
    with (
        RemoteReranker("nope", base_url=url) as remote,
        pytest.raises(Exception, match="no such model; there is length") as raised,
    ):
        remote.rank("q", PASSAGES)
    assert type(raised.value).__name__ == "NotFoundError"
