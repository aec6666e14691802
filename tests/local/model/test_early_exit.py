"""Estimates from a lower layer, and the cascade that uses them."""

import asyncio
import copy
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import tiny_config
from transformers import GPT2Config, GPT2ForSequenceClassification, MistralForSequenceClassification

from mistral_rerank import CheckpointError, LocalReranker, SettingsError, open_reranker
from mistral_rerank.local.checkpoints.config import CheckpointConfig
from mistral_rerank.local.checkpoints.export import export_merged
from mistral_rerank.local.checkpoints.summary import summary
from mistral_rerank.local.model.early_exit import (
    EARLY_EXIT_FILE,
    EarlyExit,
    EarlyExitConfig,
    read_early_exit,
    read_early_exit_config,
    write_early_exit,
)
from mistral_rerank.local.model.pooling import PoolingConfig
from mistral_rerank.local.model.rerank_model import RerankModel

CPU = torch.device("cpu")
CONFIG = EarlyExitConfig(layer=2, fitted_on=("facts@9",), questions=8)


def random_exit(hidden=64):
    torch.manual_seed(3)
    early_exit = EarlyExit(hidden)
    for parameter in early_exit.parameters():
        torch.nn.init.normal_(parameter, 0.3)
    return early_exit.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("exit") / "model")
    write_early_exit(random_exit(), CONFIG, folder)
    return folder


def local(folder, **options):
    return LocalReranker(str(folder), device="cpu", dtype="float32", batch_tokens=400, **options)


@pytest.mark.parametrize("reading", [PoolingConfig(), PoolingConfig(bidirectional=True, mean=True)])
@pytest.mark.parametrize("layer", [1, 2])
def test_estimates_are_those_of_transformers_own_states(layer, reading):
    """Of sequences that share a beginning, of one that does not and has no passage; and what is begun is gone on from."""
    torch.manual_seed(0)
    model = MistralForSequenceClassification(tiny_config(100)).eval()
    ours = RerankModel(copy.deepcopy(model).base_model, model.score, CPU, pooling=reading, resumable=True)
    start = list(range(3, 15))
    sequences = [[*start, *range(20, 50)], [*start, *range(60, 75)], [7, 8, 9], [*start, *range(30, 60)]]
    passages = [range(14, 40), range(12, 20), range(2, 2), range(10, 42)]
    early_exit, wanted = random_exit(), []
    for ids, passage in zip(sequences, passages, strict=True):
        mask = None
        if reading.bidirectional:
            places = torch.arange(len(ids))
            mask = ((places[:, None] - places).abs() < model.config.sliding_window)[None, None]
        with torch.inference_mode():
            states = model.base_model(
                input_ids=torch.tensor([ids]), attention_mask=mask, output_hidden_states=True, use_cache=False
            ).hidden_states[layer][0]
            wanted.append(early_exit([states], [passage]).item())
    assert max(wanted) - min(wanted) > 0.1
    (batch,) = ours.plan(sequences, 10**9)
    estimates, partial_states = ours.estimates(early_exit, layer, batch, [passages[place] for place in batch.members])
    assert estimates == pytest.approx([wanted[place] for place in batch.members], abs=1e-4)
    states = dict(zip(batch.members, partial_states, strict=True))
    logits = dict(zip(batch.members, ours.logits(batch), strict=True))
    some = [3, 1]
    (resumed,) = ours.plan([sequences[place] for place in some], 10**9)
    order = [some[member] for member in resumed.members]
    gone_on = ours.logits(resumed, [states[place] for place in order])
    assert gone_on == pytest.approx([logits[place] for place in order], abs=1e-4)


def test_passages_of_the_second_pass_have_the_whole_models_scores_and_come_first(checkpoint, pairs, tiny_reranker):
    exact = tiny_reranker.score_pairs(pairs)
    with local(checkpoint, cascade_depth=3) as reranker:
        found = reranker.score_pairs(pairs)
    for question in dict.fromkeys(question for question, _ in pairs):
        places = {pair: place for place, pair in enumerate(pairs) if pair[0] == question}.values()
        same = [place for place in places if found[place].logit == pytest.approx(exact[place].logit, abs=1e-4)]
        assert len(same) == 3
        lowest = min(found[place].logit for place in same)
        assert all(found[place].logit < lowest for place in set(places) - set(same))
    twice = [place for place, pair in enumerate(pairs) if pairs.count(pair) == 2]
    assert len(twice) >= 2
    assert len({(pairs[place], found[place].logit) for place in twice}) == len(twice) // 2


