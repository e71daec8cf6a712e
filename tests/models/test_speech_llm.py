import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from osum_npu.models.adapters import OsumAdapterConfig
from osum_npu.models.layout import lay_out
from osum_npu.models.llm import build_llm, load_llm
from osum_npu.models.lora import LoraSettings, fold_lora, is_lora
from osum_npu.models.speech_llm import SpeechLLM, SpeechLLMConfig, make_config
from osum_npu.models.whisper import WhisperEncoderConfig
from osum_npu.parity import relative_error

VOCABULARY, N_MELS, UNITS = 61, 80, [*"abcde", "bad"]
ENCODER = WhisperEncoderConfig(n_mels=N_MELS, width=16, layers=1, heads=2, max_frames=40)
ADAPTER = OsumAdapterConfig(layers=1, heads=2, feed_forward=24, max_positions=20)
LLM = {
    "model_type": "qwen2",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def randomize(model):
    """Give every parameter a value that matters; LoRA is zero and norms are one otherwise."""
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        deviation = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, mean=float(norm), std=deviation)


def make(*, lora=None, tied=False, ctc=True, seed=0, **llm):
    torch.manual_seed(seed)
    config = {**LLM, "tie_word_embeddings": tied, **llm}
    model = SpeechLLM(make_config(ENCODER, ADAPTER, config, lora, ctc_units=UNITS if ctc else None))
    randomize(model)
    return model.eval()


MODEL = make()


def utterance(seed):
    """Features, prompt and answer; all of them differ from seed to seed, some are short."""
    rng = torch.Generator().manual_seed(seed)

    def ids(longest):
        count = int(torch.randint(longest + 1, (), generator=rng))
        return torch.randint(VOCABULARY, (count,), generator=rng).tolist()

    frames = int(torch.randint(2, 60, (), generator=rng))
    return torch.randn(frames, N_MELS, generator=rng), ids(5), [*ids(6), VOCABULARY - 1]


def compute(model, batch, spellings=None):
    """Run the model on a batch as training does."""
    mels, prompts, answers = zip(*batch)
    frames = [len(mel) for mel in mels]
    layout = lay_out(prompts, [model.speech_length(n) for n in frames], answers)
    return model(nn.utils.rnn.pad_sequence(mels, batch_first=True), frames, layout, spellings)


def test_questions_about_one_utterance_cost_what_they_cost_alone():
    (mel, prompt, answer), (_, other_prompt, other_answer) = utterance(3), utterance(4)
    alone = [compute(MODEL, [(mel, p, a)]).loss_sum for p, a in ((prompt, answer), (other_prompt, other_answer))]
    layout = lay_out([prompt, other_prompt], [MODEL.speech_length(len(mel))], [answer, other_answer], about=[0, 0])
    together = MODEL(mel[None], [len(mel)], layout)
    assert relative_error(together.loss_sum, sum(alone)) <= 1e-5


def test_what_features_hold_behind_an_end_changes_nothing():
    mels, prompts, answers = zip(*(utterance(seed) for seed in range(5)))
    frames = [len(mel) for mel in mels]
    layout = lay_out(prompts, [MODEL.speech_length(n) for n in frames], answers)
    padded = nn.utils.rnn.pad_sequence(mels, batch_first=True)
    longer = nn.utils.rnn.pad_sequence([*mels, torch.zeros(90, N_MELS)], batch_first=True, padding_value=9.0)[:-1]
    assert relative_error(MODEL(longer, frames, layout).loss_sum, MODEL(padded, frames, layout).loss_sum) <= 1e-6


def sequence(model, mel, prompt, answer=()):
    """Embeddings of one utterance, put together by hand: ``[1, L, H]``."""
    tokens = model.llm.get_input_embeddings()
    speech, _ = model.hear(mel[None], [len(mel)])
    ids = [torch.tensor(list(part), dtype=torch.long) for part in (prompt, answer)]
    return torch.cat([tokens(ids[0]), model.marks[:1], speech, model.marks[1:], tokens(ids[1])])[None]


