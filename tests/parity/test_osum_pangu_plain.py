"""Dialogues of all kinds in one packed batch, against an LLM of transformers that is given one sequence after another.

The reference is written here: Llama with biases as transformers computes it, LoRA added to its matrices by hand, each
sequence put together from its parts; other seeds and sizes than those recorded.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from replay import Tokenizer
from torch import nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from osum_npu.models.adapters import OsumAdapterConfig
from osum_npu.models.lora import LoraSettings
from osum_npu.models.speech_llm import SpeechLLM, make_config
from osum_npu.models.whisper import WhisperEncoderConfig
from osum_npu.parity import relative_error
from osum_npu.tasks.form import get_form

VOCABULARY, END = 300, 256
SIZES = [
    {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "layers": 2},
    {"hidden_size": 64, "intermediate_size": 56, "num_attention_heads": 2, "num_key_value_heads": 2, "layers": 1},
    {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 1, "layers": 3},
]
BATCHES = [
    ["text", "intent", "chat", "text2text", "chat_think"],
    ["text2text", "text", "intent", "intent", "text"],
    ["chat_think", "text2text"],
]
ONES = {"all": BATCHES[0], "sound alone": ["chat", "text", "chat_think"], "text alone": ["intent", "text2text"]}


def make(seed, layers, **sizes):
    """A model whose every parameter matters."""
    torch.manual_seed(seed)
    llm = {"model_type": "llama", "vocab_size": VOCABULARY, "num_hidden_layers": layers, **sizes}
    llm |= {"attention_bias": True, "mlp_bias": False, "rope_theta": 16e6, "tie_word_embeddings": False}
    encoder = WhisperEncoderConfig(width=32, layers=1, heads=2, max_frames=60)
    lora = LoraSettings(rank=4, alpha=2, dropout=0.0)
    adapter = OsumAdapterConfig(layers=1, heads=2, feed_forward=24)
    model = SpeechLLM(make_config(encoder, adapter, llm, lora, form="osum_pangu", begin_of_text="fixed"))
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        deviation = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, mean=float(norm), std=deviation)
        parameter.requires_grad_(not name.startswith("llm.") or "lora_" in name)
    return model.eval()


class Dialogue:
    """One question of a kind: what is heard, if anything, and the token ids around it."""

    def __init__(self, kind, rng):
        heard = kind not in ("intent", "text2text")
        self.mel = torch.from_numpy(rng.standard_normal((int(rng.integers(4, 60)), 80)).astype(np.float32))
        self.mel = self.mel if heard else None
        instruction = "你" + "".join(rng.choice([*"ab好"], int(rng.integers(8))))
        form = get_form("osum_pangu", "fixed")
        ((self.before, self.after),) = form.encode(Tokenizer(), [kind], [instruction])
        assert (instruction.encode() in bytes(i for i in self.before if i < 256)) == (not kind.startswith("chat"))
        self.answer = [*rng.integers(0, 256, int(rng.integers(1, 7))).tolist(), END]


def draw(kinds, seed):
    rng = np.random.default_rng(seed)
    return [Dialogue(kind, rng) for kind in kinds]


def columns(dialogues):
    """Features and frames of the sounds; prompts, which sound each is about, and what stands after it."""
    mels = [one.mel for one in dialogues if one.mel is not None]
    places = iter(range(len(mels)))
    about = [None if one.mel is None else next(places) for one in dialogues]
    features = nn.utils.rnn.pad_sequence(mels, batch_first=True) if mels else torch.zeros(0, 0, 80)
    frames = [len(mel) for mel in mels]
    return features, frames, [one.before for one in dialogues], about, [one.after for one in dialogues]


def compute(model, dialogues):
    """As training does: all in one row."""
    features, frames, prompts, about, after = columns(dialogues)
    layout = model.layout(frames, prompts, [one.answer for one in dialogues], about, after)
    return model(features, frames, layout)


class Plain:
    """The reference."""

    def __init__(self, model):
        self.model, own = model, dict(model.llm.config.to_dict(), attn_implementation="eager")
        self.llm = LlamaForCausalLM(LlamaConfig(**own)).eval()
        self.weights = {}
        state = dict(model.llm.named_parameters())
        for name, parameter in state.items():
            if "lora_" in name:
                continue
            short = name.replace(".base_layer", "")
            module = name.removesuffix(".base_layer.weight")
            if module != name:
                update = state[f"{module}.lora_B.default.weight"] @ state[f"{module}.lora_A.default.weight"]
                parameter = parameter + model.config.lora["alpha"] / model.config.lora["rank"] * update
            self.weights[short] = parameter
        assert self.weights.keys() == dict(self.llm.named_parameters()).keys()

    def tokens(self, ids):
        return self.weights["model.embed_tokens.weight"][torch.tensor(ids, dtype=torch.long)]

    def sequence(self, one, answer=()):
        heard = []
        if one.mel is not None:
            speech, _ = self.model.hear(one.mel[None], [len(one.mel)])
            heard = [self.model.marks[:1], speech, self.model.marks[1:]]
        return torch.cat([self.tokens(one.before), *heard, self.tokens(one.after), self.tokens(list(answer))])

    def logits(self, embeds, mask=None):
        given = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
        return functional_call(self.llm, self.weights, kwargs=given).logits

    def loss(self, dialogues):
        """One by one."""
        total = 0
        for one in dialogues:
            logits = self.logits(self.sequence(one, one.answer)[None])[0, -len(one.answer) - 1 : -1]
            total = total + F.cross_entropy(logits, torch.tensor(one.answer), reduction="sum")
        return total

    def padded_loss(self, dialogues):
        """All together, padded on the right."""
        rows = [self.sequence(one, one.answer) for one in dialogues]
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
        logits = self.logits(nn.utils.rnn.pad_sequence(rows, batch_first=True), mask.long())
        total = 0
        for one, own, row in zip(dialogues, rows, logits):
            predicting = row[len(own) - len(one.answer) - 1 : len(own) - 1]
            total = total + F.cross_entropy(predicting, torch.tensor(one.answer), reduction="sum")
        return total

    def answer(self, one, count, penalty):
        """Greedy, with a penalty for what the answer holds already."""
        said = []
        for _ in range(count):
            scores = self.logits(self.sequence(one, said)[None])[0, -1]
            for token in set(said):
                scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            said.append(int(scores.argmax()))
        return said


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("seed", range(len(SIZES)))
def test_loss_and_gradients(seed):
    model = make(seed, **SIZES[seed])
    dialogues = draw(BATCHES[seed], seed)
    output, plain = compute(model, dialogues), Plain(model)
    want = plain.loss(dialogues)
    assert output.label_count == sum(len(one.answer) for one in dialogues)
    assert relative_error(output.loss_sum, want) <= 1e-5
    assert relative_error(plain.padded_loss(dialogues), want) <= 1e-5
    mine, theirs = gradients(model, output.loss_sum), gradients(model, want)
    assert mine.keys() == theirs.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert mine.pop("adapter.blocks.0.key.bias").abs().max() < 1e-5  # shifts all scores of a query alike
    errors = {name: relative_error(mine[name], theirs[name]) for name in mine}
    assert {name: error for name, error in errors.items() if not error <= 2e-4} == {}


@torch.no_grad()
@pytest.mark.parametrize("kinds", ONES.values(), ids=ONES)
def test_answers_of_a_mixed_batch(kinds):
    model = make(7, **SIZES[0])
    dialogues = draw(kinds, 7)
    features, frames, prompts, about, after = columns(dialogues)
    speech, lengths = model.hear(features, frames)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10**6}
    said = model.respond(speech, lengths, prompts, about, after, repetition_penalty=1.05, **settings)
    plain = Plain(model)
    assert said.tolist() == [plain.answer(one, 8, 1.05) for one in dialogues]


def test_a_batch_of_text_alone_moves_nothing_that_hears():
    model = make(3, **SIZES[0])
    found = gradients(model, compute(model, draw(["intent", "text2text"], 3)).loss_sum)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}


@torch.no_grad()
@pytest.mark.parametrize("kinds", ONES.values(), ids=ONES)
def test_in_bfloat16_a_batch_is_its_sequences(kinds):
    """Text alone is computed in the precision that it has beside sound."""
    model = make(5, **SIZES[0])
    dialogues = draw(kinds, 5)
    with torch.autocast("cpu", torch.bfloat16):
        together = compute(model, dialogues).loss_sum
        alone = sum(compute(model, [one]).loss_sum for one in dialogues)
    exact = compute(model, dialogues).loss_sum
    assert relative_error(together, alone) <= 2e-3
    assert relative_error(together, exact) <= 2e-2
