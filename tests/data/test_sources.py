"""Manifests made ready for a plan: every length is known, and what is left out is named."""

import json

import numpy as np
import pytest
import soundfile

from osum_npu.data.sources import read_source


@pytest.fixture
def manifest(tmp_path):
    soundfile.write(tmp_path / "two.wav", np.full(2 * 8000, 0.1), 8000)
    soundfile.write(tmp_path / "five.flac", np.full(5 * 16000, 0.1), 16000)
    (tmp_path / "text.wav").write_text("no sound")

    def write(*rows):
        path = tmp_path / "m.jsonl"
        path.write_text("".join(json.dumps({"wav": "two.wav", "txt": "a", **row}) + "\n" for row in rows))
        return path

    return write


def test_missing_lengths_come_from_the_files(manifest):
    path = manifest(
        {"key": "a"},
        {"key": "b", "wav": "five.flac"},
        {"key": "c", "wav": "five.flac", "start": 1.5},
        {"key": "d", "wav": "five.flac", "start": 1.5, "end": 2.25},
        {"key": "e", "wav": "nowhere.wav", "duration": 3.5},
    )
    utterances, skipped = read_source(path, 30)
    assert {u.key: u.duration for u in utterances} == {"a": 2.0, "b": 5.0, "c": 3.5, "d": 0.75, "e": 3.5}
    assert skipped == []


def test_what_cannot_be_used_is_named(manifest, tmp_path):
    path = manifest(
        {"key": "good"},
        {"key": "long", "wav": "five.flac"},
        {"key": "text", "wav": "text.wav"},
        {"key": "gone", "wav": "gone.wav"},
        {"key": "beyond", "start": 7.0},
        {"key": "typo", "gendr": "male"},
        {"key": "edge", "wav": "five.flac", "start": 1.0},
    )
    utterances, skipped = read_source(path, 4.0)
    assert [u.key for u in utterances] == ["good", "edge"]
    words = {
        "typo": f"{path}:6: typo: unknown field 'gendr'",
        "long": f"{path}: long: 5.00 s is longer than max_seconds, 4 s",
        "text": f"{path}: text: cannot read {tmp_path / 'text.wav'}: it is broken",
        "gone": f"{path}: gone: cannot read {tmp_path / 'gone.wav'}",
        "beyond": f"{path}: beyond: ",
    }
    assert len(skipped) == len(words)
    for key, beginning in words.items():
        [line] = [line for line in skipped if f" {key}: " in line]
        assert line.startswith(beginning)


def test_a_manifest_of_nothing_useful_ends_the_reading(manifest):
    with pytest.raises(ValueError, match=r"m\.jsonl: none of its rows can be used; first: .*longer than max_seconds"):
        read_source(manifest({"key": "a"}), 1.0)
    with pytest.raises(ValueError, match=r"none of its rows can be used; first: .*holds no rows"):
        read_source(manifest(), 1.0)
    with pytest.raises(ValueError, match="cannot read the manifest"):
        read_source("nowhere.jsonl", 1.0)
