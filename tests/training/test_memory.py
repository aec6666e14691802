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

CONFIG = MistralConfig(num_hidden_layers=16)
RUN = {"adapted_layers": 16, "lora_rank": 16, "tokens": 4096, "weight_bytes": 2}


def test_the_full_size_recipe_by_value():
    memory = estimate(CONFIG, **RUN, activation_checkpointing=True)
    assert memory.weights == 2 * (32000 * 4096 + 16 * 218_103_808)
    assert memory.trained == 16 * (16 * 16 * (2 * 5120 + 2 * 8192 + 3 * 18432) + 4096)
    assert 6.5 < memory.weights / 2**30 < 6.8
    assert memory.total < estimate(CONFIG, **RUN, activation_checkpointing=False).total
    assert str(memory).startswith(f"about {memory.total / 2**30:.1f} GiB: weights 6.74, LoRA with Adam 0.31, ")


def test_activations_are_near_what_autograd_saves():
    """Counted in float32 on a real forward: every tensor that is saved, once, without the weights."""
    register()
    config = tiny_config(100, hidden_size=128, intermediate_size=384, num_hidden_layers=4, sliding_window=None)
    classifier = MistralForSequenceClassification(config)
    classifier.base_model.set_attn_implementation(PACKED_ATTENTION)
    adapted = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=LORA_TARGETS))
    parameters = {weight.untyped_storage().data_ptr() for weight in adapted.parameters()}
    saved: dict[int, int] = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    sequences = [[n % 90 + 1 for n in range(start, start + 100)] for start in range(8)]
    packed = pack(*plan_packed(sequences, 10**9))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        group_logits(classifier, LAST_TOKEN, packs=[packed], positions=torch.arange(8)[None])
    memory = estimate(config, adapted_layers=4, lora_rank=8, tokens=800, weight_bytes=4, activation_checkpointing=False)
    assert memory.activations == pytest.approx(sum(saved.values()), rel=0.35)


def test_frozen_layers_save_nothing():
    all_layers = estimate(CONFIG, **RUN, activation_checkpointing=False)
    half = estimate(CONFIG, **RUN | {"adapted_layers": 8}, activation_checkpointing=False)
    assert half.activations * 2 == all_layers.activations
    assert half.weights == all_layers.weights


def test_four_bits_are_those_of_the_linears():
    full = estimate(CONFIG, **RUN, activation_checkpointing=True)
    four = estimate(CONFIG, **RUN, activation_checkpointing=True, four_bit=True)
    assert full.weights - four.weights == pytest.approx((2 - 4.127 / 8) * 16 * 218_103_808)
    assert (four.trained, four.activations) == (full.trained, full.activations)
