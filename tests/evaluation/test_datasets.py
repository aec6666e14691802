import gzip

import pytest

from mistral_rerank import InvalidInputError
from mistral_rerank.evaluation.datasets import load_beir


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "title": "", "text": "two"}\n{"_id": 3, "text": "x"}\n'
    )
    with gzip.open(tmp_path / "queries.jsonl.gz", "wt") as file:
        file.write('{"_id": "q1", "text": "who?"}\n{"_id": "q2", "text": "not judged"}\n')
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    return tmp_path


def test_a_folder_is_read_plain_or_packed(folder):
    data = load_beir(folder)
    assert data.corpus == {"d1": "T one", "d2": "two", "3": "x"}
    assert data.queries == {"q1": "who?"}
    assert data.qrels == {"q1": {"d1": 2, "d2": 0}}
    assert data.positives("q1") == ["d1"]


def test_one_of_several_splits_must_be_named(folder):
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\n")
    with pytest.raises(InvalidInputError, match="found: dev, test"):
        load_beir(folder)
    assert load_beir(folder, split="dev").positives("q1") == ["d2"]


@pytest.mark.parametrize(
    ("file", "content", "hint"),
    [
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\nnonsense\n', "corpus.jsonl:2: not JSON"),
        ("corpus.jsonl", '{"_id": "d1"}\n', "corpus.jsonl:1: lacks 'text' or 'contents'"),
        ("corpus.jsonl", '{"_id": "d1", "text": null}\n', 'corpus.jsonl:1: "text" is null; expected a string'),
        ("corpus.jsonl", '{"_id": null, "text": "a"}\n', 'corpus.jsonl:1: "_id" is null; expected a string'),
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n',
            "corpus.jsonl:2: the id 'd1' of an earlier",
        ),
        ("qrels/test.tsv", "q1\td1\t0.5\n", "test.tsv:1: expected query-id"),
        ("qrels/test.tsv", "q1\td1\t1\nq1\td1\t0\n", "test.tsv:2: another score"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\n", "test.tsv:2: expected query-id"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq9\td1\t1\n", "such as 'q9'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "has 0 judged queries and 3 passages"),
        ("corpus.jsonl", "", "has 1 judged queries and 0 passages"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(folder, file, content, hint):
    (folder / file).write_text(content)
    with pytest.raises(InvalidInputError, match=hint):
        load_beir(folder)


def test_a_file_that_was_cut_off_is_named(folder):
    packed = folder / "queries.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(InvalidInputError, match=r"queries.jsonl.gz is damaged or cut off"):
        load_beir(folder)


@pytest.mark.parametrize("missing", ["corpus.jsonl", "queries.jsonl.gz", "qrels/test.tsv"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(InvalidInputError, match="not a BEIR folder"):
        load_beir(folder)


def test_judgements_without_a_header_keep_their_first(folder):
    (folder / "qrels" / "test.tsv").write_text("q1\td1\t2\nq1\td2\t0\n\n")
    assert load_beir(folder).qrels == {"q1": {"d1": 2, "d2": 0}}


def test_byte_order_marks_are_no_part_of_ids_and_texts(folder):
    expected = load_beir(folder)
    for file in ("corpus.jsonl", "qrels/test.tsv"):
        (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())
    packed = folder / "queries.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + gzip.decompress(packed.read_bytes())))
    assert load_beir(folder) == expected
    (folder / "qrels" / "test.tsv").write_bytes(b"\xef\xbb\xbfq1\td1\t2\nq1\td2\t0\n")
    assert load_beir(folder) == expected, "without a header too"


def test_judgements_are_read_plain_or_packed(folder):
    expected, plain = load_beir(folder), folder / "qrels" / "test.tsv"
    (folder / "qrels" / "dev.tsv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert load_beir(folder, split="dev") == expected
    plain.unlink()
    assert load_beir(folder) == expected


def test_ids_and_texts_of_other_tools_are_read(folder):
    (folder / "corpus.jsonl").write_text('{"id": "d1", "contents": "one"}\n{"id": 2, "page_content": "two"}\n')
    assert load_beir(folder).corpus == {"d1": "one", "2": "two"}
