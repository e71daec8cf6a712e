"""Instructions in natural language: what they ask for follows from their words, and test words are never trained on."""

import itertools
import random
import re
from collections import defaultdict
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.tasks import HAN, LISTED, TASKS, combine, get_task
from osum_npu.tasks.instructions import (
    LANGUAGES,
    draw_instruction,
    parts,
    shared_ngrams,
    wishes,
)
from osum_npu.tasks.prompts import prompt_fault

LABELLED = [task for task in TASKS.values() if task.labels]
ASKABLE = [task for task in LISTED.values() if task.kind in ("text", "chat")]
WISHES = ("asr", "timestamps", "event", "emotion", "style", "gender", "age", "chat")
SPLITS = ("train", "test")
every_part = pytest.mark.parametrize(("lang", "split"), [*itertools.product(LANGUAGES, SPLITS)])


def flat(value):
    """All texts of a part of the table."""
    if isinstance(value, str):
        return [value]
    return [text for item in (value.values() if isinstance(value, dict) else value) for text in flat(item)]


def phrases(lang, split):
    """Every phrase that asks for a wish, with it: whole ones, questions, and those of a verb and an object."""
    told = parts(lang, split)
    whole = [(text, wish) for kind in ("wishes", "questions") for wish in WISHES for text in told[kind].get(wish, ())]
    composed = [
        (verb.format(object=what), wish)
        for wish, objects in told["objects"].items()
        for verb, what in itertools.product(told["verbs"].get(wish) or told["verbs"]["any"], objects)
    ]
    return [*whole, *composed]


class Known(dict):
    """Texts in lower case, each with its wish."""

    def __init__(self, pairs):
        super().__init__((text.lower(), wish) for text, wish in pairs)
        self.head = min(map(len, self))
        self.lengths = defaultdict(set)
        for text in self:
            self.lengths[text[: self.head]].add(len(text))

    def within(self, text):
        """Those that a text has, the longest first."""
        runs = {
            text[start : start + length]
            for start in range(len(text))
            for length in self.lengths.get(text[start : start + self.head], ())
        }
        return sorted(runs & self.keys(), key=lambda run: (-len(run), run))


@cache
def refusals(lang, split):
    """What an instruction may say of a wish that it does not have."""
    told = parts(lang, split)
    return Known(
        (refusal.format(name=name), wish)
        for wish, names in told["names"].items()
        for refusal, name in itertools.product(told["refusals"], names)
    )


@cache
def asking(lang, split):
    """Every phrase that asks for a wish."""
    return Known(phrases(lang, split))


def parted(said, lang, split):
    """An instruction in the words of a split, in lower case, less its refusals; and the wishes that these name."""
    said, refused = said.lower(), set()
    known = refusals(lang, split)
    for words in known.within(said):
        if words in said:
            said = said.replace(words, "")
            refused.add(known[words])
    return said, refused


def heard(said, lang, split):
    """What an instruction without refusals asks for, found by its words alone: the wish of each phrase, by place.

    A phrase within another one is none of its own.
    """
    known, places = asking(lang, split), {}
    for text in known.within(said):
        while (place := said.find(text)) >= 0:
            places[place] = known[text]
            said = said[:place] + "\0" * len(text) + said[place + len(text) :]
    return [places[place] for place in sorted(places)]


@every_part
def test_every_wish_has_enough_phrases_in_the_language(lang, split):
    told = parts(lang, split)
    assert tuple(told["wishes"]) == tuple(told["names"]) == WISHES
    assert set(told["objects"]) == set(WISHES)
    assert all(verb.count("{object}") == 1 for verb in flat(told["verbs"]))
    assert set(told["questions"]) <= set(WISHES)
    assert all(len(texts) >= (12 if split == "train" else 6) for texts in told["wishes"].values())
    for text in [*asking(lang, split), *told["frames"], *told["before"], *told["after"], *told["refusals"]]:
        assert bool(re.search(f"[{HAN}。]", text)) == (lang == "zh")
        assert not re.search("[<>]", text)
    assert all(frame.count("{wish}") == 1 for frame in told["frames"])
    assert all(refusal.count("{name}") == 1 for refusal in told["refusals"])


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_part_of_test_is_in_train(lang):
    train, test = (parts(lang, split) for split in SPLITS)
    assert train.keys() == test.keys()
    for kind in train:
        ours, theirs = ({text.lower() for text in flat(told[kind])} for told in (train, test))
        assert len(ours) == len(flat(train[kind])) or kind in ("joins", "objects")
        assert not (ours & theirs) - {", ", "，"}, kind  # a comma is nobody's
    for one, other in itertools.permutations([asking(lang, split) for split in SPLITS]):
        assert not [text for text in one if other.within(text)]


