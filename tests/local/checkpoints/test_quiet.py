"""What loading a model prints: nothing, unless the log level asks."""

import logging
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from mistral_rerank import LocalReranker
from mistral_rerank.local.checkpoints.quiet import quiet


def state():
    bars = are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    return bars, transformers_logging.get_verbosity(), list(warnings.filters), logging.getLogger("peft").level


@pytest.fixture(autouse=True)
def bars():
    transformers_logging.enable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def test_a_load_prints_nothing(tiny, capfd):
    transformers_logging.set_verbosity_warning()
    with LocalReranker(str(tiny), device="cpu") as reranker:
        reranker.warmup()
    assert capfd.readouterr() == ("", "")


def test_silence_ends_with_the_load_whatever_was_set_before():
    for prepare in (enable_progress_bars, disable_progress_bars):
        prepare()
        before = state()
        with quiet():
            assert are_progress_bars_disabled()
            assert not transformers_logging.is_progress_bar_enabled()
            warnings.warn("a peer's", stacklevel=1)
        assert state() == before


def test_threads_that_load_at_once_leave_the_settings_as_they_were():
    before = state()

    def load(_):
        with quiet():
            return are_progress_bars_disabled()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(load, range(200)))
    assert state() == before


def test_at_log_level_info_the_libraries_speak(caplog):
    with caplog.at_level(logging.INFO, logger="mistral_rerank"), quiet():
        assert transformers_logging.is_progress_bar_enabled()
