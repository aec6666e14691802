"""Published rerankers: token ids and logits equal those of the owners' own code, on tiny models in their layout.

Where the owner publishes a builder of token ids, it is written out here; models with sentence-transformers modules,
and encoders, are compared with its CrossEncoder.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import families
import pytest
import torch
from peft import PeftModel
from sentence_transformers import CrossEncoder
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Ministral3ForSequenceClassification,
)

from mistral_rerank import CheckpointError, InvalidInputError, LocalReranker, open_reranker
from mistral_rerank.local.checkpoints.families import FAMILIES
from mistral_rerank.local.checkpoints.loading import length_limit, load_tokenizer, open_checkpoint
from mistral_rerank.local.checkpoints.model_config import read_model_config
from mistral_rerank.local.checkpoints.summary import summary
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.local.model import rerank_model

PAIRS = [
    ("Who wrote the novel?", "She wrote it in 1797, in a small house near the sea."),
    ("when was the bridge built", "The bridge was built by the city.\n\nIt opened later?"),
    ("Why?  Because!", "  two   spaces, a\ttab and caf\u00e9 \u65e5\u672c "),
    ("Who wrote the novel?", "Nobody knows."),
    ("what is 1+1", "yes no 0 1 Yes"),
]
LONG = "The glacier moved slowly down the valley and carved the rock. " * 60
INSTRUCTION = "Prefer the newest passage; ignore others?"
QWEN3_TASK = "Given a web search query, retrieve relevant passages that answer the query"


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def qwen3_ids(tokenizer, query, passage, instruction, limit):
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    start, end = (
        encode(tokenizer, text) for text in (prefix, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    )
    pair = f"<Instruct>: {instruction or QWEN3_TASK}\n<Query>: {query}\n<Document>: {passage}"
    middle = tokenizer(pair, truncation=True, max_length=limit - len(start) - len(end)).input_ids
    return start + middle + end


def zerank_ids(tokenizer, query, passage, instruction, limit):
    start = f"<|im_start|>system\n{query.strip()}<|im_end|>\n<|im_start|>user\n"
    ids = encode(tokenizer, start + passage.strip() + "<|im_end|>\n<|im_start|>assistant\n")
    end = encode(tokenizer, "<|im_end|>\n<|im_start|>assistant\n")
    return ids if len(ids) <= limit else ids[: limit - len(end)] + end


def mxbai_ids(tokenizer, query, passage, instruction, limit):
    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    )
    start = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
    )
    question = f"query: {query}" if not instruction else f"instruction: {instruction}\nquery: {query}"
    ends = encode(tokenizer, "\n") + encode(tokenizer, task) + encode(tokenizer, "<|im_end|>\n<|im_start|>assistant\n")
    ids = encode(tokenizer, start) + encode(tokenizer, question) + encode(tokenizer, "\n")
    ids += encode(tokenizer, f"document: {passage}")
    return ids[: limit - len(ends)] + ends


def contextual_ids(tokenizer, query, passage, instruction, limit):
    head = "Check whether a given document contains information helpful to answer the query.\n<Document> "
    tail = f"\n<Query> {query}{f' {instruction}' if instruction else ''} ??"
    text = head + passage + tail
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids = encoding.input_ids
    end = [i for i, (_, stop) in zip(ids, encoding.offset_mapping, strict=True) if stop > len(head + passage)]
    return ids if len(ids) <= limit else ids[: limit - len(end)] + end


def gemma_ids(tokenizer, query, passage, instruction, limit):
    task = instruction or (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing "
        "a prediction of either 'Yes' or 'No'."
    )
    separator = encode(tokenizer, "\n")
    ids = [tokenizer.bos_token_id, *encode(tokenizer, f"A: {query}"), *separator, *encode(tokenizer, f"B: {passage}")]
    end = separator + encode(tokenizer, task)
    return ids[: limit - len(end)] + end


def nemotron_ids(tokenizer, query, passage, instruction, limit):
    return tokenizer(f"question:{query} \n \n passage:{passage}", truncation=True, max_length=limit).input_ids


def rankllama_ids(tokenizer, query, passage, instruction, limit):
    pair = f"query: {query}", f"document: {passage}"
    return tokenizer(*pair, truncation="only_second", max_length=limit).input_ids


@cache
def cross_encoder(folder, limit=None):
    return CrossEncoder(str(folder), max_length=limit, device="cpu", model_kwargs={"dtype": torch.float32})


def cross_encoder_ids(folder, query, passage, instruction, limit):
    pair = cross_encoder(folder, limit).preprocess([(query, passage)], prompt=instruction)
    return pair["input_ids"][0].tolist()


@cache
def owner_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


BUILDERS = {
    "Qwen3-Reranker": qwen3_ids,
    "Qwen3-Reranker seq-cls": qwen3_ids,
    "zerank": zerank_ids,
    "mxbai-rerank-v2": mxbai_ids,
    "ctxl-rerank-v2": contextual_ids,
    "bge-reranker-v2-gemma": gemma_ids,
    "llama-nemotron-rerank": nemotron_ids,
    "RankLLaMA": rankllama_ids,
}
LANGUAGE_MODELS = {
    "Qwen3-Reranker": ("yes", "no"),
    "zerank": ("Yes", None),
    "mxbai-rerank-v2": ("1", "0"),
    "ctxl-rerank-v2": (0, None),
    "bge-reranker-v2-gemma": ("Yes", None),
}
WITH_INSTRUCTION = {
    "Qwen3-Reranker",
    "Qwen3-Reranker with modules",
    "Qwen3-Reranker seq-cls",
    "mxbai-rerank-v2",
    "ctxl-rerank-v2",
    "bge-reranker-v2-gemma",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp("family")) for name, make in families.FAMILIES.items()}


def owner_ids(name, folder, query, passage, instruction=None, limit=512):
    if name not in BUILDERS:
        return cross_encoder_ids(folder, query, passage, instruction, limit)
    tokenizer = owner_tokenizer(folder if name != "RankLLaMA" else folder / "base")
    return BUILDERS[name](tokenizer, query, passage, instruction, limit)


def pair_tokenizer(folder, limit=512):
    checkpoint = open_checkpoint(str(folder))
    config = checkpoint.config
    most = length_limit(checkpoint, read_model_config(checkpoint.base or folder))
    return PairTokenizer(
        load_tokenizer(checkpoint),
        config.prompt,
        add_special_tokens=config.add_special_tokens,
        append_eos=config.append_eos,
        max_length=min(limit, most),
    )


def only(encoded):
    ((ids,),) = [pair.sequences for pair in encoded]
    return ids


def owner_logits(name, folder, sequences):
    """Score token ids one by one with the owner's way to a score."""
    if name in LANGUAGE_MODELS:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        vocabulary = owner_tokenizer(folder).get_vocab()
        yes, no = (vocabulary.get(token, token) for token in LANGUAGE_MODELS[name])
        with torch.inference_mode():
            last = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in sequences]
        return [(row[yes] - (0 if no is None else row[no])).item() for row in last]
    if name == "RankLLaMA":
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder).eval()
        with torch.inference_mode():
            return [model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
    if name == "llama-nemotron-rerank":
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
        model = LlamaForSequenceClassification(LlamaConfig.from_dict(config)).eval()
        model.load_state_dict(families.weights(folder))
        logits = []
        for ids in sequences:
            everything = torch.zeros(1, 1, len(ids), len(ids))
            with torch.inference_mode():
                hidden = model.model(input_ids=torch.tensor([ids]), attention_mask=everything).last_hidden_state
                logits.append(model.score(hidden.mean(1)).item() / config["temperature"])
        return logits
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]


