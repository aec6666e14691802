import pytest

from mistral_rerank.evaluation.embedding_models import PRESETS, find_preset


def test_names_are_unique_and_lower_case():
    names = [preset.name for preset in PRESETS]
    assert len(set(names)) == len(names)
    assert [name.lower() for name in names] == names


@pytest.mark.parametrize(
    ("name", "model", "query", "passage", "pooling", "normalize"),
    [
        ("e5-large-unsupervised", "intfloat/e5-large-unsupervised", "query: ", "passage: ", "mean", True),
        ("e5-large", "intfloat/e5-large", "query: ", "passage: ", "mean", True),
        ("dragon", "facebook/dragon-plus-query-encoder", "", "", "cls", False),
        ("contriever", "facebook/contriever", "", "", "mean", False),
        ("gtr-t5-large", "sentence-transformers/gtr-t5-large", "", "", "mean", True),
        ("gte-large", "thenlper/gte-large", "", "", "mean", True),
        ("BAAI/bge-small-en-v1.5", "BAAI/bge-small-en-v1.5", "Represent this sentence for searching relevant passages: ", "", "cls", True),
        ("nomic-embed-text-v1.5", "nomic-ai/nomic-embed-text-v1.5", "search_query: ", "search_document: ", "mean", True),
        ("arctic-embed-l-v2.0", "Snowflake/snowflake-arctic-embed-l-v2.0", "query: ", "", "cls", True),
        ("sentence-transformers/all-minilm-L6-v2", "sentence-transformers/all-MiniLM-L6-v2", "", "", "mean", True),
    ],
)  # fmt: skip
def test_a_model_is_used_as_its_card_says(name, model, query, passage, pooling, normalize):
    found = find_preset(name)
    assert (found.model, found.query_prefix, found.passage_prefix) == (model, query, passage)
    assert (found.pooling, found.normalize) == (pooling, normalize)


def test_nvidias_are_told_what_a_text_is():
    found = find_preset("nv-embedqa-e5-v5")
    assert (found.input_type, found.base_url) == (True, "https://integrate.api.nvidia.com/v1")


def test_dragon_has_an_encoder_for_passages():
    assert find_preset("dragon").passage_model == "facebook/dragon-plus-context-encoder"


def test_an_unknown_name_has_no_preset():
    assert find_preset("nonsense") is None
