"""Every error that this package raises on purpose.

RerankError
├── SettingsError           a setting that does not fit, or fits no other      (also a ValueError)
├── InvalidInputError       a question, passage or file that cannot be scored  (also a ValueError)
│   └── InputTooLongError   more tokens than the model takes
├── CheckpointError         weights, tokenizer or rerank.json missing or unusable
├── ScoringError            the model ran and gave no usable score
├── RerankerClosedError     used after close()
└── MissingDependencyError  an extra is not installed                          (also an ImportError)

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


class MissingDependencyError(RerankError, ImportError):
    """A feature needs packages of an extra that is not installed."""

    @classmethod
    def of(cls, extra: str, error: ImportError) -> "MissingDependencyError":
        """Say which extra brings the package that `error` missed."""
        return cls(f"{error.name} is not installed; install it with: pip install 'mistral-rerank[{extra}]'")
