import json
import math
import shutil

import pytest
from pydantic import ValidationError
from transformers import MistralForSequenceClassification

from mistral_rerank import CheckpointError, LocalReranker, SettingsError
from mistral_rerank.local.checkpoints.config import Calibration, CheckpointConfig, PretrainedBase
from mistral_rerank.local.checkpoints.detection import read_config
from mistral_rerank.local.checkpoints.summary import summary
from mistral_rerank.local.checkpoints.update import checkpoint_to_update, store_calibration

FOUND = Calibration(scale=0.5, bias=-1.25, threshold=0.37, precision=0.8, fitted_on=("a", "b"), pairs=99)
PAIRS = [("who?", "me"), ("who?", "you and I"), ("where?", "here")]


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "mine")


def test_a_stored_calibration_changes_probabilities_alone(checkpoint, tiny_reranker):
    assert store_calibration(FOUND, checkpoint_to_update(str(checkpoint), None), None) == checkpoint
    assert read_config(checkpoint).calibration == FOUND
    before = tiny_reranker.score_pairs(PAIRS)
    with LocalReranker(str(checkpoint), device="cpu", dtype="float32", batch_tokens=400) as reranker:
        after = reranker.score_pairs(PAIRS)
    assert [score.logit for score in after] == [score.logit for score in before]
    for score in after:
        assert score.probability == pytest.approx(1 / (1 + math.exp(-(0.5 * score.logit - 1.25))))


def test_info_shows_it(checkpoint):
    facts = summary(str(store_calibration(FOUND, checkpoint, None)), device="cpu", dtype="float32")
    assert facts["calibration"] == "sigmoid(0.5 x logit - 1.25), fitted on 99 pairs of a, b"
    assert facts["threshold"] == "probability 0.3700, for a precision of 0.8"


def test_what_rerank_json_says_besides_is_kept(checkpoint):
    config = CheckpointConfig(template="{query} {passage}", max_length=77)
    (checkpoint / "rerank.json").write_text(config.model_dump_json())
    store_calibration(FOUND, checkpoint, None)
    assert read_config(checkpoint) == config.model_copy(update={"calibration": FOUND})
    assert not list(checkpoint.glob("rerank.json.*"))


def test_files_of_before_are_still_read(checkpoint):
    (checkpoint / "rerank.json").write_text('{"calibration": {"scale": 2.0, "bias": 1.0}}')
    old = read_config(checkpoint).calibration
    assert (old.scale, old.bias, old.threshold, old.pairs) == (2.0, 1.0, None, 0)
    assert str(old) == "sigmoid(2 x logit + 1)"
    assert old.described_threshold == "none"


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.0}, {"scale": -1.0}, {"threshold": 1.5}, {"precision": 0.0}, {"temperature": 1}]
)
def test_a_map_that_turns_the_order_is_no_calibration(wrong):
    with pytest.raises(ValidationError):
        Calibration(**wrong)


def test_a_copy_is_written_whole_and_the_original_left_alone(checkpoint, tmp_path):
    out = tmp_path / "copy"
    assert store_calibration(FOUND, checkpoint, out) == out
    assert read_config(out).calibration == FOUND
    assert read_config(checkpoint).calibration == Calibration()
    assert {f.name for f in checkpoint.iterdir()} == {f.name for f in out.iterdir()}
    assert {f.name for f in tmp_path.iterdir()} == {"mine", "copy"}
    MistralForSequenceClassification.from_pretrained(out)


def test_a_copy_has_a_base_that_is_inside_the_original(checkpoint, tmp_path):
    (checkpoint / "base").mkdir()
    config = CheckpointConfig(base=PretrainedBase(name="base", layers=3))
    (checkpoint / "rerank.json").write_text(config.model_dump_json())
    store_calibration(FOUND, checkpoint, tmp_path / "copy")
    base = json.loads((tmp_path / "copy" / "rerank.json").read_text())["base"]
    assert (base["name"], base["layers"]) == ("base", 3)
    assert (tmp_path / "copy" / "base").is_dir()


@pytest.mark.parametrize("model", ["mini"])
def test_mini_itself_is_not_changed(model, tmp_path):
    with pytest.raises(SettingsError, match="give --out"):
        checkpoint_to_update(model, None)
    assert checkpoint_to_update(model, tmp_path / "mine").name == "mini"


def test_an_existing_out_and_a_missing_model_are_refused(checkpoint, tmp_path):
    with pytest.raises(SettingsError, match="exists; give another --out"):
        checkpoint_to_update(str(checkpoint), tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        checkpoint_to_update(str(tmp_path / "nothing"), None)


def test_a_folder_that_cannot_be_written_is_said(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        store_calibration(FOUND, checkpoint, tmp_path / "file" / "copy")
