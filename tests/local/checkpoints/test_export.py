"""What `export` writes, read by those it is for: plain transformers, Jinja, and our own reranker."""

import json
import shutil
from pathlib import Path

import jinja2
import jinja2.sandbox
import pytest
import torch
from command import run
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mistral_rerank import CheckpointError, LocalReranker, SettingsError
from mistral_rerank.local.checkpoints import export as module
from mistral_rerank.local.checkpoints.export import chat_template, export_merged
from mistral_rerank.local.checkpoints.loading import load_model, open_checkpoint
from mistral_rerank.templates import Template

TEMPLATE = 'q "{{x}}" \\n:{query} \n \n p:{passage}\n'
CALIBRATION = {"scale": 0.5, "bias": -1.0}


@pytest.fixture(scope="session")
def adapter(tiny, tmp_path_factory) -> Path:
    """A LoRA adapter with a trained head, on two of the three layers of a base inside it."""
    work = tmp_path_factory.mktemp("adapter")
    shutil.copytree(tiny, work / "adapter" / "base")
    torch.manual_seed(7)
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_hidden_layers=2, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "score.modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(work / "adapter")
    settings = {
        "template": TEMPLATE,
        "max_length": 200,
        "calibration": CALIBRATION,
        "base": {"name": "base", "layers": 2, "kind": "pretrained"},
    }
    (work / "adapter" / "rerank.json").write_text(json.dumps(settings))
    return work / "adapter"


