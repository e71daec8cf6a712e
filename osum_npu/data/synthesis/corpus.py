"""A labelled corpus for a machine with nothing on it: sentences of a grammar, spoken by espeak-ng.

Every utterance has a transcript, word times, gender and age. Three in ten are questions with their replies. Of the
others, every second has an event, every second an emotion and every second a style, in all combinations. Test and dev
have sentences and voices of their own.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from osum_npu.audio.read import SAMPLE_RATE
from osum_npu.data.manifest import write_manifest
from osum_npu.data.synthesis.effects import EMOTIONS, EVENTS, STYLES, Delivery, Wave, event, hoarsen, lay_under, tremble
from osum_npu.data.synthesis.espeak import Speech, speak
from osum_npu.data.synthesis.grammar import SPLITS, Sentence, Split, draw_questions, draw_statements
from osum_npu.data.synthesis.voices import VOICES, Voice
from osum_npu.tasks import Utterance, Word, split_words

_LANGUAGES = {"en": "en-us", "zh": "cmn"}
_QUESTIONS = 0.3
"""Share of the utterances that are questions."""
_LABELS = {"event": tuple(EVENTS), "emotion": tuple(EMOTIONS), "style": tuple(STYLES)}


@dataclass(frozen=True)
class Job:
    """One utterance to make."""

    key: str
    sentence: Sentence
    voice: Voice
    labels: Mapping[str, str]
    """Event, emotion and style, where it has them."""
    seed: int


def plan(counts: dict[Split, int], seed: int) -> Iterator[Job]:
    """Decide what is said, by whom and how. Labels, genders and ages are spread evenly.

    Args:
        counts: utterances by split.
        seed: decides everything; the same seed gives the same corpus.
    """
    for split in SPLITS:
        rng = random.Random(f"{seed}/{split}")
        voices = [voice for voice in VOICES if voice.split == split]
        groups = [[v for v in voices if (v.gender, v.age) == g] for g in sorted({(v.gender, v.age) for v in voices})]
        number = 0
        for lang in _LANGUAGES:
            share = counts[split] // len(_LANGUAGES)
            asked = int(share * _QUESTIONS)
            statements = draw_statements(lang, split, share - asked, rng)
            columns = {task: _deal(labels, len(statements), rng) for task, labels in _LABELS.items()}
            for i, sentence in enumerate([*statements, *draw_questions(lang, split, asked, rng)]):
                drawn = {task: column[i] for task, column in columns.items() if i < len(column)}
                key = f"{split}_{number:06d}"
                yield Job(
                    key=key,
                    sentence=sentence,
                    voice=rng.choice(groups[rng.randrange(len(groups))]),
                    labels={task: label for task, label in drawn.items() if label is not None},
                    seed=zlib.crc32(f"{seed}/{key}".encode()),
                )
                number += 1


def _deal(labels: Sequence[str], count: int, rng: random.Random) -> list[str | None]:
    """Deal every second of ``count`` places a label, each as often as the others."""
    dealt = [labels[i // 2 % len(labels)] if i % 2 else None for i in range(count)]
    rng.shuffle(dealt)
    return dealt


def _speak(job: Job, delivery: Delivery, rng: np.random.Generator) -> tuple[Wave, tuple[Word, ...]]:
    """Say the sentence of ``job``: samples of 16 kHz and true word times."""
    voice, words = job.voice, split_words(job.sentence.text)
    rate = int(rng.uniform(190, 235) * delivery.pace * voice.pace / voice.tract)

    def say(text: str) -> Speech:
        return speak(
            text,
            f"{_LANGUAGES[job.sentence.lang]}+{voice.variant}",
            rate=max(rate, 80),
            pitch=int(np.clip(voice.pitch + delivery.pitch + rng.integers(-6, 7), 0, 99)),
            pitch_range=delivery.pitch_range,
        )

    speech = say(job.sentence.text)
    starts = [start for _, start in speech.starts]
    if len(starts) != len(words):  # espeak-ng says some pairs ("in the") as one word; a bar keeps them apart
        barred = " | ".join(words)
        speech = say(barred)
        starts = [start for position, start in speech.starts if barred[position] != "|"]
    if len(starts) != len(words):
        raise RuntimeError(f"espeak-ng found {len(starts)} words in {job.sentence.text!r}, not {len(words)}")
    pauses = [t for name, t in speech.phonemes if name.startswith("_") and name != "_|"]
    limits = [*starts[1:], len(speech.audio) / speech.rate]
    ends = [min([limit, *(p for p in pauses if start < p <= limit)]) for start, limit in zip(starts, limits)]
    spoken = speech.audio[: int((ends[-1] + 0.03) * speech.rate)]
    wave = soxr.resample(spoken, speech.rate * voice.tract, SAMPLE_RATE).astype(np.float32)
    if voice.tremor:
        wave = tremble(wave, voice.tremor, rng.uniform(4.5, 6.0))
    if voice.hoarseness:
        wave = hoarsen(wave, voice.hoarseness, rng)
    spans = zip(words, starts, ends)
    return wave, tuple(Word(w, start / voice.tract, end / voice.tract) for w, start, end in spans)


def make(job: Job) -> tuple[Wave, Utterance]:
    """Make the sound and the labels of one utterance; its ``wav`` is still to be set."""
    rng = np.random.default_rng(job.seed)
    emotion, sound, style = (job.labels.get(task) for task in ("emotion", "event", "style"))
    delivery = EMOTIONS[emotion] if emotion else Delivery()
    speech, words = _speak(job, delivery, rng)
    before = _silence(rng.uniform(0.02, 0.12))
    if len(said := delivery.interjection()):
        before = np.concatenate([before, said * (0.3 / np.abs(said).max()), _silence(0.05)])
    parts = [before, delivery.colour(speech)]
    if sound:
        parts += [_silence(0.1), event(sound, rng) * 0.5]
    wave = np.concatenate([*parts, _silence(rng.uniform(0.02, 0.1))])
    lead = len(before) / SAMPLE_RATE
    if style:
        wave = lay_under(wave, STYLES[style], rng)
    wave = wave * (10 ** rng.uniform(-0.8, -0.1) / max(float(np.abs(wave).max()), 1e-3))
    wave += 10 ** rng.uniform(-3.8, -2.8) * rng.standard_normal(len(wave))
    wave = np.clip(wave, -1, 1).astype(np.float32)
    return wave, Utterance(
        key=job.key,
        wav="",
        duration=round(len(wave) / SAMPLE_RATE, 4),
        text=job.sentence.text,
        lang=job.sentence.lang,
        speaker=job.voice.name,
        words=tuple(Word(w.text, round(w.start + lead, 4), round(w.end + lead, 4)) for w in words),
        labels={"gender": job.voice.gender, "age": job.voice.age, **job.labels},
        reply=job.sentence.reply,
    )


def _silence(seconds: float) -> Wave:
    return np.zeros(int(seconds * SAMPLE_RATE), np.float32)


def _store(job: Job, folder: Path) -> Utterance:
    wave, utterance = make(job)
    path = folder / f"{job.key}.wav"
    soundfile.write(path, wave, SAMPLE_RATE, subtype="PCM_16")
    return Utterance(**{**utterance.__dict__, "wav": str(path)})


class _Worker:
    """Makes utterances into a folder; a class because a pool pickles what it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, job: Job) -> Utterance:
        return _store(job, self.folder)


def synthesize(out: Path, counts: dict[Split, int], seed: int = 0, processes: int | None = None) -> dict[Split, int]:
    """Write ``out/{train,dev,test}.jsonl`` and ``out/audio``.

    Args:
        out: folder to write.
        counts: utterances by split; rounded down to an even number (two languages).
        seed: decides everything.
        processes: how many to use; all cores by default.

    Returns:
        Utterances written by split.
    """
    (out / "audio").mkdir(parents=True, exist_ok=True)
    jobs = list(plan(counts, seed))
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # What espeak-ng says depends on all it said before, so every chunk of jobs is spoken by a process of its own.
    with context.Pool(processes or os.cpu_count(), maxtasksperchild=1) as pool:
        made = list(tqdm(pool.imap(_Worker(out / "audio"), jobs, chunksize=256), "synthesize", len(jobs), unit="utt"))
    return {split: _manifest(out / f"{split}.jsonl", [u for u in made if u.key.startswith(split)]) for split in SPLITS}


def _manifest(path: Path, utterances: Sequence[Utterance]) -> int:
    write_manifest(path, utterances)
    return len(utterances)
