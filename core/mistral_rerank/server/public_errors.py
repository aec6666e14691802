"""Messages of errors for clients. None repeats the content of a request, or names a path or an address."""

from __future__ import annotations

from mistral_rerank import errors

SEE_LOG = "the server's log says why"
MESSAGES: tuple[tuple[type[errors.RerankError], str | None], ...] = (
    (errors.RemoteInputTooLongError, "the question with a passage exceeds the maximum allowed length; shorten it"),
    (errors.InvalidInputError, None),
    (errors.ScoringError, None),
    (errors.RerankerClosedError, "the server is shutting down; send this to another"),
    (errors.RequestTooLargeError, "the model's endpoint takes fewer or shorter passages at once; send less"),
    (errors.RateLimitError, "the model's endpoint has had too many requests; try again later"),
    (errors.DeadlineExceededError, "the model's endpoint did not answer in time; send fewer passages, or try again"),
    (errors.RemoteError, "the model's endpoint gave no usable answer; " + SEE_LOG),
    (errors.RerankError, "the model is unusable; " + SEE_LOG),
)
"""The first match counts; None for the error's message, if it names no path, address or checkpoint."""


def public_message(error: Exception) -> str:
    """Give the message of an error for a client."""
    failed = f"the server failed ({type(error).__name__}); its log says more"
    return next((text or str(error) for kind, text in MESSAGES if isinstance(error, kind)), failed)
