"""Batches: what is drawn belongs to the utterance, and a broken file costs itself alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from osum_npu.audio.augment import SpecAugmentConfig
from osum_npu.audio.mel import frame_count
from osum_npu.audio.read import read_audio
from osum_npu.data.collate import Collator
from osum_npu.data.plan import Example
from osum_npu.models.tokenizer import train_tokenizer
from osum_npu.tasks import CHAT_SEPARATOR, COMBINATIONS, TASKS, Utterance, Word, normalize_text, prompts, write


@pytest.fixture(scope="module")
def tokenizer():
    wordings = [wording for each in prompts().values() for wording in each]
    return train_tokenizer(["hello world 你好", *wordings], ["<male>", "<female>", CHAT_SEPARATOR], 400)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(0)
    made = []
    for i in range(6):
        path = folder / f"{i}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(8000 + 800 * i), 16000)
        u = Utterance(
            key=f"u{i}",
            wav=str(path),
            duration=0.5 + 0.05 * i,
            text="Hello 你 好" if i % 2 else None,
            labels={"gender": "male"},
            reply="world",
            prompt="say it" if i == 5 else None,
        )
        made.append(Example(u, (TASKS["chat" if i == 3 else "gender"],)))
    return made


def collator(tokenizer, **changes):
    settings = {"n_mels": 80, "seed": 3, "spec_augment": SpecAugmentConfig(time_frames=10), "max_seconds": 2.0}
    return Collator(tokenizer=tokenizer, **{**settings, **changes})


def drawn(batch):
    """What was drawn for each utterance, by key."""
    return {
        example.utterance.key: (prompt, *(array.tobytes() for array in vars(one).values()))
        for example, prompt, one in zip(batch.examples, batch.prompts, batch.drawn, strict=True)
    }


def test_a_batch_holds_what_the_examples_say(tokenizer, examples):
    batch = collator(tokenizer)(examples, epoch=0)
    assert batch.examples == examples
    assert batch.wave_BS.shape == (6, 12000)
    for i, (example, wave, samples) in enumerate(zip(examples, batch.wave_BS, batch.samples, strict=True)):
        assert samples == 8000 + 800 * i
        assert np.array_equal(wave[:samples].numpy(), read_audio(example.utterance.wav))
        assert not wave[samples:].any()
        answer = tokenizer.decode(batch.answers[i], skip_special_tokens=False)
        assert batch.answers[i][-1] == tokenizer.eos_token_id
        assert normalize_text(answer.removesuffix(tokenizer.eos_token)).strip() == write(
            example.tasks[0], example.utterance
        )
        prompt = tokenizer.decode(batch.prompts[i]).replace(" ", "")
        allowed = ["say it"] if example.utterance.prompt else prompts()[example.tasks[0].name]
        assert prompt in [wording.replace(" ", "") for wording in allowed]
        hidden = batch.drawn[i]
        assert hidden.hidden_frames.shape == hidden.source_frames.shape == (frame_count(samples),)
        assert hidden.hidden_bins.shape == (80,)
    assert batch.spellings == ["<male>" if i % 2 == 0 else "hello你好<male>" for i in range(6)]
    assert batch.label_count == sum(map(len, batch.answers))
    assert batch.seconds == pytest.approx(sum(8000 + 800 * i for i in range(6)) / 16000)
    assert batch.skipped == []


def test_draws_follow_from_seed_epoch_and_key_alone(tokenizer, examples):
    collate = collator(tokenizer)
    whole = drawn(collate(examples, epoch=4))
    for group in (examples[::-1], examples[2:4], examples[5:], [examples[0], examples[4]]):
        alone = drawn(collate(group, epoch=4))
        assert alone == {key: whole[key] for key in alone}
    others = [drawn(collate(examples, epoch=5)), drawn(collator(tokenizer, seed=4)(examples, epoch=4))]
    for other in others:
        assert all(other[key][1:] != whole[key][1:] for key in whole)
        assert any(other[key][0] != whole[key][0] for key in whole)
    assert len({value[1] for value in whole.values()}) == len(whole)  # no two utterances share a mask


def test_every_wording_is_drawn_in_the_long_run(tokenizer, examples):
    seen = {tuple(collator(tokenizer)(examples[:1], epoch).prompts[0]) for epoch in range(60)}
    assert len(seen) == len(prompts()["gender"])


def test_other_wordings_are_drawn_and_no_prompt_is_none(tokenizer, examples):
    wordings = {**prompts(), "gender": ("say hello", "say world"), "chat": ("<no_prompt>",)}
    seen = set()
    for epoch in range(20):
        for example, prompt in zip(
            examples, collator(tokenizer, wordings=wordings)(examples, epoch).prompts, strict=True
        ):
            if example.tasks == (TASKS["chat"],):
                assert prompt == []
            elif example.utterance.prompt is None:
                seen.add(tokenizer.decode(prompt).strip())
    assert seen == {"say hello", "say world"}


def test_word_times_are_written_at_the_resolution_wanted(tokenizer, examples):
    row = replace(examples[1].utterance, words=(Word("hello", 0.12, 0.48),))
    for seconds, written in ((0.02, "<0.12>hello<0.48>"), (0.1, "<0.1>hello<0.5>")):
        batch = collator(tokenizer, stamp_seconds=seconds)([Example(row, (TASKS["timestamps"],))], 0)
        assert normalize_text(tokenizer.decode(batch.answers[0][:-1])).strip() == written


def test_without_augmentation_nothing_is_hidden(tokenizer, examples):
    plain = collator(tokenizer, spec_augment=None)(examples, epoch=4)
    assert plain.drawn is None
    assert plain.prompts == collator(tokenizer)(examples, epoch=4).prompts


def test_a_broken_file_is_named_and_the_others_are_kept(tokenizer, examples, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").touch()
    whole = Path(examples[0].utterance.wav).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    soundfile.write(tmp_path / "long.wav", np.full(16000 * 3, 0.1), 16000)
    names = ["missing.wav", "text.wav", "empty.wav", "cut.wav", "long.wav"]
    bad = [
        Example(Utterance(key=name, wav=str(tmp_path / name), text="a", labels={"gender": "male"}), (TASKS["gender"],))
        for name in names
    ]
    collate = collator(tokenizer)
    mixed = collate([*bad[:2], *examples[:3], *bad[2:], *examples[3:]], epoch=0)
    good = collate(examples, epoch=0)
    assert mixed.examples == good.examples
    assert torch.equal(mixed.wave_BS, good.wave_BS)
    assert drawn(mixed) == drawn(good)
    assert (mixed.answers, mixed.spellings) == (good.answers, good.spellings)
    assert [line.split(":")[0] for line in mixed.skipped] == names
    assert all(str(tmp_path / name) in line for name, line in zip(names, mixed.skipped, strict=True))


def test_a_batch_may_be_left_empty(tokenizer, tmp_path):
    lost = Example(Utterance(key="lost", wav=str(tmp_path / "lost.wav"), text="a"), (TASKS["asr"],))
    for examples in ([lost], []):
        batch = collator(tokenizer)(examples, epoch=0)
        assert (batch.examples, batch.answers, batch.seconds, batch.label_count) == ([], [], 0, 0)
        assert len(batch.skipped) == len(examples)


def test_an_answer_that_is_too_long_is_named(tokenizer, examples):
    whole = collator(tokenizer)(examples, epoch=0)
    lengths = {e.utterance.key: len(answer) - 1 for e, answer in zip(whole.examples, whole.answers)}
    limit = sorted(lengths.values())[3]
    batch = collator(tokenizer, max_answer_tokens=limit)(examples, epoch=0)
    assert batch.skipped == [
        f"{e.utterance.key}: its answer to {e.tasks[0].name} has {lengths[e.utterance.key]} tokens, "
        f"more than the allowed {limit}"
        for e in examples
        if lengths[e.utterance.key] > limit
    ]
    assert 0 < len(batch.skipped) < 6
    kept = [i for i, example in enumerate(whole.examples) if example in batch.examples]
    assert [whole.prompts[i] for i in kept] == batch.prompts
    assert [whole.answers[i] for i in kept] == batch.answers
    assert {key: drawn(whole)[key] for key in drawn(batch)} == drawn(batch)


def test_of_several_questions_only_those_with_a_long_answer_are_left_out(tokenizer, examples):
    row = replace(examples[1].utterance, text="hello " * 30, labels={"gender": "male", "age": "old"})
    both = (TASKS["asr"], COMBINATIONS["age+gender-only"])
    asked = [Example(row, both), Example(replace(row, key="b"), both[:1])]
    whole = collator(tokenizer)(asked, epoch=0)
    batch = collator(tokenizer, max_answer_tokens=len(whole.answers[1]) - 1)(asked, epoch=0)
    assert [line.split(" has ")[0] for line in batch.skipped] == [f"{key}: its answer to asr" for key in (row.key, "b")]
    assert tokenizer.decode(batch.answers[0][:-1]) == "<old><male>"
    assert (whole.about, batch.about) == ([0, 0, 1], [0])
    assert (batch.prompts, batch.answers) == (whole.prompts[1:2], whole.answers[1:2])


def test_some_questions_are_asked_in_natural_language(tokenizer, examples):
    """By the share that the stage wants; a row's own instruction stays; in the words of training alone."""
    fixed = {tuple(ids) for ids in tokenizer([*prompts()["gender"], "say it"]).input_ids}

    def natural(share, epochs=150):
        made = [tuple(collator(tokenizer, natural=share)(examples[4:6], epoch).prompts) for epoch in range(epochs)]
        assert all(tuple(own) in fixed for _, own in made)
        return [tuple(asked) for asked, _ in made if tuple(asked) not in fixed]

    assert natural(0.0, 20) == []
    assert 0.3 < len(natural(0.5)) / 150 < 0.7
    every = natural(1.0)
    assert len(every) == 150
    assert len(set(every)) > 140, "they are made up anew"
    assert every[:3] == [tuple(collator(tokenizer, natural=1.0)(examples[4:5], epoch).prompts[0]) for epoch in range(3)]
