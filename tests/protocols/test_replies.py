import json

import pytest

from mistral_rerank.errors import InvalidReplyError
from mistral_rerank.protocols.replies import read_scores
from mistral_rerank.scores import sigmoid


def read(body, *, count=2, unit="logit"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_scores(content, count=count, unit=unit).scores


@pytest.mark.parametrize(
    "body",
    [
        {"rankings": [{"index": 1, "logit": 2.5}, {"index": 0, "logit": -1}], "usage": {"total_tokens": 3}},
        {"results": [{"index": 1, "relevance_score": 2.5, "document": None}, {"index": 0, "relevance_score": -1.0}]},
        {"object": "list", "data": [{"index": 0, "score": -1}, {"index": 1, "score": 2.5}]},
        [{"score": 2.5, "index": 1, "text": "b"}, {"score": -1, "index": 0}],
    ],
)
def test_every_shape_is_read_in_the_order_of_the_request(body):
    assert [score.logit for score in read(body)] == [-1.0, 2.5]
    assert all(type(score.logit) is float for score in read(body))


def test_probabilities_become_logits_that_keep_their_order():
    scores = read([{"index": i, "score": p} for i, p in enumerate((0, 0.25, 0.75, 1))], count=4, unit="probability")
    assert [score.probability for score in scores] == [0, 0.25, 0.75, 1]
    assert [sigmoid(score.logit) for score in scores] == pytest.approx([0, 0.25, 0.75, 1])
    assert sorted(score.logit for score in scores) == [score.logit for score in scores]


def test_a_calibrated_probability_is_sent_with_its_logit():
    (score,) = read({"rankings": [{"index": 0, "logit": 2.0, "probability": 0.6}]}, count=1)
    assert (score.logit, score.probability) == (2.0, 0.6)


def test_entries_that_say_logit_are_logits_whatever_was_expected():
    (score,) = read({"rankings": [{"index": 0, "logit": 3.0}]}, count=1, unit="probability")
    assert (score.logit, score.probability) == (3.0, sigmoid(3.0))


@pytest.mark.parametrize("index", [1, 1.0, "1"])
def test_an_index_may_be_a_whole_float_or_a_string(index):
    scores = read([{"index": index, "score": 2.0}, {"index": 0, "score": 1.0}])
    assert [score.logit for score in scores] == [1.0, 2.0]


def test_a_probability_just_outside_its_range_is_clamped():
    entries = [{"index": 0, "score": 1.0000001}, {"index": 1, "score": -1e-8}]
    assert [score.probability for score in read(entries, unit="probability")] == [1.0, 0.0]
    (score,) = read([{"index": 0, "logit": 20.0, "probability": 1.0000001}], count=1)
    assert score.probability == 1.0


def test_null_means_absent():
    body = {"rankings": None, "results": [{"index": 0, "logit": None, "relevance_score": 2.0, "probability": None}]}
    (score,) = read(body, count=1)
    assert (score.logit, score.probability) == (2.0, sigmoid(2.0))


def test_a_reading_tells_whether_the_endpoint_gave_the_probabilities():
    def of(entry, unit):
        reading = read_scores(json.dumps([{"index": 0, **entry}]).encode(), count=1, unit=unit)
        return reading.calibrated, reading.named

    assert of({"logit": 1.0}, "logit") == (False, True)
    assert of({"score": 1.0}, "logit") == (False, False)
    assert of({"score": 1.0, "probability": 0.5}, "logit") == (True, False)
    assert of({"logit": 1.0, "probability": 0.5}, "probability") == (True, True)
    assert of({"relevance_score": 0.5}, "probability") == (True, False)


NAN, INFINITY, HUGE = b"NaN", b"-Infinity", b"1" + b"0" * 400


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"<html>502 Bad Gateway</html>", "not JSON"),
        (b'{"rankings":[{"index":0,"lo', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ({"detail": "a secret"}, "no list"),
        ({"rankings": {"0": 1}}, "no list"),
        ({"rankings": ["a secret"]}, "no list"),
        ([], "0 scores for 2"),
        ([{"index": 0, "score": 1}], "1 scores for 2"),
        ([{"index": 0, "score": 1}, {"index": 0, "score": 1}], "two entries"),
        ([{"index": 0, "score": 1}, {"index": 2, "score": 1}], "between 0 and 1"),
        ([{"index": 0, "score": 1}, {"index": -1, "score": 1}], "between 0 and 1"),
        ([{"index": 0, "score": 1}, {"index": True, "score": 1}], "between 0 and 1"),
        ([{"index": 0, "score": 1}, {"index": 0.5, "score": 1}], "between 0 and 1"),
        ([{"index": 0, "score": 1}, {"index": "a secret", "score": 1}], "a str"),
        ([{"index": 0, "score": 1}, {"index": "-1", "score": 1}], "a str"),
        ([{"index": 0, "score": 1}, {"score": 1}], "between 0 and 1"),
        ([{"index": 0, "score": 1}, {"index": 1}], "no finite number"),
        ([{"index": 0, "score": 1}, {"index": 1, "score": None}], "no finite number"),
        ([{"index": 0, "score": 1}, {"index": 1, "score": True}], "no finite number"),
        ([{"index": 0, "score": 1}, {"index": 1, "score": "0.5"}], "no finite number"),
        *(
            (b'[{"index":0,"score":1},{"index":1,"score":' + number + b"}]", "no finite number")
            for number in (NAN, INFINITY, HUGE, b"1e999")
        ),
        ([{"index": 0, "score": 1}, {"index": 1, "score": 1, "probability": 1.5}], "no probability"),
    ],
)
def test_a_reply_that_cannot_be_trusted_is_refused_without_repeating_it(body, said):
    with pytest.raises(InvalidReplyError, match=said) as refused:
        read(body)
    assert "secret" not in str(refused.value)
    assert len(str(refused.value)) < 200


def test_raw_logits_where_probabilities_are_due_are_refused_with_what_to_set():
    with pytest.raises(InvalidReplyError, match="score_unit='logit'"):
        read([{"index": 0, "score": 3.2}], count=1, unit="probability")
