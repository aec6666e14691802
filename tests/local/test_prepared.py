"""Prepared passages: hits in another process, and folders that are refused."""

import json
import shutil

import pytest
from command import run
from support import make_adapter

from mistral_rerank import CheckpointError, LocalReranker, SettingsError
from mistral_rerank.local import prepared as module

TEMPLATE = '{"template": "Passage: {passage}\\nQuestion: {query}"}'


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    shutil.copytree(tiny, folder)
    (folder / "rerank.json").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def passages(facts):
    return list(facts.corpus.values())[:20]


@pytest.fixture(scope="module")
def prepared(checkpoint, passages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    with pytest.MonkeyPatch.context() as patched, local(checkpoint, passage_cache="1GiB") as reranker:
        patched.setattr(module, "SHARD_BYTES", 10_000)
        reranker.prepare([*passages, passages[0]], out=folder)
        assert reranker.passage_cache_info().entries == 0
    return folder


def local(folder, **options):
    return LocalReranker(str(folder), device="cpu", **{"dtype": "float32"} | options)


def test_prepared_passages_are_not_computed_and_have_their_scores(checkpoint, passages, prepared):
    pairs = [("who?", passage) for passage in passages]
    with local(checkpoint) as plain, local(checkpoint, prepared_passages=prepared) as reranker:
        found, expected = reranker.score_pairs(pairs), plain.score_pairs(pairs)
        info = reranker.passage_cache_info()
    assert [score.logit for score in found] == pytest.approx([score.logit for score in expected], abs=1e-4)
    assert (info.hits, info.misses, info.bytes) == (20, 0, 0)
    assert len(list(prepared.glob("*.safetensors"))) > 1


def test_a_checkpoint_that_needs_a_rerank_config_has_a_checksum_and_prepared_passages(tiny, passages, tmp_path):
    folder, how = shutil.copytree(tiny, tmp_path / "unknown"), tmp_path / "how.json"
    (folder / "rerank.json").unlink(missing_ok=True)
    how.write_text(TEMPLATE)
    with local(folder, rerank_config=how, passage_cache="1GiB") as reranker:
        assert len(reranker.weights_checksum()) > 0
        reranker.prepare(passages[:2], out=tmp_path / "prepared")
    with local(folder, rerank_config=how, prepared_passages=tmp_path / "prepared") as reranker:
        reranker.rank("who?", passages[:2])
        assert reranker.passage_cache_info().hits == 2


def test_prepared_passages_go_with_a_cache_for_others(checkpoint, passages, prepared):
    with local(checkpoint, prepared_passages=prepared, passage_cache="1MiB") as reranker:
        for _ in range(2):
            reranker.rank("who?", [passages[0], "A passage that nobody has prepared before."])
        info = reranker.passage_cache_info()
    assert (info.hits, info.misses, info.entries) == (3, 1, 1)


def refusal(checkpoint, folder, **options):
    with local(checkpoint, prepared_passages=folder, **options) as reranker:
        with pytest.raises(CheckpointError) as caught:
            reranker.rank("who?", ["a passage"])
    assert "run `mistral-rerank prepare` again" in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


def test_other_weights_and_dtypes_are_refused(checkpoint, prepared, tmp_path):
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    (changed / "rerank.json").write_text(TEMPLATE.replace("Question", "Query"))
    assert "was prepared with other weights or another tokenizer" in refusal(changed, prepared)
    message = refusal(checkpoint, prepared, dtype="bfloat16")
    assert "was prepared in float32, and the model runs in bfloat16" in message


def test_a_changed_adapter_is_refused(tiny, passages, tmp_path):
    rerank = json.loads(TEMPLATE)
    adapter = make_adapter(tmp_path / "adapter", tiny, 0, rerank=rerank)
    with local(adapter, base=str(tiny), passage_cache="1MiB") as reranker:
        reranker.prepare(passages[:2], out=tmp_path / "prepared")
    with local(adapter, base=str(tiny), prepared_passages=tmp_path / "prepared") as reranker:
        reranker.rank("who?", passages[:2])
        assert reranker.passage_cache_info().hits == 2
    make_adapter(adapter, tiny, 1, rerank=rerank)
    message = refusal(adapter, tmp_path / "prepared", base=str(tiny))
    assert "was prepared with other weights or another tokenizer" in message


def test_truncated_and_missing_files_are_refused(checkpoint, copy):
    shard = copy / "passages-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert f"is truncated: {len(content) - 1} of {len(content)} bytes" in refusal(checkpoint, copy)
    shard.write_bytes(b"\xff" * len(content))
    assert "is missing or damaged" in refusal(checkpoint, copy)
    shard.unlink()
    assert "is missing or damaged" in refusal(checkpoint, copy)
    (copy / "prepared.json").unlink()
    assert "has no usable prepared.json" in refusal(checkpoint, copy)


def test_a_shard_outside_the_folder_is_refused(checkpoint, copy):
    manifest = json.loads((copy / "prepared.json").read_text())
    manifest["shards"][0]["file"] = "../passages-00000.safetensors"
    (copy / "prepared.json").write_text(json.dumps(manifest))
    assert "has no usable prepared.json" in refusal(checkpoint, copy)


def test_an_error_leaves_no_folder(checkpoint, tmp_path):
    def texts():
        yield from ["a first passage of some words"] * 20
        raise OSError("the disk is gone")

    with local(checkpoint, passage_cache="1MiB") as reranker:
        with pytest.raises(OSError, match="the disk is gone"):
            reranker.prepare(texts(), out=tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(SettingsError, match="exists; give another folder"):
            reranker.prepare(["a"], out=tmp_path)


def test_the_command_prepares_a_file(checkpoint, passages, tmp_path):
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    corpus.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    run("prepare", str(corpus), "--out", str(out), "--model", str(checkpoint), "--device", "cpu", "--dtype", "float32")
    with local(checkpoint, prepared_passages=out) as reranker:
        reranker.rank("who?", passages)
        assert reranker.passage_cache_info().misses == 0
