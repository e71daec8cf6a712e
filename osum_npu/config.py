"""The recipe of a training: typed, every field documented, all faults reported at once.

A recipe is YAML in layers, left to right, then ``dotted.key=value``. Nothing here touches a device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from osum_npu.audio.augment import SpecAugmentConfig
from osum_npu.layers import Place, fault_line, read_layers, write_yaml
from osum_npu.models.adapters import OsumAdapterConfig
from osum_npu.models.lora import LoraSettings
from osum_npu.models.whisper import WhisperEncoderConfig
from osum_npu.strict import STRICT
from osum_npu.tasks import get_task, read_prompts
from osum_npu.tasks.answer import STAMP_SECONDS
from osum_npu.tasks.form import BeginOfText, FormName

Part = Literal["encoder", "adapter", "llm", "lora", "ctc", "decoder"]
"""What a stage can train. The speech marks belong to the adapter; the decoder is that of a whole Whisper."""
WHISPER_PARTS: tuple[Part, ...] = ("encoder", "decoder")
"""What a whole Whisper has of these."""


def _task_name(name: object) -> object:
    return get_task(name).name if isinstance(name, str) else name


TaskName = Annotated[str, BeforeValidator(_task_name)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RandomLLM:
    """A small language model with random weights and a tokenizer learned from the training texts."""

    kind: Literal["random"]
    config: dict[str, Any] = Field(description="a transformers configuration: model_type and sizes")
    vocabulary: int = Field(default=2000, ge=300, description="units of the tokenizer, without labels and time stamps")
    longest_stamp: float = Field(default=10.0, gt=0, description="seconds up to which a time stamp is one token")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainedLLM:
    """A released language model with its tokenizer."""

    kind: Literal["pretrained"]
    path: str = Field(description="folder, or name on a hub")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NewModel:
    """A model put together from parts."""

    kind: Literal["new"]
    llm: RandomLLM | PretrainedLLM = Field(discriminator="kind", description="the language model")
    encoder: WhisperEncoderConfig = Field(default=WhisperEncoderConfig(), description="the speech encoder")
    encoder_weights: str | None = Field(
        default=None, description="Whisper weights: a .pt of openai-whisper, or a folder or hub name"
    )
    adapter: OsumAdapterConfig = Field(default=OsumAdapterConfig(), description="between encoder and LLM")
    lora: LoraSettings | None = Field(default=None, description="low-rank updates of the LLM")
    ctc: bool = Field(default=False, description="a CTC head on the encoder, for an auxiliary loss")
    form: FormName = Field(default="osum", description="the fixed texts around instruction and speech")
    begin_of_text: BeginOfText = Field(
        default="none",
        description="texts that begin with the tokenizer's <s>: none, the form's, or all",
    )

    def __post_init__(self) -> None:
        if self.encoder.width % self.adapter.heads:
            raise ValueError(
                f"encoder.width {self.encoder.width} is not divisible by adapter.heads {self.adapter.heads}"
            )
        longest = self.adapter.length(self.encoder.max_frames)
        if longest > self.adapter.max_positions:
            raise ValueError(
                f"adapter.max_positions {self.adapter.max_positions} is less than the {longest} speech embeddings that "
                f"encoder.max_frames {self.encoder.max_frames} can make"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SavedModel:
    """A model directory of this project, to train on."""

    kind: Literal["saved"]
    path: str = Field(description="the directory")
    lora: LoraSettings | None = Field(default=None, description="low-rank updates of the LLM to add, where it has none")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WhisperModel:
    """A whole Whisper, encoder and decoder, taught the tasks without an LLM: OSUM's first stage."""

    kind: Literal["whisper"]
    path: str | None = Field(default=None, description="folder of Hugging Face's form, or name on a hub")
    config: dict[str, Any] | None = Field(
        default=None, description="instead of path: sizes of one with random weights and a tokenizer of its own"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout of encoder and decoder, in training")

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ValueError("wanted either path or config, the other null")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Source:
    """One manifest and how much of it an epoch takes."""

    path: str = Field(description="a manifest: JSONL, shard, list of shards, or Kaldi folder")
    weight: float = Field(
        default=1.0, gt=0, le=1000, description="1.5: every row once, and a random half of them again"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """Where the utterances come from."""

    train: dict[str, Source] = Field(min_length=1, description="sources by name")
    dev: dict[str, Source] = Field(default_factory=dict, description="for the loss measured during training")
    max_seconds: float = Field(default=30.0, gt=0, description="longer utterances are left out of training, and named")
    max_answer_tokens: int | None = Field(
        default=None, ge=1, description="utterances with a longer answer are left out of training, and named"
    )
    workers: int = Field(default=1, ge=0, description="processes that read sound; 0 reads in the training process")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stage:
    """One part of a training: what learns, from which tasks, how fast and how long."""

    name: str = Field(min_length=1, pattern=r"^[\w-]+$", description="used in logs and plots")
    trainable: tuple[Part, ...] = Field(min_length=1, description="parts that learn; the others are frozen")
    steps: int = Field(ge=1, description="optimiser steps")
    learning_rate: float = Field(gt=0, lt=1, description="highest learning rate")
    embedding_learning_rate: float | None = Field(
        default=None, gt=0, lt=1, description="of the LLM's token embeddings and output layer; learning_rate by default"
    )
    muon_learning_rate: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="learn the weight matrices by Muon at this rate, all else by AdamW; AdamW alone by default",
    )
    tasks: dict[TaskName, float] = Field(
        default_factory=lambda: {"asr": 1.0},
        min_length=1,
        description="how often a task is drawn, among those that a row can serve",
    )
    questions: int = Field(
        default=1, ge=1, le=8, description="tasks asked about each utterance of a step; its sound is encoded once"
    )
    natural: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="how often an instruction about sound is in natural language, made up anew each time",
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the learning rate rises")
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = Field(
        default="linear", description="how the learning rate falls after that; inverse_sqrt is OSUM's WarmupLR"
    )
    batch_seconds: float = Field(default=120.0, gt=0, description="sound of one step over all ranks, in seconds")
    shortest_first: bool = Field(
        default=False,
        description="first epoch in rising length, which an untrained encoder learns from sooner (SortaGrad)",
    )
    micro_batch_seconds: float | None = Field(
        default=None, gt=0, description="sound computed at once on one device; the whole step by default"
    )
    llm_weight: float = Field(
        1.0, ge=0, description="weight of the answers' loss; 0 leaves adapter and LLM out of the computation"
    )
    ctc_weight: float = Field(default=0.0, ge=0, description="weight of the CTC loss of the encoder")
    spec_augment: SpecAugmentConfig | None = Field(default=None, description="masking of the features")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.99), description="AdamW's betas"
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's, added to the root of the second moment")
    clip: float = Field(default=5.0, gt=0, description="largest norm of the gradient")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="measurements without a better dev loss after which the stage ends; it ends with its best weights",
    )

    def __post_init__(self) -> None:
        if bad := [name for name, weight in self.tasks.items() if not weight > 0]:
            raise ValueError(f"task weights must be above 0; leave out {', '.join(bad)}")
        if not self.llm_weight and not self.ctc_weight:
            raise ValueError("nothing to learn from: llm_weight and ctc_weight are both 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """All of a training."""

    out: str = Field(min_length=1, description="folder of the run")
    model: NewModel | SavedModel | WhisperModel = Field(discriminator="kind", description="what is trained")
    data: Data = Field(description="what it learns from")
    stages: tuple[Stage, ...] = Field(min_length=1, description="one after the other")
    seed: int = Field(default=0, ge=0, lt=2**32, description="decides weights, order and augmentation")
    prompts: str | None = Field(
        default=None, description="YAML with the wording of a released checkpoint, instead of the project's own"
    )
    stamp_seconds: float = Field(
        default=STAMP_SECONDS, ge=0.01, le=0.1, description="resolution of the word times that are trained, in seconds"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the computation; auto is what the device trains fastest in"
    )
    device_adamw: bool = Field(
        default=False, description="learn by the AdamW that the device brings; in one process and one stage alone"
    )
    activation_checkpointing: bool = Field(
        default=False, description="compute blocks of encoder, decoder and LLM again for the gradient: less memory"
    )
    sharding: Literal["none", "full", "hybrid"] = Field(
        default="none", description="divide weights, gradients and optimiser among all ranks, or among those of a node"
    )
    spike_factor: float | None = Field(
        default=30.0, gt=1, description="a gradient or loss this far above its running median is left out"
    )
    checkpoint_every: int = Field(default=500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, description="how many to keep")
    dev_every: int = Field(default=500, ge=1, description="steps between measurements of the dev loss")
    log_every: int = Field(default=10, ge=1, description="steps between rows of the log")

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)


class RecipeError(ValueError):
    """All that is wrong with a recipe, one line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


_KINDS = ("random", "pretrained", "new", "saved", "whisper")


def load_recipe(layers: Iterable[str | Path], overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        layers: YAML files; a later one wins, mappings are merged, lists replaced.
        overrides: ``dotted.key=value`` with a YAML value; a number in the key picks from a list.

    Raises:
        RecipeError: with one line for every fault, each with file and line where there is one.
    """
    settings, origins, faults = read_layers(layers, overrides)
    if faults:
        raise RecipeError(faults)
    faults = [fault_line(place, message, origins) for place, message in _contradictions(settings)]
    try:
        # as JSON, because strict Python wants tuples and objects where YAML has lists and mappings
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as error:
        found = [_explain(one) for one in error.errors() if not _is_echo(one, error.errors())]
        faults = [fault_line(place, message, origins) for place, message in found] + faults
    if faults:
        raise RecipeError(faults)
    return recipe


def missing_files(recipe: Recipe) -> list[str]:
    """List what the recipe needs and is not there or of no use, in words."""
    groups = {"train": recipe.data.train, "dev": recipe.data.dev}
    faults = [
        f"data.{group}.{name}.path: there is no manifest {source.path}"
        for group, sources in groups.items()
        for name, source in sources.items()
        if not os.path.exists(source.path)
    ]
    try:
        read_prompts(recipe.prompts)
    except ValueError as error:
        faults.append(f"prompts: {error}")
    if isinstance(recipe.model, SavedModel) and not os.path.isfile(os.path.join(recipe.model.path, "config.json")):
        faults.append(f"model.path: {recipe.model.path} is no model directory (it has no config.json)")
    return faults


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML, every default spelled out."""
    return write_yaml(asdict(recipe))


def _is_echo(error: Any, errors: Sequence[Any]) -> bool:
    """Whether pydantic found a list too short only because its items are faulty."""
    place = error["loc"]
    deeper = (other["loc"] for other in errors if len(other["loc"]) > len(place))
    return error["type"] == "too_short" and any(path[: len(place)] == place for path in deeper)


def _explain(error: Any) -> tuple[Place, str]:
    """Say in words what pydantic found."""
    found, kind, got = error["loc"], error["type"], error.get("input")
    # pydantic names the variant of a union too, which is no setting
    variant = {i for i, part in enumerate(found) if i and found[i - 1] in ("model", "llm") and part in _KINDS}
    place = tuple(part for i, part in enumerate(found) if i not in variant and part != "[key]")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return place, "there is no such setting"
    if kind in ("missing", "missing_argument"):
        return place, "is missing"
    if kind == "union_tag_not_found":
        return (*place, "kind"), "is missing"
    if kind == "union_tag_invalid":
        return (*place, "kind"), f"must be one of {error['ctx']['expected_tags']}, got {error['ctx']['tag']!r}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return place, message
    return place, f"{message[0].lower()}{message[1:]}, got {got!r:.80}"


def _contradictions(settings: Mapping[str, Any]) -> list[tuple[Place, str]]:
    """Find settings that exclude each other; works on unchecked input, so that all faults come in one list."""
    found: list[tuple[Place, str]] = []
    model, stages = settings.get("model"), settings.get("stages")
    if not isinstance(model, dict) or not isinstance(stages, list):
        return found
    if settings.get("device_adamw") is True and len(stages) > 1:
        found.append((("device_adamw",), f"cannot change what learns, and there are {len(stages)} stages"))
    if settings.get("sharding") in ("full", "hybrid"):
        found += [
            (("stages", i, "muon_learning_rate"), "Muon needs whole matrices; set sharding: none, or leave it out")
            for i, stage in enumerate(stages)
            if isinstance(stage, dict) and stage.get("muon_learning_rate")
        ]
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    for i, stage in enumerate(stages):
        if not isinstance(stage, dict):
            continue
        if stage.get("name") is not None and stage.get("name") in names[:i]:
            found.append((("stages", i, "name"), f"two stages are called {stage['name']!r}"))
        found += [(("stages", i, *place), message) for place, message in _stage_contradictions(model, stage)]
    return found


def _stage_contradictions(model: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Find what a stage wants and the model does not have, and tasks that are named twice."""
    named, kind = stage.get("trainable"), model.get("kind")
    parts = [part for part in get_args(Part) if isinstance(named, list) and part in named]
    if kind == "whisper" and (others := [part for part in parts if part not in WHISPER_PARTS]):
        yield ("trainable",), f"trains {', '.join(others)}; a Whisper has {' and '.join(WHISPER_PARTS)}"
    if kind in ("new", "saved") and "decoder" in parts:
        yield ("trainable",), "trains decoder, which only a model of kind whisper has"
    if kind == "new" and "lora" in parts and not isinstance(model.get("lora"), dict):
        yield ("trainable",), "trains lora, but model.lora is not set"
    needs_ctc = "ctc" in parts or stage.get("ctc_weight", 0)
    if kind == "new" and needs_ctc and not model.get("ctc"):
        yield (), "uses the CTC head, but model.ctc is not true"
    if kind == "whisper" and stage.get("natural", 0):
        yield ("natural",), "asks in natural language, but a model of kind whisper is asked by its tokens alone"
    if kind == "whisper" and stage.get("ctc_weight", 0):
        yield ("ctc_weight",), "uses a CTC head, which a model of kind whisper does not have"
    tasks, first = stage.get("tasks"), dict[str, str]()
    for name in tasks if isinstance(tasks, dict) else ():
        try:
            asked = get_task(name)
        except ValueError:  # said by the check of the field
            continue
        task = asked.name
        if kind == "whisper" and not asked.hears:
            yield ("tasks", name), "is about text alone, which a model of kind whisper has no LLM for"
        if task in first:
            yield ("tasks", name), f"is the same task as {first[task]!r}; give it one weight"
        first.setdefault(task, name)
