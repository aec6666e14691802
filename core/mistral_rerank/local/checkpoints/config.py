"""The content of `rerank.json`: what a checkpoint says that transformers' own files do not.

It holds the prompt, the longest input, how the logit is read from the hidden states, the calibration, and the base of
an adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mistral_rerank.local.checkpoints.wheels import KNOWN_WHEELS, KnownWheel
from mistral_rerank.templates import DEFAULT_TEMPLATE, Template, TemplateText

if TYPE_CHECKING:
    from mistral_rerank.local.model.pooling import PoolingConfig

RERANK_JSON = "rerank.json"


class PretrainedBase(BaseModel):
    """A transformers model: a hub id or a folder inside the checkpoint; without a name, the user must give it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["pretrained"] = "pretrained"
    name: str | None = None
    revision: str | None = None
    layers: int | None = Field(default=None, ge=1, description="number of its layers that are used; None for all")


class WheelBase(BaseModel):
    """A base of `KNOWN_WHEELS`, by name. What older checkpoints say about the wheel must match it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["wheel"] = "wheel"
    name: str
    layers: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        known = KNOWN_WHEELS.get(str(content.get("name")))
        if known is None:
            raise ValueError(f"name is no known wheel; known: {', '.join(KNOWN_WHEELS)}")
        for key in ("requirement", "file", "sha256"):
            if key in content and content[key] != getattr(known, key):
                raise ValueError(f"{key} is not that of {known.base}; a checkpoint cannot choose what is fetched")
        return {key: value for key, value in content.items() if key not in ("requirement", "file", "sha256")}

    @property
    def wheel(self) -> KnownWheel:
        """The wheel."""
        return KNOWN_WHEELS[self.name]


Base = Annotated[PretrainedBase | WheelBase, Field(discriminator="kind")]


def named_base(name: str, *, layers: int | None = None) -> PretrainedBase | WheelBase:
    """Describe the base that a user names: a known wheel or a hub id; the name of a folder is left out."""
    if name in KNOWN_WHEELS:
        return WheelBase(name=name, layers=layers)
    if Path(name).expanduser().is_dir():
        return PretrainedBase(layers=layers)
    hub_id, _, revision = name.partition("@")
    return PretrainedBase(name=hub_id, revision=revision or None, layers=layers)


class Calibration(BaseModel):
    """The map from logit to probability: sigmoid(scale * logit + bias), which keeps the order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    bias: float = Field(default=0.0, allow_inf_nan=False)
    threshold: float | None = Field(
        default=None, ge=0, le=1, description="a probability; passages under it don't answer"
    )
    precision: float | None = Field(default=None, gt=0, le=1, description="the share of relevant ones at or over it")
    fitted_on: tuple[str, ...] = Field(default=(), description="names of the data sets")
    pairs: int = Field(default=0, ge=0, description="number of pairs it was fitted on")

    def __str__(self) -> str:
        formula = f"sigmoid({self.scale:g} x logit {'-' if self.bias < 0 else '+'} {abs(self.bias):g})"
        return f"{formula}, fitted on {self.pairs} pairs of {', '.join(self.fitted_on)}" if self.pairs else formula

    @property
    def described_threshold(self) -> str:
        """The threshold in words."""
        if self.threshold is None:
            return "none"
        return f"probability {self.threshold:.4f}" + (
            f", for a precision of {self.precision:g}" if self.precision else ""
        )


class CheckpointConfig(BaseModel):
    """The content of `rerank.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: TemplateText | None = Field(
        default=DEFAULT_TEMPLATE,
        description="the prompt; a list's strings are tokenized one by one; null: the tokenizer's format of a pair",
    )
    instruction_template: TemplateText | None = Field(
        default=None, description="the prompt of calls with an instruction, if it is another one"
    )
    instruction: str | None = Field(default=None, description="of calls without one")
    strip: bool = Field(default=False, description="whether white space around the texts is removed")
    add_special_tokens: bool = Field(default=True, description="whether the tokenizer adds its special tokens")
    append_eos: bool = True
    true_token: int | str | None = Field(
        default=None, description="token whose vocabulary logit is the score, such as 'yes'; null: a trained head"
    )
    false_token: int | str | None = Field(default=None, description="token whose logit is subtracted, such as 'no'")
    head: tuple[str, ...] = Field(default=(), description="folders of sentence-transformers modules after pooling")
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="the head's output is divided by it")
    pooling: Literal["last", "mean", "cls"] = "last"
    attention: Literal["causal", "bidirectional"] = "causal"
    max_length: int = Field(default=8192, ge=8)
    calibration: Calibration = Calibration()
    base: Base | None = None

    @model_validator(mode="after")
    def _has_one_head(self) -> Self:
        if self.false_token is not None and self.true_token is None:
            raise ValueError("false_token is given without true_token")
        if self.head and self.true_token is not None:
            raise ValueError("head and true_token are given; a logit comes from one of them")
        return self

    @property
    def prompt(self) -> Template:
        """The prompt template."""
        return Template(self.template, self.instruction_template, self.instruction, strip=self.strip)

    @property
    def pooling_config(self) -> PoolingConfig:
        """Pooling and attention of the model."""
        from mistral_rerank.local.model.pooling import PoolingConfig

        return PoolingConfig(
            bidirectional=self.attention == "bidirectional", mean=self.pooling == "mean", cls=self.pooling == "cls"
        )
