"""Files as users have them: byte order marks, packed files, JSON, CSV, TSV, and what is no text."""

import gzip
import json

import pytest

from mistral_rerank import InvalidInputError
from mistral_rerank.data_files.passages import read_passages
from mistral_rerank.data_files.text import text_lines
from mistral_rerank.evaluation.run_files import read_run
from mistral_rerank.training.groups import read_groups

BOM = b"\xef\xbb\xbf"


def passages(tmp_path, name, content, **options):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(passage.text, passage.record) for passage in read_passages(file, **options)]


def texts(*arguments, **options):
    return [text for text, _ in passages(*arguments, **options)]


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("packed", [False, True], ids=["as it is", "gz"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("notes.txt", "one\n\n  two \n", ["one", "two"]),
        ("notes.txt", "{not json\n[1] a reference\n", ["{not json", "[1] a reference"]),
        ("a.jsonl", '{"text": "x", "title": "T"}\n\n{"contents": "y"}\n{"page_content": "z"}\n', ["T x", "y", "z"]),
        ("a", '{"text": "x"}\n{"text": "y"}\n', ["x", "y"]),
        ("a.json", '[\n  {"text": "x", "title": null},\n  "y"\n]\n', ["x", "y"]),
        ("a", '[\n  {"text": "x"},\n  "y"\n]\n', ["x", "y"]),
        ("a.json", '{"text": "x"}\n{"text": "y"}\n', ["x", "y"]),
        ("a.json", '{\n  "text": "x"\n}\n', ["x"]),
        ("a.json", "[]", []),
        ("a.csv", 'id,text\r\n1,"two,\nlines"\r\n\r\n2,y\r\n', ["two,\nlines", "y"]),
        ("a.tsv", "id\ttitle\ttext\n1\tT\tx\n", ["T x"]),
    ],
)
def test_passages_of_every_format_are_read_whole(tmp_path, name, content, expected, packed, mark):
    data = mark + content.encode()
    name, data = (f"{name}.gz", gzip.compress(data)) if packed else (name, data)
    assert texts(tmp_path, name, data) == expected


def test_records_come_with_their_fields(tmp_path):
    assert passages(tmp_path, "a.csv", "docid,text\n7,x\n") == [("x", {"docid": "7", "text": "x"})]
    assert passages(tmp_path, "a.json", '[{"id": 7, "text": "x"}, "y"]') == [("x", {"id": 7, "text": "x"}), ("y", {})]


def test_a_field_of_any_name_can_be_the_passage(tmp_path):
    assert texts(tmp_path, "a.csv", "title,body\nT,x\n", text_field="body") == ["x"]
    assert texts(tmp_path, "a.jsonl", '{"title": "T", "body": "x"}\n', text_field="title") == ["T"]
    with pytest.raises(InvalidInputError, match=r"a.csv:2: lacks 'nope'; it has 'title', 'body'"):
        texts(tmp_path, "a.csv", "title,body\nT,x\n", text_field="nope")
    with pytest.raises(InvalidInputError, match="lines of text, which have no field 'body'"):
        texts(tmp_path, "a.txt", "one\n", text_field="body")


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.csv", "id,body\n1,x\n", "a.csv:2: lacks 'text' or 'contents' or 'page_content'; it has 'id', 'body'"),
        ("a.csv", "id,text\n1,x,y\n", "a.csv:2: 3 columns under a header of 2"),
        ("a.csv", 'id,text\n1,"x\n', "a.csv:2: unexpected end of data"),
        ("a.jsonl", '{"text": null}\n', 'a.jsonl:1: "text" is null; expected a string'),
        ("a.jsonl", '{"text": "x", "title": 3}\n', 'a.jsonl:1: "title" is a number; expected a string'),
        ("a.jsonl", '{"text": "x"}\n{\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: expected a JSON object, found a list"),
        ("a.json", "[[1]]", "a.json, item 1: expected a string, or an object"),
        ("a.json", "nonsense\n", "a.json:1: not JSON"),
        ("a.pdf", b"%PDF-1.7", r"a.pdf: .pdf files are not read; give lines of text"),
        ("a.docx", b"PK\x03\x04", r"\.docx files are not read"),
        ("a.parquet", b"PAR1", r"\.parquet files are not read"),
        ("a.xml.gz", gzip.compress(b"<a/>", mtime=0), r"\.xml files are not read"),
        ("a.txt", b"%PDF-1.7", "a.txt is a PDF, not UTF-8 text"),
        ("a", b"PAR1\x15", "a is a Parquet file"),
        ("a", gzip.compress(b"x", mtime=0), "a is a gzip archive"),
        ("a.txt", b"one\0two", "a.txt is binary, or text in UTF-16"),
        ("a.csv", "id,text\n1,x\n".encode("utf-16"), "a.csv is UTF-16 or UTF-32, not UTF-8 text; save it as UTF-8"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-le"), "a.jsonl is binary, or text in UTF-16"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "a.txt is not UTF-8 text"),
        ("a.txt.gz", gzip.compress(b"one\n" * 9, mtime=0)[:-9], "a.txt.gz is damaged or cut off"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, content, hint):
    with pytest.raises(InvalidInputError, match=hint):
        passages(tmp_path, name, content)


def test_a_byte_order_mark_is_no_part_of_the_first_id(tmp_path):
    (tmp_path / "run.trec").write_bytes(BOM + b"q1 Q0 d1 1 2.5 tag\nq1 Q0 d2 2 1.5 tag\n")
    assert read_run(tmp_path / "run.trec") == {"q1": [("d1", 2.5), ("d2", 1.5)]}
    group = {"queries": ["q"], "passages": ["a", "b"], "grades": [[1, 0]]}
    (tmp_path / "groups.jsonl").write_bytes(BOM + json.dumps(group).encode() + b"\n")
    assert read_groups(tmp_path / "groups.jsonl")[0].queries == ("q",)
    (tmp_path / "x").write_bytes(BOM + b"one\n\xef\xbb\xbftwo\n")
    assert list(text_lines(tmp_path / "x")) == ["one\n", "\ufefftwo\n"]
