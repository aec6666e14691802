"""The command as its users run it: a process of its own, with files and pipes."""

import json
import shutil

import pytest
from command import run, run_installed
from remote.endpoint import Endpoint, expected, gives, speaks


@pytest.fixture
def on_tiny(tiny):
    return "--model", tiny, "--device", "cpu", "--dtype", "float32"


def test_rank_reads_files_and_prints_a_table(on_tiny, tmp_path, tiny_reranker):
    (tmp_path / "a.txt").write_text("me\nyou and I\n")
    (tmp_path / "b.jsonl").write_text('{"text": "they", "id": "x"}\n')
    found = run_installed("rank", "who?", tmp_path / "a.txt", tmp_path / "b.jsonl", *on_tiny)
    assert (found.returncode, found.stderr) == (0, "")
    order = [place.text for place in tiny_reranker.rank("who?", ["me", "you and I", "they"])]
    assert [line.strip().split(maxsplit=3)[3] for line in found.stdout.splitlines()[1:]] == order


def test_rank_reads_stdin_and_prints_json_lines(on_tiny, tiny_reranker):
    found = run("rank", "who?", "--json", "--top-n", 1, *on_tiny, stdin='{"text": "me", "id": 1}\n{"text": "you"}\n')
    (record,) = map(json.loads, found.stdout.splitlines())
    (best,) = tiny_reranker.rank("who?", ["me", "you"], top_n=1)
    assert (record["text"], record["index"]) == (best.text, best.index)
    assert record["logit"] == pytest.approx(best.score.logit, abs=1e-4)


def test_score_writes_a_file_or_stdout(on_tiny, tmp_path, tiny_reranker):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "who?", "passage": "me", "id": 5}\n{"query": "where?", "passage": "here"}\n')
    printed = run("score", pairs, *on_tiny)
    written = run("score", pairs, "--out", tmp_path / "out.jsonl", *on_tiny)
    assert (printed.returncode, written.returncode, written.stderr) == (0, 0, "")
    assert (tmp_path / "out.jsonl").read_text() == printed.stdout
    first, second = map(json.loads, printed.stdout.splitlines())
    expected = tiny_reranker.score_pairs([("who?", "me"), ("where?", "here")])
    assert [first["logit"], second["logit"]] == pytest.approx([score.logit for score in expected], abs=1e-4)
    assert first["id"] == 5


def test_rank_asks_an_endpoint(tmp_path):
    passages = ["one", "two", "three"]
    (tmp_path / "a.txt").write_text("\n".join(passages))
    with Endpoint(speaks("nvidia")) as endpoint:
        found = run("rank", "q", tmp_path / "a.txt", "--json", "--backend", "remote", "--base-url", endpoint.url)
    assert (found.returncode, found.stderr) == (0, "")
    assert [json.loads(line)["text"] for line in found.stdout.splitlines()] == [p.text for p in expected(passages)]


def test_an_endpoints_refusal_is_one_line(tmp_path):
    with Endpoint(gives(403, {"detail": "not you"})) as endpoint:
        found = run_installed("rank", "q", "--backend", "remote", "--base-url", endpoint.url, stdin="one\n")
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "403: not you" in found.stderr


def test_info_tells_what_the_model_is(on_tiny):
    found = run("info", *on_tiny)
    assert "mistral, 3 layers of width 64" in found.stdout
    assert "cpu in float32" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("rank", " ", "-"), "the question is empty"),
        (("rank", "who?", "/not/there.txt"), "/not/there.txt"),
        (("rank", "who?", "-", "--dtype", "int7"), "given: 'int7'"),
        (("rank", "who?", "-", "--model", "/not/there"), "there is no folder '/not/there'"),
        (("score", "-"), "stdin:1: not JSON"),
        (("train", "--base", "x", "--data", "/not/there", "--out", "/tmp/never"), "not a BEIR folder"),
        (("train", "--base", "x", "--data", "d", "--out", "o", "--loss", "mse"), "loss: input should be"),
        (("pull", "/not/there"), "there is no folder"),
    ],
)
def test_errors_are_one_line_without_a_traceback(arguments, hint, tmp_path):
    found = run(*(argument.replace("/tmp/never", str(tmp_path / "o")) for argument in arguments), stdin="me\n")
    assert found.returncode == 1
    assert hint in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("file", "content", "hint"),
    [
        ("config.json", b'{"a":' * 100_000, "config.json is not usable: RecursionError"),
        ("rerank.json", b'{"base": {"kind": "wheel", "name": "evil", "requirement": "-x"}}', "no known wheel"),
    ],
)
def test_info_says_in_one_line_what_is_wrong_with_a_hostile_folder(tiny, tmp_path, file, content, hint):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / file).write_bytes(content)
    found = run("info", "--model", folder, "--device", "cpu", "--dtype", "float32")
    assert (found.returncode, found.stdout) == (1, "")
    assert hint in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_input_that_is_not_text_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    found = run_installed("rank", "who?", tmp_path / "x.txt")
    assert (found.returncode, "not UTF-8" in found.stderr) == (1, True)


def test_an_empty_input_gives_an_empty_result(on_tiny):
    found = run("rank", "who?", "--json", *on_tiny, stdin="\n")
    assert (found.returncode, found.stdout) == (0, "")