def test_a_depth_of_all_passages_changes_nothing(checkpoint, pairs, tiny_reranker):
    with local(checkpoint, cascade_depth=6) as reranker:  # of seven passages one is seen twice
        assert reranker.score_pairs(pairs) == tiny_reranker.score_pairs(pairs)


def test_what_is_awaited_is_the_same_and_so_is_what_the_cache_gives(checkpoint, pairs):
    with local(checkpoint, cascade_depth=2, cache_size=999) as reranker:
        found = asyncio.run(reranker.ascore_pairs(pairs))
        assert reranker.score_pairs(pairs) == found
        reranker._cache.clear()
        assert reranker.score_pairs(pairs) == found


def test_long_passages_are_estimated_whole_in_pieces(checkpoint, facts):
    question, passages = next(iter(facts.queries.values())), list(facts.corpus.values())[:6]
    long = [(question, passage * 9) for passage in passages]
    with local(checkpoint, cascade_depth=2, max_length=120, overflow="chunk") as reranker:
        tokens = [score.tokens for score in reranker.score_pairs(long)]
    assert min(tokens) > 120


def test_it_is_a_setting_like_others(checkpoint, monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_CASCADE_DEPTH", "4")
    reranker = open_reranker(str(checkpoint), device="cpu")
    assert reranker._options["cascade_depth"] == 4
    assert pickle.loads(pickle.dumps(reranker))._options["cascade_depth"] == 4


def test_wrong_numbers_and_checkpoints_without_an_early_exit_are_refused(tiny):
    with pytest.raises(SettingsError, match="give at least 1"):
        LocalReranker("mini", cascade_depth=0)
    with pytest.raises(SettingsError, match="cascade_depth"):
        open_reranker("mini", cascade_depth=0)
    with local(tiny, cascade_depth=3) as reranker, pytest.raises(CheckpointError, match="fit one with"):
        reranker.warmup()


def test_a_file_that_is_not_usable_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    wrong = {
        "another shape": lambda: write_early_exit(random_exit(32), CONFIG, folder),
        "too deep": lambda: write_early_exit(random_exit(), EarlyExitConfig(layer=3), folder),
        "no safetensors": lambda: (folder / EARLY_EXIT_FILE).write_text("{}"),
        "no metadata": lambda: shutil.copy(folder / "model.safetensors", folder / EARLY_EXIT_FILE),
    }
    for make in wrong.values():
        make()
        with local(folder, cascade_depth=1) as reranker, pytest.raises(CheckpointError, match="early.exit"):
            reranker.score_pairs([("who?", "me"), ("who?", "you")])


def test_other_architectures_have_none():
    model = GPT2ForSequenceClassification(GPT2Config(n_layer=2, n_head=2, n_embd=32, num_labels=1))
    with pytest.raises(CheckpointError, match="need a Mistral, Llama"):
        RerankModel(model.base_model, model.score, CPU, resumable=True)


def test_it_is_written_whole_read_as_it_was_and_told_of(checkpoint, tiny):
    assert read_early_exit_config(checkpoint) == CONFIG
    assert read_early_exit_config(tiny) is None
    wanted, found = random_exit().state_dict(), read_early_exit(checkpoint, 64).state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert [str(file.relative_to(checkpoint)) for file in checkpoint.glob("early_exit*/*")] == [EARLY_EXIT_FILE]
    facts = summary(str(checkpoint), device="cpu", dtype="float32")
    assert facts["early exit"] == "after layer 2, fitted on 8 questions of facts@9"
    assert summary(str(tiny), device="cpu", dtype="float32")["early exit"] == "none"


def test_an_exported_checkpoint_keeps_it(checkpoint, tmp_path, pairs):
    (checkpoint / "rerank.json").write_text(CheckpointConfig().model_dump_json())
    export_merged(str(checkpoint), tmp_path / "merged", dtype="float32")
    with local(checkpoint, cascade_depth=2) as ours, local(tmp_path / "merged", cascade_depth=2) as exported:
        assert exported.score_pairs(pairs) == ours.score_pairs(pairs)
    assert [file.name for file in (tmp_path / "merged").glob("*.safetensors")] == ["model.safetensors"]


def test_threads_that_write_one_early_exit_do_not_collide(tmp_path):
    exits = [random_exit(512) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda fitted: write_early_exit(fitted, CONFIG, tmp_path), exits * 8))
    assert read_early_exit_config(tmp_path) == CONFIG
    assert [file.name for file in (tmp_path / EARLY_EXIT_FILE).parent.iterdir()] == ["model.safetensors"]
