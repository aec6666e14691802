"""Every error that this package raises on purpose.

RerankError
├── SettingsError           a setting that does not fit, or fits no other      (also a ValueError)
├── InvalidInputError       a question, passage or file that cannot be scored  (also a ValueError)
│   └── InputTooLongError   more tokens than the model takes
├── CheckpointError         weights, tokenizer or rerank.json missing or unusable
├── ScoringError            the model ran and gave no usable score
├── RerankerClosedError     used after close()
├── MissingDependencyError  an extra is not installed                          (also an ImportError)
└── RemoteError             an endpoint gave no usable answer; has status, request_id, retry_after
    ├── AuthenticationError        401, 403: the key is missing, wrong or not allowed
    ├── QuotaExceededError         402: no credits left
    ├── NotFoundError              404: no such route or model
    │   └── ModelRetiredError      410: the model is no longer served
    ├── RequestRefusedError        400, 422 and the like: the endpoint does not take this request
    │   ├── RequestTooLargeError   413, or more passages than the endpoint takes at once
    │   └── RemoteInputTooLongError  more tokens than the model takes          (also an InputTooLongError)
    ├── RateLimitError             429: too many requests
    ├── ServerError                5xx
    ├── EndpointUnreachableError   no connection, or it broke                  (also a ConnectionError)
    ├── DeadlineExceededError      the time of the call is over                (also a TimeoutError)
    └── InvalidReplyError          an answer that does not keep to its protocol

Each message says what was given, what was expected and how to put it right. None repeats a question or a
passage, so logging an error never leaks text.
"""


class RerankError(Exception):
    """Base of every error that this package raises on purpose."""


class SettingsError(RerankError, ValueError):
    """A setting has a value that does not fit, or contradicts another."""


class InvalidInputError(RerankError, ValueError):
    """A question, a passage or a data file cannot be used as given."""


class InputTooLongError(InvalidInputError):
    """A question leaves no room for a passage, or a passage is over the limit and may not be cut."""


class CheckpointError(RerankError):
    """A checkpoint folder or its base is missing, incomplete or of a kind that is not supported."""


class ScoringError(RerankError):
    """The model ran and gave no usable score: not a number, infinite, or out of memory for one pair."""


class RerankerClosedError(RerankError):
    """The reranker was used after it had been closed."""


class RemoteError(RerankError):
    """A remote endpoint gave no usable answer.

    Attributes:
        status: the HTTP status, or None where none came.
        request_id: what the endpoint, or else this client, calls the request in its logs.
        retry_after: seconds that the endpoint asks to wait, or None.

    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.request_id, self.retry_after = status, request_id, retry_after


class AuthenticationError(RemoteError):
    """The key is missing, wrong, or not allowed to use this model."""


class QuotaExceededError(RemoteError):
    """The account has no credits left."""


class NotFoundError(RemoteError):
    """The endpoint has no such route, or serves no such model."""


class ModelRetiredError(NotFoundError):
    """The model was served once, and is no longer."""


class RequestRefusedError(RemoteError):
    """The endpoint does not take this request."""


class RequestTooLargeError(RequestRefusedError):
    """The request has more bytes or passages than the endpoint takes at once."""


class RemoteInputTooLongError(RequestRefusedError, InputTooLongError):
    """A question with a passage has more tokens than the endpoint's model takes."""


class RateLimitError(RemoteError):
    """The endpoint has had too many requests."""


class ServerError(RemoteError):
    """The endpoint failed, or is overloaded."""


class EndpointUnreachableError(RemoteError, ConnectionError):
    """No connection could be made, or it broke."""


class DeadlineExceededError(RemoteError, TimeoutError):
    """The time of the call was over before the answer came."""


class InvalidReplyError(RemoteError):
    """An answer came that does not keep to its protocol."""


class MissingDependencyError(RerankError, ImportError):
    """A feature needs packages of an extra that is not installed."""

    @classmethod
    def of(cls, extra: str, error: ImportError) -> "MissingDependencyError":
        """Say which extra brings the package that `error` missed."""
        return cls(f"{error.name} is not installed; install it with: pip install 'mistral-rerank[{extra}]'")
