"""Settings of a training run; `mistral-rerank train` has an option for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Loss = Literal["bce", "infonce", "bce+infonce"]


class TrainSettings(BaseModel):
    """Settings of a training run; the same settings and data give the same weights on one thread."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: tuple[Path, ...] = Field(min_length=1, description="a BEIR folder or a .jsonl of groups; repeatable")
    validation: tuple[Path, ...] = Field(
        (), description="like data, ranked every save_steps; the best weights are kept"
    )
    max_queries: int | None = Field(None, ge=1, description="most questions of each data set; default: all")
    patience: int | None = Field(None, ge=1, description="stop after so many validations without an improvement")
    base: str | None = Field(None, description="the base model: a folder, a hub id, or smollm2-135m")
    layers: int | None = Field(None, ge=1, description="keep only the first N layers of the base")
    init: str | None = Field(None, description="continue from this adapter, or mini, instead of from a base")
    loss: Loss = Field("bce+infonce", description="training loss")
    distill: float = Field(1.0, ge=0, description="weight of the distillation loss where groups hold teacher scores")
    questions: int = Field(1, ge=1, description="questions of a group, which share its passages")
    negatives: int = Field(4, ge=0, description="hard negatives of a group: judged 0, or from BM25")
    random_negatives: int = Field(1, ge=0, description="random negatives of a group")
    max_length: int = Field(512, ge=16, description="most tokens of a pair while training")
    template: str | None = Field(
        None, description="the prompt, with {query} and {passage}; default: NVIDIA's, or that of init"
    )
    bidirectional: bool = Field(False, description="attend in both directions and pool the mean of all tokens")
    frozen_layers: int = Field(0, ge=0, description="lower layers without LoRA, which need no backward pass")
    lora_rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    lora_alpha: int = Field(32, ge=1, description="the LoRA update is multiplied by this over the rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the LoRA matrices")
    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay")
    epochs: float = Field(1.0, gt=0, description="passes over the training data")
    groups_per_step: int = Field(32, ge=1, description="groups of one optimizer step")
    groups_per_forward: int = Field(4, ge=1, description="groups whose activations are in memory at once")
    batch_tokens: int = Field(4096, ge=1, description="tokens of one packed row")
    four_bit: bool = Field(False, description="keep the base in 4 bits while training (QLoRA)")
    activation_checkpointing: bool = Field(False, description="less memory for a third more time")
    save_steps: int = Field(50, ge=1, description="optimizer steps between saved states, and validations")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    seed: int = Field(0, description="seed of the sampling and the initial weights")