def naive_loss(model, mel, prompt, answer):
    logits = model.llm(inputs_embeds=sequence(model, mel, prompt, answer)).logits[0]
    return F.cross_entropy(logits[-len(answer) - 1 : -1], torch.tensor(answer), reduction="sum")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_full_logits(tied):
    model, batch = make(tied=tied, ctc=False), [utterance(seed) for seed in range(4)]
    output, naive = compute(model, batch), sum(naive_loss(model, *one) for one in batch)
    assert output.label_count == sum(len(answer) for *_, answer in batch)
    assert relative_error(output.loss_sum, naive) <= 1e-5
    truth, mine = gradients(model, naive), gradients(model, output.loss_sum)
    assert mine.keys() == truth.keys() == dict(model.named_parameters()).keys()
    # A key's bias without rotation shifts all scores of a query alike: nothing but rounding errors is left of it.
    assert mine.pop("adapter.blocks.0.key.bias").abs().max() < 1e-5
    errors = {name: relative_error(mine[name], truth[name]) for name in mine}
    assert {name: error for name, error in errors.items() if not error <= 1e-4} == {}


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
@torch.no_grad()
def test_loss_of_a_batch_is_the_sum_over_singles(seeds):
    batch = [utterance(seed) for seed in seeds]
    alone = sum(compute(MODEL, [one]).loss_sum for one in batch)
    assert relative_error(compute(MODEL, batch).loss_sum, alone) <= 1e-5


@pytest.mark.parametrize("seeds", [(1, 2), (2, 1)], ids=["long", "short"])
def test_an_utterance_does_not_touch_another(seeds):
    (first, prompt, _), (second, other, answer) = map(utterance, seeds)
    mels = nn.utils.rnn.pad_sequence([first, second], batch_first=True).requires_grad_()
    frames = [len(first), len(second)]
    lengths = [MODEL.speech_length(n) for n in frames]

    def loss(features, changed_prompt):
        layout = lay_out([changed_prompt, other], lengths, [[], answer])
        return MODEL(features, frames, layout).loss_sum

    before = loss(mels, prompt)
    assert relative_error(before, naive_loss(MODEL, second, other, answer)) <= 1e-5
    before.backward()
    assert not mels.grad[0].any()
    assert mels.grad[1, : len(second)].any(-1).all()
    changed = mels.detach().clone()
    changed[0, : len(first)] = 5 * torch.randn_like(first)
    after = loss(changed, [(token + 1) % VOCABULARY for token in prompt])
    assert relative_error(after, before) <= 1e-6


def test_ctc_loss_is_torch_s_on_each_utterance():
    model, batch = make(), [utterance(seed) for seed in range(6)]
    batch = [(mel[:50], prompt, answer) for mel, prompt, answer in batch]
    spelled = {  # a known word is one unit, and other words are their characters, without those that are unknown
        "abba cd": [*"abbacd"],
        "": [],
        "bad badea": ["bad", *"badea"],
        "xyz": [],
        "axbyc": [*"abc"],
        "abcde" * 20: [*"abcde" * 20],  # does not fit into its frames
    }
    transcripts, known = list(spelled), [[UNITS.index(unit) for unit in units] for units in spelled.values()]
    naive = []
    for (mel, *_), target in zip(batch, known):
        encoded, length = model.encoder(mel[None], [len(mel)])
        scores = model.ctc_head(encoded).log_softmax(-1)
        if target and 2 * len(target) <= len(scores):
            blank = len(UNITS)
            target = torch.tensor(target)
            naive.append(
                F.ctc_loss(scores, target, torch.tensor(length), torch.tensor([len(target)]), blank, reduction="sum")
            )
    output = compute(model, batch, transcripts)
    assert len(naive) == 3
    assert relative_error(output.ctc_sum, sum(naive)) <= 1e-5
    assert output.ctc_count == sum(map(len, known))
    truth, mine = gradients(model, sum(naive)), gradients(model, output.ctc_sum)
    assert mine.keys() == truth.keys()
    assert {name for name in mine if mine[name].any()} <= {n for n in mine if n.startswith(("encoder.", "ctc_head."))}
    assert max(relative_error(mine[name], truth[name]) for name in truth) <= 1e-4


def test_ctc_without_anything_to_spell():
    output = compute(MODEL, [utterance(0)], ["?"])
    assert (output.ctc_sum.item(), output.ctc_count) == (0.0, 0)
    assert compute(MODEL, [utterance(0)]).ctc_sum is None
    with pytest.raises(ValueError, match="no CTC head"):
        compute(make(ctc=False), [utterance(0)], ["a"])


