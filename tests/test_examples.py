"""Each example as it stands, in a process of its own."""

import re
import shutil
from pathlib import Path

from command import run_code
from support import FACTS

from mistral_rerank.evaluation.datasets import load_beir

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def output(name, *arguments):
    found = run_code(SCRIPT, EXAMPLES / f"{name}.py", *arguments)
    assert found.returncode == 0, found.stderr
    return found.stdout


def answers(text):
    """The paragraphs of an output, as lists of their lines without the indentation."""
    return [[line.strip() for line in paragraph.splitlines()] for paragraph in text.strip().split("\n\n")]


def test_every_example_has_a_test_and_a_line_in_the_readme():
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    source, readme = Path(__file__).read_text("utf-8"), (EXAMPLES / "README.md").read_text("utf-8")
    assert names == set(re.findall(r'output\("(\w+)"', source))
    assert all(f"({name}.py)" in readme for name in names)


def test_the_plain_example_counts_answers_before_and_after(tmp_path):
    facts = shutil.copytree(FACTS, tmp_path / "facts")
    head, *rows = (facts / "qrels" / "test.tsv").read_text("utf-8").splitlines(keepends=True)
    (facts / "qrels" / "test.tsv").write_text("".join([head, *rows[10:20]]), "utf-8")
    counts = re.search(r"(\d+) of (\d+) before, (\d+) after", output("plain_rerank", facts)).groups()
    before, total, after = map(int, counts)
    assert total == 10
    assert 0 < before < total
    assert 0 < after <= total


def test_the_rag_chain_cites_the_answer_or_says_that_there_is_none():
    _, laptop, courses, dentist = answers(output("langchain_rag"))
    assert laptop[1].startswith("A lost or stolen laptop must be reported")
    assert laptop[1].endswith("[1]")
    assert laptop[2].startswith("[1] laptop, probability ")
    assert courses[1].startswith("Each employee has 1,500 euros")
    assert dentist == ["Which dentist does the company recommend?", "The documents do not answer this question."]


def test_the_query_engine_gives_the_llm_the_answer_first():
    query, first, second = output("llama_index_query_engine").splitlines()
    assert query == "Why does ice float on water?"
    assert first.endswith("Water expands as it freezes, so ice is less dense than the liquid around it.")
    assert "was 1" not in first
    assert float(first.split()[0]) >= float(second.split()[0])


def test_hybrid_search_reranks_what_both_searches_found():
    _, *rows = output("hybrid_search").splitlines()
    words, characters, fused, reranked = (row.partition(":")[2].strip().split(", ") for row in rows)
    assert set(fused) == set(words) | set(characters)
    assert set(words) != set(characters)
    assert reranked[0].split()[0] == "adenosine"
    assert fused[0] != "adenosine"


def test_fine_tuning_on_a_folder_writes_a_reranker(tmp_path):
    (tmp_path / "documents").mkdir()
    sections = [f"# What is {name}\n{name} is the number {number}.\n## Empty\n" for number, name in enumerate(("one", "two", "three", "four", "five"))]  # fmt: skip
    (tmp_path / "documents" / "numbers.md").write_text("".join(sections), "utf-8")
    printed = output("finetune_folder", tmp_path / "documents", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert "headings of 5 sections" in printed
    assert re.search(r"right section: 1\.00 with mini, [01]\.\d\d with ", printed)
    assert len(load_beir(tmp_path / "data", split="test").queries) == 1
    assert (tmp_path / "out" / "rerank.json").is_file()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_remote_example_ranks_at_an_endpoint():
    query, first, *others = output("remote_endpoint").splitlines()
    assert query.startswith("Why does ice float on water? Ranked by ")
    assert (
        first.split(maxsplit=3)[3]
        == "Water expands as it freezes, so a block of ice is less dense than the liquid around it."
    )
    assert len(others) == 2
