import pytest

from mistral_rerank import LocalReranker, RerankSettings, SettingsError, open_reranker


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
