"""Flash attention in rows without padding: what CUDA would run, with a plain kernel of the same protocol in its place."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import model_logits, plain_logits, tiny_config
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralForSequenceClassification

from mistral_rerank.local.batching.packing import pack
from mistral_rerank.local.batching.planning import plan_packed
from mistral_rerank.local.model import rerank_model as models
from mistral_rerank.local.model.attention import SpanAttention
from mistral_rerank.local.model.flash_attention import FlashAttention, passes_self_check
from mistral_rerank.local.model.pooling import apply_head
from mistral_rerank.local.model.rerank_model import row_attention
from mistral_rerank.local.model.transformer import PackedBackbone

CPU = torch.device("cpu")
QUESTION = list(range(10, 40))
SEQUENCES = [[5] * 3, [6] * 3, [7] * 90, [*QUESTION, 1], [*QUESTION, *[2] * 50], [*QUESTION, 3, 4]]


def plain_kernel(query, key, value, queries, keys, *most, scale, window_size, enable_gqa, end_together=True):
    """What `varlen_attn` documents, sequence by sequence; queries and keys end together."""
    assert enable_gqa
    assert most == (int(queries.diff().max()), int(keys.diff().max()))
    assert queries.dtype == keys.dtype == torch.int32
    mixed = []
    for (q_start, q_stop), (k_start, k_stop) in zip(queries.unfold(0, 2, 1), keys.unfold(0, 2, 1), strict=True):
        places = torch.arange(int(k_stop - k_start))
        own = (places[-int(q_stop - q_start) :] if end_together else places[: int(q_stop - q_start)])[:, None]
        back, ahead = (len(places) if reach < 0 else reach for reach in window_size)
        seen = (places >= own - back) & (places <= own + ahead)
        q, k, v = (x.transpose(0, 1) for x in (query[q_start:q_stop], key[k_start:k_stop], value[k_start:k_stop]))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        mixed.append(found.transpose(0, 1))
    return torch.cat(mixed)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", plain_kernel)
    passes_self_check.cache_clear()
    yield
    passes_self_check.cache_clear()


def states(packed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    tokens = packed.ids.shape[1]
    return [torch.randn(1, heads, tokens, 16, generator=draw).to(dtype) for heads in (4, 2, 2)]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("window", [None, 8, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_it_gives_what_a_call_for_each_span_gives(window, causal):
    packed = pack(*plan_packed(SEQUENCES, 10**9, share=causal), causal=causal).padded_to_bucket()
    query, key, value = states(packed)
    ours, expected = (kind(packed, window, CPU) for kind in (FlashAttention, SpanAttention))
    for way, asked in (("all_tokens", query), ("last_tokens", query[:, :, packed.last])):
        if way == "all_tokens" or causal:
            found, usual = (getattr(kind, way)(asked, key, value, 0.3) for kind in (ours, expected))
            torch.testing.assert_close(found, usual, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 24], ids=["full", "window"])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_scores_equal_transformers_own_one_at_a_time(window, data):
    torch.manual_seed(0)
    reference = MistralForSequenceClassification(tiny_config(100, sliding_window=window)).eval()
    ids = st.lists(st.integers(1, 99), min_size=1, max_size=40)
    prefixes = data.draw(st.lists(ids, min_size=1, max_size=3))
    suffixes = data.draw(st.lists(st.tuples(st.sampled_from(prefixes), ids), min_size=1, max_size=12))
    sequences = [prefix + rest for prefix, rest in suffixes]
    packed = pack(*plan_packed(sequences, 10**9))
    ours = PackedBackbone(copy.deepcopy(reference.base_model), CPU, attention=FlashAttention)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(varlen, "varlen_attn", plain_kernel)
        found = apply_head(reference.score, ours(packed)).tolist()
    expected = plain_logits(reference, sequences)
    assert found == pytest.approx([expected[member] for member in packed.members], abs=1e-4)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 40},
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "original_max_position_embeddings": 40,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0, 3.0] * 4,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_short_and_long_sequences_keep_their_own_rotary_frequencies(monkeypatch, scaling):
    monkeypatch.setattr(models, "row_attention", lambda backbone, device: FlashAttention)
    torch.manual_seed(0)
    config = tiny_config(100, max_position_embeddings=40, rope_parameters=scaling | {"rope_theta": 10000.0})
    reference = MistralForSequenceClassification(config).eval()
    taken = copy.deepcopy(reference)
    ours = models.RerankModel(taken.base_model, taken.score, CPU)
    expected = [logit for ids in SEQUENCES for logit in plain_logits(copy.deepcopy(reference), [ids])]
    assert model_logits(ours, SEQUENCES) == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kernel_that_does_it_right_is_used(dtype):
    assert passes_self_check(4, 2, 16, CPU, dtype)


def test_a_kernel_without_an_argument_for_grouped_queries_is_used(monkeypatch):
    def of_pytorch_2_11(query, key, value, queries, keys, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        options = {"scale": scale, "window_size": window_size, "enable_gqa": True}
        return plain_kernel(query, key, value, queries, keys, max_q, max_k, **options)

    monkeypatch.setattr(varlen, "varlen_attn", of_pytorch_2_11)
    passes_self_check.cache_clear()
    assert passes_self_check(4, 2, 16, CPU, torch.bfloat16)
    passes_self_check.cache_clear()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("what", ["begins together", "looks one further", "forgets the window"])
def test_a_kernel_that_does_it_otherwise_is_not_used(monkeypatch, caplog, what):
    def other(query, key, value, queries, keys, *most, window_size, enable_gqa, **options):
        back, ahead = window_size
        if what == "looks one further":
            back = back + 1 if back > 0 else back
        elif what == "forgets the window":
            back = -1
        together = what != "begins together"
        window_size = (back, ahead)
        options |= {"window_size": window_size, "enable_gqa": enable_gqa, "end_together": together}
        return plain_kernel(query, key, value, queries, keys, *most, **options)

    monkeypatch.setattr(varlen, "varlen_attn", other)
    assert not passes_self_check(4, 2, 16, CPU, torch.bfloat16)
    assert "batches are padded" in caplog.text


def test_without_a_kernel_for_the_device_batches_are_padded(caplog):
    caplog.set_level("INFO")
    passes_self_check.cache_clear()
    assert not passes_self_check(4, 2, 16, CPU, torch.bfloat16), "PyTorch has none for a CPU"
    assert "no flash attention on cpu in torch.bfloat16" in caplog.text
    passes_self_check.cache_clear()


@pytest.mark.parametrize(("right", "expected"), [(True, FlashAttention), (False, None)])
def test_cuda_gets_it_where_the_kernel_agrees_for_the_models_heads(monkeypatch, right, expected):
    asked = []
    monkeypatch.setattr(models, "passes_self_check", lambda *shape: asked.append(shape) or right)
    backbone = MistralForSequenceClassification(tiny_config(100, head_dim=32)).to(torch.bfloat16).base_model
    cuda = torch.device("cuda")
    assert row_attention(backbone, cuda) is expected
    config = backbone.config
    assert asked == [(config.num_attention_heads, config.num_key_value_heads, 32, cuda, torch.bfloat16)]
    assert row_attention(backbone, CPU) is SpanAttention


def test_rows_without_a_shared_prefix_copy_no_keys():
    alone = pack(*plan_packed([[1] * 5, [2] * 3], 10**9)).padded_to_bucket()
    shared = pack(*plan_packed(SEQUENCES, 10**9)).padded_to_bucket()
    for packed, tokens in ((alone, slice(8)), (shared, None)):
        indices = FlashAttention(packed, None, CPU)._last_tokens._key_indices
        assert indices == tokens if tokens is not None else isinstance(indices, torch.Tensor)


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.names.add(operator.overloadpacket.__name__)
        return operator(*arguments, **(options or {}))


def test_a_forward_reads_no_value_back_from_the_device(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *_, **__: query)
    classifier = MistralForSequenceClassification(tiny_config(100)).eval()
    backbone = PackedBackbone(classifier.base_model, CPU, attention=FlashAttention)
    packed = pack(*plan_packed(SEQUENCES, 10**9))
    with torch.inference_mode(), Operators() as operators:
        backbone(packed)
    assert "mm" in operators.names
    assert not operators.names & {"item", "is_nonzero", "nonzero", "masked_select"}


def test_pytorchs_own_kernel_takes_what_it_is_given():
    """Shapes, dtypes and names alone: tensors on the meta device hold no values."""
    packed = pack(*plan_packed(SEQUENCES, 10**9))
    meta = torch.device("meta")
    for window in (None, 8):
        attention = FlashAttention(packed, window, meta)
        query, key, value = (state.to(meta) for state in states(packed, torch.bfloat16))
        assert attention.all_tokens(query, key, value, 0.25).shape == (packed.ids.shape[1], 4, 16)
        last = query[:, :, packed.last]
        assert attention.last_tokens(last, key, value, 0.25).shape == (len(SEQUENCES), 4, 16)
