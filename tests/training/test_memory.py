import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import tiny_config
from transformers import MistralConfig, MistralForSequenceClassification

from mistral_rerank.local.batching.packing import pack
from mistral_rerank.local.batching.planning import plan_packed
from mistral_rerank.local.model.attention import PACKED_ATTENTION, register
from mistral_rerank.local.model.pooling import LAST_TOKEN
from mistral_rerank.training.finetune import LORA_TARGETS
from mistral_rerank.training.memory import estimate
from mistral_rerank.training.trainer import group_logits

RUN = {"layers": 16, "adapted_layers": 16, "lora_rank": 16, "tokens": 4096, "bytes_of_weight": 2}


def test_the_full_size_recipe_by_value():
    found = estimate(MistralConfig(), **RUN, activation_checkpointing=True)
    assert found.weights == 2 * (32000 * 4096 + 16 * 218_103_808)
    assert found.trained == 16 * (16 * 16 * (2 * 5120 + 2 * 8192 + 3 * 18432) + 4096)
    assert 6.5 < found.weights / 2**30 < 6.8
    assert found.total < estimate(MistralConfig(), **RUN, activation_checkpointing=False).total
    assert str(found).startswith(f"about {found.total / 2**30:.1f} GiB: weights 6.74, LoRA with Adam 0.31, ")


def test_activations_are_near_what_autograd_keeps():
    """Counted in float32 on a real forward: every tensor that is saved, once, without the weights."""
    register()
    config = tiny_config(100, hidden_size=128, intermediate_size=384, num_hidden_layers=4, sliding_window=None)
    classifier = MistralForSequenceClassification(config)
    classifier.base_model.set_attn_implementation(PACKED_ATTENTION)
    adapted = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=LORA_TARGETS))
    own = {weight.untyped_storage().data_ptr() for weight in adapted.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    sequences = [[n % 90 + 1 for n in range(start, start + 100)] for start in range(8)]
    packed = pack(*plan_packed(sequences, 10**9))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        group_logits(classifier, LAST_TOKEN, packs=[packed], positions=torch.arange(8)[None])
    found = estimate(
        config, layers=4, adapted_layers=4, lora_rank=8, tokens=800, bytes_of_weight=4, activation_checkpointing=False
    )
    assert found.activations == pytest.approx(sum(kept.values()), rel=0.35)


def test_frozen_layers_keep_nothing():
    all_of_them = estimate(MistralConfig(), **RUN, activation_checkpointing=False)
    half = estimate(MistralConfig(), **RUN | {"adapted_layers": 8}, activation_checkpointing=False)
    assert half.activations * 2 == all_of_them.activations
    assert half.weights == all_of_them.weights


def test_four_bits_are_those_of_the_linears():
    full = estimate(MistralConfig(), **RUN, activation_checkpointing=True)
    four = estimate(MistralConfig(), **RUN, activation_checkpointing=True, four_bit=True)
    assert full.weights - four.weights == pytest.approx((2 - 4.127 / 8) * 16 * 218_103_808)
    assert (four.trained, four.activations) == (full.trained, full.activations)
