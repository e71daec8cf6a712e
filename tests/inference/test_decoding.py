"""What ends an answer, what is cut off, and how tokens are drawn."""

import zlib
from collections import Counter
from itertools import takewhile

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loud import TOKENIZER, make

from osum_npu.inference.decoding import (
    DECODINGS,
    LOOP_BLOCK,
    LOOP_REPEATS,
    LOOP_TOKENS,
    Decoding,
    Draw,
    Limits,
    Loops,
    cut_loop,
    decode,
    get_decoding,
    longest_answer,
)
from osum_npu.tasks import COMBINATIONS, TASKS, Utterance

CPU = torch.device("cpu")
END = TOKENIZER.eos_token_id


def loops(tokens):
    """Whether the tokens end in a loop, by the words of the definition: the shortest block that repeats, or 0."""
    for block in range(1, LOOP_BLOCK + 1):
        times = -(-max(LOOP_REPEATS * block, LOOP_TOKENS) // block)
        length = max(LOOP_REPEATS * block, LOOP_TOKENS)
        if len(tokens) >= length and tokens[-length:] == (tokens[-block:] * times)[-length:]:
            return block
    return 0


def stops(tokens):
    """How many tokens there are when the stopping criterion ends the answer; all of them where it does not."""
    criterion = Loops(CPU)
    return next((n for n in range(1, len(tokens) + 1) if criterion(torch.tensor([tokens[:n]]), None)[0]), len(tokens))


TOKENS = st.lists(st.integers(0, 3), max_size=40)
BLOCKS = st.lists(st.integers(0, 400), min_size=1, max_size=LOOP_BLOCK + 4)


@settings(deadline=None)
@given(TOKENS, BLOCKS, st.integers(1, 40))
@example([], [1], LOOP_TOKENS - 1)
@example([], [1], LOOP_TOKENS)
@example([2], list(range(LOOP_BLOCK)), LOOP_REPEATS)
@example([2], list(range(LOOP_BLOCK + 1)), LOOP_REPEATS)
def test_an_answer_ends_at_the_first_loop_and_keeps_one_occurrence(before, block, times):
    said = (before + block * times)[:400]
    first = next((n for n in range(1, len(said) + 1) if loops(said[:n])), None)
    assert stops(said) == (first or len(said))
    if first is None:
        assert cut_loop(said) == said
        return
    shortest, kept = loops(said[:first]), cut_loop(said[:first])
    assert kept == said[: len(kept)]
    assert len(kept) <= first - max(LOOP_REPEATS - 1, LOOP_TOKENS // shortest - 1) * shortest
    lost = said[len(kept) : first]
    assert lost == (kept[-shortest:] * len(lost))[: len(lost)]  # nothing but repetitions is cut off
    assert kept[-shortest:] != kept[-2 * shortest : -shortest]  # and no repetition is left
    assert not loops(kept)


@pytest.mark.parametrize(
    "said",
    [
        ["ha"] * (LOOP_TOKENS - 1),
        ["no", "no"] * 15,
        list("row row row your boat gently") * (LOOP_REPEATS - 1),
        [*"again and again "] * 3 + ["end"],
        ["a"] * 40 + ["b"],
    ],
)
def test_what_people_repeat_is_left_alone(said):
    ids = {word: i for i, word in enumerate(dict.fromkeys(said))}
    tokens = [ids[word] for word in said]
    assert cut_loop(tokens) == tokens


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 2), min_size=70, max_size=70), min_size=1, max_size=5))
def test_rows_are_judged_one_by_one(rows):
    rows += [rows[0][:30] + [1, 2] * 20, [7] * 70]
    assert Loops(CPU)(torch.tensor(rows), None).tolist() == [bool(loops(row)) for row in rows]


def test_every_answer_has_a_limit_of_its_own():
    limits = Limits([3, 5], CPU)
    assert limits(torch.zeros(2, 4), None).tolist() == [True, False]
    assert limits(torch.zeros(6, 3), None).tolist() == [True, True, True, False, False, False]  # three beams each
    assert limits(torch.zeros(6, 2), None).tolist() == [False] * 6


