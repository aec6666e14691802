"""Encoders against a real HTTP server on loopback, and a tiny seeded BERT; the cache and the bi-encoder over stand-ins."""

import zlib

import numpy as np
import pytest
import torch
from pydantic import SecretStr
from remote.endpoint import Endpoint, gives
from transformers import BertConfig, BertModel

from mistral_rerank import CheckpointError, InvalidInputError
from mistral_rerank.errors import AuthenticationError, EndpointUnreachableError, InvalidReplyError, RequestRefusedError
from mistral_rerank.evaluation import encoders
from mistral_rerank.evaluation.embedding_models import open_encoder
from mistral_rerank.evaluation.encoders import BiEncoderReranker, CachedEncoder, EndpointEncoder, LocalEncoder, Preset
from mistral_rerank.evaluation.first_stage import open_first_stage
from mistral_rerank.remote.retries import Retries

AT_ONCE = Retries(most=2, first_wait=0.0)
PLAIN = Preset("m", "m", "query: ", "passage: ", pooling=None, normalize=False)


def vector_of(text):
    return [float(zlib.crc32(f"{i}{text}".encode()) % 97 + 1) for i in range(3)]


def embeds(exchange):
    """Answers as OpenAI's API does, in another order than asked."""
    inputs = exchange.request.body["input"]
    data = [{"object": "embedding", "index": i, "embedding": vector_of(text)} for i, text in enumerate(inputs)]
    exchange.respond(200, {"object": "list", "data": data[::-1], "model": "m"})


def test_an_openai_endpoint_is_asked_with_prefixes_in_batches():
    texts = [f"text {i}" for i in range(70)]
    done = []
    with Endpoint(embeds) as endpoint:
        found = EndpointEncoder(PLAIN, f"{endpoint.url}/v1").encode(texts, "passage", progress=done.append)
    assert found.tolist() == [vector_of(f"passage: {text}") for text in texts]
    assert {request.path for request in endpoint.requests} == {"/v1/embeddings"}
    assert sorted(len(body["input"]) for body in endpoint.bodies) == [6, 32, 32]
    assert done == [32, 32, 6]
    assert set(endpoint.bodies[0]) == {"model", "input", "encoding_format"}
    assert "authorization" not in endpoint.requests[0].headers


def test_a_nim_is_told_what_a_text_is():
    preset = Preset("n", "nvidia/n", pooling=None, input_type=True)
    with Endpoint(embeds) as endpoint:
        encoder = EndpointEncoder(preset, endpoint.url, api_key=SecretStr("sk-1"))
        vectors = encoder.encode(["a"], "query")
        encoder.encode(["b"], "passage")
    assert [(body["input_type"], body["truncate"]) for body in endpoint.bodies] == [
        ("query", "END"),
        ("passage", "END"),
    ]
    assert endpoint.requests[0].headers["authorization"] == "Bearer sk-1"
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("given", "path"),
    [("", "/v1/embeddings"), ("/v1", "/v1/embeddings"), ("/v1/embeddings/", "/v1/embeddings"), ("/x/v2", "/x/v2/embeddings"), ("/v1/retrieval/nvidia", "/v1/retrieval/nvidia/embeddings")],
)  # fmt: skip
def test_any_way_to_write_the_url_reaches_the_route(given, path):
    with Endpoint(embeds) as endpoint:
        EndpointEncoder(PLAIN, f"{endpoint.url}{given}").encode(["a"], "query")
    assert [request.path for request in endpoint.requests] == [path]


def test_the_key_comes_from_the_environment_and_shows_nowhere(monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_EMBEDDINGS_API_KEY", "sk-of-the-environment")
    with Endpoint(gives(401, {"detail": "sk-of-the-environment is wrong for 'a long text'"})) as endpoint:
        encoder = EndpointEncoder(PLAIN, endpoint.url)
        with pytest.raises(AuthenticationError) as caught:
            encoder.encode(["a long text"], "query")
    assert endpoint.requests[0].headers["authorization"] == "Bearer sk-of-the-environment"
    assert "sk-of" not in str(caught.value)
    assert "sk-of" not in repr(vars(encoder))


def test_a_passing_fault_is_tried_again():
    with Endpoint(embeds, script=[gives(503, {}), gives(429, {}, {"Retry-After": "0"})]) as endpoint:
        found = EndpointEncoder(PLAIN, endpoint.url, retries=AT_ONCE).encode(["a"], "query")
    assert found.tolist() == [vector_of("query: a")]
    assert len(endpoint.requests) == 3


def test_a_refusal_is_not():
    with Endpoint(gives(400, {"error": {"message": "no such model"}})) as endpoint:
        with pytest.raises(RequestRefusedError, match="no such model"):
            EndpointEncoder(PLAIN, endpoint.url, retries=AT_ONCE).encode(["a"], "query")
    assert len(endpoint.requests) == 1


def test_a_batch_that_is_too_large_is_halved():
    def small(exchange):
        if len(exchange.request.body["input"]) > 8:
            exchange.respond(413, {"error": "too large"})
        else:
            embeds(exchange)

    texts = [str(i) for i in range(20)]
    with Endpoint(small) as endpoint:
        found = EndpointEncoder(PLAIN, endpoint.url).encode(texts, "query")
    assert found.tolist() == [vector_of(f"query: {text}") for text in texts]


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"data": []},
        {"data": [{"index": 0, "embedding": [1.0]}]},
        {"data": [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}]},
        {"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}]},
        {"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": "AACA"}]},
        {"data": [{"index": i, "embedding": [1.0]} for i in range(3)]},
        b'{"data": [{"index": 0, "embedding": [1e999]}, {"index": 1, "embedding": [1.0]}]}',
        b"<html>",
    ],
)
def test_an_answer_without_one_vector_for_each_text_is_an_error(body):
    with Endpoint(gives(200, body)) as endpoint:
        with pytest.raises(InvalidReplyError, match="answered 200, but"):
            EndpointEncoder(PLAIN, endpoint.url, retries=Retries(most=0)).encode(["a", "b"], "query")


