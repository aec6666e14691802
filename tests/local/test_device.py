"""What "auto" chooses."""

import json
from pathlib import Path

import pytest
import torch

from mistral_rerank import SettingsError
from mistral_rerank.local.device import DTYPES, multiplies_bfloat16, pick_device, pick_dtype

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not multiplies_bfloat16(CPU), reason="this CPU does not multiply bfloat16")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the answer is kept, in a cache folder that is not there yet."""
    monkeypatch.setenv("MISTRAL_RERANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dtypes.json"


@needs_bfloat16
def test_the_faster_dtype_is_kept_in_the_cache_folder(kept: Path):
    chosen = pick_dtype("auto", CPU)
    (here, name), *others = json.loads(kept.read_text()).items()
    assert torch.__version__ in here
    assert DTYPES[name] == chosen
    assert not others
    for other in ("float32", "bfloat16"):
        kept.write_text(json.dumps({"another machine": "float32", here: other}))
        assert pick_dtype("auto", CPU) == DTYPES[other]


@needs_bfloat16
@pytest.mark.parametrize("damage", ["{", "[1]", '{"here": []}', '{"another machine": "float32"}'])
def test_an_answer_that_is_not_there_is_found_again(kept: Path, damage: str):
    kept.parent.mkdir()
    kept.write_text(damage)
    chosen = pick_dtype("auto", CPU)
    assert chosen in (DTYPES[name] for name in json.loads(kept.read_text()).values())


@needs_bfloat16
def test_a_cache_folder_that_cannot_be_made_is_no_error(kept: Path):
    kept.parent.write_text("a file")
    assert pick_dtype("auto", CPU) in (torch.bfloat16, torch.float32)


def test_names_are_taken_at_their_word(kept: Path):
    assert pick_dtype("float16", CPU) == torch.float16
    assert not kept.exists()


@pytest.mark.parametrize("choose", [lambda: pick_dtype("int8", CPU), lambda: pick_device("tpu")])
def test_a_name_that_is_not_known_is_an_error_that_lists_those_that_are(choose):
    with pytest.raises(SettingsError, match="give 'auto'"):
        choose()
