"""The verbs as people call them: help, exit statuses, what is printed and what is written."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny

from osum_npu import __version__
from osum_npu.cli.main import main, make_parser
from osum_npu.evaluation.metrics import headline
from osum_npu.tasks import get_task
from osum_npu.training.log import read_log

HEAVY = ("torch", "transformers", "whisper", "pydantic", "scipy", "matplotlib", "numpy", "yaml", "soundfile")


def verbs(parser=None, words=()):
    """Every verb, also those within a verb, as words."""
    parser = parser or make_parser()
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from verbs(below, (*words, name))


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("OSUM_BACKEND", "cpu")
    with tiny.one_thread():
        yield


# -- help and starting


@pytest.mark.parametrize("words", list(verbs()), ids=" ".join)
def test_help_of_every_verb(words, capsys):
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {' '.join(('osum-npu', *words))}")
    assert "==SUPPRESS==" not in said


def test_the_verbs_are_those_that_scripts_rest_on():
    names = {words[0] for words in verbs() if words}
    assert {"train", "check", "show", "infer", "eval", "data", "doctor", "quickstart"} <= names
    assert {("data", "check"), ("data", "prepare"), ("data", "synthesize")} <= set(verbs())


@pytest.mark.parametrize("code", ["import osum_npu", "import osum_npu.cli.main as m; m.make_parser().format_help()"])
def test_what_is_heavy_waits_until_it_is_needed(code):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print([name for name in {HEAVY} if name in sys.modules])"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_help_in_a_process_of_its_own_loads_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['osum-npu', '--help']\ntry: runpy.run_module('osum_npu', run_name='__main__')\n"
    )
    code += f"except SystemExit as end: print(end.code, [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_the_startup_benchmark_prints_its_medians():
    script = Path(__file__).parents[2] / "benchmarks" / "startup.py"
    done = subprocess.run([sys.executable, script, "--runs", "1"], capture_output=True, text=True, check=True)
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:]] == [
        "python -c pass",
        "import osum_npu",
        "osum-npu --help",
        "osum-npu train --help",
    ]


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert (left.value.code, capsys.readouterr().out.strip()) == (0, __version__)


@pytest.mark.parametrize(
    "words",
    [[], ["sing"], ["infer"], ["eval", "--model", "m"], ["data"], ["data", "prepare", "timit", "a", "b"], ["check"]],
)
def test_words_that_make_no_command_end_with_2(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert "usage: osum-npu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["infer", "--model", "nowhere", "--tasks", "sing", "a.wav"], "there is no task 'sing'; the tasks are asr"),
        (["infer", "--model", "nowhere", "a.jsonl"], "cannot read the manifest a.jsonl"),
        (
            ["infer", "--model", "nowhere", "--decoding", "best", "a.wav"],
            "there is no decoding 'best'; there are greedy",
        ),
        (
            ["infer", "--model", "nowhere", "--prompts", "p.yaml", "a.wav"],
            "p.yaml: the prompts cannot be read: No such",
        ),
        (["infer", "--model", "nowhere", "--prompt", " ", "a.wav"], "--prompt is empty; <no_prompt> asks without"),
        (
            ["infer", "--model", "m", "--tasks", "asr,age", "--prompt", "who?", "a.wav"],
            "answers to 2: asr, age; name one",
        ),
        (["eval", "--model", "nowhere", "--data", "a.jsonl", "--out", "o"], "cannot read the manifest a.jsonl"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
        (["train", "out=a"], "is missing"),
        (["data", "check", "nowhere.jsonl"], "cannot read the manifest nowhere.jsonl"),
        (["data", "prepare", "fsdd", "nowhere", "out"], "is missing"),
    ],
)
def test_what_cannot_start_ends_with_2_and_a_reason(words, fault, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr()
    assert fault in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


# -- doctor


def test_doctor_says_what_runs(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "chosen: cpu (OSUM_BACKEND=cpu)" in said
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["chosen"], report["runs"], report["device"]["name"]) == ("cpu", True, "cpu")
    assert {"cpu", "cuda"} <= {each["name"] for each in report["backends"]}
    assert report["ops"]
    assert report["versions"]["osum-npu"] == __version__


def test_doctor_of_a_backend_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setenv("OSUM_BACKEND", "nonsense")
    assert main(["doctor"]) == 1
    assert "fault: OSUM_BACKEND=nonsense: there is no backend 'nonsense'; installed are" in capsys.readouterr().out


# -- twenty faults


TWENTY = {
    "no key": ({"key": None}, "no key"),
    "no wav": ({"wav": None}, "no wav"),
    "empty transcript": ({"txt": " "}, "txt is empty"),
    "mark": ({"txt": "do<male>"}, "txt holds <male>"),
    "unknown field": ({"gendr": "male"}, "unknown field 'gendr'; did you mean 'gender'?"),
    "gender": ({"gender": "mal"}, "gender 'mal' is none of"),
    "emotion": ({"emotion": "angry"}, "emotion 'angry' is none of"),
    "style": ({"style": "news paper"}, "style 'news paper' is none of"),
    "language": ({"lang": "English"}, "no language code"),
    "duration": ({"duration": -1}, "duration must be more than 0"),
    "span": ({"start": 2, "end": 1}, "end must lie after start"),
    "words": ({"words": [["re", 0, 0.1]]}, "words say"),
    "word times": ({"words": [["do", 0.5, 0.1]]}, "lasts from 0.5 to 0.1"),
    "again": ({"key": "train_000"}, "the key occurs already in line"),
    "json": (b'{"key": "torn', "no JSON"),
    "list": (b"[1, 2]", "the line holds a list"),
    "bytes": (b'{"key": "\xff"}', "is no UTF-8"),
    "gone": ({"wav": "gone.wav"}, "cannot read"),
    "text": ({"wav": "text.wav"}, "it is broken or in no known format"),
    "empty": ({"wav": "empty.wav"}, "it is empty (0 bytes)"),
    "cut": ({"wav": "cut.wav"}, "cut off"),
    "length": ({"duration": 2.5}, "duration is given as 2.5 s"),
    "silent": ({"wav": "silent.wav"}, "silent throughout"),
}
ONLY_CHECKED = {"length", "silent"}
"""Faults that cost nothing but a wrong label: training and inference take the row as it is."""


@pytest.fixture
def faulty(corpus, tmp_path):
    """A manifest with a faulty row after every good one, and the line of each fault."""
    good = [json.loads(line) for line in (corpus / "train.jsonl").read_text("utf-8").splitlines()]
    for row in good:
        row["wav"] = str(corpus / row["wav"])
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").touch()
    whole = Path(good[0]["wav"]).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    lines, places = [], {}
    for row, name in zip(good, [*TWENTY, *[None] * len(good)], strict=False):
        lines.append(json.dumps(row).encode())
        if name is not None:
            change = TWENTY[name][0]
            plain = {"key": f"bad {name}", "wav": good[0]["wav"], "txt": "do"}
            lines.append(change if isinstance(change, bytes) else json.dumps({**plain, **change}).encode())
            places[name] = len(lines)
    manifest = tmp_path / "faulty.jsonl"
    manifest.write_bytes(b"\n".join(lines) + b"\n")
    return manifest, places, len(good)


def test_data_check_lists_every_fault_with_its_line(faulty, capsys):
    manifest, places, good = faulty
    assert len(places) >= 20
    assert main(["data", "check", str(manifest)]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert len(lines) == len(places)
    for (name, line), said in zip(places.items(), lines, strict=True):
        assert said.startswith(f"{manifest}:{line}: "), name
        assert TWENTY[name][1] in said, name
    assert summary.startswith(f"{manifest}: {good} good rows, ")
    assert summary.endswith(f"; {len(places)} faults")


def test_data_check_without_sound_and_of_good_data(faulty, corpus, capsys):
    manifest, places, _ = faulty
    assert main(["data", "check", "--no-audio", str(manifest)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"; {len(places) - 6} faults")
    assert main(["data", "check", str(corpus / "train.jsonl"), str(corpus / "dev.jsonl")]) == 0
    assert [line.rpartition("; ")[2] for line in capsys.readouterr().out.splitlines()] == ["0 faults", "0 faults"]


def test_train_goes_on_with_the_rest_and_names_the_faults(faulty, corpus, tmp_path, capsys):
    manifest, places, _ = faulty
    layer, out = tiny.write_recipe(tmp_path / "tiny.yaml", corpus), tmp_path / "run"
    stage = "{name: all, trainable: [encoder, ctc], steps: 6, learning_rate: 1e-3, batch_seconds: 15, ctc_weight: 1}"
    words = [
        "train",
        str(layer),
        f"out={out}",
        f"stages=[{stage}]",
        f"data.train.tones={{path: {manifest}}}",
        "stages.0.llm_weight=0",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"model: {out / 'model'}"
    assert read_log(out / "log.jsonl")[-1]["step"] == 6
    skipped = (out / "skipped.txt").read_text("utf-8")
    for name, line in places.items():
        named = f"{manifest}:{line}: " in skipped or f"bad {name}: " in skipped
        assert named == (name not in ONLY_CHECKED), name
    assert len(skipped.splitlines()) == len(places) - len(ONLY_CHECKED)


# -- infer


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


# -- eval


def test_eval_writes_scores_by_task_and_a_page(finished, corpus, tmp_path, capsys):
    rows = [json.loads(line) for line in (corpus / "dev.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row["wav"] = str(corpus / row["wav"])
    manifest, out = tmp_path / "test.jsonl", tmp_path / "out"
    broken = {**rows[0], "key": "broken", "wav": "gone.wav"}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [broken, *rows, {"key": "k"}]))
    tasks = ["asr", "gender", "timestamps", "chat", "age+gender", "style+age+gender-only"]
    words = ["--data", manifest, "--tasks", ",".join(tasks), "--limit", "5", "--out", out, "--decoding", "beam"]
    assert main(["eval", "--model", str(finished / "model"), *map(str, words)]) == 0
    said = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert set(report["tasks"]) == set(tasks)
    for name in tasks:
        scores = report["tasks"][name]
        assert scores["n"] == (5 if name != "chat" else min(5, sum("reply" in row for row in [broken, *rows])))
        assert {metric.key for metric in headline(get_task(name))} <= scores.keys()
        assert f"\n{name}" in said
    wer = report["tasks"]["asr"]["wer"]
    assert wer is None or wer >= 0
    assert report["tasks"]["asr"]["failed"] == 1  # a recording that is not there counts as an error
    assert report["tasks"]["gender"]["accuracy"] <= 0.8
    assert report["tasks"]["age+gender"]["accuracy"] <= report["tasks"]["age+gender"]["gender_accuracy"]
    assert report["facts"]["decoding"] == "beam"
    assert "gone.wav" in said
    assert f"{manifest}:{len(rows) + 2}: k: no wav" in said
    page = (out / "report.html").read_text("utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert "gone.wav" in page
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(predictions) == sum(scores["n"] for scores in report["tasks"].values())
    assert {row["task"] for row in predictions} == set(tasks)
    assert said.splitlines()[-1] == f"report: {out / 'report.html'}"


def test_eval_of_tasks_without_labels_ends_in_words(finished, corpus, tmp_path, capsys):
    manifest = tmp_path / "bare.jsonl"
    manifest.write_text('{"key": "a", "wav": "a.wav"}\n')
    words = ["--data", str(manifest), "--tasks", "asr,gender", "--out", str(tmp_path / "out")]
    assert main(["eval", "--model", str(finished / "model"), *words]) == 2
    assert "carries labels for asr, gender" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def answering_with_tags(finished, tmp_path):
    """The trained model as if it had learned OSUM-Pangu's form."""
    folder = tmp_path / "tags" / "model"
    shutil.copytree(finished / "model", folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "form": "osum_pangu"}))
    return folder