@every_part
def test_no_phrase_arises_where_parts_of_the_other_split_meet(lang, split):
    """Neither of a phrase and what stands before it, nor of a phrase and what comes after."""
    told = parts(lang, split)
    asked = asking(lang, split)
    heads, tails = zip(*(frame.lower().split("{wish}") for frame in told["frames"]), strict=True)
    joins = {join.lower() for pair in told["joins"] for join in pair}
    meetings = [({*heads, *joins, *(text.lower() for text in told["openings"])}, asked), (asked, {*tails, *joins})]
    borders = [({text[i:] for text in one for i in range(len(text))}, starts(other)) for one, other in meetings]
    for text in asking(lang, "test" if split == "train" else "train"):
        for end, start in borders:
            assert not any(text[:i] in end and text[i:] in start for i in range(1, len(text))), text


def starts(texts):
    """All beginnings of the texts."""
    return {text[:end] for text in texts for end in range(1, len(text) + 1)}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_phrase_asks_for_one_wish_only(lang):
    pairs = [(text.lower(), wish) for split in SPLITS for text, wish in phrases(lang, split)]
    known = Known(pairs)
    assert not [(text, wish) for text, wish in pairs if {known[run] for run in known.within(text)} != {wish}]


COMBINED = st.builds(combine, st.lists(st.sampled_from(LABELLED), min_size=1, unique=True).map(tuple), st.booleans())


@given(st.sampled_from(ASKABLE) | COMBINED, st.sampled_from(LANGUAGES), st.sampled_from(SPLITS), st.integers())
def test_an_instruction_says_what_it_asks_for_in_the_words_of_its_split(task, lang, split, seed):
    said = draw_instruction(task, split, random.Random(seed), lang)
    assert said == draw_instruction(task, split, random.Random(seed), lang)
    asked, refused = parted(said, lang, split)
    found = heard(asked, lang, split)
    assert sorted(found) == sorted(wishes(task))
    if "asr" in found and len(found) > 1:
        assert found[0] == "asr" or found[-1] == "asr"
        found.remove("asr")
        assert ("asr", *found) == wishes(task)
    else:
        assert tuple(found) == wishes(task)
    assert heard(asked, lang, "test" if split == "train" else "train") == []
    assert "{" not in said
    assert not prompt_fault(said)
    assert not refused & {*wishes(task), *(["asr"] if task.transcript else [])}


@pytest.mark.parametrize("name", ["chat_think", "text2text", "intent"])
def test_what_no_instruction_asks_for(name):
    with pytest.raises(ValueError, match=f"task '{name}' is not asked for by an instruction"):
        draw_instruction(get_task(name), "train", random.Random(0))


def test_there_are_many_thousands_in_both_languages():
    rng = random.Random(0)
    for split, least in (("train", 0.97), ("test", 0.9)):
        drawn = [draw_instruction(TASKS["age"], split, rng) for _ in range(4000)]
        assert len(set(drawn)) > least * len(drawn)
        assert 0.4 < sum(bool(re.search(f"[{HAN}]", said)) for said in drawn) / len(drawn) < 0.6


def test_shared_ngrams_are_counted():
    assert shared_ngrams(["a b c d e"], ["A b c d", "b c d x"]) == 0.5
    assert shared_ngrams(["听写一遍"], ["请听写一遍"], 4) == 0.5
    assert shared_ngrams(["a"], ["b"]) == 0
