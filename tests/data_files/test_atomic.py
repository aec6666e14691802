import io
import json
import os
import subprocess
import sys
import threading

import pytest

from mistral_rerank import InvalidInputError, SettingsError
from mistral_rerank.data_files.atomic import atomic_write, complete_lines, replacement, write_json
from mistral_rerank.data_files.pairs import BLOCK, score_file, score_lines


def pairs_text(count):
    return "".join(json.dumps({"query": "q", "passage": "a" * (n % 7), "id": n}) + "\n" for n in range(count))


def expected(count, reranker):
    return list(score_lines(reranker, io.StringIO(pairs_text(count)), "pairs"))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def nothing(_):
    pass


def test_scores_are_added_to_the_records(length_reranker):
    (record,) = expected(1, length_reranker)
    assert record == {"query": "q", "passage": "", "id": 0, "logit": 0.0, "probability": 0.5}


def test_a_stopped_run_goes_on_and_equals_one_that_was_not(tmp_path, length_reranker):
    count, out = 2 * BLOCK + 10, tmp_path / "scores.jsonl"
    seen = []
    calls = length_reranker.score_pairs

    def stops(pairs):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(len(pairs))
        return calls(pairs)

    length_reranker.score_pairs = stops
    with pytest.raises(KeyboardInterrupt):
        score_file(length_reranker, io.StringIO(pairs_text(count)), "pairs", out, settings={}, progress=nothing)
    assert not out.exists()
    partial = tmp_path / "scores.jsonl.partial"
    assert len(read(partial)) == BLOCK
    with partial.open("a") as file:
        file.write('{"query": "half a li')
    length_reranker.score_pairs = calls
    progress = []
    done = score_file(
        length_reranker, io.StringIO(pairs_text(count)), "pairs", out, settings={}, progress=progress.append
    )
    assert (done, progress) == (count, [BLOCK, BLOCK, 10])
    assert read(out) == expected(count, length_reranker)
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_does_not_go_on_with_other_weights_of_the_same_name(tmp_path, length_reranker):
    out, bad = tmp_path / "s.jsonl", pairs_text(BLOCK) + "{}\n"
    length_reranker.weights_checksum = lambda: "one"
    with pytest.raises(InvalidInputError):
        score_file(length_reranker, io.StringIO(bad), "p", out, settings={}, progress=nothing)
    length_reranker.weights_checksum = lambda: "two"
    with pytest.raises(SettingsError, match="another weights"):
        score_file(length_reranker, io.StringIO(bad), "p", out, settings={}, progress=nothing)


def test_a_second_process_does_not_write_the_same_file(tmp_path, length_reranker):
    out = tmp_path / "s.jsonl"

    def refused_meanwhile(_):
        code = "import sys; from pathlib import Path; from mistral_rerank.data_files.atomic import only_writer\n"
        code += "with only_writer(Path(sys.argv[1])): pass"
        second = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True)
        assert f"another process writes {out}" in second.stderr
        seen.append(second.returncode)

    seen = []
    score_file(length_reranker, io.StringIO(pairs_text(3)), "p", out, settings={}, progress=refused_meanwhile)
    assert seen == [1, 1]
    assert read(out) == expected(3, length_reranker)
    assert list(tmp_path.iterdir()) == [out]


def test_wrong_lines_are_set_aside_with_their_reasons_also_after_a_stop(tmp_path, length_reranker):
    lines = [
        *pairs_text(BLOCK).splitlines(keepends=True),
        "no JSON\n",
        '{"query": "q"}\n',
        '{"query": "q", "passage": "x"}',
    ]
    out, rejects = tmp_path / "s.jsonl", tmp_path / "rejects.jsonl"
    options = {"settings": {}, "progress": nothing, "rejects": rejects}
    scored = length_reranker.score_pairs

    def stops(pairs):
        if len(pairs) < BLOCK:
            raise KeyboardInterrupt
        return scored(pairs)

    length_reranker.score_pairs = stops
    with pytest.raises(KeyboardInterrupt):
        score_file(length_reranker, lines, "p", out, **options)
    length_reranker.score_pairs = scored
    assert score_file(length_reranker, lines, "p", out, **options) == BLOCK + 1
    assert [(reject["line"], reject["text"]) for reject in read(rejects)] == [
        (BLOCK + 1, "no JSON"),
        (BLOCK + 2, '{"query": "q"}'),
    ]
    assert "not JSON" in read(rejects)[0]["reason"]
    assert "lacks 'passage'" in read(rejects)[1]["reason"]


