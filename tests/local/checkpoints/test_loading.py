import json
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
from support import plain_logits, tiny_config
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MistralForCausalLM,
    MistralForSequenceClassification,
    modeling_utils,
)

from mistral_rerank import CheckpointError, LocalReranker, SettingsError
from mistral_rerank.local.checkpoints.detection import read_config
from mistral_rerank.local.checkpoints.loading import find_checkpoint, load_classifier, open_checkpoint
from mistral_rerank.local.checkpoints.summary import summary
from mistral_rerank.local.checkpoints.update import checkpoint_to_update
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.local.model.rerank_model import RerankModel
from mistral_rerank.templates import Template


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "checkpoint")


def write_settings(folder, **settings):
    (folder / "rerank.json").write_text(json.dumps(settings))


def test_the_settings_of_a_checkpoint_decide_prompt_end_token_limit_and_calibration(folder, tokenizer, pairs):
    write_settings(
        folder,
        template="query: {query} document: {passage}",
        append_eos=False,
        max_length=64,
        calibration={"scale": 0.5, "bias": -1.0},
    )
    pairs = [pair for pair in pairs if pair[1].strip()]  # blank passages are not scored by the model
    prompt = Template("query: {query} document: {passage}")
    encoded = PairTokenizer(tokenizer, prompt, append_eos=False, max_length=64).encode(pairs[:20])
    model = MistralForSequenceClassification.from_pretrained(folder).eval()
    expected = plain_logits(model, [pair.sequences[0] for pair in encoded])
    with LocalReranker(str(folder), device="cpu", dtype="float32") as reranker:
        scores = reranker.score_pairs(pairs[:20])
    assert [score.logit for score in scores] == pytest.approx(expected, abs=1e-4)
    assert scores[0].probability == pytest.approx(torch.tensor(expected[0] * 0.5 - 1).sigmoid().item(), abs=1e-4)


def test_the_users_limit_can_only_lower_the_checkpoints(folder, pairs):
    write_settings(folder, max_length=40)
    with (
        LocalReranker(str(folder), device="cpu", dtype="float32", max_length=400) as buffer,
        LocalReranker(str(folder), device="cpu", dtype="float32") as own,
    ):
        assert buffer.score_pairs(pairs[:10]) == own.score_pairs(pairs[:10])


def test_a_base_is_cut_to_its_first_layers(folder, tokenizer):
    cut = load_classifier(folder, dtype=torch.float32, layers=2)
    whole = MistralForSequenceClassification.from_pretrained(folder).eval()
    assert len(cut.model.layers) == cut.config.num_hidden_layers == 2
    whole.model.layers = whole.model.layers[:2]
    ids = [tokenizer("question:who? \n \n passage:me").input_ids]
    assert plain_logits(cut.eval(), ids) == plain_logits(whole, ids)
    with pytest.raises(CheckpointError, match="has 3 layers, 9 were asked for"):
        load_classifier(folder, dtype=torch.float32, layers=9)


def test_weights_that_are_not_safetensors_are_refused(folder):
    torch.save(MistralForSequenceClassification.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with (
        LocalReranker(str(folder), device="cpu") as reranker,
        pytest.raises(CheckpointError, match="safetensors"),
    ):
        reranker.warmup()


def test_a_model_without_a_score_head_is_refused(folder, tokenizer):
    MistralForCausalLM(tiny_config(len(tokenizer))).save_pretrained(folder)
    with (
        LocalReranker(str(folder), device="cpu") as reranker,
        pytest.raises(CheckpointError, match="no score.weight"),
    ):
        reranker.warmup()


def test_an_encoder_with_two_labels_is_refused(folder, tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    with (
        LocalReranker(str(folder), device="cpu") as reranker,
        pytest.raises(CheckpointError, match="not usable"),
    ):
        reranker.warmup()


def test_quantization_of_an_encoder_is_refused(folder, tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    model = BertForSequenceClassification(config)
    with pytest.raises(CheckpointError, match="'nf4' is for rows without padding of a Mistral, Llama"):
        RerankModel(model, None, torch.device("cpu"), quantization="nf4")


def test_a_model_that_needs_code_of_its_own_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "mistral_special"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")
    with LocalReranker(str(folder), device="cpu") as reranker, pytest.raises(CheckpointError):
        reranker.warmup()


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"pooling": "first"}, "pooling"),
        ({"max_lenght": 5}, "max_lenght"),
        ({"calibration": {"scale": -1}}, "scale"),
    ],
)
def test_settings_that_are_not_understood_are_refused(folder, settings, hint):
    write_settings(folder, **settings)
    with pytest.raises(CheckpointError, match=hint):
        open_checkpoint(str(folder))


def test_a_plain_peft_folder_names_its_base(tmp_path):
    folder = tmp_path / "rankllama-v1-7b-lora-passage"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    assert read_config(folder).base.name == "some/base"


@pytest.mark.parametrize("name", ["/not/there", "./not-there", "nothing"])
def test_a_name_that_is_no_folder_and_no_hub_id_is_refused(name):
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_checkpoint(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="it is no checkpoint"):
        open_checkpoint(str(tmp_path))


def test_the_summary_tells_what_runs_where(tiny):
    facts = summary(str(tiny), device="cpu", dtype="float32")
    assert facts["architecture"] == "mistral, 3 layers of width 64"
    assert facts["runs on"] == "cpu in float32"


def test_a_folder_called_mini_does_not_replace_the_built_in_model(folder, tmp_path, monkeypatch):
    folder.rename(tmp_path / "mini")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("mini") != tmp_path / "mini"
    assert (find_checkpoint("mini") / "adapter_model.safetensors").is_file()
    assert find_checkpoint("./mini").resolve() == tmp_path / "mini"
    with pytest.raises(SettingsError, match="--out"):
        checkpoint_to_update("mini", None)


def test_only_the_shards_of_the_layers_that_are_used_are_opened(tiny, tokenizer, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = MistralForSequenceClassification(tiny_config(len(tokenizer), num_hidden_layers=32))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    used = {file for name, file in shards.items() if ".layers." not in name or int(name.split(".")[2]) < 16}
    assert len(used) < len(set(shards.values()))
    opened = set()
    real = safetensors.safe_open

    def spy(file, *arguments, **options):
        opened.add(Path(file).name)
        return real(file, *arguments, **options)

    monkeypatch.setattr(safetensors, "safe_open", spy)
    monkeypatch.setattr(modeling_utils, "safe_open", spy)
    cut = load_classifier(tmp_path, dtype="auto", layers=16)
    assert opened == used
    model.model.layers = model.model.layers[:16]
    ids = [tokenizer("question:who? \n \n passage:me").input_ids]
    assert plain_logits(cut.eval(), ids) == plain_logits(model.eval(), ids)