def test_eval_in_natural_language_compares_wordings_and_stages(answering_with_tags, corpus, tmp_path, capsys):
    tasks = ["asr", "gender+age-only", "chat", "gender"]
    words = ["--model", answering_with_tags, "--data", corpus / "dev.jsonl", "--limit", "2", "--natural"]
    assert main([str(w) for w in ["eval", *words, "--tasks", "asr", "--out", tmp_path / "1"]]) == 0
    words += ["--tasks", ",".join(tasks), "--out", tmp_path / "2", "--stage", f"stage 1={tmp_path / '1/report.json'}"]
    assert main([str(w) for w in ["eval", *words]]) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "2/report.json").read_text("utf-8"), parse_constant=pytest.fail)
    asked = [name for name in tasks if name in report["tasks"]]
    shown = [name for name in asked if name != "chat"]  # that form shows a chat no instruction
    following = report["instructions"]["following"]
    assert {w: set(found["tasks"]) for w, found in following.items()} == {"fixed": set(asked), "natural": set(shown)}
    assert report["instructions"]["differences"].keys() == set(shown)
    rows = [json.loads(line) for line in (tmp_path / "2/predictions.jsonl").read_text("utf-8").splitlines()]
    for name in shown:
        by_wording = {w: [row for row in rows if (row["task"], row["wording"]) == (name, w)] for w in following}
        assert [r["key"] for r in by_wording["fixed"]] == [r["key"] for r in by_wording["natural"]]
        assert not any(r["prompt"] for r in by_wording["fixed"])
        assert all(r["prompt"] for r in by_wording["natural"])
    assert "instructions followed" in said
    page = (tmp_path / "2/report.html").read_text("utf-8")
    assert "stage 1" in page
    assert "Instructions followed, by stage" in page


@pytest.mark.parametrize(
    ("stage", "fault"),
    [("report.json", "--stage wants a name and a report"), ("a=gone.json", "gone.json: the report of a stage cannot")],
)
def test_eval_of_a_stage_that_is_not_there(finished, corpus, tmp_path, capsys, stage, fault):
    words = ["--model", finished / "model", "--data", corpus / "dev.jsonl", "--out", tmp_path, "--stage", stage]
    assert main([str(w) for w in ["eval", *words]]) == 2
    assert fault in capsys.readouterr().err


# -- instructions


def test_data_intents_writes_rows_that_data_check_takes(tmp_path, capsys):
    words = ["data", "intents", tmp_path / "i", "--train", "40", "--dev", "4", "--test", "20", "--tasks", "age,SER+SAP"]
    assert main([str(w) for w in words]) == 0
    assert "occur in train" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "i/test.jsonl").read_text("utf-8").splitlines()]
    assert {row["intent"] for row in rows} == {"age", "emotion+age"}
    assert main(["data", "check", str(tmp_path / "i/test.jsonl")]) == 0
    assert main(["data", "intents", str(tmp_path), "--tasks", "text2text"]) == 2
    assert "'text2text' is not asked for by an instruction" in capsys.readouterr().err
