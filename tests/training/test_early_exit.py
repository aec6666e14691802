"""Fitting an early exit: it learns, the same seed gives the same, and a checkpoint keeps it."""

import shutil

import pytest
import torch
from support import FACTS

from mistral_rerank import InvalidInputError, SettingsError
from mistral_rerank.local.checkpoints.update import store_early_exit
from mistral_rerank.local.model.early_exit import EarlyExitConfig, read_early_exit_config
from mistral_rerank.local.scorer import LoadedCheckpoint
from mistral_rerank.training.early_exit import draw_questions, fit_early_exit
from mistral_rerank.training.groups import write_groups
from mistral_rerank.training.mining import load_groups
from mistral_rerank.training.settings import TrainSettings

SETTINGS = TrainSettings(data=(FACTS,), negatives=5, random_negatives=2, seed=1)


@pytest.fixture(scope="module")
def model(tiny):
    return LoadedCheckpoint(
        str(tiny),
        device=torch.device("cpu"),
        dtype=torch.float32,
        quantization=None,
        max_length=None,
        overflow="truncate",
        resumable=True,
    )


@pytest.fixture(scope="module")
def questions():
    return draw_questions(SETTINGS)


def test_every_question_comes_with_as_many_passages(questions, facts):
    assert {query for query, _ in questions} == set(facts.queries.values())
    assert {len(set(passages)) for _, passages in questions} == {8}
    again = draw_questions(SETTINGS)
    assert again == questions
    assert draw_questions(SETTINGS.model_copy(update={"seed": 2})) != questions


def test_a_question_is_drawn_once_however_often_its_set_is_given_and_grouped(tmp_path):
    groups = load_groups(FACTS, SETTINGS.model_copy(update={"questions": 4}))
    write_groups(groups, tmp_path / "groups.jsonl")
    drawn = draw_questions(SETTINGS.model_copy(update={"data": (*[tmp_path / "groups.jsonl"] * 2, FACTS)}))
    assert len(drawn) == len({query for query, _ in drawn}) == 40


def test_a_layer_that_is_not_below_others_is_refused(model, questions):
    with pytest.raises(SettingsError, match="has 3 layers; give a layer from 1 to 2"):
        fit_early_exit(model, questions, layer=3)


def test_too_few_questions_are_refused():
    with pytest.raises(InvalidInputError, match="there are 19 questions"):
        draw_questions(SETTINGS.model_copy(update={"max_queries": 19}))


def test_fitting_brings_estimates_near_to_the_logits(model, questions):
    notices = []
    short, long = (
        fit_early_exit(model, questions, layer=2, epochs=epochs, notify=lambda *notice: notices.append(notice))
        for epochs in (1, 20)
    )
    assert (long.questions, long.held_out) == (36, 4)
    assert long.correlation > max(0.3, short.correlation)
    assert long.best_retained >= 0.75
    assert [notice for notice in notices if notice[1] == notice[2]] == [
        *(("reading", 40, 40), ("fitting", 36, 36)),
        *(("reading", 40, 40), ("fitting", 720, 720)),
    ]


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_rng_alone(model, questions):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (
        fit_early_exit(model, questions[:20], layer=1, epochs=1, seed=seed).early_exit.state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert not torch.allclose(first["passage.weight"], other["passage.weight"], atol=1e-3)


def test_it_is_stored_in_a_copy_or_in_the_checkpoint(model, questions, tiny, tmp_path):
    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    fitted = fit_early_exit(model, questions[:20], layer=1, epochs=1)
    first, second = EarlyExitConfig(layer=1, questions=18), EarlyExitConfig(layer=1, questions=17)
    assert store_early_exit(fitted.early_exit, first, checkpoint, tmp_path / "copy") == tmp_path / "copy"
    assert read_early_exit_config(tmp_path / "copy") == first
    assert read_early_exit_config(checkpoint) is None
    for config in (first, second):
        assert store_early_exit(fitted.early_exit, config, checkpoint, None) == checkpoint
        assert read_early_exit_config(checkpoint) == config