def test_an_empty_text_is_sent_as_a_blank():
    with Endpoint(embeds) as endpoint:
        EndpointEncoder(Preset("m", "m", pooling=None), endpoint.url).encode([""], "passage")
    assert endpoint.bodies[0]["input"] == [" "]


def test_a_named_model_at_an_endpoint_keeps_its_prefixes(facts):
    with Endpoint(embeds) as endpoint:
        stage = open_first_stage(f"dense:intfloat/e5-small-v2@{endpoint.url}/v1")
        stage.search(facts, list(facts.queries)[:1], k=2, progress=lambda _done, _total: None)
    texts = [text for body in endpoint.bodies for text in body["input"]]
    assert {body["model"] for body in endpoint.bodies} == {"intfloat/e5-small-v2"}
    assert sum(text.startswith("query: ") for text in texts) == 1
    assert sum(text.startswith("passage: ") for text in texts) == len(facts.corpus)


def test_a_prefix_does_not_turn_off_the_input_type_of_an_nvidia_model():
    with Endpoint(embeds) as endpoint:
        encoder = open_encoder(f"nvidia/n@{endpoint.url}/v1", query_prefix="ask: ")
        encoder.encode(["a"], "query", progress=lambda _: None)
    (body,) = endpoint.bodies
    assert (body["model"], body["input"], body["input_type"]) == ("nvidia/n", ["ask: a"], "query")


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer):
    """A plain transformers folder, not one of sentence-transformers."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hidden(bert, tokenizer, text):
    model = BertModel.from_pretrained(bert).eval()
    with torch.inference_mode():
        return model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [("mean", lambda h: h.mean(0)), ("cls", lambda h: h[0]), ("lasttoken", lambda h: h[-1])],
)
def test_pooling_prefix_and_normalisation_are_the_presets(bert, tokenizer, pooling, pool):
    preset = Preset("x", "x", "ask: ", "tell: ", pooling=pooling)
    texts = ["the sun", "a much longer text about the moon and the sea", ""]
    encoder = LocalEncoder(preset, model=str(bert), device="cpu")
    for kind, prefix in (("query", "ask: "), ("passage", "tell: ")):
        expected = [pool(hidden(bert, tokenizer, prefix + text)) for text in texts]
        found = encoder.encode(texts, kind)
        assert found == pytest.approx(torch.stack([v / v.norm() for v in expected]).numpy(), abs=1e-5)


def test_two_encoders_are_one_for_each_kind(bert, tmp_path, tokenizer):
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(bert)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    preset = Preset("two", str(bert), pooling="cls", normalize=False, passage_model=str(tmp_path))
    encoder = LocalEncoder(preset, device="cpu")
    for kind, folder in (("query", bert), ("passage", tmp_path)):
        found = encoder.encode(["the sun"], kind)[0]
        assert found == pytest.approx(hidden(folder, tokenizer, "the sun")[0].numpy(), abs=1e-5)


def test_a_model_without_safetensors_is_refused(bert, tmp_path, tokenizer):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(BertModel.from_pretrained(bert).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="give a folder or a hub id with safetensors"):
        LocalEncoder(None, model=str(tmp_path), device="cpu")


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
    monkeypatch.setattr(encoders, "BLOCK", 4)
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


class Lengths:
    """Questions point along their length, passages along theirs plus one."""

    def __init__(self):
        self.texts = []

    def encode(self, texts, kind, *, progress):
        self.texts += [(kind, text) for text in texts]
        return np.array([[len(text) + (kind == "passage"), 1.0] for text in texts], dtype=np.float32)


def test_a_score_is_the_product_of_the_vectors_and_no_text_is_encoded_twice():
    encoder = Lengths()
    reranker = BiEncoderReranker("lengths", encoder)
    assert [s.logit for s in reranker.score_pairs([("ab", "x"), ("ab", "xyz"), ("c", "x")])] == [5.0, 9.0, 3.0]
    assert [s.logit for s in reranker.score_pairs([("c", "xyz"), ("c", "new")])] == [5.0, 5.0]
    assert sorted(encoder.texts) == [("passage", "new"), ("passage", "x"), ("passage", "xyz"), ("query", "ab"), ("query", "c")]  # fmt: skip


async def test_it_ranks_like_any_reranker():
    reranker = BiEncoderReranker("lengths", Lengths())
    assert [place.index for place in await reranker.arank("q", ["a", "ccc", "bb"])] == [1, 2, 0]
    assert reranker.model_name == "lengths"
    with pytest.raises(InvalidInputError):
        reranker.score_pairs([(" ", "x")])


def test_pairs_may_come_from_a_generator():
    reranker = BiEncoderReranker("lengths", Lengths())
    pairs = [("who?", "me"), ("who?", "you")]
    assert reranker.score_pairs(pair for pair in pairs) == reranker.score_pairs(pairs)
