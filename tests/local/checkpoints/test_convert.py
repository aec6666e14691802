import os

import families
import pytest
import torch

from mistral_rerank import CheckpointError, LocalReranker, SettingsError
from mistral_rerank.local.checkpoints.convert import convert


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-ran",)


def test_an_adapter_in_bin_is_converted_and_scores_as_before(tmp_path):
    folder = families.rankllama(tmp_path)
    pairs = [("who?", "me"), ("who?", "you and me")]
    with LocalReranker(folder, device="cpu", dtype="float32") as reranker:
        expected = reranker.score_pairs(pairs)
    tensors = families.weights(folder, "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with (
        LocalReranker(folder, device="cpu", dtype="float32") as reranker,
        pytest.raises(CheckpointError, match="mistral-rerank convert"),
    ):
        reranker.warmup()
    out = tmp_path / "converted" / folder.name
    convert(str(folder), out)
    with LocalReranker(out, base=folder / "base", device="cpu", dtype="float32") as reranker:
        assert reranker.score_pairs(pairs) == expected
    with pytest.raises(SettingsError, match="exists"):
        convert(str(folder), out)


def test_a_pickle_with_other_objects_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    torch.save({"weight": Evil()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not usable"):
        convert("model", tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


def test_a_folder_without_bin_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert(str(tmp_path), tmp_path / "out")