def test_the_longest_answer_follows_from_task_and_sound():
    row, own = (Utterance(key="k", wav="k", prompt=prompt) for prompt in (None, "how many speak?"))
    asr = TASKS["asr"]
    assert longest_answer(asr, row, 0.1) < longest_answer(asr, row, 5) < longest_answer(asr, row, 30)
    # eight Han characters a second, two tokens each; two time stamps of six tokens around each of six
    assert longest_answer(asr, row, 30) > 30 * 8 * 2
    assert longest_answer(TASKS["timestamps"], row, 30) > 30 * 6 * 14
    assert longest_answer(TASKS["chat"], row, 1) > longest_answer(asr, row, 1) + 100
    assert longest_answer(asr, own, 1) > longest_answer(asr, row, 1) + 100
    labels = COMBINATIONS["style+age+gender-only"]
    assert longest_answer(labels, row, 30) == longest_answer(labels, row, 1) > 30


def test_the_named_settings():
    # ASLP-lab/OSUM, OSUM and OSUM-EChat: their generate calls
    released = {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.05, "max_new_tokens": 400, "cut_loops": False}
    wanted = {
        "greedy": Decoding(),
        "beam": Decoding(beams=4),
        "osum": Decoding(beams=4, sample=True, **released),
        "osum-echat": Decoding(beams=1, sample=True, **released),
        # ASLP-lab/OSUM-Pangu: top_p and top_k are 1, and nothing is drawn
        "osum-pangu": Decoding(beams=1, **{**released, "top_k": 0, "top_p": 1.0}),
    }
    assert wanted == DECODINGS
    assert get_decoding("beam") is DECODINGS["beam"]
    with pytest.raises(ValueError, match="there is no decoding 'beams'; there are greedy, beam, osum, osum-echat"):
        get_decoding("beams")


# -- drawing


def test_tokens_are_drawn_by_their_probability():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).log()
    seeds = [f"s{i}" for i in range(2000)]
    draw, ids, counts = Draw(seeds, 3, 4, CPU), torch.zeros(2000, 0), Counter()
    for _ in range(3):
        left = draw(ids, scores.expand(2000, 5).clone())
        assert ((left == 0).sum(-1) == 1).all()
        assert left.isinf().sum() == 4 * 2000
        counts.update(left.argmax(-1).tolist())
        ids = torch.zeros(2000, ids.shape[1] + 1)
    shares = np.array([counts[token] for token in range(5)]) / 6000
    np.testing.assert_allclose(shares, scores.exp(), atol=0.03)  # five standard deviations
    assert counts[4] == 0


@given(st.permutations(["a", "b", "c"]))
def test_what_is_drawn_belongs_to_the_seed(seeds):
    scores = torch.linspace(0, 1, 12).reshape(1, 12)
    together = Draw(seeds, 2, 5, CPU)(torch.zeros(3, 1), scores.expand(3, 12))
    for seed, row in zip(seeds, together, strict=True):
        assert torch.equal(Draw([seed], 2, 5, CPU)(torch.zeros(1, 1), scores)[0], row)


# -- with a model


@pytest.fixture(scope="module")
def model():
    return make().eval()


@pytest.fixture(scope="module")
def heard(model):
    """Speech embeddings of several lengths, prompts of several lengths."""
    torch.manual_seed(1)
    lengths = [6, 2, 9, 4, 7, 3]
    speech = torch.randn(sum(lengths), model.llm.config.hidden_size)
    prompts = [[5 + i, 9, 40][: 1 + i % 3] for i in range(len(lengths))]
    return speech, lengths, prompts


def some(heard, rows):
    speech, lengths, prompts = heard
    return torch.cat(speech.split(lengths)[rows]), lengths[rows], prompts[rows]


def answers(model, heard, decoding, limit=160, ends=(END,), rows=slice(None)):
    speech, lengths, prompts = some(heard, rows)
    seeds = [f"u{length}" for length in lengths]
    limits = [limit] * len(lengths)
    return decode(model, speech, lengths, prompts, decoding, limits=limits, ends=ends, seeds=seeds)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([50, 51, 60, 61, 62, 63, 64, 60], [50, 51, 60, 61, 62, 63, 64]),  # back to 60, for ever
        ([50, 60, 60], [50, 60]),
        ([50, 60, 61, END], [50, 60, 61]),
    ],
)
def test_a_model_that_goes_round_in_circles_is_stopped(heard, words, kept, beams):
    model = make().eval()
    tokens, head = model.llm.get_input_embeddings().weight, model.llm.lm_head.weight
    with torch.no_grad():
        for layer in model.llm.model.layers:  # so that a token follows from the one before alone
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head.zero_()
        states = torch.eye(head.shape[1])
        model.marks[1] = states[-1]
        head[words[0]] = 10 * states[-1]
        for state, word, following in zip(states, dict.fromkeys(words), words[1:], strict=False):
            tokens[word] = state
            head[following] += 10 * state
    assert answers(model, heard, Decoding(beams=beams)) == [kept] * 6
    free = answers(model, heard, Decoding(beams=beams, cut_loops=False))
    assert {len(said) for said in free} == {len(kept) if END in words else 160}


