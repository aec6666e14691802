import numpy as np
import pytest

from mistral_rerank.errors import EndpointUnreachableError
from mistral_rerank.evaluation import embedding_cache
from mistral_rerank.evaluation.embedding_cache import CachedEncoder


class Counts:
    """Breaks after so many texts."""

    def __init__(self, most=10**6):
        self.most, self.seen = most, []

    def encode(self, texts, kind, *, progress):
        if len(self.seen) + len(texts) > self.most:
            raise EndpointUnreachableError("gone")
        self.seen += texts
        progress(len(texts))
        return np.array([[len(text), kind == "query"] for text in texts], dtype=np.float32)


def test_a_stopped_encoding_goes_on_after_its_last_block(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_cache, "BLOCK", 4)
    texts = ["x" * length for length in range(10)]
    with pytest.raises(EndpointUnreachableError):
        CachedEncoder(Counts(most=9), tmp_path / "v").encode(texts, "passage", progress=lambda _: None)
    rest, done = Counts(), []
    found = CachedEncoder(rest, tmp_path / "v").encode(texts, "passage", progress=done.append)
    assert rest.seen == texts[8:]
    assert done == [4, 4, 2]
    assert found.tolist() == [[length, 0] for length in range(10)]


def test_a_question_is_no_passage(tmp_path):
    encoder = CachedEncoder(Counts(), tmp_path)
    assert [encoder.encode(["a"], kind, progress=lambda _: None)[0, 1] for kind in ("query", "passage")] == [1, 0]
    assert len(list(tmp_path.glob("*.npy"))) == 2
