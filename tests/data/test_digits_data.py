import importlib.util
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from osum_npu.data.manifest import read_manifest, write_manifest
from osum_npu.tasks import Utterance

RECIPE = Path(__file__).parents[2] / "recipes" / "digits" / "make_data.py"
WORDS = ("zero", "one", "two")
RATE = 16000


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("digits_make_data", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Two speakers, three words, in each split two clips that occur nowhere else."""
    folder = tmp_path_factory.mktemp("pack")
    random = np.random.default_rng(0)
    for part in ("train", "dev"):
        utterances = []
        for speaker in ("ann", "bob"):
            for word in WORDS:
                for take in range(2):
                    key = f"{part}_{speaker}_{word}_{take}"
                    soundfile.write(folder / f"{key}.flac", 0.1 * random.normal(size=random.integers(1600, 3200)), RATE)
                    utterances.append(
                        Utterance(
                            key=key,
                            wav=str(folder / f"{key}.flac"),
                            text=word,
                            lang="en",
                            speaker=speaker,
                            labels={"gender": "male"} if speaker == "bob" else {},
                        )
                    )
        write_manifest(folder / f"{part}.jsonl", utterances)
    return folder


@pytest.fixture(scope="module")
def made(recipe, pack, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    recipe.make_data(pack, out, train=120, seed=0)
    return out


def clips_of(pack, part):
    clips = defaultdict(list)
    for utterance in read_manifest(pack / f"{part}.jsonl").utterances:
        clips[utterance.speaker, utterance.text].append(soundfile.read(utterance.wav, dtype="int16")[0])
    return clips


@pytest.mark.parametrize(("part", "count"), [("dev", 300), ("train", 120)])
def test_every_word_is_a_clip_of_the_speaker_and_split_in_its_place(made, pack, part, count):
    clips = clips_of(pack, part)
    manifest = read_manifest(made / f"{part}.jsonl", check_audio=True)
    assert manifest.faults == []
    assert len(manifest.utterances) == count
    for utterance in manifest.utterances:
        sound, rate = soundfile.read(utterance.wav, dtype="int16")
        assert rate == RATE
        assert utterance.duration == len(sound) / RATE
        assert utterance.text == " ".join(word.text for word in utterance.words)
        assert utterance.labels == ({"gender": "male"} if utterance.speaker == "bob" else {})
        edges = [0]
        for word in utterance.words:
            start, end = round(word.start * RATE), round(word.end * RATE)
            span = sound[start:end].astype(int)
            assert any(
                len(clip) == len(span) and np.abs(clip - span).max() <= 1
                for clip in clips[utterance.speaker, word.text]
            )
            edges += [start, end]
        edges.append(len(sound))
        for gap_start, gap_end in zip(edges[::2], edges[1::2], strict=True):
            assert 0.05 * RATE - 1 <= gap_end - gap_start <= 0.2 * RATE
            assert np.abs(sound[gap_start:gap_end]).max() < 0.02 * 32768


def test_lengths_and_speakers(made):
    dev = read_manifest(made / "dev.jsonl").utterances
    train = read_manifest(made / "train.jsonl").utterances
    assert {len(utterance.words) for utterance in dev} == {1, 2, 3, 4}
    lengths = [len(utterance.words) for utterance in train]
    assert {1, 2, 3, 4} < set(lengths) <= set(range(1, 9))
    assert 0 < sum(length > 4 for length in lengths) < 0.3 * len(lengths)
    assert {utterance.speaker for utterance in dev} == {"ann", "bob"}
    gaps = [soundfile.read(utterance.wav, dtype="int16")[0][:800] for utterance in dev]
    assert {bool(gap.any()) for gap in gaps} == {True, False}


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_and_the_dev_list_is_fixed(recipe, pack, made, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_data.py", str(pack), str(tmp_path / "same"), "--train", "120"])
    recipe.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:2], str(tmp_path / "other"), "--train", "50", "--seed", "1"])
    recipe.main()
    wanted, same, other = files(made), files(tmp_path / "same"), files(tmp_path / "other")
    assert same == wanted
    assert len(wanted) == 2 + 300 + 120
    assert {path: content for path, content in other.items() if "dev" in str(path)} == {
        path: content for path, content in wanted.items() if "dev" in str(path)
    }
    assert other[Path("train.jsonl")] != b"".join(wanted[Path("train.jsonl")].splitlines(keepends=True)[:50])


def test_clips_that_cannot_be_read_are_named_and_left_out(recipe, pack, tmp_path, capsys):
    rows = read_manifest(pack / "dev.jsonl").utterances[:3]
    write_manifest(
        tmp_path / "dev.jsonl",
        [
            *rows,
            Utterance(key="gone", wav="gone.wav", text="one", speaker="ann"),
            Utterance(key="bare", wav=rows[0].wav),
        ],
    )
    clips = recipe.load_clips(tmp_path / "dev.jsonl")
    assert sum(len(takes) for by_word in clips.values() for takes in by_word.values()) == 3
    printed = capsys.readouterr().out
    assert "gone: cannot read" in printed
    assert "bare: left out" in printed
    write_manifest(tmp_path / "dev.jsonl", [Utterance(key="gone", wav="gone.wav", text="one", speaker="ann")])
    with pytest.raises(ValueError, match="no usable clip"):
        recipe.load_clips(tmp_path / "dev.jsonl")
