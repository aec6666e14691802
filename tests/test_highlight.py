"""The best sentence of a passage, as offsets into the text."""

import asyncio
from itertools import pairwise

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server.running import running
from support import LengthReranker

from mistral_rerank import InvalidInputError, Score
from mistral_rerank.scores import Usage
from mistral_rerank.sentences import sentence_spans

TEXT = "  The first one. The second is longer! Third? "


@pytest.mark.parametrize(
    "sentences",
    [
        ["The Panthers won.", "They beat J. Smith and the U.S. Army.", "It was 3.5 points, e.g. few."],
        ['"Is it so?"', "He asked Dr. Who.", "Yes…", "(And more.)", "End"],
        ["一つ。", "二つ！", "「三つ。」", "四"],
        ["Intro:\n", "- one item\n", "- two items\n\n", "Next paragraph\nin two lines"],
        ["Ω is a letter.", "Это второе.", "Élan!"],
    ],
)
def test_texts_are_divided_into_sentences(sentences):
    joined = "".join(sentences) if "。" in sentences[0] or sentences[0].endswith("\n") else " ".join(sentences)
    assert [joined[start:end] for start, end in sentence_spans(joined)] == [each.strip() for each in sentences]


@given(st.text(alphabet='aA.! \n。9-"🙂', max_size=60))
def test_every_character_but_space_is_in_one_sentence(text):
    spans = sentence_spans(text)
    assert "".join("".join(text[start:end].split()) for start, end in spans) == "".join(text.split())
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_the_sentence_with_the_best_score_is_marked(length_reranker):
    passages = [TEXT, "one sentence only ", "", "Same. Size."]
    for highlights in (
        length_reranker.highlight("q", passages),
        asyncio.run(length_reranker.ahighlight("q", passages)),
    ):
        marked = [None if span is None else text[slice(*span)] for text, span in zip(passages, highlights, strict=True)]
        assert marked == ["The second is longer!", "one sentence only", None, "Same."]
    assert length_reranker.calls == 2  # one call for all sentences


def test_nothing_is_scored_without_a_choice(length_reranker):
    assert length_reranker.highlight("q", ["one sentence", ""]) == [(0, 12), None]
    assert length_reranker.highlight("q", []) == []
    assert length_reranker.calls == 0
    with pytest.raises(InvalidInputError, match="question is empty"):
        length_reranker.highlight(" ", ["one sentence"])


def test_the_usage_of_the_sentences_counts():
    class Counts(LengthReranker):
        def score_pairs(self, pairs, *, overflow=None):
            return [Score.from_logit(len(passage), tokens=10) for _, passage in pairs]

    reranker = Counts()
    ranking = reranker.rank("q", [TEXT])
    ranking.mark(reranker.highlight("q", [TEXT]))
    assert ranking.usage == Usage(tokens=40)
    assert ranking[0].highlight == (17, 38)


def test_the_server_marks_the_passages_of_the_reply():
    body = {"query": "q", "documents": [TEXT, "short", "Some. More text"], "top_n": 2}
    with running(LengthReranker()) as url:
        plain = httpx.post(f"{url}/v2/rerank", json=body).json()["results"]
        marked = httpx.post(f"{url}/v2/rerank", json=body | {"highlight": True}).json()["results"]
        nvidia = {"query": {"text": "q"}, "passages": [{"text": TEXT}], "highlight": "true"}
        (entry,) = httpx.post(f"{url}/v1/ranking", json=nvidia).json()["rankings"]
    assert all("highlight" not in result for result in plain)
    assert [result["highlight"] for result in marked] == [{"start": 17, "end": 38}, {"start": 6, "end": 15}]
    assert entry["highlight"] == {"start": 17, "end": 38}
