"""The embedded default, as its users get it."""

import re
from importlib import resources

import pytest
import torch
from peft import PeftModel
from support import plain_logits
from transformers import AutoModelForSequenceClassification

from mistral_rerank import LocalReranker
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.local.checkpoints.loading import load_tokenizer, open_checkpoint
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.templates import Template


@pytest.fixture(scope="module")
def mini():
    """Keeps scores, since tests share pairs."""
    with LocalReranker("mini", device="cpu", dtype="float32", cache_size=10_000) as reranker:
        yield reranker


def test_mini_equals_plain_transformers_and_peft(mini, facts):
    checkpoint = open_checkpoint("mini")
    passages = list(facts.corpus.values())
    pairs = [(query, passages[n]) for n, query in enumerate(list(facts.queries.values())[:12])]
    tokenizer = PairTokenizer(load_tokenizer(checkpoint), Template(checkpoint.config.template), max_length=8192)
    base = AutoModelForSequenceClassification.from_pretrained(
        checkpoint.base, num_labels=1, num_hidden_layers=16, dtype=torch.float32
    )
    adapted = PeftModel.from_pretrained(base, checkpoint.folder).eval()
    expected = plain_logits(adapted, [pair.sequences[0] for pair in tokenizer.encode(pairs)])
    assert [score.logit for score in mini.score_pairs(pairs)] == pytest.approx(expected, abs=1e-4)


def test_special_tokens_spelled_in_a_passage_stay_text(mini):
    checkpoint = open_checkpoint("mini")
    tokenizer = load_tokenizer(checkpoint)
    maker = PairTokenizer(tokenizer, Template(checkpoint.config.template), max_length=8192)
    for spelled in ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<repo_name>", "<file_sep>"):
        ((ids,),) = [pair.sequences for pair in maker.encode([("who?", f"me {spelled}")])]
        assert not set(ids[:-1]) & set(tokenizer.all_special_ids)


def reordered(mini, facts, candidates):
    """The candidates of each question in mini's order; one call reads a passage once for all questions."""
    pairs = [(facts.queries[query], facts.corpus[i]) for query, ids in candidates.items() for i in ids]
    logits = iter([score.logit for score in mini.score_pairs(pairs)])
    return {
        query: sorted(ids, key=dict(zip(ids, logits, strict=False)).__getitem__, reverse=True)
        for query, ids in candidates.items()
    }


def answered_first(facts, rankings):
    """How many questions are answered by the passage at the top."""
    return sum(ids[0] == facts.positives(query)[0] for query, ids in rankings.items())


def test_mini_tells_an_answer_from_passages_about_other_things(mini, facts):
    passages = list(facts.corpus)
    candidates = {
        query: facts.positives(query) + [passages[(7 * number + 9 * step) % len(passages)] for step in range(9)]
        for number, query in enumerate(facts.queries)
    }
    assert answered_first(facts, reordered(mini, facts, candidates)) >= 34


def test_the_answers_of_the_web_pages_sample_come_first(mini):
    page = resources.files("mistral_rerank.server").joinpath("page.html").read_text(encoding="utf-8")
    question, *passages = re.findall(r'"(.*)"', re.search(r"const SAMPLE = {(.*?)\n};", page, re.DOTALL)[1])
    first, second, *_ = mini.rank(question, passages)
    assert {first.index, second.index} == {4, 7}
    assert first.score.logit > 1


@pytest.fixture(scope="module")
def misleading(facts):
    """BM25's ten passages for each question, among which word overlap misleads."""
    rankings = BM25(facts.corpus).search(list(facts.queries.values()), k=10)
    return {query: [passage for passage, _ in found] for query, found in zip(facts.queries, rankings, strict=True)}


@pytest.fixture(scope="module")
def corrected(mini, facts, misleading):
    return reordered(mini, facts, misleading)


def test_mini_puts_answers_higher_where_word_overlap_misleads(facts, misleading, corrected):
    places = []
    for query, ids in misleading.items():
        (answer,) = facts.positives(query)
        places.append((ids.index(answer), corrected[query].index(answer)))
    higher, lower = sum(after < before for before, after in places), sum(after > before for before, after in places)
    assert higher >= 4 * lower, "16 and 2 of 40 when it was trained"
    gain = sum(1 / (1 + after) - 1 / (1 + before) for before, after in places) / len(places)
    assert gain >= 0.08, "of the mean reciprocal rank: 0.11 when it was trained"


@pytest.mark.xfail(
    strict=True,
    reason="this training of mini often puts the answer second, after shared words; its card has the figures",
)
def test_mini_beats_bm25_where_word_overlap_misleads(facts, misleading, corrected):
    assert answered_first(facts, corrected) >= answered_first(facts, misleading) + 8


def test_the_best_passage_reaches_minis_second_pass(mini, facts):
    questions, passages = list(facts.queries.values())[:20], list(facts.corpus.values())
    with LocalReranker("mini", device="cpu", dtype="float32", cascade_depth=8) as chooser:
        pairs = [(question, passage) for question in questions for passage in passages[:40]]
        whole, found = ([score.logit for score in reranker.score_pairs(pairs)] for reranker in (mini, chooser))
    best = [range(start, start + 40) for start in range(0, len(pairs), 40)]
    kept = sum(max(found[i] for i in of) == pytest.approx(max(whole[i] for i in of), abs=1e-4) for of in best)
    assert kept >= 19
