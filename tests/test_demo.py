"""`mistral-rerank demo`, and the data that comes with the package."""

import io
import tomllib
from pathlib import Path

from command import run
from support import LengthReranker

from mistral_rerank.cli.demo import ROWS, print_demo
from mistral_rerank.cli.terminal import Terminal
from mistral_rerank.demo import BM25_RUN, FACTS, SHOWN, demo_questions
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.evaluation.run_files import read_run

NEXT = 'mistral-rerank rank "your question" passages.txt --highlight'


def printed(width=160, **options):
    written = io.StringIO()
    print_demo(LengthReranker(), Terminal(file=written, width=width, **options))
    return written.getvalue()


def test_the_stored_run_is_that_of_bm25(facts):
    rankings = BM25(facts.corpus).search(list(facts.queries.values()), k=10)
    expected = {query: [passage for passage, _ in found] for query, found in zip(facts.queries, rankings, strict=True)}
    assert {query: [passage for passage, _ in found] for query, found in read_run(BM25_RUN).items()} == expected


def test_the_questions_are_the_first_that_bm25_does_not_answer_in_first_place(facts):
    run = read_run(BM25_RUN)
    missed = [facts.queries[query] for query in facts.queries if run[query][0][0] not in facts.positives(query)]
    questions = demo_questions()
    assert list(questions) == missed[:SHOWN]
    for candidates in questions.values():
        assert [candidate.answers for candidate in candidates].count(True) == 1
        assert not candidates[0].answers
        assert all(candidate.text == f"{candidate.title} {candidate.body}" for candidate in candidates)


def test_both_orders_are_printed_side_by_side_and_the_best_sentence_is_marked():
    lines = [line.rstrip() for line in printed().splitlines()]
    for query, candidates in demo_questions().items():
        start = lines.index(query)
        by_length = sorted(range(len(candidates)), key=lambda index: -len(candidates[index].text))
        for place, index in enumerate(by_length[:ROWS]):
            row = lines[start + 2 + place]
            before, after = candidates[place], candidates[index]
            assert row.startswith(str(place + 1))
            assert f"{'*' if before.answers else ' '} {before.title}" in row
            assert f"{'*' if after.answers else ' '} {after.title}" in row
            assert row.split()[-2] == str(index + 1)
        end = lines.index("", start)
        passage = " ".join(line.strip() for line in lines[start + 2 + ROWS : end])
        body = candidates[by_length[0]].body
        assert passage.replace("[", "").replace("]", "") == body
        marked = passage[passage.index("[") + 1 : passage.index("]")]
        assert marked == max((part.strip(".") + "." for part in body.split(". ")), key=len)
    assert lines[-1].strip() == NEXT


def test_long_titles_are_cut_on_a_narrow_terminal_and_headings_are_not():
    headings = [line.split() for line in printed(width=80).splitlines() if line.strip().startswith("BM25")]
    assert [words[-1] for words in headings] == ["probability"] * SHOWN


def test_colours_mark_the_sentence_on_a_terminal_and_only_there():
    assert "\x1b[" not in printed()
    assert "[" not in printed(force_terminal=True, color_system=None)
    assert "\x1b[38;2;0;0;0;48;2;255;215;95m" in printed(force_terminal=True, color_system="truecolor")


def test_the_command_runs_with_a_model_of_ones_own(tiny):
    found = run("demo", "--model", tiny, "--device", "cpu", "--dtype", "float32")
    assert (found.returncode, found.stderr) == (0, "")
    assert [line for line in found.stdout.splitlines() if line in demo_questions()] == list(demo_questions())
    assert found.stdout.endswith(f"{NEXT}\n")


def test_the_wheel_includes_the_data():
    root = Path(__file__).parents[1]
    wheel = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    files = [FACTS / "corpus.jsonl", FACTS / "queries.jsonl", FACTS / "qrels" / "test.tsv", BM25_RUN]
    assert all(file.is_file() and file.is_relative_to(root / "core" / "mistral_rerank") for file in files)
    assert "core/mistral_rerank" in wheel["packages"]
    assert not wheel.get("exclude")