def test_any_of_several_tokens_ends_an_answer(model, heard):
    whole = answers(model, heard, Decoding(), limit=30)
    ends = (END, max(whole, key=len)[4])
    ended = answers(model, heard, Decoding(), limit=30, ends=ends)
    assert ended == [list(takewhile(lambda token: token not in ends, said)) for said in whole]
    assert ended != whole
    longest, steps = max(range(6), key=lambda i: len(whole[i])), []
    handle = model.llm.register_forward_hook(lambda *_: steps.append(1))
    (said,) = answers(model, heard, Decoding(), limit=30, ends=ends, rows=slice(longest, longest + 1))
    handle.remove()
    assert len(steps) == len(said) + 1 <= 5


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
@pytest.mark.parametrize("name", ["osum", "osum-echat"])
def test_released_settings_are_those_of_generate(model, heard, name, monkeypatch):
    """One utterance at a time, as the releases do. With one beam, our noise takes the place of torch's draw."""
    decoding, one = DECODINGS[name], slice(2, 3)
    (said,) = answers(model, heard, decoding, rows=one)
    if decoding.beams == 1:
        noise, steps = Draw(["u9"], 400, 5, CPU).noise_BLK, iter(range(400))

        def draw(probabilities, num_samples):
            likeliest, token = probabilities.log().topk(5)
            return token.gather(1, (likeliest + noise[:, next(steps)]).argmax(-1, keepdim=True))

        monkeypatch.setattr(torch, "multinomial", draw)
    settings = {"num_beams": decoding.beams, "do_sample": True, "max_new_tokens": 400, "min_length": 1, "top_k": 5}
    settings |= {"top_p": 0.9, "repetition_penalty": 1.05, "length_penalty": 1.0, "temperature": 1.0}
    speech, lengths, prompts = some(heard, one)
    torch.manual_seed(zlib.crc32(b"u9"))
    (ids,) = model.respond(speech, lengths, prompts, eos_token_id=END, pad_token_id=END, **settings).tolist()
    assert said == list(takewhile(lambda token: token != END, ids))
    assert len(said) > 3


@pytest.mark.parametrize("beams", [1, 4])
def test_the_penalty_of_repetition_does_not_depend_on_padding(model, heard, beams):
    decoding = Decoding(beams=beams, repetition_penalty=1.5)
    together = answers(model, heard, decoding, limit=25)
    assert together == [answers(model, heard, decoding, limit=25, rows=slice(i, i + 1))[0] for i in range(6)]
    assert together != answers(model, heard, Decoding(beams=beams), limit=25)


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_each_answer_ends_at_its_own_limit(model, heard, name):
    speech, lengths, prompts = heard
    limits = [3, 30, 7, 12, 1, 20]
    settings = {"decoding": DECODINGS[name], "ends": (END,), "seeds": ["s"] * 6}
    together = decode(model, speech, lengths, prompts, limits=limits, **settings)
    assert [len(said) <= limit for said, limit in zip(together, limits, strict=True)] == [True] * 6
    for i, said in enumerate(together):
        rows = slice(i, i + 1)
        settings["seeds"] = ["s"]
        (alone,) = decode(model, *some(heard, rows), limits=limits[rows], **settings)
        assert said == alone


def test_no_instruction_at_all(model, heard):
    speech, lengths, _ = heard
    settings = {"limits": [20] * 6, "ends": (END,), "seeds": ["s"] * 6}
    none = decode(model, speech, lengths, [[]] * 6, Decoding(), **settings)
    mixed = decode(model, speech, lengths, [[], [7], [], [8, 9], [], []], Decoding(), **settings)
    assert [mixed[i] for i in (0, 2, 4, 5)] == [none[i] for i in (0, 2, 4, 5)]
