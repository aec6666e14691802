"""What clients may write in optional fields, and that required ones stay strict."""

import pytest

from mistral_rerank import InvalidInputError
from mistral_rerank.protocols import PROTOCOLS

TEXTS = {
    "nvidia": {"query": {"text": "q"}, "passages": [{"text": "a"}]},
    "tei": {"query": "q", "texts": ["a"]},
}
BODIES = {name: TEXTS.get(name, {"query": "q", "documents": ["a"]}) for name in PROTOCOLS}
OPTIONAL = [
    (name, field)
    for name, protocol in PROTOCOLS.items()
    for field, described in protocol.body.model_fields.items()
    if not described.is_required()
]
FLAGS = [
    ("cohere", "return_documents"),
    ("jina", "return_documents"),
    ("vllm", "return_documents"),
    ("vllm", "use_activation"),
    ("voyage", "return_documents"),
    ("voyage", "truncation"),
    ("tei", "raw_scores"),
    ("tei", "return_text"),
    ("tei", "truncate"),
]
NUMBERS = [("nvidia", "top_k"), ("cohere", "top_n"), ("vllm", "top_n"), ("voyage", "top_k")]


@pytest.mark.parametrize(("name", "field"), OPTIONAL)
def test_null_in_an_optional_field_means_absent(name, field):
    read = PROTOCOLS[name].read_request
    assert read(BODIES[name] | {field: None}) == read(BODIES[name])


@pytest.mark.parametrize("text", ["true", "True", "false", "False"])
@pytest.mark.parametrize(("name", "field"), FLAGS)
def test_a_flag_may_be_a_string(name, field, text):
    read = PROTOCOLS[name].read_request
    assert read(BODIES[name] | {field: text}) == read(BODIES[name] | {field: text.lower() == "true"})


@pytest.mark.parametrize(("name", "field"), NUMBERS)
def test_a_number_may_be_a_string(name, field):
    assert PROTOCOLS[name].read_request(BODIES[name] | {field: "2"}).top_n == 2


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "tei"])
@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_model_is_none(name, blank):
    assert PROTOCOLS[name].read_request(BODIES[name] | {"model": blank}).model is None


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("cohere", {"documents": "a"}),
        ("cohere", {"documents": None}),
        ("cohere", {"documents": [None]}),
        ("cohere", {"query": None}),
        ("cohere", {"top_n": "two"}),
        ("cohere", {"top_n": "0"}),
        ("cohere", {"top_n": True}),
        ("cohere", {"return_documents": "yes"}),
        ("cohere", {"return_documents": 1}),
        ("voyage", {"documents": [1]}),
        ("tei", {"texts": "a"}),
        ("nvidia", {"passages": ["a"]}),
        ("nvidia", {"passages": [{"text": None}]}),
    ],
)
def test_what_is_required_stays_strict(name, body):
    with pytest.raises(InvalidInputError):
        PROTOCOLS[name].read_request(BODIES[name] | body)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_of_a_list_of_faults_one_is_told(name):
    field = next(field for field in ("passages", "documents", "texts") if field in BODIES[name])
    with pytest.raises(InvalidInputError) as caught:
        PROTOCOLS[name].read_request(BODIES[name] | {field: [1] * 500})
    assert f"{field}.0" in str(caught.value)
    assert f"{field}.1" not in str(caught.value)
    assert len(str(caught.value)) <= 500