@cache
def expected_logits(name, folder):
    if name in BUILDERS:
        return owner_logits(name, folder, [owner_ids(name, folder, *pair) for pair in PAIRS])
    return cross_encoder(folder).predict(PAIRS, activation_fn=torch.nn.Identity()).tolist()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_token_ids_are_those_of_the_owners_builder(name, folders):
    ids = [only([pair]) for pair in pair_tokenizer(folders[name]).encode(PAIRS)]
    assert ids == [owner_ids(name, folders[name], *pair) for pair in PAIRS]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_passage_over_the_limit_loses_its_end_as_in_the_owners_builder(name, folders):
    ids = only(pair_tokenizer(folders[name], 300).encode([(PAIRS[0][0], LONG)]))
    assert len(ids) == 300
    assert ids == owner_ids(name, folders[name], PAIRS[0][0], LONG, limit=300)


@pytest.mark.parametrize("name", sorted(WITH_INSTRUCTION))
def test_an_instruction_goes_where_the_owner_puts_it(name, folders):
    tokenizer = pair_tokenizer(folders[name])
    for pair in PAIRS[:3]:
        ids = only(tokenizer.encode([pair], instruction=INSTRUCTION))
        assert ids == owner_ids(name, folders[name], *pair, instruction=INSTRUCTION)
        assert ids != only(tokenizer.encode([pair]))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_texts_that_spell_special_tokens_of_the_template_stay_texts(name, folders):
    tokenizer = pair_tokenizer(folders[name])
    checkpoint = open_checkpoint(str(folders[name]))
    vocabulary = load_tokenizer(checkpoint)
    plain = only(tokenizer.encode([("who?", "me")]))
    held = [token for token in ("<think>", "</think>") if token in str(checkpoint.config.template)]
    spelled = [*(set(vocabulary.all_special_tokens) | {"<|im_start|>"}) & set(vocabulary.get_added_vocab()), *held]
    special = set(vocabulary.convert_tokens_to_ids(spelled)) - {vocabulary.unk_token_id}
    assert set(encode(vocabulary, "".join(spelled))) & special, "the plain tokenizer is fooled, so this test can fail"
    for token in spelled:
        for pair in (("who?", f"me {token}\n"), (f"who{token}?", "me")):
            ids = only(tokenizer.encode([pair]))
            assert [i for i in ids if i in special] == [i for i in plain if i in special]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_are_those_of_the_owners_code(name, padded, folders, monkeypatch):
    """Packed rows share the prefix of pairs with the same question."""
    folder = folders[name]
    if padded:
        monkeypatch.setattr(rerank_model, "row_attention", lambda *_: None)
    with LocalReranker(folder, device="cpu", dtype="float32") as reranker:
        logits = [score.logit for score in reranker.score_pairs(PAIRS)]
    assert logits == pytest.approx(expected_logits(name, folder), abs=1e-4)
    assert len(set(logits)) == len(PAIRS)


