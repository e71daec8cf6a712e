"""The data of a run: its sources, and what a stage learns from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from osum_npu.config import Recipe, Source, Stage
from osum_npu.data.collate import Collator
from osum_npu.data.loader import Position, Step, steps
from osum_npu.data.plan import WeightedSource, servable
from osum_npu.data.sources import read_source
from osum_npu.models.whisper_encoder_decoder import TranscriptStart, WhisperEncoderDecoder
from osum_npu.tasks import Utterance, read_prompts
from osum_npu.tasks.form import get_form
from osum_npu.training.build import Trainee
from osum_npu.training.ranks import Ranks
from osum_npu.training.skipped import Skipped
from osum_npu.training.state import fingerprint


class Feed:
    """Reads the sources of a recipe, and makes batches of them for its stages."""

    def __init__(self, recipe: Recipe, ranks: Ranks, skipped: Skipped) -> None:
        """Read manifests and wordings.

        Args:
            recipe: of the run.
            ranks: each takes its share of every step.
            skipped: names rows that cannot be used.

        Raises:
            ValueError: a source or the file of wordings cannot be read.
        """
        self.recipe, self.ranks, self.skipped = recipe, ranks, skipped
        self.wordings, self.ignored_prompts = read_prompts(recipe.prompts)
        self.train, self.dev = self._read(recipe.data.train), self._read(recipe.data.dev)

    def _read(self, sources: Mapping[str, Source]) -> list[WeightedSource]:
        read = []
        for source in sources.values():
            utterances, skipped = read_source(source.path, self.recipe.data.max_seconds)
            self.skipped.add(skipped)
            read.append(WeightedSource(utterances, source.weight))
        return read

    @property
    def utterances(self) -> list[Utterance]:
        """All that is trained on."""
        return [utterance for source in self.train for utterance in source.utterances]

    @property
    def fingerprints(self) -> dict[str, str]:
        """What each source of the training data is known by."""
        return {name: fingerprint(source.utterances) for name, source in zip(self.recipe.data.train, self.train)}

    def serve(self, model: Trainee, tokenizer: Any) -> None:
        """Make batches for a model from now on.

        Raises:
            ValueError: a stage finds nothing to learn in the data, or nothing to be measured by.
        """
        self.tokenizer, self.encoder = tokenizer, model.encoder.config
        self.form = get_form("osum")
        self.start: TranscriptStart | None = None
        self.max_answer_tokens = self.recipe.data.max_answer_tokens
        if isinstance(model, WhisperEncoderDecoder):
            self.start = TranscriptStart.of(tokenizer)
            self.max_answer_tokens = min(self.max_answer_tokens or model.max_answer_tokens, model.max_answer_tokens)
        else:
            self.form = get_form(model.config.form, model.config.begin_of_text)
            self.form.encode(tokenizer, [], [])  # says now what does not fit
        for stage in self.recipe.stages:  # what would end the last one is said before the first one begins
            if not _serves(self.train, stage):
                raise ValueError(
                    f"stage {stage.name!r}: no utterance of the training data carries the labels for any of its "
                    f"tasks: {', '.join(stage.tasks)}; name other tasks, or add data with these labels"
                )
            if stage.patience is not None and not self.measures(stage):
                raise ValueError(
                    f"stage {stage.name!r} has patience, but no utterance of the dev data carries the labels for any "
                    f"of its tasks: {', '.join(stage.tasks)}; leave patience out, or add such data to data.dev"
                )

    def measures(self, stage: Stage) -> bool:
        """Whether the dev data can measure a stage."""
        return _serves(self.dev, stage)

    def steps(self, stage: Stage, start: Position) -> Iterator[Step]:
        """Yield this rank's share of every step of a stage, without end."""
        return steps(
            self.train,
            stage.tasks,
            self.collator(stage),
            batch_seconds=stage.batch_seconds,
            micro_batch_seconds=stage.micro_batch_seconds,
            questions=stage.questions,
            shortest_first=stage.shortest_first,
            start=start,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            workers=self.recipe.data.workers,
        )

    def collator(self, stage: Stage, *, augment: bool = True) -> Collator:
        """Return what makes batches for a stage."""
        return Collator(
            tokenizer=self.tokenizer,
            n_mels=self.encoder.n_mels,
            seed=self.recipe.seed,
            spec_augment=stage.spec_augment if augment else None,
            max_seconds=min(self.recipe.data.max_seconds, self.encoder.max_seconds),
            form=self.form,
            wordings=self.wordings,
            natural=stage.natural,
            stamp_seconds=self.recipe.stamp_seconds,
            max_answer_tokens=self.max_answer_tokens,
            start=self.start,
        )


def _serves(sources: list[WeightedSource], stage: Stage) -> bool:
    """Whether any utterance carries the labels for any of the stage's tasks."""
    return any(servable(utterance, stage.tasks) for source in sources for utterance in source.utterances)
