"""Options of the adapters: their schema, help, names, types, errors and serialization."""

import inspect
import json
import pickle
import pydoc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from langchain_core.load import dumps, loads
from support import LengthReranker

import llama_index_mistral_rerank
from langchain_mistral_rerank import MistralCrossEncoder, MistralRerank
from mistral_rerank import InvalidInputError, LocalReranker, RerankError, RerankSettings, SettingsError, open_reranker

LANGCHAIN, LLAMA_INDEX = MistralRerank, llama_index_mistral_rerank.MistralRerank
BOTH = pytest.mark.parametrize("adapter", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama_index"])
ALL = pytest.mark.parametrize(
    "adapter", [LANGCHAIN, LLAMA_INDEX, MistralCrossEncoder], ids=["langchain", "llama_index", "cross_encoder"]
)
PEER_NAMES = {
    "top_k": "top_n",
    "model_name": "model",
    "model_id_or_path": "model",
    "score_threshold": "min_score",
    "similarity_cutoff": "min_score",
    "batch_size": "batch_tokens",
    "max_batch_size": "max_passages",
    "truncate": "overflow",
    "truncation": "overflow",
    "nvidia_api_key": "api_key",
    "auth_token": "api_key",
    "max_retries": "retries",
    "use_fp16": "dtype",
}


class Unpicklable(LengthReranker):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@ALL
def test_the_json_schema_has_defaults_and_no_python_objects(adapter):
    schema = adapter.model_json_schema()
    json.dumps(schema)
    properties = schema["properties"]
    assert properties["device"]["default"] == "auto"
    assert properties["timeout"]["default"] == 120.0
    assert {"reranker", "text_fn"}.isdisjoint(properties)
    assert "\n\n" not in schema["description"]


@BOTH
@pytest.mark.parametrize(("given", "meant"), [*PEER_NAMES.items(), ("topn", "top_n"), ("quantisation", "quantization")])
def test_an_unknown_option_names_the_one_that_is_meant(adapter, given, meant):
    with pytest.raises(SettingsError, match=f"^{given}: no such option; did you mean {meant}\\?$"):
        adapter(**{given: 1})


def test_options_of_a_ranking_are_no_settings_of_a_reranker():
    for make in (open_reranker, RerankSettings, MistralCrossEncoder):
        with pytest.raises(SettingsError, match=r"top_k: .* top_n is an option of an adapter or an argument of rank"):
            make(top_k=3)
    with pytest.raises(SettingsError, match="^nonsense: no such option$"):
        RerankSettings(nonsense=3)


@BOTH
def test_every_wrong_option_is_an_error_of_the_documented_tree(adapter):
    for options in ({"top_n": -1}, {"min_score": 2}, {"dtype": "int7"}, {"reranker": "mini"}, {"timeout": "soon"}):
        with pytest.raises(RerankError, match=next(iter(options))) as raised:
            adapter(**options)
        assert isinstance(raised.value, SettingsError)
    instance = adapter()
    for name, value in {"top_n": -1, "device": None, "min_scor": 0.1, "batch_size": 3}.items():
        with pytest.raises(SettingsError, match=name):
            setattr(instance, name, value)
    with pytest.raises(SettingsError, match="batch_size: no such option; did you mean batch_tokens"):
        instance.batch_size = 3
    with pytest.raises(SettingsError, match="api_key") as raised:
        instance.nvidia_api_key = "hunter2"
    assert "hunter2" not in str(raised.value)
    with pytest.raises(SettingsError, match="top_k: no option of a single call; did you mean top_n"):
        instance.rerank("q", [], top_k=3)


@BOTH
def test_a_wrong_variable_is_named_in_the_error_of_an_adapter(adapter, monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_DTYPE", "int7")
    with pytest.raises(SettingsError, match=r"dtype \(from MISTRAL_RERANK_DTYPE\): .*'int7'"):
        adapter()


@BOTH
def test_repr_begins_with_model_backend_device_and_top_n(adapter):
    name = adapter.__name__
    assert repr(adapter()) == f"{name}(model='mini', backend='local', device='auto', top_n=5)"
    local = adapter(model="m", device="cpu", max_length=64, top_n=None)
    assert repr(local) == f"{name}(model='m', backend='local', device='cpu', top_n=None, max_length=64)"
    remote = adapter(backend="remote", base_url="http://h", api_key="secret", min_score=0.25)
    expected = "model='http://h', backend='remote', base_url='http://h', top_n=5, api_key=SecretStr('**********')"
    assert repr(remote) == f"{name}({expected}, min_score=0.25)"
    custom = adapter(reranker=LengthReranker())
    assert repr(custom) == f"{name}(model='length', reranker='LengthReranker', top_n=5)"


@ALL
def test_help_lists_every_option_and_shows_its_default(adapter):
    text = pydoc.plain(pydoc.render_doc(adapter))
    assert text.count("<factory>") == (1 if adapter is LLAMA_INDEX else 0)  # the framework's own callback_manager
    for name, parameter in inspect.signature(adapter).parameters.items():
        assert parameter.default is not inspect.Parameter.empty
        assert f"{name}: " in inspect.getdoc(adapter) or name == "callback_manager"
    assert "Annotated" not in str(inspect.signature(adapter))
    methods = {"compress_documents", "acompress_documents", "postprocess_nodes", "apostprocess_nodes", "score"}
    documented = [getattr(adapter, name).__doc__ for name in methods if hasattr(adapter, name)]
    assert documented
    assert all(documented)


@BOTH
def test_paths_and_numbers_of_numpy_and_torch_are_taken_as_plain_values(adapter, tiny):
    instance = adapter(
        model=tiny,
        device=torch.device("cpu"),
        dtype=torch.float32,
        top_n=np.int64(2),
        min_score=np.float32(0.25),
        max_length=np.int32(64),
        share_batches=np.bool_(True),
        timeout=torch.tensor(3.0),
    )
    plain = adapter(
        model=str(tiny),
        device="cpu",
        dtype="float32",
        top_n=2,
        min_score=0.25,
        max_length=64,
        share_batches=True,
        timeout=3.0,
    )
    assert instance == plain
    assert {type(instance.top_n), type(instance.max_length)} == {int}
    assert {type(instance.min_score), type(instance.timeout)} == {float}
    instance.top_n, instance.model = np.int8(1), Path("elsewhere")
    assert (instance.top_n, instance.model) == (1, "elsewhere")
    json.dumps(instance.model_dump(mode="json"))


def test_the_core_accepts_the_same_option_values(tiny):
    given = {"device": torch.device("cpu"), "dtype": torch.float32}
    with open_reranker(tiny, **given) as opened, LocalReranker(tiny, **given) as local:
        expected = opened.rank("q", ["a", "bb"], top_n=np.int64(1))
        assert local.rank("q", ["a", "bb"], top_n=1) == expected
        assert pickle.loads(pickle.dumps(local)).model_name == local.model_name == str(tiny)


def test_llama_index_gives_back_an_equal_adapter():
    instance = LLAMA_INDEX(model="m", top_n=None, metadata_mode="all", keep_retrieval_score=True, min_score=0.25)
    assert LLAMA_INDEX.from_dict(instance.to_dict()) == LLAMA_INDEX.from_json(instance.to_json()) == instance
    assert LLAMA_INDEX.from_dict(instance.to_dict() | {"top_n": 3}) != instance
    assert LLAMA_INDEX() != LANGCHAIN()


@BOTH
def test_adapters_are_equal_by_their_options_whether_their_model_is_open_or_not(adapter, tiny):
    options = {"model": str(tiny), "device": "cpu", "dtype": "float32"}
    one, two = adapter(**options), adapter(**options)
    one.use()
    assert one == two == pickle.loads(pickle.dumps(one))
    assert one != adapter(**options, api_key="k", backend="local")
    one.unload()


def test_a_custom_reranker_is_not_lost_in_a_dump():
    for custom in (LengthReranker(), Unpicklable()):
        with pytest.raises(SettingsError, match="a reranker of your own cannot be serialized"):
            dumps(LANGCHAIN(reranker=custom))
        for dump in (LLAMA_INDEX.to_dict, LLAMA_INDEX.to_json):
            with pytest.raises(SettingsError, match="a reranker of your own cannot be serialized"):
                dump(LLAMA_INDEX(reranker=custom))
    with pytest.raises(SettingsError, match="text_fn cannot be serialized"):
        dumps(LANGCHAIN(text_fn=str))


@BOTH
def test_a_pickle_holds_a_custom_reranker_or_is_refused(adapter):
    again = pickle.loads(pickle.dumps(adapter(reranker=LengthReranker())))
    assert type(again.use()) is LengthReranker
    with pytest.raises((SettingsError, TypeError), match="cannot be pickled|cannot pickle"):
        pickle.dumps(instance := adapter(reranker=Unpicklable()))
    assert type(instance.use()) is Unpicklable  # the attempt left it as it was


def test_langchain_loads_what_was_given_whatever_the_environment_says(monkeypatch):
    remote = {"backend": "remote", "base_url": "http://h", "api_key": "k-1", "headers": {"api-key": "k-3"}}
    text = dumps(LANGCHAIN(model="m", device="auto", **remote))
    assert "k-1" not in text
    assert "k-3" not in text
    monkeypatch.setenv("MISTRAL_RERANK_DEVICE", "cpu")
    monkeypatch.setenv("MISTRAL_RERANK_BACKEND", "local")
    options = {"allowed_objects": [LANGCHAIN], "valid_namespaces": ["langchain_mistral_rerank"]}
    again = loads(text, **options, secrets_map={"MISTRAL_RERANK_API_KEY": "k-2"})
    assert (again.model, again.device, again.backend, again.base_url) == ("m", "auto", "remote", "http://h")
    assert again.api_key.get_secret_value() == "k-2"


def test_an_empty_list_needs_no_options_but_a_query():
    assert LLAMA_INDEX().rerank("q", []) == []
    with pytest.raises(InvalidInputError):
        LLAMA_INDEX().rerank(" ", [])
