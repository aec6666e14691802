"""A decoder's layers on several devices: a second CPU stage, or a GPU and a CPU, and "meta" to see where states go."""

import pytest
import torch
from support import model_logits, tiny_config
from transformers import BertConfig, BertForSequenceClassification, MistralForSequenceClassification

from mistral_rerank import CheckpointError, LocalReranker, SettingsError
from mistral_rerank.local.batching.packing import pack
from mistral_rerank.local.batching.planning import plan_packed
from mistral_rerank.local.device import pick_devices
from mistral_rerank.local.model.attention import SpanAttention
from mistral_rerank.local.model.placement import layer_devices
from mistral_rerank.local.model.rerank_model import RerankModel
from mistral_rerank.local.model.transformer import PackedBackbone

CPU, META = torch.device("cpu"), torch.device("meta")
QUESTION = list(range(10, 40))
SEQUENCES = [[5], [6] * 3, [7] * 90, [*QUESTION, 1], [*QUESTION, *[2] * 50], [*QUESTION, 3, 4]]


def classifier():
    torch.manual_seed(0)
    return MistralForSequenceClassification(tiny_config(100, sliding_window=24)).eval()


def placed(device, *further, **options):
    model = classifier()
    return RerankModel(model.base_model, model.score, device, further_devices=further, **options)


def test_layers_are_split_into_runs_of_about_the_same_number():
    assert layer_devices(3, [CPU]) == [CPU] * 3
    assert layer_devices(3, [CPU, META]) == [CPU, CPU, META]
    assert [layer_devices(32, range(5)).count(stage) for stage in range(5)] == [7, 6, 7, 6, 6]


@pytest.mark.any_device
@pytest.mark.parametrize("packed", [False, True])
def test_logits_are_those_of_one_device(device, packed):
    expected = model_logits(placed(CPU), SEQUENCES)
    assert model_logits(placed(device, CPU, packed=packed), SEQUENCES) == pytest.approx(expected, abs=1e-4)


@pytest.mark.any_device
def test_chunks_and_resumed_forwards_have_the_logits_of_one_device(device):
    model = placed(device, CPU, packed=True, resumable=True)
    (batch,) = model.plan(SEQUENCES, 1000)
    expected = placed(CPU).logits(batch)
    for layer in (1, 2):
        assert model.logits(batch, model.states(batch, layer)) == pytest.approx(expected, abs=1e-4)
    *_, logit = model.chunks(batch.sequences[0], 16)
    assert logit == pytest.approx(expected[0], abs=1e-4)


def test_each_layer_of_a_packed_row_runs_on_its_device():
    devices = []

    class Recorded(SpanAttention):
        def all_tokens(self, query, *rest):
            devices.append(query.device)
            return super().all_tokens(query, *rest)

        def last_tokens(self, query, *rest):
            devices.append(query.device)
            return super().last_tokens(query, *rest)

    backbone = PackedBackbone(classifier().base_model, CPU, attention=Recorded, further_devices=[META])
    with pytest.raises(NotImplementedError, match="meta"), torch.inference_mode():  # the state returns to the first
        backbone(pack(*plan_packed(SEQUENCES, 1000)))
    assert devices == [CPU, CPU, META]


def test_each_layer_of_padded_rows_runs_on_its_device():
    model, devices = classifier(), []
    for layer in model.base_model.layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: devices.append(output.device))
    ours = RerankModel(model.base_model, model.score, CPU, packed=False, further_devices=[META])
    with pytest.raises(NotImplementedError, match="meta"):
        model_logits(ours, SEQUENCES[:1])
    assert devices == [CPU, CPU, META]
    assert {weight.device for weight in model.base_model.layers[2].parameters()} == {META}


def test_an_encoder_is_on_one_device():
    config = BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    with pytest.raises(CheckpointError, match="give one device"):
        RerankModel(BertForSequenceClassification(config), None, CPU, further_devices=[CPU])


def test_devices_are_named_with_commas(tiny, tiny_reranker, pairs):
    assert pick_devices("cpu, cpu") == (CPU, CPU)
    with pytest.raises(SettingsError, match="'cpu,meta' has several types"):
        pick_devices("cpu,meta")
    expected = [score.logit for score in tiny_reranker.score_pairs(pairs[:20])]
    with LocalReranker(str(tiny), device="cpu,cpu", dtype="float32") as reranker:
        logits = [score.logit for score in reranker.score_pairs(pairs[:20])]
    assert logits == pytest.approx(expected, abs=1e-5)
