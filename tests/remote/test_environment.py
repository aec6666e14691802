"""Proxies and certificates of the environment that cannot be used are told in one line."""

import asyncio
import sys

import pytest
from remote.endpoint import Endpoint, speaks

from mistral_rerank import MissingDependencyError, RemoteReranker, SettingsError


@pytest.fixture(autouse=True)
def no_proxies_of_this_machine(monkeypatch):
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def ask(how, **settings):
    with RemoteReranker("m", base_url="http://endpoint.invalid", protocol="tei", retries=0, **settings) as reranker:
        if how == "sync":
            return reranker.rank("q", ["one"])
        return asyncio.run(reranker.arank("q", ["one"]))


both = pytest.mark.parametrize("how", ["sync", "async"])


@both
@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "HTTPS_PROXY"])
def test_a_socks_proxy_without_its_extra_names_the_variable_and_the_extra(how, name, monkeypatch):
    monkeypatch.setenv(name, "socks5://user:hunter2@proxy:1080")
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(MissingDependencyError, match=rf"{name} .*mistral-rerank\[socks\]") as raised:
        ask(how)
    assert "hunter2" not in str(raised.value)
    assert "\n" not in str(raised.value)


@both
def test_a_socks_proxy_in_code_without_its_extra_names_the_setting(how, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(MissingDependencyError, match=r"proxy .*mistral-rerank\[socks\]"):
        ask(how, proxy="socks5://proxy:1080")


@both
@pytest.mark.parametrize("value", ["ftp://user:hunter2@proxy", "http://proxy:hunter2"])
def test_a_proxy_that_cannot_be_used_names_the_variable_and_not_its_value(how, value, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(SettingsError, match="HTTPS_PROXY is no usable proxy") as raised:
        ask(how)
    assert "hunter2" not in str(raised.value)


@both
@pytest.mark.parametrize("kind", ["missing", "no certificates"])
def test_a_mistyped_file_of_certificates_names_the_variable_and_the_file(how, kind, monkeypatch, tmp_path):
    path = tmp_path / "roots.pem"
    if kind == "no certificates":
        path.write_text("none")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(SettingsError, match=r"SSL_CERT_FILE names no usable file .*roots\.pem"):
        ask(how)


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    with Endpoint(speaks("tei", path="http://endpoint.invalid/rerank")) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert [place.text for place in ask("sync")] == ["one"]
