"""The verbs as people call them: help, exit statuses, what is printed and what is written."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from faults import ONLY_CHECKED, TWENTY

from osum_npu import __version__
from osum_npu.cli.main import main, make_parser
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