def test_without_a_layout_the_llm_is_left_out():
    mel = utterance(3)[0]
    output = MODEL(mel[None], [len(mel)], None, ["abc"])
    assert (output.loss_sum.item(), output.label_count) == (0.0, 0)
    assert torch.equal(output.ctc_sum, compute(MODEL, [utterance(3)], ["abc"]).ctc_sum)


@torch.no_grad()
def test_answers_are_those_of_decoding_without_cache_or_batch():
    model = make(tied=True)
    batch = [utterance(seed) for seed in range(10, 15)]
    mels, prompts, _ = zip(*batch)
    features, frames = nn.utils.rnn.pad_sequence(mels, batch_first=True), [len(mel) for mel in mels]
    said = model.generate(features, frames, prompts, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert said.shape == (5, 8)
    for mel, prompt, ids in zip(mels, prompts, said.tolist()):
        for place, token in enumerate(ids):
            logits = model.llm(inputs_embeds=sequence(model, mel, prompt, ids[:place]), use_cache=False).logits
            assert token == logits[0, -1].argmax()
    assert len({tuple(ids) for ids in said.tolist()}) > 1


LORA = LoraSettings(rank=3, alpha=7)


@pytest.fixture
def base(tmp_path):
    """The folder of a plain decoder."""

    def write(tied=False):
        torch.manual_seed(1)
        llm = build_llm({**LLM, "tie_word_embeddings": tied})
        randomize(llm)
        llm.save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return write


def by_reference(path, lora=None):
    """A model whose LLM lies in a folder of its own."""
    torch.manual_seed(0)
    model = SpeechLLM(make_config(ENCODER, ADAPTER, {}, lora, ctc_units=UNITS, llm_path=path), load_llm(path))
    for name, parameter in model.named_parameters():
        if is_lora(name):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["whole", "LLM elsewhere"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
def test_saved_and_loaded_bit_for_bit(lora, tied, elsewhere, base, tmp_path):
    model = by_reference(base(tied), lora) if elsewhere else make(lora=lora, tied=tied)
    model.save_pretrained(tmp_path / "model")
    loaded = SpeechLLM.from_pretrained(tmp_path / "model")
    assert not loaded.training
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert [name for name in state if not torch.equal(state[name], again[name])] == []
    batch = [utterance(seed) for seed in range(3)]
    assert torch.equal(compute(loaded, batch).loss_sum, compute(model, batch).loss_sum)
    head, tokens = loaded.llm.get_output_embeddings().weight, loaded.llm.get_input_embeddings().weight
    assert (head is tokens) == tied

    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert any(name.startswith("llm.") for name in stored) != elsewhere
    assert not any(map(is_lora, stored))
    assert (tmp_path / "model" / "adapter_model.safetensors").exists() == (lora is not None)


def test_llm_can_be_taken_from_elsewhere(base, tmp_path):
    path = base()
    model = by_reference(path, LORA)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"the LLM '.*base' cannot be loaded: .* llm_path"):
        SpeechLLM.from_pretrained(tmp_path / "model")
    loaded = SpeechLLM.from_pretrained(tmp_path / "model", llm_path=str(tmp_path / "moved"))
    loaded.save_pretrained(tmp_path / "again")  # which must not name the old place
    again = SpeechLLM.from_pretrained(tmp_path / "again")
    batch = [utterance(0)]
    assert torch.equal(compute(again, batch).loss_sum, compute(model, batch).loss_sum)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lora_is_loaded_by_plain_peft(tied, base, tmp_path):
    path = base(tied)
    model = by_reference(path, LORA)
    model.save_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.randint(VOCABULARY, (2, 9))
    before = plain(ids).logits
    adapted = PeftModel.from_pretrained(plain, tmp_path / "model").eval()
    assert relative_error(adapted(ids).logits, model.llm(ids).logits) <= 1e-5
    assert relative_error(adapted(ids).logits, before) > 0.1
    adapted.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("model", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def spoil_tensor(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors, name: tensors.pop(name), "adapter.embed.bias is missing"),
        (lambda tensors, name: tensors.update(more=tensors[name].clone()), "more is not part of the model"),
        (
            lambda tensors, name: tensors.update({name: torch.zeros(3)}),
            r"adapter.embed.bias has shape \(3,\), wanted \(16,\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_that_do_not_fit_are_named(change, complaint, tmp_path):
    MODEL.save_pretrained(tmp_path)
    spoil_tensor(tmp_path, "adapter.embed.bias", change)
    with pytest.raises(ValueError, match=f"{tmp_path}: the weights do not fit config.json: {complaint}"):
        SpeechLLM.from_pretrained(tmp_path)


def test_lora_that_does_not_fit_is_named(tmp_path):
    make(lora=LORA).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["lora"]["rank"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=r"lora_A\S* has shape \(3, 24\), wanted \(5, 24\)"):
        SpeechLLM.from_pretrained(tmp_path)


def test_configuration_round_trip(tmp_path):
    config = make_config(ENCODER, ADAPTER, LLM, LORA, ctc_units=UNITS, llm_path="folder")
    config.save_pretrained(tmp_path)
    loaded = SpeechLLMConfig.from_pretrained(tmp_path)
    for name in ("encoder", "adapter", "llm", "lora", "ctc_units", "llm_path"):
        assert getattr(loaded, name) == getattr(config, name)
    assert loaded.to_dict() == config.to_dict()
    assert WhisperEncoderConfig(**loaded.encoder) == ENCODER
    assert OsumAdapterConfig(**loaded.adapter) == ADAPTER
    assert LoraSettings(**loaded.lora) == LORA
    SpeechLLMConfig()  # transformers builds one without arguments to find what differs from the defaults


QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def test_parameters_of_the_full_size_are_as_many_as_the_release_has():
    with torch.device("meta"):
        model = SpeechLLM(make_config(WhisperEncoderConfig(), OsumAdapterConfig(), QWEN2_7B, LoraSettings()))
    counts = {
        "encoder": sum(p.numel() for p in model.encoder.parameters()),  # without the position table
        "adapter": sum(p.numel() for p in model.adapter.parameters()),
        "lora": sum(p.numel() for name, p in model.named_parameters() if is_lora(name)),
    }
    millions = {name: round(count / 1e6, 2) for name, count in counts.items()}
    assert millions == {"encoder": 305.68, "adapter": 51.96, "lora": 15.14}


@pytest.mark.parametrize("elsewhere", [False, True], ids=["whole", "LLM elsewhere"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_llm_can_stay_in_the_dtype_of_its_files(tied, elsewhere, base, tmp_path):
    model = by_reference(base(tied), LORA) if elsewhere else make(lora=LORA, tied=tied)
    halved = {name for name in model.state_dict() if name.startswith("llm.") and not is_lora(name)}
    model.save_pretrained(tmp_path / "model")
    folder, prefix = (tmp_path / "base", "") if elsewhere else (tmp_path / "model", "llm.")
    stored = load_file(folder / "model.safetensors")
    small = {name: tensor.bfloat16() if name.startswith(prefix) else tensor for name, tensor in stored.items()}
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), "utf-8")
    kept, wide = (SpeechLLM.from_pretrained(tmp_path / "model", llm_dtype=d) for d in ("auto", torch.float32))
    for name, tensor in kept.state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if name in halved else torch.float32), name
        assert torch.equal(tensor.float(), wide.state_dict()[name]), name
    for each in (kept, wide):  # LoRA is folded in float32 either way, and each sum rounded once
        fold_lora(each.llm)
    folded = wide.state_dict()
    assert all(torch.equal(tensor, folded[name].to(tensor.dtype)) for name, tensor in kept.state_dict().items())


@torch.no_grad()
def test_a_penalty_for_repetition_does_not_depend_on_the_batch():
    batch = [utterance(seed) for seed in (11, 12, 13, 14)]
    assert len({len(mel) for mel, *_ in batch}) > 1

    def said(group, **settings):
        mels, prompts, _ = zip(*group)
        features, frames = nn.utils.rnn.pad_sequence(mels, batch_first=True), [len(mel) for mel in mels]
        return MODEL.generate(features, frames, prompts, max_new_tokens=12, do_sample=False, pad_token_id=0, **settings)

    together = said(batch, repetition_penalty=1.5)
    assert not torch.equal(together, said(batch))
    assert torch.equal(together, torch.cat([said([one], repetition_penalty=1.5) for one in batch]))


def test_it_is_a_model_of_transformers():
    model = make(lora=LORA)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.device == torch.device("cpu")
    halved = model.to(torch.bfloat16)
    assert halved.dtype is torch.bfloat16
    mel = utterance(0)[0].to(torch.bfloat16)
    said = halved.generate(mel[None], [len(mel)], [[1, 2]], max_new_tokens=3, pad_token_id=0)
    assert said.shape == (1, 3)
