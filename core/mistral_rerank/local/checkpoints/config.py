"""The content of `rerank.json`: what a checkpoint says that transformers' own files do not.

It holds the prompt, the end token, the longest input, pooling and attention, the calibration, and the base of an
adapter. A checkpoint without the file gets the defaults.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mistral_rerank.errors import CheckpointError
from mistral_rerank.local.checkpoints.trust import check_files, read_json
from mistral_rerank.local.checkpoints.wheels import KNOWN_WHEELS, KnownWheel
from mistral_rerank.templates import DEFAULT_TEMPLATE

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

    template: str = DEFAULT_TEMPLATE
    append_eos: bool = True
    pooling: Literal["last", "mean"] = "last"
    attention: Literal["causal", "bidirectional"] = "causal"
    max_length: int = Field(default=8192, ge=8)
    calibration: Calibration = Calibration()
    base: Base | None = None

    @property
    def pooling_config(self) -> PoolingConfig:
        """Pooling and attention of the model."""
        from mistral_rerank.local.model.pooling import PoolingConfig

        return PoolingConfig(bidirectional=self.attention == "bidirectional", mean=self.pooling == "mean")


def mini_folder() -> Path:
    """Return the folder of "mini" inside the package."""
    return Path(str(files("mistral_rerank") / "mini"))


def read_config(folder: Path) -> CheckpointConfig:
    """Read `rerank.json` of a checkpoint folder, or infer its content if there is none.

    Raises:
        CheckpointError: the folder holds no checkpoint, or one of another kind.

    """
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds neither config.json nor adapter_config.json; it is no checkpoint")
    if folder != mini_folder():  # an installer may link the files of a package
        check_files(folder)
    if (file := folder / RERANK_JSON).is_file():
        content = read_json(file)
        try:
            return CheckpointConfig.model_validate(content)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            raise CheckpointError(f"{file} is not usable: {'; '.join(problems)}") from error
    if not adapter.is_file():
        return CheckpointConfig()
    name = read_json(adapter).get("base_model_name_or_path")
    return CheckpointConfig(base=PretrainedBase(name=name if isinstance(name, str) else None))
