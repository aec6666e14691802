"""The recipe `examples/training/mini`: its groups, its weights, and what a training must survive."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from command import run_code
from safetensors.torch import load_file, save_file

RECIPE = Path(__file__).parent.parent / "examples" / "training" / "mini"
SCRIPT = """
import runpy, sys
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_groups_are_repeated_until_a_later_file_appears(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    monkeypatch.delitem(sys.modules, "rows", raising=False)
    from rows import Steps

    first, later = tmp_path / "pass-0.jsonl", tmp_path / "pass-1.jsonl"
    first.write_text("a\nb\n")
    steps = iter(Steps([first, later], 2))
    assert [sorted(next(steps)) for _ in range(2)] == [["a", "b"], ["a", "b"]]
    later.write_text("c\nd\n")
    assert [sorted(next(steps)) for _ in range(3)] == [["c", "d"], ["c", "d"], ["a", "b"]]


def test_steps_without_a_finite_gradient_leave_the_weights_finite(tiny, tmp_path):
    group = {"queries": ["When?", "Who?"], "passages": ["In May.", "Nobody."], "grades": [[1.0, 0.0], [0.0, 1.0]]}
    lines = [json.dumps(group | {"teacher": [[1.0, value], [0.0, 2.0]]}) for value in (0.0, float("nan"))]
    (tmp_path / "pass-0.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["--base", tiny, "--layers", 3, "--rank", 4, "--groups", tmp_path / "pass-0.jsonl", "--workers", 0]
    arguments += ["--groups-per-step", 1, "--seconds", 100, "--device", "cpu", "--out", tmp_path]
    trained = run_code(SCRIPT, (RECIPE / "train.py").as_posix(), *arguments)
    assert trained.returncode == 1
    assert "21 steps without a finite gradient" in trained.stderr
    assert json.loads((tmp_path / "training.json").read_text())["steps"] in (20, 21)
    weights = load_file(tmp_path / "adapter-0.safetensors") | load_file(tmp_path / "adapter-1.safetensors")
    assert len(weights) == 3 * 7 * 2 + 1
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert all(tensor.any() for tensor in weights.values())


class LexicalEmbeddings:
    """Two teachers, each of which counts letters."""

    def of(self, _kind, texts):
        return np.array([[[text.count(letter) for letter in "etaoin"] for text in texts]] * 2, np.float32)


def test_a_group_holds_the_answers_and_what_bm25_retrieves_and_doubts_what_teachers_rank_as_high(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    from retrieved import retrieved_groups

    bakeries = {f"p{number}": f"The bakery number {number} of the town opens at {number}." for number in range(30)}
    questions = {f"q{number}": f"When does the bakery number {number} open?" for number in range(12)}
    folder = tmp_path / "boolq_test"
    (folder / "qrels").mkdir(parents=True)
    lines = [{"_id": key, "title": "", "text": text} for key, text in bakeries.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"_id": key, "text": text} for key, text in questions.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = "".join(f"q{number}\tp{number}\t1\n" for number in range(12))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)

    groups = retrieved_groups(tmp_path, LexicalEmbeddings(), "boolq_test", 0, 7, most=8)
    assert groups == retrieved_groups(tmp_path, LexicalEmbeddings(), "boolq_test", 0, 7, most=8)
    assert sum(len(group.queries) for group in groups) == 8
    assert any(None in grades for group in groups for grades in group.grades)
    for group in groups:
        assert len(set(group.passages)) == len(group.passages) <= 20
        for row, (grades, logits) in enumerate(zip(group.grades, group.teacher, strict=True)):
            answer = grades.index(1.0)
            assert grades.count(1.0) == 1
            assert group.passages[answer].split("number ")[1].split()[0] in group.queries[row]
            assert logits[answer] == max(logits)


def test_an_average_has_the_means_of_all_weights(tmp_path):
    for name, value in (("one", 1.0), ("two", 4.0)):
        (tmp_path / name).mkdir()
        tensors = {"lora_A": torch.full((2, 3), value).bfloat16(), "score": torch.tensor([value])}
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "rerank.json").write_text(name)
    done = run_code(SCRIPT, (RECIPE / "average.py").as_posix(), tmp_path / "mean", tmp_path / "one", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    mean = load_file(tmp_path / "mean" / "adapter_model.safetensors")
    assert mean["lora_A"].dtype == torch.bfloat16
    assert mean["lora_A"].unique().tolist() == mean["score"].tolist() == [2.5]
    assert (tmp_path / "mean" / "rerank.json").read_text() == "one"


def test_a_disguised_answer_shares_no_word_with_its_question_and_an_echo_shares_some(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    import disguised
    from overlap import shared_words

    monkeypatch.setattr(disguised, "synonyms", {"restored": ("repaired",), "mill": ("plant",)}.get)
    question, draw = "Who restored the wooden mill in Barrow?", random.Random(1)
    answer = "In 1931, the wooden mill of old Barrow was restored by Hilde Moen, paid by the town."
    texts = {disguised.disguised(question, answer, draw) for _ in range(20)}
    assert all(shared_words(question, text) == 0 for text in texts)
    assert all("1931" in text and "Hilde Moen" in text for text in texts)
    assert any("plant" in text and "repaired" in text for text in texts)
    echoes = [echo for _ in range(20) for echo in disguised.echoes(question, ["Oslo"], draw)]
    assert all(shared_words(question, echo) >= 0.25 for echo in echoes)


def test_words_of_one_meaning_keep_their_form(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPE))
    import wordnet

    monkeypatch.setattr(wordnet, "WORDNET", tmp_path)
    senses = {
        "verb": "00000000 29 v 02 carry 0 tote 0 001 @ 00000040 v 0000 | move",
        "noun": "00000000 06 n 03 city 0 Rome 0 big_town 0 000 | a place",
        "adj": "",
    }
    base_forms = {"verb": "carry v 1 1 @ 1 0 00000000\n", "noun": "city n 1 0 1 0 00000000\n", "adj": ""}
    for part, line in senses.items():
        (tmp_path / f"data.{part}").write_text(line + "\n")
        (tmp_path / f"index.{part}").write_text("  1 licence\n" + base_forms[part])
        (tmp_path / f"{part}.exc").write_text("")
    for forgotten in (wordnet.synonyms, wordnet._index, wordnet._irregular, wordnet._senses):
        forgotten.cache_clear()
    words = "carried", "carrying", "carries", "cities", "city", "unknown"
    assert [wordnet.synonyms(word) for word in words] == [
        *(("toted",), ("toting",), ("totes",), ("big towns",), ("big town",), ()),
    ]
