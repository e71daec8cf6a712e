"""The recipe on real recordings: what its preparation keeps, and the probe that its model is held against."""

import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from osum_npu.audio.read import SAMPLE_RATE, read_audio
from osum_npu.config import load_recipe
from osum_npu.data.manifest import read_manifest, write_manifest
from osum_npu.tasks import Utterance

RECIPE = Path(__file__).parents[2] / "recipes" / "small_real"
RENDER = """
import json, os
import numpy as np
HERE = os.path.dirname(os.path.abspath(__file__))
def rows(part):
    return [json.loads(line) for line in open(os.path.join(HERE, f"recipes_{part}.jsonl"), encoding="utf8")]
def render(row):
    return np.full(round(row["duration"] * 16000), row["items"][0], np.float32)
"""


def load(name):
    spec = importlib.util.spec_from_file_location(f"small_real_{name}", RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_data():
    return load("make_data")


@pytest.fixture(scope="module")
def probe():
    return load("probe")


def tone(path, pitch, level, random, seconds):
    """Noise and a tone."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    soundfile.write(path, level * np.sin(2 * np.pi * pitch * time) + 1e-3 * random.normal(size=len(time)), SAMPLE_RATE)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Six packs in small: what is to be heard in a clip is the height of its tone."""
    folder, random = tmp_path_factory.mktemp("packs"), np.random.RandomState(0)
    everything = {"gender": ("female", "male"), "age": ("child", "adult"), "style": ("有声书",) * 2}
    labels = {
        "fsdd": everything,
        "zh_hsk": everything,
        "speechocean762": everything,
        "librispeech_mini": everything,
        "events": {**everything, "event": ("cough", "sneeze")},
    }
    for pack, known in labels.items():
        for part in ("train", "dev"):
            (folder / pack / "audio").mkdir(parents=True, exist_ok=True)
            rows = []
            for i in range(24):
                key, which = f"{pack}_{part}_{i}", i % 2
                wav = folder / pack / "audio" / f"{key}.flac"
                seconds = 9 if pack == "librispeech_mini" and i < 2 else 0.5
                tone(wav, (400, 2000)[which] * random.uniform(0.9, 1.1), random.uniform(0.1, 0.3), random, seconds)
                chosen = {name: values[which] for name, values in known.items()}
                text = None if pack in ("events", "librispeech_mini") else ("one", "two")[which]
                rows.append(Utterance(key=key, wav=str(wav), text=text, speaker=f"{part}{i // 4}", labels=chosen))
            write_manifest(folder / pack / f"{part}.jsonl", rows)
    times = folder / "timestamps"
    times.mkdir()
    (times / "render.py").write_text(RENDER, "utf-8")
    for part in ("train", "dev"):
        row = {
            "key": f"ts_{part}",
            "wav": f"audio/ts_{part}.flac",
            "txt": "one two",
            "lang": "en",
            "gender": "male",
            "duration": 0.25,
            "words": [["one", 0, 0.1], ["two", 0.1, 0.2]],
            "items": [0.125],
        }
        (times / f"recipes_{part}.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def data(make_data, packs, tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    make_data.make_data(packs, out)
    return out


@pytest.mark.parametrize("file", ["hear", "understand"])
def test_the_recipes_name_all_manifests_that_are_made(data, file):
    recipe = load_recipe([RECIPE / f"{file}.yaml"])
    for part, sources in (("train", recipe.data.train), ("dev", recipe.data.dev)):
        made = {path.stem for path in (data / part).glob("*.jsonl")}
        if file == "hear":
            made -= {"windows_librispeech_mini"}  # they teach labels alone
        wanted = {"events_cry", "events_other"}  # events that the small packs lack
        assert {Path(source.path).parts[-3:] for source in sources.values()} == {
            ("data", part, f"{name}.jsonl") for name in made | wanted
        }


def test_labels_that_a_pack_cannot_teach_are_gone(data):
    kept = {
        path.stem: {name for row in read_manifest(path, check_audio=True).utterances for name in row.labels}
        for path in (data / "train").glob("*.jsonl")
    }
    assert kept == {
        "fsdd": set(),
        "zh_hsk": set(),
        "speechocean762": {"gender", "age"},
        "librispeech_mini": {"gender"},
        "windows_librispeech_mini": {"gender"},
        "events_cough": {"event"},
        "events_sneeze": {"event"},
        "timestamps": set(),
    }


def test_windows_are_the_parts_of_a_long_clip_with_its_labels(data):
    clips = {row.key: row for row in read_manifest(data / "train" / "librispeech_mini.jsonl").utterances}
    windows = read_manifest(data / "train" / "windows_librispeech_mini.jsonl").utterances
    assert [(row.key, row.start, row.end) for row in windows] == [
        (f"librispeech_mini_train_{clip}_{number}", 4 * number, 4 * number + 4) for clip in (0, 1) for number in (0, 1)
    ]
    for row in windows:
        clip = clips[row.key[:-2]]
        assert (row.wav, row.labels, row.speaker) == (clip.wav, clip.labels, clip.speaker)
        sound = read_audio(clip.wav)[int(row.start * SAMPLE_RATE) : int(row.end * SAMPLE_RATE)]
        assert np.array_equal(read_audio(row.wav, row.start, row.end), sound)


def test_sound_and_rows_stay_as_they_are(data, packs):
    for pack in ("fsdd", "speechocean762"):
        before = read_manifest(packs / pack / "dev.jsonl").utterances
        after = read_manifest(data / "dev" / f"{pack}.jsonl").utterances
        assert [(u.key, u.text, u.speaker) for u in before] == [(u.key, u.text, u.speaker) for u in after]
        for old, new in zip(before, after, strict=True):
            sound, rate = soundfile.read(new.wav, dtype="int16")
            assert rate == SAMPLE_RATE
            assert np.abs(sound - soundfile.read(old.wav, dtype="int16")[0].astype(int)).max() <= 1
    [rendered] = read_manifest(data / "dev" / "timestamps.jsonl").utterances
    assert [(word.text, word.start, word.end) for word in rendered.words] == [("one", 0, 0.1), ("two", 0.1, 0.2)]
    sound = soundfile.read(rendered.wav)[0]
    assert len(sound) == 4000
    assert np.allclose(sound, 0.125, atol=1e-4)


def test_a_missing_pack_is_named(make_data, tmp_path):
    (tmp_path / "fsdd").mkdir()
    for part in ("train", "dev"):
        (tmp_path / "fsdd" / f"{part}.jsonl").touch()
    with pytest.raises(
        ValueError, match=r"lacks zh_hsk/train\.jsonl, .*timestamps/recipes_dev\.jsonl, timestamps/render\.py"
    ):
        make_data.make_data(tmp_path, tmp_path / "out")


def test_an_event_without_its_name_is_told_and_left_out(make_data, packs, tmp_path, capsys):
    shutil.copytree(packs / "events", tmp_path / "events")
    row = {"key": "nameless", "wav": str(packs / "events" / "audio" / "events_dev_0.flac"), "event": None}
    with (tmp_path / "events" / "dev.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
    clips = make_data.read_clips(tmp_path, "events", "dev")
    assert [clip.utterance.key for clip in clips] == [f"events_dev_{i}" for i in range(24)]
    assert "events dev: nameless: no event" in capsys.readouterr().out


def test_the_probe_hears_a_tone_and_stands_beside_the_model(probe, data, tmp_path):
    rows = [(json.loads(line), path.stem) for path in (data / "dev").glob("*.jsonl") for line in path.open()]
    said = []
    for row, source in rows:
        if source == "speechocean762":  # a model that takes every third woman for a man, and all children for adults
            number = int(row["key"].split("_")[-1])
            gender = "male" if number % 6 == 0 else row["gender"]
            for task, label in (("gender", gender), ("age", "adult")):
                results = {f"{task}-only": {"labels": {task: label}}}
                said.append({"task": f"{task}-only", "key": row["key"], "results": results})
        if source == "fsdd":
            said.append({"task": "asr", "key": row["key"], "results": {"asr": {"text": row["txt"].title() + "."}}})
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in said), "utf-8")
    table = {row["question"]: row for row in probe.compare(data, predictions)}
    for name in ("gender, speechocean762", "age, speechocean762", "event", "digit, fsdd"):
        assert table[name]["n"] == 24
        assert table[name]["mean"]["accuracy"] == table[name]["mean_std"]["accuracy"] == 1.0
    assert table["gender, speechocean762"]["model"]["accuracy"] == pytest.approx(20 / 24)
    assert table["gender, its adults"]["model"] == {"n": 12, "accuracy": 1.0, "balanced": 1.0}
    assert table["gender, its children"]["model"]["accuracy"] == pytest.approx(8 / 12)
    assert table["age, speechocean762"]["model"]["balanced"] == 0.5
    assert table["digit, fsdd"]["model"]["accuracy"] == 1.0, "what is no error to the scorer is none here"
    assert table["event"]["model"]["accuracy"] == 0.0, "no answer is a wrong one"


def test_classes_weigh_the_same_and_a_label_of_noise_stays_at_chance(probe):
    random = np.random.RandomState(0)
    labels = ["rare"] * 20 + ["frequent"] * 380
    x = random.normal(size=(400, 2)) + 0.8 * np.array([[label == "rare", 0] for label in labels])
    said = probe.probe(torch.tensor(x).float(), labels, [str(i) for i in range(400)], torch.tensor(x).float())
    found = probe.measure(labels, said)
    assert found.balanced > 0.65, "a probe that weighs clips alike would call nearly all of them frequent"
    noise = torch.tensor(random.normal(size=(400, 2))).float()
    guessed = probe.probe(noise[:200], labels[::2], [str(i) for i in range(200)], noise[200:])
    assert 0.2 < probe.measure(labels[1::2], guessed).balanced < 0.8


@pytest.mark.parametrize(
    ("pack", "part", "rows", "labels"),
    [
        ("fsdd", "dev", 240, {}),
        ("zh_hsk", "train", 7232, {}),
        ("speechocean762", "train", 2320, {"female": 1240, "male": 1080, "adult": 1320, "child": 1000}),
        ("speechocean762", "dev", 180, {"female": 100, "male": 80, "adult": 100, "child": 80}),
        ("librispeech_mini", "train", 231, {"female": 115, "male": 116}),
        ("events", "train", 574, {"cough": 278, "cry": 150, "other": 117, "sneeze": 29}),
        ("events", "dev", 51, {"cough": 24, "cry": 13, "other": 11, "sneeze": 3}),
        ("timestamps", "train", 3600, {}),
        ("timestamps", "dev", 300, {}),
    ],
)
def test_the_real_packs_give_the_rows_and_labels_that_the_readme_names(make_data, pack, part, rows, labels):
    packs = Path(os.environ.get("OSUM_DATA_DIR", "/nowhere"))
    if absent := [name for name in make_data.KEPT if not (packs / name).is_dir()]:
        pytest.skip(f"OSUM_DATA_DIR names no folder with {', '.join(absent)}")
    clips = make_data.read_clips(packs, pack, part)
    assert len(clips) == rows
    assert Counter(label for clip in clips for label in clip.utterance.labels.values()) == labels
    for clip in clips[:: max(1, rows // 3)]:
        assert len(clip.read()) / SAMPLE_RATE == pytest.approx(clip.utterance.duration, abs=0.002)
