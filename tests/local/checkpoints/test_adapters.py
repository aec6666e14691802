"""Several LoRA adapters on one base: each scores as if it were loaded alone, to the last bit."""

import json
import pickle
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from support import make_adapter
from torch import nn
from transformers import AutoModelForSequenceClassification

from mistral_rerank import CheckpointError, InvalidInputError, LocalReranker, SettingsError, open_reranker
from mistral_rerank.local.checkpoints import loading
from mistral_rerank.local.model import rerank_model
from mistral_rerank.local.model.early_exit import EarlyExit, EarlyExitConfig, write_early_exit

ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Eight adapters of different ranks, linears, templates, calibrations, pooling and attention."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = [
        {},
        {"target_modules": ALL_LINEARS},
        {"target_modules": ["down_proj"], "lora_alpha": 3},
        {"target_modules": ["gate_proj", "up_proj"], "use_rslora": True},
        {"rerank": {"template": "Q: {query} P: {passage}", "append_eos": False}},
        {"rerank": {"pooling": "mean"}, "target_modules": ALL_LINEARS},
        {"rerank": {"attention": "bidirectional", "max_length": 64}},
        {"layers_to_transform": [1], "target_modules": ALL_LINEARS, "rank_pattern": {"q_proj": 5}},
    ]
    names = [f"number-{number}" for number in range(len(kinds))]
    return {
        name: str(make_adapter(folder / name, tiny, number, **kind))
        for number, (name, kind) in enumerate(zip(names, kinds, strict=True))
    }


def fresh_scores(folder, calls, **options):
    with LocalReranker(folder, **OPTIONS | options) as reranker:
        return [reranker.score_pairs(call) for call in calls]


def test_a_thousand_switches_under_eight_threads_give_exactly_the_scores_of_a_fresh_load(
    tiny, adapters, pairs, monkeypatch
):
    calls = [pairs[:3], pairs[5:6], pairs[40:46], [(pairs[0][0], pairs[1][1] * 4)]]
    fresh = {name: fresh_scores(folder, calls, base=tiny) for name, folder in adapters.items()}
    fresh[None] = fresh_scores(tiny, calls)
    assert len({scores[0][0].logit for scores in fresh.values()}) == 9, "the adapters differ, so this test can fail"
    loads = []
    load = loading._load
    monkeypatch.setattr(loading, "_load", lambda *given, **options: loads.append(given) or load(*given, **options))
    order = random.Random(0).choices([(name, number) for name in fresh for number in range(len(calls))], k=1000)
    assert sum(one[0] != other[0] for one, other in pairwise(order)) > 850
    with LocalReranker(tiny, adapters=adapters, **OPTIONS) as reranker, ThreadPoolExecutor(8) as threads:
        scores = list(threads.map(lambda each: reranker.score_pairs(calls[each[1]], adapter=each[0]), order))
    assert scores == [fresh[name][number] for name, number in order]
    assert len(loads) == 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_dtype_and_forward_gives_the_scores_of_a_fresh_load(
    tiny, adapters, pairs, tmp_path, monkeypatch, padded, stored, dtype
):
    """The model is an adapter itself, which names no base."""
    if padded:
        monkeypatch.setattr(rerank_model, "row_attention", lambda *_: None)
    base = shutil.copytree(tiny, tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tiny, dtype=getattr(torch, stored))
    model.save_pretrained(base)
    first, *names = ["number-0", "number-1", "number-3", "number-5"]
    options = {"base": base, "dtype": dtype}
    fresh = {name: fresh_scores(adapters[name], [pairs[:12]], **options) for name in [first, *names]}
    chosen = {name: adapters[name] for name in names}
    with LocalReranker(adapters[first], adapters=chosen, **OPTIONS | options) as reranker:
        for name in [*names, *reversed(names)]:
            assert [reranker.score_pairs(pairs[:12], adapter=name)] == fresh[name]
            assert [reranker.score_pairs(pairs[:12])] == fresh[first]


