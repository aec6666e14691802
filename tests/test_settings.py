import warnings

import pytest

from mistral_rerank import LocalReranker, RerankSettings, SettingsError, open_reranker
from mistral_rerank.server.settings import ServerSettings


def test_a_setting_comes_from_the_argument_then_the_environment_then_the_default(monkeypatch):
    assert (RerankSettings().model, RerankSettings().named_model) == (None, "mini")
    monkeypatch.setenv("MISTRAL_RERANK_MODEL", "from/env")
    monkeypatch.setenv("MISTRAL_RERANK_MAX_LENGTH", "256")
    monkeypatch.setenv("MISTRAL_RERANK_SHARE_BATCHES", "true")
    settings = RerankSettings()
    assert (settings.model, settings.max_length, settings.share_batches) == ("from/env", 256, True)
    assert RerankSettings(model="given").model == "given"


def test_a_wrong_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_DTYPE", "int7")
    with pytest.raises(SettingsError, match=r"dtype.*int7"):
        open_reranker()


@pytest.mark.parametrize(
    ("setting", "value"), [("topn", 3), ("overflow", "NONE"), ("max_length", 0), ("device", "tpu9")]
)
def test_a_setting_that_does_not_fit_is_refused(setting, value):
    with pytest.raises(SettingsError, match=setting):
        open_reranker("mini", **{setting: value})


def test_open_reranker_loads_nothing_yet(tmp_path):
    with open_reranker(str(tmp_path / "not-there")) as reranker:
        assert isinstance(reranker, LocalReranker)
        assert reranker.model_name.endswith("not-there")


def test_two_readings_of_the_environment_differ(monkeypatch):
    first = RerankSettings()
    monkeypatch.setenv("MISTRAL_RERANK_DEVICE", "cpu")
    assert (first.device, RerankSettings().device) == ("auto", "cpu")


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("MISTRAL_RERANK_MODLE", "did you mean model?"),
        ("MISTRAL_RERANK_MODEL_NAME", "did you mean model?"),
        ("MISTRAL_RERANK_TOP_N", "top_n is an option of an adapter"),
        ("MISTRAL_RERANK_NONSENSE", "is not read"),
    ],
)
def test_a_variable_that_is_not_read_is_warned_of(monkeypatch, variable, meant):
    monkeypatch.setenv(variable, "secret-value")
    with pytest.warns(UserWarning, match=variable) as warned:
        RerankSettings()
    (message,) = [str(warning.message) for warning in warned]
    assert meant in message
    assert "secret-value" not in message


def test_variables_that_are_read_somewhere_are_not_warned_of(monkeypatch):
    for name in ("API_KEY", "CACHE", "EMBEDDINGS_API_KEY", "SERVER_API_KEYS", "CLUSTER_CPUS", "DEVICE"):
        monkeypatch.setenv(f"MISTRAL_RERANK_{name}", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RerankSettings().device == "cpu"


def test_a_misspelled_variable_of_the_server_is_warned_of(monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_SERVER_APIKEYS", "secret-value")
    with pytest.warns(UserWarning, match=r"MISTRAL_RERANK_SERVER_APIKEYS is not read; did you mean api_keys\?"):
        ServerSettings()


@pytest.mark.parametrize(
    "options",
    [{"base_url": "http://h"}, {"protocol": "cohere"}, {"api_key": "k"}],
    ids=lambda options: next(iter(options)),
)
def test_an_endpoint_without_the_remote_backend_is_warned_of(options, monkeypatch):
    with pytest.warns(UserWarning, match=f"^{next(iter(options))} is set and backend is not"):
        RerankSettings(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RerankSettings(**options, backend="local")
        RerankSettings(**options, backend="remote")
        monkeypatch.setenv("MISTRAL_RERANK_BACKEND", "local")
        RerankSettings(**options)


def test_a_base_url_of_the_environment_without_the_remote_backend_is_warned_of(monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_BASE_URL", "http://h")
    with pytest.warns(UserWarning, match="base_url is set and backend is not"):
        RerankSettings()
