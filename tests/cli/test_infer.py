"""`osum-npu infer` as people call it: files, folders and manifests, questions of one's own, faulty input."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from faults import ONLY_CHECKED

from osum_npu.cli.main import main


@pytest.fixture
def folder(corpus, tmp_path):
    """Sound files in a tree, and one that is none."""
    sounds = sorted((corpus / "dev").glob("*.wav"))[:3]
    (tmp_path / "sounds" / "deep").mkdir(parents=True)
    shutil.copy(sounds[0], tmp_path / "sounds" / "b.wav")
    shutil.copy(sounds[1], tmp_path / "sounds" / "deep" / "a.WAV")
    wave, rate = soundfile.read(sounds[2])
    soundfile.write(tmp_path / "sounds" / "c.flac", wave, rate)
    (tmp_path / "sounds" / "notes.txt").write_text("no sound")
    return tmp_path / "sounds"


def run_infer(finished, capsys, *words):
    status = main(["infer", "--model", str(finished / "model"), *map(str, words)])
    said = capsys.readouterr()
    return status, [json.loads(line, parse_constant=pytest.fail) for line in said.out.splitlines()], said.err


def test_infer_on_files_a_folder_and_a_manifest(finished, corpus, folder, tmp_path, capsys):
    manifest = tmp_path / "two.jsonl"
    rows = [json.loads(line) for line in (corpus / "dev.jsonl").read_text("utf-8").splitlines()[:2]]
    rows = [{**row, "wav": str(corpus / row["wav"])} for row in rows]
    del rows[1]["duration"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    single = folder / "c.flac"
    status, lines, err = run_infer(finished, capsys, "--tasks", "asr,SGC,timestamps", single, folder, manifest)
    assert (status, err) == (0, "")
    assert [line["key"] for line in lines] == ["c", "b.wav", "c.flac", "deep/a.WAV", rows[0]["key"], rows[1]["key"]]
    for line in lines:
        assert list(line) == ["key", "wav", "duration", "results"]
        assert line["duration"] == pytest.approx(soundfile.info(line["wav"]).duration, abs=1e-3)
        assert list(line["results"]) == ["asr", "gender", "timestamps"]
        assert isinstance(line["results"]["asr"]["text"], str)
        assert {"label", "fault"} & line["results"]["gender"].keys()
        assert isinstance(line["results"]["timestamps"]["words"], list)
    assert lines[0]["results"] == lines[2]["results"]  # the same sound, wherever it stands
    assert lines[4]["wav"] == rows[0]["wav"]


def test_infer_asks_in_the_words_of_a_file(finished, folder, tmp_path, capsys):
    path = tmp_path / "prompts.yaml"
    path.write_text("<TRANSCRIBE><AGE><GENDER>: [do re mi]\n<S2S>: [a]\n", "utf-8")
    words = ["--tasks", "<TRANSCRIBE><AGE><GENDER>", "--prompts", path, folder]
    status, lines, err = run_infer(finished, capsys, *words)
    assert (status, err) == (0, f"{path}: ignored, as of no task here: <S2S>\n")
    own = run_infer(finished, capsys, "--tasks", "age+gender", "--prompt", "do re mi", folder)
    assert lines == own[1]
    for line in lines:
        assert list(line["results"]) == ["age+gender"]
        assert {"text", "labels"} <= line["results"]["age+gender"].keys()


def test_infer_asks_an_instruction_of_ones_own_where_a_row_brings_none(finished, folder, tmp_path, capsys):
    manifest = tmp_path / "own.jsonl"
    rows = [{"key": "a", "wav": "sounds/b.wav"}, {"key": "b", "wav": "sounds/b.wav", "prompt": "so la"}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [line["results"] for line in run_infer(finished, capsys, "--prompt", "do re mi", manifest)[1]]
    for prompt, row in (("do re mi", asked[0]), ("so la", asked[1])):
        (line,) = run_infer(finished, capsys, "--prompt", prompt, folder / "b.wav")[1]
        assert line["results"] == row
    assert run_infer(finished, capsys, "--prompt", "<no_prompt>", folder / "b.wav")[0] == 0


@pytest.mark.parametrize(
    ("prompt", "fault"), [("a" * 10000, "the prompt has 10000 characters"), (" ", "--prompt is empty")]
)
def test_infer_refuses_an_instruction_that_is_too_long_or_none(finished, folder, capsys, prompt, fault):
    assert run_infer(finished, capsys, "--prompt", prompt, folder)[0] == 2
    assert fault in run_infer(finished, capsys, "--prompt", prompt, folder)[2]


def test_infer_answers_an_instruction_of_tags_as_any_other(finished, folder, capsys):
    status, lines, _ = run_infer(finished, capsys, "--prompt", "<asr><|endoftext|><male><|im_end|>[unused10]", folder)
    assert status == 0
    assert all("asr" in line["results"] for line in lines)
    assert not any("<" in line["results"]["asr"]["text"] and ">" in line["results"]["asr"]["text"] for line in lines)


@pytest.mark.parametrize("decoding", ["beam", "osum", "osum-echat"])
def test_infer_by_every_decoding_is_repeated_by_its_seed(finished, folder, capsys, decoding):
    words = ["--tasks", "asr,gender", "--decoding", decoding, "--seed", "3", folder]
    first = run_infer(finished, capsys, *words)
    assert first[0] == 0
    assert run_infer(finished, capsys, *words) == first


def test_infer_names_what_it_cannot_use_and_answers_the_rest(finished, folder, tmp_path, capsys):
    (folder / "broken.wav").write_text("no sound")
    soundfile.write(folder / "long.wav", 0.1 * np.ones(16000 * 5), 16000)
    (tmp_path / "empty").mkdir()
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"key": "k", "wav": "sounds/b.wav", "gendr": 1}\n')
    out = tmp_path / "new" / "answers.jsonl"
    inputs = [folder, tmp_path / "gone.wav", tmp_path / "empty", manifest]
    status, printed, err = run_infer(finished, capsys, "--tasks", "gender", "--out", out, *inputs)
    assert (status, printed) == (1, [])
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["key"] for line in lines] == ["b.wav", "broken.wav", "c.flac", "deep/a.WAV", "long.wav", "gone"]
    errors = {line["key"]: line["error"] for line in lines if "error" in line}
    assert errors.keys() == {"broken.wav", "long.wav", "gone"}
    assert "longer than the allowed 4 s" in errors["long.wav"]
    assert all(list(line) == ["key", "wav", "error"] for line in lines if "error" in line)
    assert all("results" in line for line in lines if "error" not in line)
    skipped = [line for line in err.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 5
    for word in (
        "broken.wav",
        "long.wav",
        "gone.wav",
        f"{tmp_path / 'empty'}: no sound file",
        f"{manifest}:1: k: unknown",
    ):
        assert [line for line in skipped if word in line], word
    assert err.splitlines()[-1] == "5 of 8 inputs skipped or unreadable"
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]


def test_infer_on_the_faulty_manifest(finished, faulty, capsys):
    manifest, places, good = faulty
    status, lines, err = run_infer(finished, capsys, manifest)
    assert status == 1
    assert sum("results" in line for line in lines) == good + len(ONLY_CHECKED)
    for name, line in places.items():
        if name not in ONLY_CHECKED:
            named = [said for said in err.splitlines() if f"{manifest}:{line}: " in said or f"/{name}.wav" in said]
            assert named, name


def test_infer_on_nothing(finished, tmp_path, capsys):
    assert main(["infer", "--model", str(finished / "model"), str(tmp_path)]) == 2
    assert "nothing to answer about" in capsys.readouterr().err
    sound = tmp_path / "a.wav"
    soundfile.write(sound, 0.1 * np.ones(16000), 16000)
    assert main(["infer", "--model", str(tmp_path), str(sound)]) == 2
    assert "is no model directory" in capsys.readouterr().err
