"""The example that makes training questions as people really ask them."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_rerank.evaluation.datasets import BeirDataset, load_beir

SCRIPT = Path(__file__).parent.parent / "examples" / "training" / "messy_questions.py"


@pytest.fixture(scope="module")
def messy():
    spec = importlib.util.spec_from_file_location("messy_questions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def abstracts():
    """Two questions with three abstracts each."""
    corpus = {f"{q}{i}": f"First of {q}{i}. Second of {q}{i}. Third of {q}{i}. Fourth." for q in "ab" for i in range(3)}
    return BeirDataset("x", corpus, {"a": "a?", "b": "b?"}, {q: {f"{q}{i}": 1 for i in range(3)} for q in "ab"})


def test_a_request_is_a_piece_of_an_abstract_that_is_not_there_any_more(messy):
    dataset = messy.requests(abstracts(), random.Random(1))
    assert set(dataset.queries) == {"a", "b"}
    for query, text in dataset.queries.items():
        (gone,) = {passage for passage in abstracts().corpus if passage[0] == query} - set(dataset.corpus)
        assert text in abstracts().corpus[gone]
        assert set(dataset.positives(query)) == {f"{query}{i}" for i in range(3)} - {gone}


def test_a_double_question_has_an_answer_in_two_passages(messy):
    corpus = {f"p{i}": f"the river number{i} flows through the valley" for i in range(12)}
    queries = {f"q{i}": f"What flows through number{i}?" for i in range(12)}
    dataset = messy.doubles(
        BeirDataset("x", corpus, queries, {f"q{i}": {f"p{i}": 1} for i in range(12)}), random.Random(1)
    )
    assert dataset.corpus == corpus
    for query, text in dataset.queries.items():
        assert len(dataset.positives(query)) == 2
        for passage in dataset.positives(query):
            assert f"number{passage[1:]}" in text
        assert ", and What" not in text


def test_template_questions_are_rephrased(messy):
    questions = {messy.as_a_patient("What are the symptoms of Gout ?", random.Random(seed)) for seed in range(400)}
    assert "how do i know if i have Gout" in questions
    assert "signs of gout" in questions
    assert any("Gout ?" in text for text in questions), "one in five keeps its words"


def test_a_slip_of_the_keys_leaves_short_words_alone(messy):
    texts = [messy.mistyped("why is my kidney hurting", random.Random(seed)).split() for seed in range(60)]
    assert all((text[0], text[1], text[2]) == ("why", "is", "my") for text in texts)
    assert len({tuple(text) for text in texts}) > 5


def test_the_command_writes_folders_and_groups_that_are_read_again(messy, tmp_path):
    data, groups = tmp_path / "data", tmp_path / "groups"
    for name in ("bioasq_6_8", "squad_du"):
        messy.write(abstracts(), data / name)
    groups.mkdir()
    line = {"queries": ["What causes Gout ?"], "passages": ["x"], "grades": [[1.0]], "teacher": [[2.5]]}
    for name in ("medquad", "stackexchange_small", "techdocs_faq"):
        (groups / f"{name}.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
    command = [sys.executable, SCRIPT, data, groups, tmp_path / "out"]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "requests: 2 questions, 4 passages" in process.stdout
    assert len(load_beir(tmp_path / "out" / "requests").queries) == 2
    written = json.loads((tmp_path / "out" / "medquad.jsonl").read_text("utf-8"))
    assert "gout" in written["queries"][0].lower()
    assert written | {"queries": line["queries"]} == line
