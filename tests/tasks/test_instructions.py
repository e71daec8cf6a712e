"""Instructions in natural language: what they ask for follows from their words, and test words are never trained on."""

import itertools
import random
import re
from collections import Counter, defaultdict
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.tasks import HAN, LISTED, TASKS, combine, get_task
from osum_npu.tasks.instructions import (
    LANGUAGES,
    Phrases,
    draw_instruction,
    parts,
    shared_ngrams,
    spell_out,
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


def whole(lang, split, count=None):
    """Phrases that ask for a wish by themselves, with it: all wishes and questions, or a random ``count`` of them."""
    told = parts(lang, split)
    made = [(text, wish) for kind in ("wishes", "questions") for wish in WISHES for text in told[kind].get(wish, ())]
    return made if count is None or count > len(made) else random.Random(0).sample(made, count)


def verbs(lang, split, wish):
    told = parts(lang, split)["verbs"]
    return list(told.get(wish) or told["any"])


def composed(lang, split, count=None):
    """Phrases of a verb and an object, with their wish: all of them, or a random ``count`` for each wish."""
    rng = random.Random(0)
    for wish, objects in parts(lang, split)["objects"].items():
        made, objects = verbs(lang, split, wish), list(objects)
        pairs = itertools.product(made, objects)
        if count is not None:
            pairs = ((rng.choice(made), rng.choice(objects)) for _ in range(count))
        for verb, what in pairs:
            yield verb.format(object=what), wish


class Known:
    """Texts in lower case, each with its wishes, to be found in others."""

    def __init__(self, pairs):
        self.wishes = defaultdict(set)
        for text, wish in pairs:
            self.wishes[text.lower()].add(wish)
        self.head = min(map(len, self.wishes))
        self.lengths = defaultdict(set)
        for text in self.wishes:
            self.lengths[text[: self.head]].add(len(text))

    def places(self, text):
        """Where the texts stand in another one, each with its wish: start, end, wish."""
        for start in range(len(text)):
            for length in self.lengths.get(text[start : start + self.head], ()):
                for wish in self.wishes.get(text[start : start + length], ()):
                    yield start, start + length, wish


class Framed:
    """Texts of a frame and what fills it, by wish, to be found in others; there are too many to make them all."""

    def __init__(self, frames, fillers):
        self.fillers = Known((text, wish) for wish, texts in fillers.items() for text in texts)
        self.frames = {wish: [re.split("{.*}", text.lower()) for text in texts] for wish, texts in frames.items()}

    def places(self, text):
        for start, end, wish in self.fillers.places(text):
            for before, after in self.frames[wish]:
                if text.endswith(before, 0, start) and text.startswith(after, end):
                    yield start - len(before), end + len(after), wish


@cache
def refusals(lang, split):
    """What an instruction may say of a wish that it does not have."""
    told = parts(lang, split)
    return Framed({wish: list(told["refusals"]) for wish in WISHES}, told["names"])


@cache
def asking(lang, split):
    """Every phrase that asks for a wish."""
    objects = parts(lang, split)["objects"]
    return Known(whole(lang, split)), Framed({wish: verbs(lang, split, wish) for wish in objects}, objects)


@cache
def things(lang, split):
    """The names of all wishes."""
    return Known((name, wish) for wish, names in parts(lang, split)["names"].items() for name in names)


@cache
def openings(lang, split):
    return tuple(text.lower() for text in parts(lang, split)["openings"])


def begins(said, start, lang, split):
    """Whether a sentence begins there."""
    before = said[:start].rstrip()
    return not before or before[-1] in ".?!。？！\0" or said[:start].endswith(openings(lang, split))


def listed(said, lang, split):
    """What an instruction asks for by a list of things: where the whole of it stands, and the wishes in their order."""
    known, joins = things(lang, split), {join for pair in parts(lang, split)["lists"] for join in pair}
    for request in sorted(parts(lang, split)["requests"], key=len, reverse=True):
        before, after = request.lower().split("{things}")
        starts = [match.start() for match in re.finditer(f"(?={re.escape(before)})", said)]
        ways = [(start, start + len(before), ()) for start in starts if begins(said, start, lang, split)]
        while ways:  # up to where names have been read, and their wishes
            start, place, told = ways.pop()
            for at, length, wish in known.places(said[place:]):
                end = place + length
                if at:  # names later on are read in their turn
                    break
                if said.startswith(after, end):
                    return start, end + len(after), (*told, wish)
                ways += [(start, end + len(join), (*told, wish)) for join in joins if said.startswith(join, end)]
    return None


def found(known):
    """Where texts stand in another one, none within another: start, end, wish; the longest come first."""
    places, taken = [], set()
    for start, end, wish in sorted(known, key=lambda place: (place[0] - place[1], place)):
        if taken.isdisjoint(range(start, end)):
            taken |= set(range(start, end))
            places.append((start, end, wish))
    return places


def within(text, lang, split):
    """Every place where a text has a phrase of a split."""
    return [place for known in asking(lang, split) for place in known.places(text.lower())]


def parted(said, lang, split):
    """An instruction in the words of a split, in lower case, less its refusals; and the wishes that these name."""
    said, refused = said.lower(), set()
    places = refusals(lang, split).places(said)
    for start, end, wish in found([place for place in places if begins(said, place[0], lang, split)]):
        said = said[:start] + "\0" * (end - start) + said[end:]
        refused.add(wish)
    return said, refused


def heard(said, lang, split):
    """What an instruction without refusals asks for, found by its words alone: the wish of each phrase, by place.

    A phrase within another one is none of its own.
    """
    places = []
    if (asked := listed(said, lang, split)) is not None:
        start, end, in_list = asked
        places = [(start, number, wish) for number, wish in enumerate(in_list)]
        said = said[:start] + "\0" * (end - start) + said[end:]
    places += [(start, 0, wish) for start, _, wish in found(within(said, lang, split))]
    return [wish for _, _, wish in sorted(places)]


@every_part
def test_every_wish_has_enough_phrases_in_the_language(lang, split):
    told = parts(lang, split)
    assert tuple(told["wishes"]) == tuple(told["names"]) == WISHES
    assert set(told["objects"]) == set(WISHES)
    assert all(verb.count("{object}") == 1 for verb in flat(told["verbs"]))
    assert set(told["questions"]) <= set(WISHES)
    assert all(len(list(texts)) >= (12 if split == "train" else 6) for texts in told["wishes"].values())
    for text in flat(
        {name: part for name, part in told.items() if name not in ("verbs", "joins", "lists", "openings")}
    ):
        assert bool(re.search(f"[{HAN}。]", text)) == (lang == "zh")
    for text in flat(told):
        assert not re.search(r"[][<>|]", text)
    assert all(frame.count("{wish}") == 1 for frame in told["frames"])
    assert all(request.count("{things}") == 1 for request in told["requests"])
    assert all(refusal.count("{name}") == 1 for refusal in told["refusals"])


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_part_of_test_is_in_train(lang):
    train, test = (parts(lang, split) for split in SPLITS)
    assert train.keys() == test.keys()
    for kind in train:
        ours, theirs = ({text.lower() for text in flat(told[kind])} for told in (train, test))
        assert len(ours) == len(flat(train[kind])) or kind in ("joins", "lists", "objects")
        assert not (ours & theirs) - {", ", "，", "、"}, kind  # a comma is nobody's


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_phrase_of_a_split_is_within_one_of_the_other(lang):
    assert not [text for text, _ in (*whole(lang, "test"), *composed(lang, "test")) if within(text, lang, "train")]
    assert not [
        text for text, _ in (*whole(lang, "train"), *composed(lang, "train", 2000)) if within(text, lang, "test")
    ]


@every_part
def test_no_phrase_arises_where_parts_of_the_other_split_meet(lang, split):
    """Neither of a phrase and what stands before it, nor of a phrase and what comes after."""
    told = parts(lang, split)
    asked = [text.lower() for text, _ in (*whole(lang, split), *composed(lang, split, 500))]
    heads, tails = zip(*(frame.lower().split("{wish}") for frame in told["frames"]), strict=True)
    joins = {join.lower() for pair in told["joins"] for join in pair}
    meetings = [({*heads, *joins, *(text.lower() for text in told["openings"])}, asked), (asked, {*tails, *joins})]
    borders = [({text[i:] for text in one for i in range(len(text))}, starts(other)) for one, other in meetings]
    other = "test" if split == "train" else "train"
    for text, _ in (*whole(lang, other), *composed(lang, other, 500)):
        for end, start in borders:
            assert not any(text[:i] in end and text[i:] in start for i in range(1, len(text))), text


def starts(texts):
    """All beginnings of the texts."""
    return {text[:end] for text in texts for end in range(1, len(text) + 1)}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_phrase_asks_for_one_wish_only(lang):
    for split in SPLITS:
        for text, wish in (*whole(lang, split, 3000), *composed(lang, split, 200)):
            assert {one for other in SPLITS for _, _, one in within(text, lang, other)} == {wish}, text


def test_a_pattern_spells_out_its_alternatives():
    assert spell_out("say it") == ("say it",)
    assert spell_out("[a|b] c[|d]") == ("a c", "a cd", "b c", "b cd")


def test_a_pattern_is_drawn_by_the_root_of_what_it_makes():
    """Four phrases of one pattern as often as two by themselves, and each of them alike."""
    rng, drawn = random.Random(0), Counter()
    made = Phrases(tuple(map(spell_out, ["[a|b|c|d]", "e", "f"])))
    drawn.update(made.draw(rng) for _ in range(8000))
    assert list(made) == list("abcdef")
    for phrase in "abcdef":
        assert drawn[phrase] / 8000 == pytest.approx(0.25 if phrase in "ef" else 0.125, abs=0.02)


COMBINED = st.builds(combine, st.lists(st.sampled_from(LABELLED), min_size=1, unique=True).map(tuple), st.booleans())


@given(st.sampled_from(ASKABLE) | COMBINED, st.sampled_from(LANGUAGES), st.sampled_from(SPLITS), st.integers())
def test_an_instruction_says_what_it_asks_for_in_the_words_of_its_split(task, lang, split, seed):
    said = draw_instruction(task, split, random.Random(seed), lang)
    assert said == draw_instruction(task, split, random.Random(seed), lang)
    asked, refused = parted(said, lang, split)
    wanted = heard(asked, lang, split)
    assert sorted(wanted) == sorted(wishes(task))
    if "asr" in wanted and len(wanted) > 1:
        assert wanted[0] == "asr" or wanted[-1] == "asr"
        wanted.remove("asr")
        assert ("asr", *wanted) == wishes(task)
    else:
        assert tuple(wanted) == wishes(task)
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