def test_the_probability_has_the_owners_temperature_and_offset(folders):
    for name, scale, bias in (("zerank", 0.2, 0), ("zerank with modules", 0.2, 0), ("mxbai-rerank-v2", 1, -4.5)):
        with LocalReranker(folders[name], device="cpu", dtype="float32") as reranker:
            (score,) = reranker.score_pairs(PAIRS[:1])
        assert score.probability == pytest.approx(torch.tensor(scale * score.logit + bias).sigmoid().item(), abs=1e-6)


@pytest.mark.parametrize("name", ["Qwen3-Reranker", "zerank", "mxbai-rerank-v2", "RankLLaMA"])
def test_a_folder_under_another_name_is_refused(name, folders, tmp_path):
    folder = shutil.copytree(folders[name], tmp_path / "renamed")
    with pytest.raises(CheckpointError, match="does not say how it is read.*rerank_config"):
        open_checkpoint(str(folder))


def test_an_unknown_decoder_is_refused_with_what_to_set(folders, tmp_path):
    folder = families.qwen3_reranker_seq_cls(tmp_path).rename(tmp_path / "my-model")
    with pytest.raises(CheckpointError, match="template.*true_token.*Qwen3-Reranker"):
        open_checkpoint(str(folder))
    (tmp_path / "how.json").write_text('{"template": "{query}\\n{passage}", "append_eos": false}')
    with LocalReranker(folder, rerank_config=tmp_path / "how.json", device="cpu", dtype="float32") as reranker:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        expected = owner_logits("", folder, [tokenizer("who?\nme").input_ids])
        assert [score.logit for score in reranker.score_pairs([("who?", "me")])] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bge-reranker-v2-minicpm-layerwise", "its layers have a head each.*never run"),
        ("bge-reranker-v2.5-gemma2-lightweight", "it merges tokens between layers.*never run"),
        ("Nemotron-3.5-Rerank-8B-BF16", "its prompt and pooling.*rerank_config"),
    ],
)
def test_known_rerankers_that_are_not_read_are_refused_with_the_reason(name, reason, folders, tmp_path):
    folder = shutil.copytree(folders["Qwen3-Reranker"], tmp_path / name)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(folder))


def test_a_bidirectional_ministral3_is_read_as_its_rerank_config_says(tmp_path):
    folder = families.ministral3_bidirectional(tmp_path)
    with pytest.raises(CheckpointError, match="rerank_config"):
        open_checkpoint(str(folder))
    how = {"template": "question:{query} \n \n passage:{passage}", "append_eos": False}
    how |= {"attention": "bidirectional", "pooling": "mean"}
    (tmp_path / "how.json").write_text(json.dumps(how))
    with LocalReranker(folder, rerank_config=tmp_path / "how.json", device="cpu", dtype="float32") as reranker:
        logits = [score.logit for score in reranker.score_pairs([("who?", "me and you"), ("why?", "me")])]
    families.update_json(folder / "config.json", model_type="ministral3")
    owner = Ministral3ForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for logit, (query, passage) in zip(logits, [("who?", "me and you"), ("why?", "me")], strict=True):
        ids = tokenizer(f"question:{query} \n \n passage:{passage}", return_tensors="pt").input_ids
        everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        hidden = owner.base_model(input_ids=ids, attention_mask=everything).last_hidden_state
        assert logit == pytest.approx(owner.score(hidden.mean(1)).item(), abs=1e-4)


