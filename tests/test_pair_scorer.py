"""`PairScorer` in data frame libraries."""

import pickle

import pytest
from server.running import ray_cluster

from mistral_rerank import InvalidInputError, PairScorer, SettingsError

COLUMNS = {"query": ["q", "q", "r"], "passage": ["one", "two words", "one"], "id": [1, 2, 3]}


@pytest.fixture
def options(tiny):
    return {"model": str(tiny), "device": "cpu", "dtype": "float32"}


@pytest.fixture
def expected(tiny_reranker):
    scores = tiny_reranker.score_pairs(list(zip(COLUMNS["query"], COLUMNS["passage"], strict=True)))
    return [(score.logit, score.probability, score.tokens) for score in scores]


def assert_scored(batch, expected) -> None:
    assert list(batch["id"]) == COLUMNS["id"]
    for column, name in enumerate(("logit", "probability", "tokens")):
        assert list(batch[name]) == pytest.approx([scores[column] for scores in expected], abs=1e-5)


def test_a_dict_of_columns_is_scored_and_stays(options, expected):
    batch = dict(COLUMNS)
    assert_scored(PairScorer(**options)(batch), expected)
    assert batch == COLUMNS


def test_data_frames_are_scored_as_spark_and_dask_give_them(options, expected):
    pandas = pytest.importorskip("pandas")
    scorer = pickle.loads(pickle.dumps(PairScorer(**options)))
    (frame,) = map(scorer, [pandas.DataFrame(COLUMNS, index=[7, 8, 9])])
    assert_scored(frame, expected)
    assert list(frame.index) == [7, 8, 9]


def test_ray_data_scores_in_actors(options, expected):
    pytest.importorskip("pyarrow")
    ray_cluster()
    from ray.data import ActorPoolStrategy, from_items

    rows = from_items([dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)])
    scored = rows.map_batches(
        PairScorer, fn_constructor_kwargs=options, compute=ActorPoolStrategy(size=1), num_cpus=0.1
    ).take_all()
    assert_scored(
        {name: [row[name] for row in sorted(scored, key=lambda row: row["id"])] for name in scored[0]}, expected
    )


def test_what_is_wrong_is_said(options):
    with pytest.raises(SettingsError, match="modell: no such option"):
        PairScorer(modell="mini")
    with pytest.raises(InvalidInputError, match="the question of pair 0 is empty"):
        PairScorer(**options)({"query": [" "], "passage": ["p"]})


def test_a_key_is_not_part_of_a_pickle():
    scorer = PairScorer(model="m", backend="remote", base_url="http://127.0.0.1:9/v1", api_key="secret-key")
    assert b"secret-key" not in pickle.dumps(scorer)
