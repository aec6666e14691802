"""What must hold on every device: these tests run on CUDA where there is a card, and on the CPU elsewhere."""

import copy

import pytest
import torch
from support import model_logits, plain_logits, tiny_config
from transformers import MistralForSequenceClassification

from mistral_rerank import LocalReranker
from mistral_rerank.local.model import rerank_model
from mistral_rerank.local.model.rerank_model import RerankModel

pytestmark = pytest.mark.any_device

QUESTION = list(range(10, 40))
SEQUENCES = [[5], [6] * 3, [7] * 90, [*QUESTION, 1], [*QUESTION, *[2] * 50], [*QUESTION, 3, 4]]


@pytest.fixture(params=[False, True], ids=["padded", "packed"])
def packed(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(rerank_model, "row_attention", lambda *_: None)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.15)], ids=str
)
def test_scores_equal_transformers_own_in_float32(device, window, dtype, tolerance):
    torch.manual_seed(0)
    reference = MistralForSequenceClassification(tiny_config(100, sliding_window=window)).eval()
    taken = copy.deepcopy(reference)
    for parameter in taken.base_model.parameters():  # buffers stay: rotary frequencies are float32
        parameter.data = parameter.data.to(dtype)
    model = RerankModel(taken.base_model, taken.score, device)
    assert model_logits(model, SEQUENCES) == pytest.approx(plain_logits(reference, SEQUENCES), abs=tolerance)


def test_a_resumed_forward_gives_the_scores_of_a_whole_one(device):
    torch.manual_seed(0)
    classifier = MistralForSequenceClassification(tiny_config(100)).eval()
    model = RerankModel(classifier.base_model, classifier.score, device, resumable=True)
    (batch,) = model.plan(SEQUENCES, 1000)
    assert model.logits(batch, model.states(batch, 2)) == pytest.approx(model.logits(batch), abs=1e-4)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("share_batches", [False, True])
def test_a_reranker_scores_as_on_the_cpu(device, tiny, tiny_reranker, pairs, share_batches):
    expected = [score.logit for score in tiny_reranker.score_pairs(pairs)]
    options = {"dtype": "float32", "batch_tokens": 1000, "share_batches": share_batches}
    with LocalReranker(str(tiny), device=str(device), **options) as reranker:
        logits = [score.logit for score in reranker.score_pairs(pairs)]
        best = reranker.rank(*[pairs[0][0], [passage for _, passage in pairs[:7]]], top_n=1)[0]
    assert logits == pytest.approx(expected, abs=1e-3)
    assert best.score.logit == pytest.approx(max(expected[:7]), abs=1e-3)


def test_the_default_dtype_of_the_device_gives_finite_scores(device, tiny, pairs):
    with LocalReranker(str(tiny), device=str(device)) as reranker:
        assert all(abs(score.logit) < 1e3 for score in reranker.score_pairs(pairs[:20]))
