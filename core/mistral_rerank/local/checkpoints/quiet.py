"""Silences progress bars, warnings and log lines of the libraries while a model is loaded.

At log level INFO of `mistral_rerank`, which is `-v` on the command line, they are shown.
"""

from __future__ import annotations

import logging
import threading
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_lock = threading.Lock()
_inside = 0
_restore = ExitStack()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, PEFT and the hub client inside the block, and restore their settings after it.

    The settings are global: the first thread to enter changes them, and the last to leave restores them.
    """
    global _inside, _restore
    if logging.getLogger("mistral_rerank").isEnabledFor(logging.INFO):
        yield
        return
    with _lock:
        _inside += 1
        if _inside == 1:
            _restore = _silence()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore.close()


def _silence() -> ExitStack:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        for name in ("huggingface_hub", "peft", "gguf"):
            other = logging.getLogger(name)
            stack.callback(other.setLevel, other.level)
            other.setLevel(logging.ERROR)
        hub_bars = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
        stack.callback(hub_bars)
        if transformers_logging.is_progress_bar_enabled():
            stack.callback(transformers_logging.enable_progress_bar)  # enables the hub's too, which are restored later
        transformers_logging.disable_progress_bar()
        return stack.pop_all()