def test_a_resume_reads_line_by_line(tmp_path):
    file = tmp_path / "lines"
    file.write_bytes(b"one\ntwo\nhal")
    lines = complete_lines(file)
    assert next(lines) == b"one\n"
    assert [*lines] == [b"two\n"]
    assert file.read_bytes() == b"one\ntwo\n"
    assert [*complete_lines(tmp_path / "none")] == []


def test_a_partial_file_of_other_pairs_is_not_continued(tmp_path, length_reranker):
    (tmp_path / "s.jsonl.partial").write_text('{"query": "other", "passage": "x", "logit": 1}\n')
    with pytest.raises(InvalidInputError, match="scores of other pairs"):
        score_file(
            length_reranker, io.StringIO(pairs_text(3)), "p", tmp_path / "s.jsonl", settings={}, progress=nothing
        )


def test_a_run_does_not_go_on_with_other_settings(tmp_path, length_reranker):
    out, bad = tmp_path / "s.jsonl", pairs_text(BLOCK) + '{"query": " ", "passage": "x"}\n'
    with pytest.raises(InvalidInputError):
        score_file(length_reranker, io.StringIO(bad), "p", out, settings={"dtype": "float32"}, progress=nothing)
    with pytest.raises(SettingsError, match=r"s.jsonl.partial holds work with another dtype; remove it"):
        score_file(length_reranker, io.StringIO(bad), "p", out, settings={"dtype": "float16"}, progress=nothing)
    assert len(read(tmp_path / "s.jsonl.partial")) == BLOCK
    (tmp_path / "s.jsonl.partial").unlink()  # as it was told to
    good, other = pairs_text(1), {"dtype": "float16"}
    assert score_file(length_reranker, io.StringIO(good), "p", out, settings=other, progress=nothing) == 1


def test_half_a_surrogate_pair_is_scored_and_written_as_it_came(tmp_path, length_reranker):
    pair, out = '{"query": "q", "passage": "cut \\ud83d"}\n', tmp_path / "s.jsonl"
    score_file(length_reranker, io.StringIO(pair), "p", out, settings={}, progress=nothing)
    assert [record["passage"] for record in read(out)] == ["cut \ud83d"]
    out.rename(tmp_path / "s.jsonl.partial")
    score_file(length_reranker, io.StringIO(pair * 2), "p", out, settings={}, progress=nothing)
    assert len(read(out)) == 2


def test_a_file_that_fails_half_way_leaves_what_was_there(tmp_path):
    (tmp_path / "kept").write_text("old")

    def write():
        with atomic_write(tmp_path / "kept") as lines:
            lines.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_a_wrong_pair_stops_the_run_and_keeps_what_is_done(tmp_path, length_reranker):
    text = pairs_text(BLOCK) + '{"query": " ", "passage": "x"}\n'
    with pytest.raises(InvalidInputError, match=f'p:{BLOCK + 1}: "query" is empty'):
        score_file(length_reranker, io.StringIO(text), "p", tmp_path / "s.jsonl", settings={}, progress=nothing)
    assert len(read(tmp_path / "s.jsonl.partial")) == BLOCK
    assert not (tmp_path / "s.jsonl").exists()


def test_an_existing_result_is_not_overwritten(tmp_path, length_reranker):
    (tmp_path / "s.jsonl").write_text("kept")
    with pytest.raises(InvalidInputError, match="exists"):
        score_file(
            length_reranker, io.StringIO(pairs_text(3)), "p", tmp_path / "s.jsonl", settings={}, progress=nothing
        )
    assert (tmp_path / "s.jsonl").read_text() == "kept"


def test_threads_that_write_one_file_each_leave_it_whole(tmp_path):
    file, barrier, failures = tmp_path / "kept.json", threading.Barrier(8), []

    def write(number):
        barrier.wait()
        try:
            for _ in range(20):
                write_json(file, [number] * 5000)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(set(json.loads(file.read_text()))) == 1
    assert list(tmp_path.iterdir()) == [file]


def test_two_that_write_at_once_do_not_meet(tmp_path):
    with atomic_write(tmp_path / "x") as one, atomic_write(tmp_path / "x") as two:
        one.write("one")
        two.write("two")
    assert (tmp_path / "x").read_text() == "one", "the last to finish"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_new_file_has_the_permissions_that_the_umask_gives(tmp_path):
    (tmp_path / "usual").write_text("x")
    write_json(tmp_path / "ours", {})
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path):
    def make():
        with replacement(tmp_path / "out") as folder:
            folder.mkdir()
            (folder / "half").write_text("x")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        make()
    assert list(tmp_path.iterdir()) == []
