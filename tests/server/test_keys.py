"""Key files and lists of keys: what is a key, what is refused, and that no message shows one."""

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from mistral_rerank.cli import app
from mistral_rerank.server.settings import ServerSettings
from mistral_rerank.settings import describe


@pytest.fixture
def serve_with(tmp_path, monkeypatch):
    """A function that starts `serve` with a key file of this content; gives the keys, or the refusal."""
    served = []
    monkeypatch.setattr("mistral_rerank.server.lifecycle.serve", lambda _, settings, **options: served.append(settings))

    def call(content: bytes) -> list[str] | str:
        file = tmp_path / "keys"
        file.write_bytes(content)
        arguments = ["serve", "--backend", "remote", "--base-url", "http://127.0.0.1:9", "--api-key-file", str(file)]
        found = CliRunner().invoke(app, arguments)
        if found.exception is not None:
            return str(found.exception)
        return [key.get_secret_value() for key in served[0].api_keys]

    return call


@pytest.mark.parametrize(
    "content",
    [
        b"# keys of team A\nfirst\n\n  # and B\n second \n",
        b"\xef\xbb\xbffirst\r\nsecond\r\n",
    ],
)
def test_a_key_file_holds_one_key_a_line_beside_comments(serve_with, content):
    assert serve_with(content) == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"first\nsecret key\n", "line 2: the key holds a blank"),
        (b"first\nsecret # of team A\n", "line 2: the key holds a blank"),
        ("first\n\nsecret\u00e9\n".encode(), "line 3: the key holds a character that is not printable ASCII"),
        (b"secret\x07\n", "line 1: the key holds a character that is not printable ASCII"),
        (b"# secret\n", "holds no key"),
        ("secret\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_keys_that_cannot_match_are_refused_by_their_line_and_not_shown(serve_with, content, says):
    refusal = serve_with(content)
    assert says in refusal
    assert "secret" not in refusal


@pytest.mark.parametrize("keys", ["first,secret key", "first,secret\u00e9", "first,sec\x00ret", "first,#secret"])
def test_lists_of_keys_are_as_strict_as_files(keys, monkeypatch):
    monkeypatch.setattr("os.environ", {"MISTRAL_RERANK_SERVER_API_KEYS": keys})
    for given in ({}, {"api_keys": keys}, {"api_keys": keys.split(",")}):
        with pytest.raises(ValidationError, match="key 2") as caught:
            ServerSettings(**given)
        assert "sec" not in describe(caught.value)


def test_a_byte_order_mark_before_the_environments_keys_is_no_part_of_one(monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_SERVER_API_KEYS", "\ufefffirst,second")
    assert [key.get_secret_value() for key in ServerSettings().api_keys] == ["first", "second"]