def test_concurrent_calls_share_batches_with_the_same_adapter_alone(tiny, adapters, pairs):
    calls = [[pair] for pair in pairs[:6]] * 9
    names = [None, *adapters]
    fresh = {
        name: [score for (score,) in fresh_scores(adapters.get(name, tiny), calls[:6], base=tiny if name else None)]
        for name in names
    }
    with (
        LocalReranker(tiny, adapters=adapters, share_batches=True, **OPTIONS) as reranker,
        ThreadPoolExecutor(16) as threads,
    ):
        scores = list(threads.map(lambda n: reranker.score_pairs(calls[n], adapter=names[n // 6])[0], range(54)))
    expected = [fresh[names[n // 6]][n % 6].logit for n in range(54)]
    assert [score.logit for score in scores] == pytest.approx(expected, abs=1e-4)


def test_long_sequences_of_two_adapters_run_in_turns(tiny, adapters, pairs):
    """Their keys and values are kept between the turns."""
    call = [(pairs[0][0], pairs[1][1] * 40)]
    names = ["number-0", "number-1", "number-4"]
    options = {"batch_tokens": 64}
    fresh = {name: fresh_scores(adapters[name], [call], base=tiny, **options) for name in names}
    with LocalReranker(tiny, adapters=adapters, **OPTIONS | options) as reranker, ThreadPoolExecutor(6) as threads:
        scores = list(threads.map(lambda name: [reranker.score_pairs(call, adapter=name)], names * 2))
    assert scores == [fresh[name] for name in names * 2]


def test_a_cascade_runs_each_adapters_own_early_exit(tiny, adapters, pairs, tmp_path):
    calls = [[(pairs[0][0], passage) for _, passage in pairs[:9]]]
    copies = {}
    for number, name in enumerate(["number-0", "number-1"]):
        copies[name] = shutil.copytree(adapters[name], tmp_path / name)
        torch.manual_seed(number)
        early_exit = EarlyExit(64)
        nn.init.normal_(early_exit.around.weight)
        write_early_exit(early_exit, EarlyExitConfig(layer=1 + number), copies[name])
    options = {"base": tiny, "cascade_depth": 3}
    fresh = {name: fresh_scores(folder, calls, **options) for name, folder in copies.items()}
    with LocalReranker(copies["number-0"], adapters={"b": copies["number-1"]}, **OPTIONS | options) as reranker:
        for _ in range(2):
            assert reranker.score_pairs(calls[0]) == fresh["number-0"][0]
            assert reranker.score_pairs(calls[0], adapter="b") == fresh["number-1"][0]
    with (
        LocalReranker(copies["number-0"], adapters={"b": adapters["number-2"]}, **OPTIONS | options) as reranker,
        pytest.raises(CheckpointError, match="b has no early exit"),
    ):
        reranker.warmup()


def test_the_score_cache_keeps_adapters_apart(tiny, adapters, pairs):
    with LocalReranker(tiny, adapters=adapters, cache_size=1000, **OPTIONS) as reranker:
        scores = {name: reranker.score_pairs(pairs[:3], adapter=name) for name in [None, *adapters]}
        assert {name: reranker.score_pairs(pairs[:3], adapter=name) for name in scores} == scores
        assert len({each[0].logit for each in scores.values()}) == 9
        assert len(reranker._cache._scores) == 27


def test_a_ranking_takes_an_adapter(tiny, adapters):
    passages = ["she wrote it", "nobody knows", "it opened later"]
    with open_reranker(tiny, adapters={"a": adapters["number-1"]}, **OPTIONS) as reranker:
        assert reranker.adapters == ("a",)
        ranking = reranker.rank("who wrote it", passages, adapter="a")
        scores = reranker.score_pairs([("who wrote it", passage.text) for passage in ranking], adapter="a")
        assert [passage.score.logit for passage in ranking] == pytest.approx([score.logit for score in scores])
        assert pickle.loads(pickle.dumps(reranker)).adapters == ("a",)
        with pytest.raises(InvalidInputError, match="there is no adapter 'b'; adapters: a"):
            reranker.rank("who", passages, adapter="b")
    with open_reranker(tiny, **OPTIONS) as reranker, pytest.raises(InvalidInputError, match=r"open .* adapters="):
        reranker.score_pairs([("who", "me")], adapter="a")


def test_adapters_come_from_the_environment_too(tiny, adapters, monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_ADAPTERS", json.dumps({"a": adapters["number-1"]}))
    assert open_reranker(tiny, **OPTIONS).adapters == ("a",)
    monkeypatch.setenv("MISTRAL_RERANK_ADAPTERS", "a=folder")
    with pytest.raises(SettingsError, match="adapters .*not a JSON object"):
        open_reranker(tiny, **OPTIONS)


def refused(message, model, adapter, **options):
    with (
        LocalReranker(model, adapters={"other": adapter}, **OPTIONS | options) as reranker,
        pytest.raises(CheckpointError, match=message),
    ):
        reranker.warmup()


def test_an_adapter_of_another_base_or_cut_is_refused(tiny, adapters, tmp_path):
    shutil.copytree(tiny, tmp_path / "named" / "base")
    named = make_adapter(tmp_path / "named", tiny, 0, rerank={"base": {"kind": "pretrained", "name": "base"}})
    refused("the adapter 'other' .* is for 3 layers of .*base, and the model is 3 layers of .*tiny", tiny, named)
    cut = make_adapter(tmp_path / "cut", tiny, 0, layers=2)
    refused("is for 2 layers of .*, and the model is 3 layers of", tiny, cut)
    refused("is for 3 layers of .*, and the model is 2 layers of", cut, adapters["number-0"], base=tiny)
    refused("is a whole model; give a folder with a LoRA adapter", tiny, tiny)


def test_an_adapter_that_changes_more_than_linears_is_refused(tiny, adapters, tmp_path):
    for name, lora, changed in (
        ("dora", {"use_dora": True}, r"model\.layers\.0\.self_attn\.q_proj"),
        ("embeddings", {"modules_to_save": ["embed_tokens"]}, r"model\.embed_tokens"),
        ("biases", {"bias": "lora_only"}, "biases"),
    ):
        folder = make_adapter(tmp_path / name, tiny, 0, **lora)
        refused(f"{name} changes {changed}.*Open it alone", tiny, folder)
        refused(f"{name} changes {changed}.*Open it alone", folder, adapters["number-0"], base=tiny)
        assert fresh_scores(folder, [[("who", "me")]], base=tiny)


def test_quantized_weights_are_not_shared(tiny, adapters, monkeypatch):
    monkeypatch.setattr("mistral_rerank.local.reranker.check_quantization", lambda *_: None)
    for quantization in ("int8", "nf4"):
        with pytest.raises(SettingsError, match="rounds weights after an adapter is merged"):
            LocalReranker(tiny, adapters=adapters, quantization=quantization, **OPTIONS)


def test_adapters_share_a_passage_cache_and_none_of_its_entries(tiny, pairs, tmp_path):
    template = {"template": "Passage: {passage}\nQuestion: {query}"}
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "rerank.json").write_text(json.dumps(template))
    folders = {
        name: str(make_adapter(tmp_path / name, tiny, number, target_modules=ALL_LINEARS, rerank=template))
        for number, name in enumerate(["one", "two"])
    }
    calls = [pairs[:3], [("who?", passage) for _, passage in pairs[:3]]]
    fresh = {name: fresh_scores(folder, calls, base=base) for name, folder in folders.items()}
    fresh[None] = fresh_scores(base, calls)
    with LocalReranker(base, adapters=folders, passage_cache="1MiB", **OPTIONS) as reranker:
        for number, call in enumerate(calls):
            for name, expected in fresh.items():
                logits = [score.logit for score in reranker.score_pairs(call, adapter=name)]
                assert logits == pytest.approx([score.logit for score in expected[number]], abs=1e-4)
        info = reranker.passage_cache_info()
    assert (info.hits, info.misses) == (9, 9)
