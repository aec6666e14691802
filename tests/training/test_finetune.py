import json
import math
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, repeat
from xml.etree import ElementTree

import families
import pytest
import torch
import transformers
from command import MAIN, run, run_code
from peft import PeftModel
from safetensors.torch import load_file
from server.running import free_port
from support import FACTS, plain_logits
from transformers import AutoModelForSequenceClassification

from mistral_rerank import CheckpointError, InvalidInputError, LocalReranker, SettingsError
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.local.checkpoints.detection import read_config
from mistral_rerank.local.checkpoints.loading import load_tokenizer, open_checkpoint
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.local.model.pooling import PoolingConfig
from mistral_rerank.templates import Template
from mistral_rerank.training.finetune import _arguments, _last_complete_state, finetune
from mistral_rerank.training.groups import Group, read_groups, write_groups
from mistral_rerank.training.losses import ndcg
from mistral_rerank.training.mining import mine
from mistral_rerank.training.settings import TrainSettings
from mistral_rerank.training.trainer import GroupCollator, GroupTrainer


@pytest.fixture(scope="module")
def settings(tiny):
    return TrainSettings(
        base=str(tiny),
        layers=2,
        data=(FACTS,),
        negatives=2,
        max_length=160,
        groups_per_step=8,
        groups_per_forward=4,
        learning_rate=3e-3,
        epochs=3,
        save_steps=3,
        device="cpu",
    )


@pytest.fixture(scope="module")
def nine_groups(tmp_path_factory):
    """A file of groups whose questions are not trained on."""
    folder = tmp_path_factory.mktemp("held")
    queries = shutil.copytree(FACTS, folder / "out") / "queries.jsonl"
    queries.write_text(queries.read_text().replace('"text": "', '"text": "Tell me: '))
    mined = mine(load_beir(folder / "out"), negatives=2, random_negatives=1, max_queries=9)
    write_groups(mined.groups, folder / "groups.jsonl")
    return folder / "groups.jsonl"


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    return finetune(settings, tmp_path_factory.mktemp("train") / "checkpoint")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With several threads PyTorch does not promise equal sums, and training amplifies a last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_ndcg_of(checkpoint, settings, groups, validated):
    """Hold a mean nDCG@10 of nine groups to the finished checkpoint's, which bfloat16 may have ranked otherwise in ties."""
    low, high = [], []
    options = {"base": settings.base, "device": "cpu", "dtype": "float32", "max_length": settings.max_length}
    with LocalReranker(str(checkpoint), **options) as reranker:
        for group in read_groups(groups):
            scores = reranker.score_pairs([(group.queries[0], text) for text in group.passages])
            logits, grades = torch.tensor([[score.logit for score in scores]]), torch.tensor(group.grades)
            low.append(ndcg(logits - 0.003 * grades, grades).item())
            high.append(ndcg(logits + 0.003 * grades, grades).item())
    assert sum(high) - sum(low) < 1  # else the check could not fail
    assert sum(low) / len(low) - 1e-4 <= validated <= sum(high) / len(high) + 1e-4


def test_training_lowers_the_loss(trained):
    record = json.loads((trained / "training.json").read_text())
    assert (record["groups"], record["steps"], len(record["loss"])) == (40, 15, 15)
    untrained = math.log(4) + math.log(2)  # of a head that gives 0, for groups of four
    assert record["loss"][0] == pytest.approx(untrained, abs=1e-3)
    assert sum(record["loss"][-5:]) / 5 < 0.9 * untrained


def test_the_checkpoint_opens_in_plain_transformers_and_peft_with_equal_logits(trained, tiny, pairs):
    checkpoint = open_checkpoint(str(trained), base=str(tiny))
    assert (checkpoint.base, checkpoint.layers) == (tiny, 2)
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny, num_labels=1, num_hidden_layers=2, dtype=torch.float32
    )
    plain = PeftModel.from_pretrained(base, trained).eval()
    tokenizer = PairTokenizer(load_tokenizer(checkpoint), Template(), max_length=512)
    expected = plain_logits(plain, [pair.sequences[0] for pair in tokenizer.encode(pairs[:30])])
    assert max(expected) - min(expected) > 0.01
    with LocalReranker(str(trained), base=str(tiny), device="cpu", dtype="float32") as reranker:
        logits = [score.logit for score in reranker.score_pairs(pairs[:30])]
    assert logits == pytest.approx(expected, abs=1e-4)