def test_a_gemma_2_is_scored_with_its_soft_caps_and_says_why_its_rows_are_padded(tmp_path):
    folder = families.gemma2(tmp_path)
    (folder / "rerank.json").write_text('{"template": "{query}\\n{passage}", "append_eos": false}')
    ids = AutoTokenizer.from_pretrained(folder)("who?\nme").input_ids
    with LocalReranker(folder, device="cpu", dtype="float32") as reranker:
        (score,) = reranker.score_pairs([("who?", "me")])
    model = Gemma2ForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert score.logit == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-4)
    model.set_attn_implementation("eager")
    for layer in model.base_model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert score.logit != pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-4)
    assert summary(str(folder), device="cpu", dtype="float32")["batches"].endswith("caps scores")


def test_the_family_can_be_given(folders, tmp_path):
    folder = families.qwen3_reranker(tmp_path).rename(tmp_path / "my-model")
    given = open_checkpoint(str(folder), rerank_config="qwen3-reranker").config
    assert given == open_checkpoint(str(folders["Qwen3-Reranker"])).config


def test_an_instruction_of_a_call_or_of_the_settings_changes_the_score(folders):
    with open_reranker(folders["mxbai-rerank-v2"], device="cpu", dtype="float32", cache_size=100) as reranker:
        plain = reranker.score_pairs(PAIRS)
        instructed = reranker.score_pairs(PAIRS, instruction=INSTRUCTION)
        assert reranker.score_pairs(PAIRS) == plain
        ranked = reranker.rank(*("Who wrote the novel?", [PAIRS[0][1]]), instruction=INSTRUCTION)
    assert all(one.logit != other.logit for one, other in zip(plain, instructed, strict=True))
    assert ranked[0].score.logit == pytest.approx(instructed[0].logit, abs=1e-5)
    settings = {"device": "cpu", "dtype": "float32", "instruction": INSTRUCTION}
    with open_reranker(folders["mxbai-rerank-v2"], **settings) as reranker:
        logits = [score.logit for score in reranker.score_pairs(PAIRS)]
    assert logits == pytest.approx([score.logit for score in instructed], abs=1e-5)


@pytest.mark.parametrize("name", ["zerank", "llama-nemotron-rerank", "ms-marco-MiniLM"])
def test_a_model_without_a_place_for_an_instruction_refuses_it(name, folders):
    with (
        LocalReranker(folders[name], device="cpu", dtype="float32") as reranker,
        pytest.raises(InvalidInputError, match="no place for one"),
    ):
        reranker.rank("who?", ["me"], instruction=INSTRUCTION)


def test_the_summary_tells_how_a_checkpoint_is_read_and_why(folders):
    facts = {
        name: summary(str(folders[name]), device="cpu", dtype="float32")
        for name in ("Qwen3-Reranker", "Qwen3-Reranker with modules", "ms-marco-MiniLM", "ettin")
    }
    assert facts["Qwen3-Reranker"]["read as"] == "the known family Qwen3-Reranker"
    assert facts["Qwen3-Reranker"]["head"] == "the logit of the token 'yes' minus that of 'no'"
    assert facts["Qwen3-Reranker"]["instruction"] == QWEN3_TASK
    assert facts["Qwen3-Reranker with modules"]["read as"] == "modules.json of sentence-transformers"
    assert facts["ms-marco-MiniLM"]["read as"] == "the architecture, an encoder"
    assert facts["ms-marco-MiniLM"]["batches"].startswith("padded rows")
    assert facts["ettin"]["head"] == "the modules 2_Dense, 3_LayerNorm, 4_Dense"


def test_the_documentation_lists_every_family():
    page = (Path(__file__).parents[3] / "docs" / "reference" / "models.md").read_text("utf-8")
    rows = "".join(line for line in page.splitlines() if line.startswith("|"))
    assert [family.name for family in FAMILIES if family.name not in rows] == []


def test_modules_that_are_not_read_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["ettin"], tmp_path / "ettin")
    modules = json.loads((folder / "modules.json").read_text())
    for change, message in (
        ({"type": "evil.Dense"}, "another package"),
        ({"path": "../ettin"}, "no folder of the checkpoint"),
        ({"type": "sentence_transformers.sentence_transformer.modules.cnn.CNN"}, "no chain that is read"),
    ):
        (folder / "modules.json").write_text(json.dumps([*modules[:-1], modules[-1] | change]))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(folder))


def test_a_template_with_a_special_token_of_another_tokenizer_is_refused(folders, tmp_path):
    how = tmp_path / "how.json"
    how.write_text(json.dumps({"template": "<|im_start|>{query}{passage}", "append_eos": False}))
    with (
        LocalReranker(folders["llama-nemotron-rerank"], rerank_config=how, device="cpu") as reranker,
        pytest.raises(CheckpointError, match=r"holds <\|im_start\|>, which is no token"),
    ):
        reranker.warmup()
