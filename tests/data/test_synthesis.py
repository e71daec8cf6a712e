"""The synthesized corpus: its splits share nothing, its labels are all there, its word times are true."""

import hashlib
import random
import re
from collections import Counter

import numpy as np
import pytest
import soundfile

from osum_npu.data.manifest import read_manifest
from osum_npu.data.synthesis.corpus import Job, make, plan, synthesize
from osum_npu.data.synthesis.grammar import SPLITS, Sentence, draw_statements, grammar, questions
from osum_npu.data.synthesis.voices import VOICES
from osum_npu.tasks import HAN, TASKS, missing, normalize_text, split_words

pytest.importorskip(
    "espeakng_loader", reason="speech synthesis needs espeakng-loader: pip install 'osum-npu[quickstart]'"
)

RATE = 16000
COUNTS = {"train": 160, "dev": 10, "test": 80}


@pytest.fixture(scope="module")
def jobs():
    """A plan of a size that a quickstart may have."""
    return list(plan({"train": 6000, "dev": 200, "test": 1000}, seed=0))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder, and the manifest of each split with its sound checked."""
    folder = tmp_path_factory.mktemp("synthesized")
    assert synthesize(folder, COUNTS, seed=3, processes=1) == COUNTS
    return folder, {split: read_manifest(folder / f"{split}.jsonl", check_audio=True) for split in SPLITS}


def every_question(lang):
    return [question for split in SPLITS for question in questions(lang, split)]


# -- who says what


def test_no_sentence_and_no_voice_of_one_split_is_in_another(jobs):
    for of in (lambda job: job.sentence.text, lambda job: job.voice.variant, lambda job: job.key):
        sets = {split: {of(job) for job in jobs if job.key.startswith(split)} for split in SPLITS}
        assert all(sets.values())
        assert not sets["train"] & sets["test"]
        assert not sets["train"] & sets["dev"]
        assert not sets["dev"] & sets["test"]


def test_a_fifth_of_the_voices_is_held_out_and_each_split_has_all_kinds():
    assert len({voice.name for voice in VOICES}) == len(VOICES)
    held_out = [voice for voice in VOICES if voice.split == "test"]
    assert len(held_out) >= 0.2 * len(VOICES)
    kinds = {(voice.gender, voice.age) for voice in VOICES}
    assert kinds == {(gender, age) for gender in TASKS["gender"].labels for age in TASKS["age"].labels}
    for split in SPLITS:
        assert {(voice.gender, voice.age) for voice in VOICES if voice.split == split} == kinds


def test_the_language_is_rich_enough_to_be_learned_and_not_recited(jobs):
    sentences = {job.sentence for job in jobs}
    assert len({sentence.text for sentence in sentences}) >= 2000
    words = {word for s in sentences if s.lang == "en" for word in split_words(s.text)}
    characters = {character for s in sentences if s.lang == "zh" for character in s.text}
    assert len(words) >= 150
    assert len(characters) >= 150
    assert all(re.fullmatch(r"[a-z']+", word) for word in words)
    assert all(re.fullmatch(f"[{HAN}]", character) for character in characters)
    learned = {word for job in jobs if job.key.startswith("train") for word in split_words(job.sentence.text)}
    asked = {word for job in jobs if not job.key.startswith("train") for word in split_words(job.sentence.text)}
    assert len(asked - learned) < 0.02 * len(asked)  # new sentences, but of known words


def test_the_grammar_is_text_throughout():
    """YAML reads a bare ``no`` or ``12`` as something else."""
    for lang, rules in grammar().items():
        for entries in (*rules["lists"].values(), rules["sentences"], rules["ask"], rules["sums"]["numbers"]):
            assert all(isinstance(entry, str) for entry in entries)
        for question in every_question(lang):
            assert isinstance(question.reply, str)
            assert "{" not in question.text
            assert normalize_text(question.text) == question.text
        for sentence in draw_statements(lang, "train", 200, random.Random(0)):
            assert "{" not in sentence.text
            assert normalize_text(sentence.text) == sentence.text


def test_a_question_has_one_reply_and_every_fact_is_asked_for_in_every_split():
    for lang, rules in grammar().items():
        asked = [question.text for question in every_question(lang)]
        assert len(set(asked)) == len(asked) > 250
        facts = Counter()
        for split in SPLITS:
            replies = Counter(question.reply for question in questions(lang, split))
            facts[frozenset(replies)] += 1
        assert len(facts) == 1
        assert len(list(questions(lang, "test"))) == 2 * len(asked) // len(rules["ask"])


def test_labels_languages_ages_and_genders_are_spread_evenly(jobs):
    train = [job for job in jobs if job.key.startswith("train")]
    for of in (lambda job: job.sentence.lang, lambda job: (job.voice.gender, job.voice.age)):
        counts = Counter(map(of, train))
        assert max(counts.values()) < 1.3 * min(counts.values())
    statements = [job for job in train if job.sentence.reply is None]
    assert len(statements) == 0.7 * len(train)
    for task in ("event", "emotion", "style"):
        counts = Counter(job.labels.get(task) for job in statements)
        assert abs(counts.pop(None) - len(statements) / 2) <= 2
        assert counts.keys() == set(TASKS[task].labels)
        assert max(counts.values()) - min(counts.values()) <= 4
    assert len({frozenset(job.labels) for job in statements}) == 8
    assert not any(job.labels for job in jobs if job.sentence.reply is not None)


def test_the_plan_follows_from_the_seed_and_a_split_from_its_own_size(jobs):
    again = list(plan({"train": 6000, "dev": 200, "test": 1000}, seed=0))
    assert again == jobs
    other = list(plan({"train": 50, "dev": 200, "test": 1000}, seed=0))
    assert [job for job in other if job.key.startswith("test")] == [job for job in jobs if job.key.startswith("test")]
    assert [j.sentence for j in plan({"train": 50, "dev": 0, "test": 0}, seed=1)] != [j.sentence for j in other[:50]]


# -- the files


def files(folder):
    # sums, because pytest would take hours to show where two sounds differ
    sums = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
    return {path.relative_to(folder): digest for path, digest in sums.items()}


def test_the_same_seed_makes_the_same_bytes_with_any_number_of_processes(corpus, tmp_path):
    synthesize(tmp_path, COUNTS, seed=3, processes=2)
    assert files(tmp_path) == files(corpus[0])


def test_the_manifests_have_no_fault_and_every_task_all_its_labels(corpus):
    folder, manifests = corpus
    assert {split: len(manifest.utterances) for split, manifest in manifests.items()} == COUNTS
    assert all(manifest.faults == [] for manifest in manifests.values())
    for split in ("train", "test"):
        for task in TASKS.values():
            able = [u for u in manifests[split].utterances if not missing(task, u)]
            assert able
            if task.labels:
                assert {u.labels[task.name] for u in able} == set(task.labels)
    assert {p.name for p in (folder / "audio").iterdir()} == {
        f"{u.key}.wav" for manifest in manifests.values() for u in manifest.utterances
    }


def test_words_are_those_of_the_text_in_rising_times_within_the_sound(corpus):
    for manifest in corpus[1].values():
        for u in manifest.utterances:
            assert [word.text for word in u.words] == split_words(u.text)
            edges = [edge for word in u.words for edge in (word.start, word.end)]
            assert edges == sorted(edges)
            assert edges[0] > 0
            assert edges[-1] < u.duration
            assert all(word.end - word.start > 0.01 for word in u.words)
            assert u.duration == pytest.approx(soundfile.info(u.wav).duration, abs=1e-3)


# -- true times


def rms(wave, start, end):
    return float(np.sqrt(np.mean(wave[round(start * RATE) : round(end * RATE)] ** 2)))


def test_sound_is_where_the_words_are(jobs):
    """Speech stands out of the silence before it, begins with the first word and ends with the last."""
    starts, ends = [], []
    plain = [job for job in jobs if not job.labels]
    for job in random.Random(0).sample(plain, 80):
        wave, u = make(job)
        first, last = u.words[0].start, u.words[-1].end
        silence = rms(wave, 0, first - 0.01)
        assert rms(wave, first, last) > 5 * silence
        assert all(rms(wave, word.start, word.end) > 2 * silence for word in u.words)
        envelope = np.sqrt(np.convolve(wave**2, np.ones(160) / 160, "same"))
        loud = np.flatnonzero(envelope > 0.1 * envelope.max()) / RATE
        starts.append(loud[0] - first)
        ends.append(loud[-1] - last)
    # a word may begin or end with a quiet consonant, but no sound lies outside
    assert min(starts) > -0.03
    assert max(ends) < 0.05
    assert np.median(starts) < 0.1
    assert np.median(ends) > -0.1


def spoken(text, lang, voice):
    """Word times of a plain utterance; the same speed and level every time."""
    return make(Job("k", Sentence(text, lang), voice, {}, seed=1))[1].words


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("age", TASKS["age"].labels)
def test_a_word_takes_as_long_in_a_text_as_alone(lang, age):
    """Of two words, the second: the first is spoken faster than alone, as it does not end the phrase."""
    voice = next(voice for voice in VOICES if voice.age == age and voice.split == "test")
    lists = [entry for entries in grammar()[lang]["lists"].values() for entry in entries]
    words = {word for entry in lists for word in entry.split() if lang == "en" or len(word) == 2}
    known = sorted(words, key=lambda word: (len(word), word))
    chosen = known[:: max(1, len(known) // 10)]

    def length(words):
        return words[-1].end - words[0].start

    alone = {word: length(spoken(word, lang, voice)) for word in chosen}
    pairs = [(first, second) for i, first in enumerate(chosen) for second in chosen[i % 3 :: 3]]
    together = []
    for first, second in pairs:
        words = spoken(f"{first} {second}" if lang == "en" else first + second, lang, voice)
        together.append(length(words[-len(split_words(second)) :]))
    ratio = np.array(together) / [alone[second] for _, second in pairs]
    assert abs(np.median(ratio) - 1) < 0.05
    assert np.mean(abs(ratio - 1) < 0.2) > 0.9
    assert np.corrcoef(together, [alone[second] for _, second in pairs])[0, 1] > 0.9


def test_an_unknown_voice_is_named():
    from osum_npu.data.synthesis.espeak import speak

    with pytest.raises(ValueError, match="espeak-ng has no voice 'xx-nowhere'"):
        speak("hello", "xx-nowhere")
