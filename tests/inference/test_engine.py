import json
import re
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loud import LONGEST, TOKENIZER, make

from osum_npu import backend
from osum_npu.checkpoints.model_directory import end_ids, save_model
from osum_npu.inference.decoding import DECODINGS, Decoding
from osum_npu.inference.engine import Engine
from osum_npu.tasks import COMBINATIONS, TASKS, Utterance, prompts, read, read_prefixed

ASR, GENDER = TASKS["asr"], TASKS["gender"]
CPU = torch.device("cpu")
SHORT = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def engine():
    return Engine(make(), TOKENIZER, CPU, batch_seconds=20.0, decoding=SHORT)


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    """A hundred sounds of 0.02 to 1.9 s, of all pitches and loudnesses, in no order."""
    folder, rng = tmp_path_factory.mktemp("waves"), np.random.default_rng(0)
    made = []
    for i in range(100):
        t = np.arange(rng.integers(320, 30400)) / 16000
        pitch, glide = rng.uniform(80, 2000), rng.uniform(-300, 300)
        wave = np.sin(2 * np.pi * (pitch * t + glide * t**2)) + rng.uniform(0, 0.5) * rng.normal(size=t.size)
        path = folder / f"{i}.wav"
        soundfile.write(path, rng.uniform(0.05, 0.5) * wave, 16000)
        made.append(Utterance(key=f"u{i}", wav=str(path), duration=t.size / 16000))
    return made


def write(path, wave):
    soundfile.write(path, wave, 16000, subtype="FLOAT")
    return str(path)


def test_a_hundred_at_once_answer_as_one_by_one(engine, utterances):
    together = list(engine.answer(utterances, [ASR]))
    assert [result.utterance for result in together] == utterances
    for result, utterance in zip(together, utterances):
        (alone,) = engine.answer([utterance], [ASR])
        assert alone == result
    texts = [result.raw["asr"] for result in together]
    assert len(set(texts)) > 50, "the answers are too alike to tell anything"
    assert min(map(len, texts)) < 3 < max(map(len, texts)), "no answer of a batch ends before another"


@pytest.mark.parametrize("batch_seconds", [1.0, 1000.0], ids=["many windows", "one batch"])
@pytest.mark.parametrize("known", [True, False], ids=["lengths known", "lengths unknown"])
def test_answers_do_not_depend_on_the_batches(engine, utterances, batch_seconds, known):
    some = utterances[:40] if known else [Utterance(key=u.key, wav=u.wav) for u in utterances[:40]]
    other = Engine(engine.model, TOKENIZER, CPU, batch_seconds=batch_seconds, decoding=SHORT)
    raw = [result.raw for result in other.answer(some, [ASR])]
    assert raw == [result.raw for result in engine.answer(utterances[:40], [ASR])]


@pytest.mark.parametrize("limit", [3.0, 10.0])
def test_no_batch_is_larger_than_asked_for(engine, utterances, limit):
    other, shapes = Engine(engine.model, TOKENIZER, CPU, batch_seconds=limit), []
    handle = engine.model.encoder.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    list(other.answer(utterances, []))
    handle.remove()
    seconds = [rows * frames / 100 for rows, frames, _ in shapes]
    assert sum(rows for rows, *_ in shapes) == len(utterances)
    assert max(seconds) <= limit
    # Padding is little, and batches are full: those of similar length go together.
    assert sum(seconds) <= 1.2 * sum(u.duration for u in utterances)
    assert np.mean(seconds) > limit / 2