@pytest.fixture(scope="session")
def exported(adapter, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "deep" / "merged"
    export_merged(str(adapter), out, dtype="float32")
    return out


def local(folder, **options):
    return LocalReranker(str(folder), device="cpu", dtype="float32", **options)


def messages(query, passage):
    return [{"role": "document", "content": passage}, {"role": "query", "content": query}]


def test_plain_transformers_gives_our_logits_from_the_folder_alone(adapter, exported, pairs, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "elsewhere")
    (folder / "rerank.json").unlink()
    pairs = [pair for pair in pairs if pair[1].strip()]  # blank passages are not scored by the model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert (model.dtype, model.config.num_labels, len(model.model.layers)) == (torch.float32, 1, 2)
    texts = [tokenizer.apply_chat_template(messages(*pair), tokenize=False) for pair in pairs[:20]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = model(**batch).logits[:, 0].tolist()
    with local(adapter) as reranker:
        expected = [score.logit for score in reranker.score_pairs(pairs[:20])]
    assert found == pytest.approx(expected, abs=1e-4)


def test_our_reranker_gives_the_same_scores_with_the_same_calibration(adapter, exported, pairs):
    long = [("where?", "far away " * 300)]
    with local(adapter) as before, local(exported) as after:
        expected, found = (reranker.score_pairs(pairs[:20] + long) for reranker in (before, after))
    assert found == expected
    assert found[0].probability == pytest.approx(torch.tensor(found[0].logit * 0.5 - 1).sigmoid().item())


def test_the_folder_says_all_that_other_engines_ask(exported, tokenizer):
    assert {file.name for file in exported.iterdir()} == {
        *("config.json", "model.safetensors", "rerank.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }, "no pickle, no adapter"
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["MistralForSequenceClassification"]
    assert (config["num_hidden_layers"], list(config["id2label"])) == (2, ["0"])
    assert config["pad_token_id"] not in (None, tokenizer.eos_token_id)
    assert "problem_type" not in config or config["problem_type"] is None
    assert json.loads((exported / "tokenizer_config.json").read_text())["model_max_length"] == 200
    assert json.loads((exported / "rerank.json").read_text())["base"] is None
    assert len({file.stat().st_mode for file in exported.iterdir()}) == 1, "whoever may read one file may read all"
    for file in exported.glob("*.json*"):
        assert str(exported.parent) not in file.read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_merge_is_rounded_once_and_the_head_not_at_all(adapter, exported, tmp_path, dtype):
    export_merged(str(adapter), tmp_path / "out", dtype=dtype)
    with (
        safe_open(exported / "model.safetensors", "pt") as exact,
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as rounded,
    ):
        assert exact.keys() == rounded.keys()
        for name in exact.keys():  # noqa: SIM118 - not a dict
            wanted = torch.float32 if name == "score.weight" else getattr(torch, dtype)
            assert torch.equal(rounded.get_tensor(name), exact.get_tensor(name).to(wanted)), name


def test_our_reranker_reads_the_head_of_a_rounded_export_unrounded(adapter, exported, tmp_path):
    export_merged(str(adapter), tmp_path / "out", dtype="bfloat16")
    heads = []
    for folder in (exported, tmp_path / "out"):
        checkpoint = open_checkpoint(str(folder))
        heads.append(load_model(checkpoint, dtype=torch.bfloat16).score.weight)
    assert heads[1].dtype == torch.float32
    assert torch.equal(*heads)


@pytest.mark.parametrize("wrong", ["its end token", "an id of its own"])
def test_a_padding_token_that_transformers_would_pool_wrongly_is_replaced(tiny, tmp_path, pairs, wrong):
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token if wrong == "its end token" else None
    tokenizer.save_pretrained(folder)
    export_merged(str(folder), tmp_path / "out", dtype="float32")
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    texts = [Template().format(*pair).text for pair in pairs[:5]]
    with torch.inference_mode():
        found = model(**plain(texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    with local(folder) as reranker:
        assert found == pytest.approx([score.logit for score in reranker.score_pairs(pairs[:5])], abs=1e-4)


def test_a_tokenizer_that_transformers_rebuilds_on_loading_keeps_the_end_token(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    export_merged(str(folder), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("me").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(ids) == 2 + len(tokenizer("me", add_special_tokens=False).input_ids)


def test_a_checkpoint_without_an_end_token_gets_none(tiny, tmp_path, pairs):
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    (folder / "rerank.json").write_text('{"append_eos": false}')
    export_merged(str(folder), tmp_path / "out", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("me").input_ids[-1] != tokenizer.eos_token_id
    with local(folder) as before, local(tmp_path / "out") as after:
        assert after.score_pairs(pairs[:5]) == before.score_pairs(pairs[:5])


@pytest.mark.parametrize(
    "template",
    [
        "question:{query} \n \n passage:{passage}",
        "{query}{passage}",
        "{query}\n{passage}\n",
        "\n  {query}\r\n{passage} \t",
        "{{ messages }} {% raw %} {# no #} \"{query}\" '\\n' {passage} ~ \\",
        "Frage: {query} → 😀\u2028{passage}",
        "Passage: {passage}\nQuestion: {query}",
    ],
)
@pytest.mark.parametrize("pair", [("who?", "me"), ("{{ 7 * 7 }} {passage}", " <s>{% if %}\n"), ("", "")])
def test_the_chat_template_renders_what_the_prompt_formats(template, pair):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    for engine in (environment, jinja2.Environment(autoescape=False)):
        rendered = engine.from_string(chat_template(Template(template))).render(messages=messages(*pair))
        assert rendered == Template(template).format(*pair).text


def test_the_chat_template_on_disk_is_the_checkpoints(exported):
    rendered = jinja2.Template((exported / "chat_template.jinja").read_text()).render(messages=messages("q", "p"))
    assert rendered == Template(TEMPLATE).format("q", "p").text


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_exists_is_refused_and_untouched(tiny, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = [*tmp_path.iterdir()], out.lstat()
    with pytest.raises(SettingsError, match="give another folder"):
        export_merged(str(tiny), out)
    assert ([*tmp_path.iterdir()], out.lstat()) == before


@pytest.mark.parametrize("step", ["_check", "_prepare_tokenizer"])
def test_a_failure_midway_leaves_nothing(tiny, tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(OSError, match="no space left"):
        export_merged(str(tiny), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_would_score_other_texts_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_append_eos", lambda tokenizer: None)
    with pytest.raises(CheckpointError, match="other engines would score other texts"):
        export_merged(str(tiny), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_and_its_errors_are_one_line(tiny, tmp_path):
    out = tmp_path / "out"
    done = run("export", "--model", tiny, "--out", out, "--dtype", "float32")
    assert (done.returncode, done.stdout) == (0, "")
    assert (out / "model.safetensors").is_file()
    for arguments, hint in (
        (("--model", tiny, "--out", out), "exists"),
        (("--model", tiny, "--out", tmp_path / "b", "--dtype", "int8"), "'bfloat16'"),
    ):
        refused = run("export", *arguments)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
        assert hint in refused.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
