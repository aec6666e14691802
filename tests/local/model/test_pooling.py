"""Checkpoints whose tokens look ahead too, or of whose hidden states the mean is pooled."""

import json
import shutil

import pytest
import torch
from support import model_logits, tiny_config
from transformers import MistralForSequenceClassification

from mistral_rerank import CheckpointError, LocalReranker
from mistral_rerank.local.checkpoints.config import CheckpointConfig
from mistral_rerank.local.checkpoints.export import export_merged
from mistral_rerank.local.checkpoints.loading import open_checkpoint
from mistral_rerank.local.model.pooling import LAST_TOKEN, PoolingConfig
from mistral_rerank.local.model.rerank_model import RerankModel

READINGS = [PoolingConfig(bidirectional=True, mean=True), PoolingConfig(bidirectional=True), PoolingConfig(mean=True)]
SEQUENCES = [[*range(10, 22), *range(30, 30 + rest)] for rest in (1, 40, 40, 3, 25)] + [[7, 8]]


def plain(model, ids, reading, window):
    """One sequence through plain transformers, with an attention mask written out."""
    near = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
    seen = (near.abs() if reading.bidirectional else near) < (window or len(ids))
    seen &= torch.tensor(reading.bidirectional) | (near >= 0)
    with torch.inference_mode():
        hidden = model.model(torch.tensor([ids]), attention_mask=seen[None, None], use_cache=False).last_hidden_state
        return model.score(hidden.mean(1) if reading.mean else hidden[:, -1]).item()


@pytest.mark.parametrize("window", [None, 24], ids=["full", "window"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("reading", [*READINGS, LAST_TOKEN], ids=repr)
def test_scores_are_those_of_a_plain_loop(reading, packed, window):
    torch.manual_seed(0)
    model = MistralForSequenceClassification(tiny_config(100, sliding_window=window)).eval()
    expected = [plain(model, ids, reading, window) for ids in SEQUENCES]
    ours = RerankModel(model.model, model.score, torch.device("cpu"), pooling=reading, packed=packed)
    assert model_logits(ours, SEQUENCES) == pytest.approx(expected, abs=1e-5)
    parts = ours.plan(SEQUENCES, 60)
    assert sorted(member for part in parts for member in part.members) == list(range(len(SEQUENCES)))
    assert len(parts) > 1
    assert model_logits(ours, SEQUENCES, 60) == pytest.approx(expected, abs=1e-5)
    if packed:
        whole = sum(map(len, SEQUENCES))
        (batch,) = ours.plan(SEQUENCES, 10**9)
        assert batch.real_tokens == whole if reading != LAST_TOKEN else batch.real_tokens < whole


def test_they_score_otherwise():
    torch.manual_seed(0)
    model = MistralForSequenceClassification(tiny_config(100, sliding_window=None)).eval()
    logits = [plain(model, SEQUENCES[1], reading, None) for reading in (*READINGS, LAST_TOKEN)]
    assert len({round(logit, 4) for logit in logits}) == 4


def test_a_checkpoint_says_how_it_reads(tiny, pairs, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(tiny, folder)
    config = CheckpointConfig(attention="bidirectional", pooling="mean")
    (folder / "rerank.json").write_text(config.model_dump_json())
    assert open_checkpoint(str(folder)).config.pooling_config == READINGS[0]
    found = {}
    for name in (tiny, folder):
        with LocalReranker(str(name), device="cpu", dtype="float32") as reranker:
            found[name] = [score.logit for score in reranker.score_pairs(pairs[:10])]
    assert found[tiny] != pytest.approx(found[folder], abs=1e-3)
    with pytest.raises(CheckpointError, match="other engines do not know"):
        export_merged(str(folder), tmp_path / "merged")
    (folder / "rerank.json").write_text(json.dumps({"pooling": "first"}))
    with pytest.raises(CheckpointError, match="pooling"):
        open_checkpoint(str(folder))
