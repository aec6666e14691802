"""The exceptions of this package.

RerankError
├── SettingsError           an invalid setting, or a contradiction of settings  (also a ValueError)
├── InvalidInputError       a question, passage or file that cannot be scored   (also a ValueError)
│   └── InputTooLongError   more tokens than the model accepts
├── CheckpointError         weights, tokenizer or rerank.json missing or unusable
├── ScoringError            the model ran and gave no usable score
├── DeadlineExceededError   the deadline of a call is over                      (also a TimeoutError)
├── RerankerClosedError     used after close()
├── MissingDependencyError  an extra is not installed                           (also an ImportError)
└── RemoteError             an endpoint gave no usable answer; has status, request_id, retry_after
    ├── AuthenticationError        401, 403: the key is missing, wrong or not allowed
    ├── QuotaExceededError         402: no credits left
    ├── NotFoundError              404: no such route or model
    │   └── ModelRetiredError      410: the model is no longer served
    ├── RequestRefusedError        400, 422 and the like: the endpoint refuses this request
    │   ├── RequestTooLargeError   413, or more passages than the endpoint takes at once
    │   └── RemoteInputTooLongError  more tokens than the model takes          (also an InputTooLongError)
    ├── RateLimitError             429: too many requests
    ├── ServerError                5xx
    ├── EndpointUnreachableError   no connection, or it broke                  (also a ConnectionError)
    ├── RemoteDeadlineExceededError  the deadline or the timeout is over       (also a DeadlineExceededError)
    └── InvalidReplyError          a response that violates its protocol

Each message says what was given, what was expected and how to fix it. None repeats a question or a passage, so
logging an error never leaks text.
"""


class RerankError(Exception):
    """Base of the exceptions of this package."""


class SettingsError(RerankError, ValueError):
    """A setting is invalid, or contradicts another."""


class InvalidInputError(RerankError, ValueError):
    """A question, a passage or a data file cannot be used as given."""


class InputTooLongError(InvalidInputError):
    """A question leaves no room for a passage, or a passage is over the limit and may not be truncated."""


class CheckpointError(RerankError):
    """A checkpoint folder or its base is missing, incomplete or unsupported."""


class ScoringError(RerankError):
    """The model ran and gave no usable score: not a number, infinite, or out of memory for one pair."""


class DeadlineExceededError(RerankError, TimeoutError):
    """The deadline of a call was over before there was a result."""


class RerankerClosedError(RerankError):
    """The reranker was used after it had been closed."""


class RemoteError(RerankError):
    """A remote endpoint gave no usable answer.

    Attributes:
        status: the HTTP status; None without a response.
        request_id: the endpoint's id of the request, or else this client's.
        retry_after: seconds of the endpoint's `Retry-After`, or None.

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
    """The endpoint no longer serves the model."""


class RequestRefusedError(RemoteError):
    """The endpoint refuses this request."""


class RequestTooLargeError(RequestRefusedError):
    """The request has more bytes or passages than the endpoint accepts."""


class RemoteInputTooLongError(RequestRefusedError, InputTooLongError):
    """A question with a passage has more tokens than the endpoint's model accepts."""


class RateLimitError(RemoteError):
    """The endpoint has received too many requests."""


class ServerError(RemoteError):
    """The endpoint failed, or is overloaded."""


class EndpointUnreachableError(RemoteError, ConnectionError):
    """No connection, or a broken one."""


class RemoteDeadlineExceededError(RemoteError, DeadlineExceededError):
    """The deadline of a call, or the timeout of an endpoint, was over before the response."""


class InvalidReplyError(RemoteError):
    """The response violates its protocol."""


class MissingDependencyError(RerankError, ImportError):
    """A feature needs packages of an extra that is not installed."""

    @classmethod
    def of(cls, extra: str, error: ImportError) -> "MissingDependencyError":
        """Make the error that names the extra of the missing package."""
        return cls(f"{error.name} is not installed; install it with: pip install 'mistral-rerank[{extra}]'")