def test_all_seven_linears_and_the_head_are_trained_and_nothing_else(trained):
    names = weights(trained)
    kinds = {name.split(".")[-3] for name in names if "lora" in name}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert [name for name in names if "lora" not in name] == ["base_model.model.score.weight"]
    assert all(tensor.abs().sum() > 0 for tensor in names.values())


def test_the_seed_decides_the_weights(settings, trained, tmp_path):
    again = weights(finetune(settings, tmp_path / "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(trained).items())


def test_a_killed_run_resumes_and_ends_with_the_same_weights(settings, trained, tmp_path, monkeypatch):
    calls = []
    compute_loss = GroupTrainer.compute_loss

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) > 15:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GroupTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingsError, match="holds work with another seed; remove it"):
        finetune(settings.model_copy(update={"seed": 1}), tmp_path / "out")
    resumed = finetune(settings, tmp_path / "out")
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(trained).items())
    before, after = (json.loads((folder / "training.json").read_text()) for folder in (trained, resumed))
    assert after == before
    assert list(tmp_path.iterdir()) == [resumed]


def test_the_best_validated_weights_are_saved_and_exhausted_patience_ends_the_run(
    settings, nine_groups, tmp_path, monkeypatch
):
    """Validations fall after the second, so the third and fourth use up the patience."""
    means = iter((0.5, 0.8, 0.7, 0.6))
    scores = chain.from_iterable(repeat(mean, 9) for mean in means)
    monkeypatch.setattr("mistral_rerank.training.trainer.ndcg", lambda *_: torch.tensor([next(scores)]))
    chosen = settings.model_copy(update={"validation": (nine_groups,), "patience": 2, "epochs": 9})
    out = finetune(chosen, tmp_path / "out")
    record = json.loads((out / "training.json").read_text())
    assert record["validation"] == {"3": 0.5, "6": 0.8, "9": 0.7, "12": 0.6}
    assert (record["best_step"], record["steps"], record["validation_groups"]) == (6, 12, 9)
    monkeypatch.setattr("mistral_rerank.training.trainer.ndcg", lambda *_: torch.tensor([0.5]))

    def stop(_self, args, state, control, **_):
        control.should_training_stop = state.global_step == 6

    monkeypatch.setattr("mistral_rerank.training.trainer.LossProgress.on_step_end", stop)
    six = finetune(chosen.model_copy(update={"validation": (), "patience": None}), tmp_path / "six")
    assert all(torch.equal(tensor, weights(six)[name]) for name, tensor in weights(out).items())


def test_validation_ranks_groups_as_the_finished_checkpoint_does(settings, nine_groups, tmp_path):
    out = finetune(settings.model_copy(update={"validation": (nine_groups,), "save_steps": 15}), tmp_path / "out")
    record = json.loads((out / "training.json").read_text())
    assert list(record["validation"]) == ["15"]
    assert_ndcg_of(out, settings, nine_groups, record["validation"]["15"])