def test_what_cannot_be_read_is_told_and_the_rest_is_answered(engine, utterances, tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is no sound", "utf-8")
    (tmp_path / "cut.wav").write_bytes((tmp_path / utterances[0].wav).read_bytes()[:400])
    (tmp_path / "folder.wav").mkdir()
    bad = {
        "missing.wav": "No such file",
        "empty.wav": "it is empty",
        "text.wav": "broken or in no known format",
        "cut.wav": "the file is cut off",
        "folder.wav": "directory",
        write(tmp_path / "long.wav", np.zeros(33000)): "longer than the allowed 2 s",
        write(tmp_path / "short.wav", np.zeros(150)): "too short",
        write(tmp_path / "nan.wav", np.full(5000, np.nan)): "5000 samples are NaN",
    }
    mixed, reasons = [], {}
    for i, (name, reason) in enumerate(bad.items()):
        mixed += [Utterance(key=f"bad{i}", wav=str(tmp_path / name)), utterances[i]]
        reasons[f"bad{i}"] = (str(tmp_path / name), reason)
    mixed.append(Utterance(key="outside", wav=utterances[0].wav, start=50.0))
    reasons["outside"] = (utterances[0].wav, "start 50 s lies outside the sound")

    results = list(engine.answer(mixed, [ASR]))
    assert [result.utterance for result in results] == mixed
    for result in results:
        key = result.utterance.key
        if key in reasons:
            path, reason = reasons[key]
            assert path in result.error
            assert reason in result.error
            assert result.answers == result.raw == {}
            assert result.as_json() == {"key": key, "wav": path, "error": result.error}
    good = [result for result in results if result.error is None]
    assert good == list(engine.answer([u for u in mixed if u.key.startswith("u")], [ASR]))


def test_only_broken_ones_and_none_at_all(engine, tmp_path):
    missing = Utterance(key="a", wav=str(tmp_path / "a.wav"))
    assert [bool(result.error) for result in engine.answer([missing, missing], [ASR])] == [True, True]
    assert list(engine.answer([], [ASR])) == []


def test_several_tasks_take_one_pass_through_the_encoder(engine, utterances):
    some, passes = utterances[:8], []
    handle = engine.model.encoder.register_forward_hook(lambda *_: passes.append(1))
    together = list(engine.answer(some, list(TASKS.values())))
    handle.remove()
    assert len(passes) == 1
    for name, task in TASKS.items():
        alone = [result.raw[name] for result in engine.answer(some, [task])]
        assert [result.raw[name] for result in together] == alone
    said = [tuple(result.raw.values()) for result in together]
    assert any(len(set(one)) > 1 for one in said), "the prompt changes no answer"
    for result in together:
        assert result.answers == {name: read(task, result.raw[name]) for name, task in TASKS.items()}
        row = json.loads(json.dumps(result.as_json(), ensure_ascii=False))
        assert row["key"] == result.utterance.key
        assert row["duration"] == pytest.approx(result.utterance.duration, abs=1e-4)
        assert row["results"].keys() == TASKS.keys()


def test_a_row_s_own_prompt_is_used(engine, utterances):
    def ask(prompt):
        rows = [Utterance(key=u.key, wav=u.wav, prompt=prompt) for u in utterances[:10]]
        return [result.raw["gender"] for result in engine.answer(rows, [GENDER])]

    assert ask(None) == ask(prompts()["gender"][0]) != ask("north south?")


def test_other_wordings_are_asked_and_no_prompt_is_none(engine, utterances):
    def said(wordings):
        other = Engine(engine.model, TOKENIZER, CPU, decoding=SHORT, wordings={**prompts(), "gender": wordings})
        return [result.raw["gender"] for result in other.answer(utterances[:10], [GENDER])]

    def asked(prompt):
        rows = [Utterance(key=u.key, wav=u.wav, prompt=prompt) for u in utterances[:10]]
        return [result.raw["asr"] for result in engine.answer(rows, [ASR])]

    assert said(("north south?", "red")) == asked("north south?") != said(prompts()["gender"])
    assert said(("<no_prompt>",)) == asked("<no_prompt>") != asked("north south?")


def test_combinations_are_answered_with_labels_by_task(engine, utterances):
    task = COMBINATIONS["age+gender"]
    (result,) = engine.answer(utterances[:1], [task])
    assert result.answers["age+gender"] == read(task, result.raw["age+gender"])
    assert {"text", "labels"} <= result.as_json()["results"]["age+gender"].keys()


def test_a_span_of_a_file_is_answered_as_a_file_of_its_own(engine, tmp_path):
    wave = np.random.default_rng(3).normal(size=24000) / 10
    whole = write(tmp_path / "whole.wav", wave)
    part = write(tmp_path / "part.wav", wave[8000:20000])
    span = Utterance(key="a", wav=whole, start=0.5, end=1.25)
    (one,), (other,) = engine.answer([span], [ASR]), engine.answer([Utterance(key="b", wav=part)], [ASR])
    assert one.raw == other.raw
    assert one.seconds == other.seconds == 0.75


def test_a_model_directory_is_loaded_onto_the_chosen_backend(engine, utterances, tmp_path, monkeypatch):
    monkeypatch.setenv("OSUM_BACKEND", "cpu")
    save_model(make(), TOKENIZER, tmp_path / "model", "")
    loaded = Engine.load(tmp_path / "model", decoding=SHORT)
    assert loaded.longest == LONGEST
    assert not loaded.model.training
    raw = [result.raw for result in loaded.answer(utterances[:20], [ASR])]
    assert raw == [result.raw for result in engine.answer(utterances[:20], [ASR])]


def test_in_half_precision_the_positions_stay_exact(tmp_path, monkeypatch):
    save_model(make(), TOKENIZER, tmp_path / "model", "")
    host = replace(backend.load("cpu"), dtypes=(torch.bfloat16,))
    monkeypatch.setattr(backend, "current", lambda: host)
    halved, exact = Engine.load(tmp_path / "model").model, make()
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}
    assert halved.dtype is torch.bfloat16
    for name, buffer in exact.named_buffers():
        if not name.endswith("gate_up"):
            assert torch.equal(halved.get_buffer(name), buffer), name
    assert "llm.model.rotary_emb.inv_freq" in dict(exact.named_buffers())
    sound = 0.1 * torch.randn(1, 60, 80, dtype=torch.bfloat16)
    said = halved.generate(sound, [60], [[1, 2]], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert said.shape == (1, 3)


def test_answers_end_where_the_generation_settings_of_the_model_say(utterances, tmp_path, monkeypatch):
    monkeypatch.setenv("OSUM_BACKEND", "cpu")
    folder = tmp_path / "model"
    save_model(make(), TOKENIZER, folder, "")
    assert end_ids(folder) == [TOKENIZER.eos_token_id]
    settings = json.loads((folder / "generation_config.json").read_text("utf-8"))
    settings["eos_token_id"] = list(range(len(TOKENIZER)))
    (folder / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    loaded = Engine.load(folder)
    assert loaded.ends == settings["eos_token_id"]
    assert [result.raw["asr"] for result in loaded.answer(utterances[:5], [ASR])] == [""] * 5
    (folder / "generation_config.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match=r"generation_config\.json is damaged"):
        Engine.load(folder)
    (folder / "generation_config.json").unlink()
    assert end_ids(folder) is None
    assert Engine.load(folder).ends == [TOKENIZER.eos_token_id]


def test_settings_that_an_llm_brings_along_decide_nothing(engine, utterances):
    model = make()
    model.llm.generation_config.repetition_penalty = 5.0
    model.llm.generation_config.do_sample = True
    other = Engine(model, TOKENIZER, CPU, decoding=SHORT)
    raw = [result.raw for result in other.answer(utterances[:20], [ASR])]
    assert raw == [result.raw for result in engine.answer(utterances[:20], [ASR])]


@pytest.mark.parametrize("name", ["beam", "osum-echat"])  # greedy is that of all other tests
def test_no_decoding_depends_on_the_batch(engine, utterances, name):
    def raw(batch_seconds, seed=0):
        decoding = replace(DECODINGS[name], max_new_tokens=12)
        other = Engine(engine.model, TOKENIZER, CPU, batch_seconds=batch_seconds, decoding=decoding, seed=seed)
        return [result.raw for result in other.answer(utterances[:12], [ASR, GENDER])]

    assert raw(1.0) == raw(100.0)
    assert (raw(100.0) == raw(100.0, seed=1)) == (not DECODINGS[name].sample)


def test_drawing_with_beams_is_repeated_by_the_same_seed_and_the_same_batches(engine, utterances):
    def raw(seed):
        decoding = replace(DECODINGS["osum"], max_new_tokens=12)
        other = Engine(engine.model, TOKENIZER, CPU, decoding=decoding, seed=seed)
        return [result.raw for result in other.answer(utterances[:12], [ASR])]

    torch.manual_seed(1)
    first = raw(0)
    torch.manual_seed(2)
    assert raw(0) == first != raw(1)


# -- what users ask for in words of their own

WISHES = st.text(max_size=40) | st.lists(
    st.sampled_from(
        ["<asr>", "<age>", "<male>", "<|im_end|>", "<|endoftext|>", "[unused10]", "<s>", "年龄", "\0", " "]
    ),
    max_size=8,
).map("".join)


@settings(max_examples=25)
@given(wishes=st.lists(WISHES, min_size=1, max_size=4))
@pytest.mark.parametrize("form", ["osum", "osum_pangu"])
def test_any_instruction_gets_an_answer(tagged, utterances, form, wishes):
    asked = [replace(utterances[0], key=str(i), prompt=wish) for i, wish in enumerate(wishes)]
    for row, result in zip(asked, tagged[form].answer(asked, [ASR])):
        assert result.error is None
        text, answer = result.raw["asr"], result.answers["asr"]
        free = form == "osum_pangu" and row.prompt.strip()
        assert answer == (read_prefixed(text)[1] if free else read(ASR, text))
        assert not re.search("<[^<>]*>", answer.text or "")
        assert not (free and answer.intent is None and answer.fault is None)


def test_an_instruction_that_is_too_long_is_told_and_the_rest_is_answered(engine, utterances):
    asked = [replace(utterances[0], prompt="why? " * 2000), utterances[1]]
    long, good = engine.answer(asked, [ASR])
    assert long.error == "u0: the prompt has 10000 characters, more than the 4000 that are allowed; shorten it"
    assert good.error is None


def test_what_a_row_s_instruction_is_known_to_ask_for_is_read_as_that(tagged, utterances):
    row = replace(utterances[0], prompt="male or female?", intent="gender")
    (result,) = tagged["osum_pangu"].answer([row], [GENDER])
    assert result.answers["gender"] == read(GENDER, result.raw["gender"])


@pytest.fixture(scope="module")
def tagged():
    engines = {}
    for form in ("osum", "osum_pangu"):
        model = make()
        model.config.form = form
        engines[form] = Engine(model, TOKENIZER, CPU, decoding=SHORT)
    return engines