def test_validation_on_the_training_questions_is_refused(settings, tmp_path):
    with pytest.raises(SettingsError, match="every question of the validation is trained on"):
        finetune(settings.model_copy(update={"validation": (FACTS,)}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_patience_needs_validation_data(settings, tmp_path):
    with pytest.raises(SettingsError, match="patience counts validations"):
        finetune(settings.model_copy(update={"patience": 1}), tmp_path / "out")


def test_the_run_leaves_a_card_and_a_plot(settings, trained):
    card = (trained / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\npipeline_tag: text-ranking\n")
    assert "facts: 40 groups an epoch" in card
    assert "rank 16" in card
    assert "| learning_rate | `0.003` |" in card
    for folder in (str(FACTS.parent), settings.base):
        assert folder not in card + (trained / "training.json").read_text()
    plot = ElementTree.parse(trained / "training.svg").getroot()
    assert plot.tag == "{http://www.w3.org/2000/svg}svg"
    assert plot.findtext("{*}title") == "Loss and nDCG@10 over the steps"
    (loss,) = (line for line in plot.iterfind(".//{*}g[@id]") if len(line.findall(".//{*}use")) == 15)
    heights = [float(point.get("y")) for point in loss.iterfind(".//{*}use")]
    assert heights[0] < heights[-1]  # y grows downwards: the loss fell


def test_memory_is_estimated_before_anything_is_loaded(settings, tmp_path, monkeypatch):
    notices = []

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mistral_rerank.training.finetune.load_classifier", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, tmp_path / "out", notice=notices.append)
    assert [line.split(":")[0] for line in notices] == ["memory"]
    assert "GiB" in notices[0]


def test_a_question_that_leaves_no_room_is_an_error_before_the_first_step(settings, tmp_path):
    write_groups([Group(("who? " * 90, "who?"), ("me", "you"), ((1, 0), (0, 1)))], tmp_path / "groups.jsonl")
    with pytest.raises(InvalidInputError, match="of 2 questions to train on, pair 0: the question takes"):
        finetune(settings.model_copy(update={"data": (tmp_path / "groups.jsonl",)}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["groups.jsonl"]


def test_a_loss_that_is_not_a_number_stops_the_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("mistral_rerank.training.trainer.group_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(SettingsError, match="the loss is nan after step 0; lower learning_rate"):
        finetune(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_layer_at_least_is_trained(settings, tmp_path):
    with pytest.raises(SettingsError, match="there are 2 layers"):
        finetune(settings.model_copy(update={"frozen_layers": 2}), tmp_path / "out")


def test_an_incomplete_state_is_skipped(tmp_path):
    assert _last_complete_state(tmp_path) is None
    for step in (9, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert _last_complete_state(tmp_path) == str(tmp_path / "checkpoint-10")


def test_an_existing_folder_is_not_overwritten(settings, trained):
    with pytest.raises(SettingsError, match="exists"):
        finetune(settings, trained)


def test_data_that_is_not_beir_is_refused_before_anything_is_written(settings, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(InvalidInputError, match="not a BEIR folder"):
        finetune(settings.model_copy(update={"data": (tmp_path / "data",)}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_activation_checkpointing_gives_the_same_losses(settings, trained, tmp_path):
    again = finetune(settings.model_copy(update={"activation_checkpointing": True}), tmp_path / "out")
    before, after = (json.loads((folder / "training.json").read_text())["loss"] for folder in (trained, again))
    assert after == pytest.approx(before, abs=0.02)


@pytest.mark.parametrize("checkpoints", [True, False])
def test_older_releases_of_transformers_get_the_old_name_of_activation_checkpointing(
    monkeypatch, settings, tmp_path, checkpoints
):
    class OlderArguments:
        def __init__(self, *, gradient_checkpointing=False, **others):
            assert "activation_checkpointing" not in others
            self.gradient_checkpointing = gradient_checkpointing

    monkeypatch.setattr(transformers, "TrainingArguments", OlderArguments)
    chosen = settings.model_copy(update={"activation_checkpointing": checkpoints})
    assert _arguments(chosen, tmp_path, bf16=False, cpu=True).gradient_checkpointing is checkpoints


def test_a_base_in_four_bits_is_trained(settings, trained, tmp_path):
    notices = []
    out = finetune(settings.model_copy(update={"four_bit": True}), tmp_path / "out", notice=notices.append)
    full, four = (json.loads((folder / "training.json").read_text())["loss"] for folder in (trained, out))
    assert four[0] == pytest.approx(full[0], abs=1e-3)  # the head starts at 0
    assert four[1:] != full[1:]
    assert sum(four[-5:]) / 5 < 0.9 * four[0]
    assert weights(out).keys() == weights(trained).keys()
    with LocalReranker(str(out), base=settings.base, device="cpu", dtype="float32") as reranker:
        assert reranker.score_pairs([("who?", "me")])


def test_layers_below_the_frozen_ones_get_no_adapter(settings, tmp_path):
    part = finetune(settings.model_copy(update={"frozen_layers": 1, "epochs": 1}), tmp_path / "out")
    assert {name.split("layers.")[1][0] for name in weights(part) if "layers." in name} == {"1"}
    with LocalReranker(str(part), base=settings.base, device="cpu", dtype="float32") as reranker:
        assert reranker.score_pairs([("who?", "me")])


def test_questions_may_share_a_passage_that_comes_first(settings, tmp_path):
    changes = {"template": "{passage}\n{query}", "questions": 4, "groups_per_step": 2, "groups_per_forward": 1}
    out = finetune(settings.model_copy(update=changes), tmp_path / "out")
    losses = json.loads((out / "training.json").read_text())["loss"]
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


def test_a_bidirectional_model_is_trained_as_it_is_run(settings, nine_groups, tmp_path):
    changes = {"bidirectional": True, "validation": (nine_groups,), "save_steps": 15}
    out = finetune(settings.model_copy(update=changes), tmp_path / "out")
    assert read_config(out).pooling_config == PoolingConfig(bidirectional=True, mean=True)
    record = json.loads((out / "training.json").read_text())
    assert sum(record["loss"][-5:]) / 5 < 0.9 * record["loss"][0]
    assert list(record["validation"]) == ["15"]
    assert_ndcg_of(out, settings, nine_groups, record["validation"]["15"])
    more = {"layers": None, "init": str(out), "epochs": 1}
    assert read_config(finetune(settings.model_copy(update=more), tmp_path / "more")) == read_config(out)


def test_the_path_of_a_local_base_is_not_saved_and_has_to_be_given_again(settings, trained, tiny, tmp_path):
    for file in ("rerank.json", "adapter_config.json", "training.json", "README.md"):
        assert str(tiny) not in (trained / file).read_text()
    assert json.loads((trained / "rerank.json").read_text())["base"]["name"] is None
    with pytest.raises(CheckpointError, match=r"rerank.json: base.name is not given.*--base FOLDER"):
        open_checkpoint(str(trained))
    from_adapter = {"base": None, "layers": None, "init": str(trained)}
    with pytest.raises(CheckpointError, match="base.name is not given"):
        finetune(settings.model_copy(update=from_adapter), tmp_path / "none")


def test_training_continues_from_an_adapter_with_its_base_inside(settings, trained, tiny, tmp_path):
    start = shutil.copytree(trained, tmp_path / "start")
    shutil.copytree(tiny, start / "base")
    config = json.loads((start / "rerank.json").read_text())
    config["base"]["name"] = "base"
    (start / "rerank.json").write_text(json.dumps(config))
    from_adapter = {"base": None, "layers": None, "init": str(start), "epochs": 1}
    out = finetune(settings.model_copy(update=from_adapter), tmp_path / "out")
    with LocalReranker(str(out), base=str(start / "base"), device="cpu") as reranker:
        assert len(reranker.score_pairs([("who?", "me")])) == 1


def test_training_continues_from_an_adapter_with_its_base_layers_and_template(settings, trained, tmp_path):
    from_adapter = settings.model_copy(update={"layers": None, "init": str(trained), "epochs": 1})
    more = finetune(from_adapter, tmp_path / "more")
    assert read_config(more) == read_config(trained)
    assert (more / "adapter_config.json").read_text() == (trained / "adapter_config.json").read_text()
    before, after = (json.loads((folder / "training.json").read_text())["loss"] for folder in (trained, more))
    assert sum(after) / len(after) < sum(before) / len(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": None, "base": None}, "give a base to train on, or init"),
        ({"template": "{query}\n{passage}"}, "leave template out"),
        ({"layers": 1}, "leave layers out"),
        ({"bidirectional": True}, "leave bidirectional out"),
        ({"lora_rank": 4, "frozen_layers": 1}, "leave frozen_layers, lora_rank out"),
    ],
)
def test_settings_that_contradict_the_adapter_are_refused(settings, trained, tmp_path, changes, message):
    from_adapter = {"layers": None, "init": str(trained)}
    with pytest.raises(SettingsError, match=message):
        finetune(settings.model_copy(update=from_adapter | changes), tmp_path / "none")
    with pytest.raises(CheckpointError, match="neither"):
        finetune(settings.model_copy(update=from_adapter | {"init": str(tmp_path)}), tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_is_no_adapter_to_continue_from(settings, tiny, tmp_path):
    with pytest.raises(SettingsError, match="whole model"):
        finetune(settings.model_copy(update={"base": None, "init": str(tiny)}), tmp_path / "none")


@pytest.fixture(scope="module")
def distilled(settings, facts, tmp_path_factory):
    """Settings of a run on groups whose teacher likes the last passage best."""
    file = tmp_path_factory.mktemp("groups") / "groups.jsonl"
    groups = mine(facts, negatives=2, random_negatives=1).groups
    write_groups([replace(group, teacher=((0.0, 0.0, 0.0, 9.0),)) for group in groups], file)
    return settings.model_copy(update={"data": (file,), "epochs": 1})


def test_a_teacher_changes_the_loss(distilled, tmp_path):
    first = [
        json.loads((finetune(settings, tmp_path / name) / "training.json").read_text())["loss"][0]
        for name, settings in (("distilled", distilled), ("alone", distilled.model_copy(update={"distill": 0.0})))
    ]
    divergence = math.log(4) - 0.0025  # of an untrained model's even shares from the teacher's, about one-hot
    assert first[0] - first[1] == pytest.approx(divergence, abs=2e-3)


def test_groups_of_two_sizes_are_refused_in_one_forward(settings, distilled, tmp_path):
    with pytest.raises(SettingsError, match="one number of passages.*Set groups_per_forward to 1"):
        finetune(settings.model_copy(update={"data": distilled.data + settings.data}), tmp_path / "out")


def test_groups_of_two_sizes_with_and_without_a_teacher_train_together_one_a_forward(settings, distilled, tmp_path):
    file = tmp_path / "short.jsonl"
    write_groups([Group(("What is the capital of France?",), ("Paris", "Rome"), ((1.0, 0.0),))] * 4, file)
    data = (*distilled.data, file)
    mixed = settings.model_copy(update={"data": data, "epochs": 1, "groups_per_forward": 1})
    record = json.loads((finetune(mixed, tmp_path / "out") / "training.json").read_text())
    assert record["groups"] == 44
    assert all(math.isfinite(loss) for loss in record["loss"])


def test_the_record_counts_the_tokens_that_were_computed(settings, trained, tiny):
    checkpoint = open_checkpoint(str(trained), base=str(tiny))
    collator = GroupCollator(
        PairTokenizer(load_tokenizer(checkpoint), Template(), max_length=settings.max_length), settings.batch_tokens
    )
    groups = mine(load_beir(FACTS), negatives=2, random_negatives=1, seed=settings.seed).groups
    random.Random(settings.seed).shuffle(groups)
    once = sum(
        packed.ids.numel() for start in range(0, 40, 4) for packed in collator(groups[start : start + 4])["packs"]
    )
    record = json.loads((trained / "training.json").read_text())
    assert record["tokens"] == 3 * once


def test_two_processes_train_what_one_does(settings, tmp_path):
    """Both start from one seed and see half of every step's groups: the mean gradient is the same."""
    command = ["train", "--base", settings.base, "--layers", "2", "--data", str(FACTS), "--device", "cpu"]
    command += ["--negatives", "2", "--max-length", "160", "--groups-per-forward", "4", "--learning-rate", "3e-3"]
    command += ["--groups-per-step", "8", "--out"]
    alone = run(*command, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def train(rank):
        variables = common | {"RANK": rank, "LOCAL_RANK": rank}  # as torchrun sets them
        return run_code(f"import os; os.environ.update({variables}); {MAIN}", *command, tmp_path / "two")

    with ThreadPoolExecutor(2) as pool:
        for process in pool.map(train, "01"):
            assert process.returncode == 0, process.stderr
    one, two = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two"))
    assert (one["steps"], two["steps"]) == (5, 5)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)


@pytest.mark.parametrize("template", ["{query}\n{passage}", "{passage}\n{query}"])
def test_logits_of_packed_rows_return_to_their_groups(tokenizer, template):
    passages = ("me " * 30, "you", "they " * 12)
    grades = ((1.0, 0.0, None), (0.0, 1.0, 0.0))
    groups = [Group(("who? " * 5, "where? " * 5), passages, grades), Group(("a", "b"), ("c" * 9, "d", ""), grades)]
    pair_tokenizer = PairTokenizer(tokenizer, Template(template), max_length=512)
    batch = GroupCollator(pair_tokenizer, batch_tokens=80)(groups)
    members = [member for packed in batch["packs"] for member in packed.members]
    assert sorted(members) == list(range(12))
    assert [members[position] for position in batch["positions"].flatten()] == list(range(12))
    assert batch["grades"].nan_to_num(-1).tolist() == [[1, 0, -1], [0, 1, 0], [1, 0, -1], [0, 1, 0]]
    assert batch["teacher"] is None


def test_a_qwen3_base_is_trained_and_scores_as_in_plain_transformers(settings, pairs, tmp_path):
    base = families.qwen3_reranker(tmp_path)
    changes = {"base": str(base), "layers": None, "epochs": 1}
    out = finetune(settings.model_copy(update=changes), tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, out).eval()
    checkpoint = open_checkpoint(str(out), base=str(base))
    tokenizer = PairTokenizer(load_tokenizer(checkpoint), Template(), max_length=512)
    expected = plain_logits(plain, [pair.sequences[0] for pair in tokenizer.encode(pairs[:10])])
    with LocalReranker(out, base=base, device="cpu", dtype="float32") as reranker:
        logits = [score.logit for score in reranker.score_pairs(pairs[:10])]
    assert logits == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.001
