"""What the original systems computed, computed again by an imported checkpoint; see tests/golden/README.md.

A batch of the originals depends on its padding in two ways, which this project's do not; the tests of batches put that
habit into the encoder.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import recorded
import torch
from recorded import F

from osum_npu.audio.mel import frame_count, log_mel
from osum_npu.checkpoints.osum import import_osum
from osum_npu.checkpoints.osum_keys import llm_prefix, reference_key
from osum_npu.models.layout import lay_out_left
from osum_npu.models.llm import decode_packed
from osum_npu.models.lora import is_lora
from osum_npu.models.speech_llm import SpeechLLM
from osum_npu.models.whisper import WhisperEncoder
from osum_npu.parity import relative_error
from osum_npu.tasks.form import get_form

TENSORS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-3

KINDS = {
    "text": "text",
    "s2t_chat": "chat",
    "s2t_chat_think": "chat_think",
    "intent_classification": "intent",
    "text2text": "text2text",
    "generate": "text",
    "generate4chat": "chat",
    "generate_text2text": "intent",
}
"""This project's kinds of tasks, by output type and by function of the original."""
SINGLE = 0xE000
"""Letters from here on are single bytes: recorded instructions are no text in UTF-8."""


class Tokenizer:
    """The tokenizer of the recordings, as transformers' are called."""

    bos_token_id = F.ByteTokenizer.specials["<s>"]
    added_tokens_decoder = {i: special for special, i in F.ByteTokenizer.specials.items()}  # noqa: RUF012

    def __call__(self, texts, add_special_tokens, split_special_tokens=False):
        assert not add_special_tokens
        encode = (lambda text: [*text.encode()]) if split_special_tokens else F.ByteTokenizer().encode
        single = [[ord(letter) - SINGLE for letter in text if letter >= chr(SINGLE)] for text in texts]
        return SimpleNamespace(input_ids=[ids or encode(text) for ids, text in zip(single, texts)])


class Recording:
    """One file of recorded numbers."""

    def __init__(self, name):
        self.golden = recorded.read(name)
        self.seed, self.cases = self.golden["seed"], self.golden["cases"]
        self.forward = [name for name, case in self.cases.items() if case["kind"] == "forward"]
        self.generate = [name for name, case in self.cases.items() if case["kind"] == "generate"]

    def load(self, folder, *, merge):
        """The model that the importer makes of the original checkpoint."""
        torch.save(recorded.checkpoint(self.golden), folder / "infer.pt")
        llm = recorded.write_llm(self.golden, folder / "llm")
        config = self.golden["config"]
        import_osum(
            folder / "infer.pt",
            folder / "model",
            str(llm),
            merge=merge,
            encoder_heads=config["encoder"]["heads"],
            adapter_heads=config["adapter"]["heads"],
            lora_alpha=(config.get("lora") or {}).get("alpha"),
        )
        model = SpeechLLM.from_pretrained(folder / "model")
        if not merge:
            assert model.config.llm_path is not None
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith("llm.") or is_lora(name))
        return model

    def ids(self, given):
        return F.token_ids(**given, seed=self.seed) if given else []

    def hear(self, utterances):
        """Features and frames of a batch, as the product computes them."""
        names = [f"{self.golden['system']}.wave.{one['wave']}" for one in utterances if one["wave"]]
        samples = [one["wave"] for one in utterances if one["wave"]]
        waves = [torch.from_numpy(F.waveform(name, n, self.seed)) for name, n in zip(names, samples)]
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True) if waves else torch.zeros(0, 0)
        features = log_mel(padded, samples, self.golden["config"]["features"]["n_mels"])
        return features, [frame_count(n) for n in samples]

    def form(self, case):
        """The form that a case was recorded in."""
        name = "osum"
        if self.golden["system"] == "pangu":
            name = {"forward": "osum_pangu", "generate": "osum_pangu_released"}[case["kind"]]
        rules = {"bos_before_each_template": "fixed", "bos_before_each_template_and_prompt": "all"}
        return get_form(name, next((rule for mark, rule in rules.items() if case.get(mark)), "none"))

    def asked(self, case, utterances):
        """Token ids before each speech, which utterance each is about, token ids after it."""
        kind = KINDS[case.get("output_type") or case["function"]]
        instructions = ["".join(chr(SINGLE + token) for token in self.ids(one["prompt"])) for one in utterances]
        questions = self.form(case).encode(Tokenizer(), [kind] * len(utterances), instructions)
        about = [i if one["wave"] else None for i, one in enumerate(utterances)]
        return [question.before for question in questions], about, [question.after for question in questions]


class HabitEncoder(WhisperEncoder):
    """Whisper's encoder with the originals' habit.

    Between the convolutions, padding is not set to zero; and behind them, the mask is every second place of the padded
    one, from the first or the second place on, so that half a frame more counts where the padded length is odd.
    """

    def convolve(self, mel_BTM, frames):
        padded = mel_BTM.shape[1]
        x_FC, (longest, *_) = super().convolve(mel_BTM, [padded] * len(frames))
        lengths = tuple((n + padded % 2) // 2 for n in frames)
        return torch.cat([x_EC[:n] for x_EC, n in zip(x_FC.split(longest), lengths)]), lengths


class Run:
    """Utterances of one recorded forward case, computed by a model."""

    def __init__(self, recording, model, case, utterances):
        self.tensors = {}
        hooks = [
            module.register_forward_hook(lambda _, __, out, name=name: self.tensors.update({name: out}))
            for name, module in {
                "encoder_out": model.encoder,
                "downsample_out": model.adapter.down,
                "speech_transformer_out": model.adapter.after_norm,
                "speech_embeds": model.adapter,
            }.items()
        ]
        self.features, self.frames = recording.hear(utterances)
        self.speech, self.speech_length = model.hear(self.features, self.frames)
        for hook in hooks:
            hook.remove()
        self.encoder_length = self.tensors["encoder_out"][1] if self.frames else ()
        end = recording.golden["config"]["eos_token_id"]
        answers = [[*recording.ids(one["label"]), end] for one in utterances]
        before, about, after = recording.asked(case, utterances)
        self.layout = model.layout(self.frames, before, answers, about, after)
        self.tensors["inputs_embeds"] = model.embed(self.speech, self.layout)
        hidden = decode_packed(model.llm, self.tensors["inputs_embeds"], self.layout.position_BL, self.layout.packed)
        self.tensors["logits"] = model.llm.get_output_embeddings()(hidden)

    def packed(self, name):
        """Valid rows of all utterances, one behind the other."""
        tensor = self.tensors["logits" if name == "logits_predicting_labels" else name]
        if name == "logits_predicting_labels":
            return tensor[0, self.layout.predictor_N]
        if name in ("inputs_embeds", "logits"):
            return tensor[self.layout.mask_BL]
        return tensor[0] if isinstance(tensor, tuple) else tensor


def misses(record, tensor, tolerance):
    """What differs from a record by more than the tolerance, relative to the tensor's root-mean-square."""
    differences = F.differences(record, tensor.detach().float().numpy())
    return {name: difference for name, difference in differences.items() if not difference < tolerance}


@contextmanager
def habit(model, case):
    """Give the model the originals' habit for a batch; a single utterance does not show it."""
    if len(case["batch"]) > 1:
        model.encoder.__class__ = HabitEncoder
    yield
    model.encoder.__class__ = WhisperEncoder


def check_weight(recording, key):
    weight = F.weight(key, recording.golden["parameters"][key], recording.seed)
    assert max(F.differences(recording.golden["weight_check"][key], weight).values()) < 1e-6


def check_features(recording, samples):
    features, frames = recording.hear([{"wave": int(samples)}])
    assert frames == [len(features[0])]
    assert misses(recording.golden["features"][samples], features[0], TENSORS) == {}


@torch.no_grad()
def check_tensors_and_loss(recording, model, name, tolerance=TENSORS, loss=LOSS):
    case = recording.cases[name]
    with habit(model, case):
        run = Run(recording, model, case, case["batch"])
        output = model(run.features, run.frames, run.layout)
    assert run.frames == case.get("feature_lengths", [])
    assert list(run.encoder_length) == case.get("encoder_lengths", [])
    assert list(run.speech_length) == case.get("speech_lengths", [])
    assert set(case["tensors"]) == {*run.tensors, "logits_predicting_labels"}
    for tensor, record in case["tensors"].items():
        assert misses(record, run.packed(tensor), tolerance) == {}, tensor
    assert output.label_count == case["n_targets"]
    assert output.loss_sum.item() / output.label_count == pytest.approx(float(case["loss"]), rel=loss)


@torch.no_grad()
def check_positions_and_labels(recording, model, name):
    case = recording.cases[name]
    with habit(model, case):
        layout = Run(recording, model, case, case["batch"]).layout
    labels = torch.full_like(layout.position_BL, -100)
    labels.view(-1)[layout.predictor_N + 1] = layout.label_N
    valid = [np.array(F.expand(mask), bool) for mask in case["attention_mask"]]
    for theirs, mine in (("position_ids", layout.position_BL), ("labels", labels)):
        rows = [np.array(F.expand(row))[inside] for row, inside in zip(case[theirs], valid)]
        assert mine[layout.mask_BL].tolist() == np.concatenate(rows).tolist(), theirs


def check_gradients(recording, model, name):
    case = recording.cases[name]
    with habit(model, case):
        run = Run(recording, model, case, case["batch"])
        model.zero_grad()
        output = model(run.features, run.frames, run.layout)
    (output.loss_sum / output.label_count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == case["params_with_grad"]
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert total == pytest.approx(float(case["grad_l2_total"]), rel=GRADIENTS)
    prefix = llm_prefix(recording.golden["parameters"])
    by_key = {reference_key(name, prefix): gradient for name, gradient in gradients.items()}
    for key, record in case["grads"].items():
        assert misses(record, by_key[key.removesuffix("[-2:]")], GRADIENTS) == {}, key


@torch.no_grad()
def check_what_the_habit_changes(recording, model, name):
    case = recording.cases[name]
    with habit(model, case):
        together = Run(recording, model, case, case["batch"])
        alone = [Run(recording, model, case, [one]) for one in case["batch"]]
    for row, change in enumerate(case["speech_embeds_batch_against_single"]):
        mine, other = together.speech.split(together.speech_length)[row], alone[row].speech
        assert [len(mine), len(other)] == change["lengths_batch_single"]
        least = min(len(mine), len(other))
        # three digits are recorded, and the least changes are rounding errors
        assert (mine[:least] - other[:least]).abs().max().item() == pytest.approx(change["max_abs"], rel=6e-3, abs=2e-5)


@torch.no_grad()
def check_a_batch_against_its_singles(recording, model, name):
    """Without the habit they are the same."""
    case = recording.cases[name]
    together, alone = (
        Run(recording, model, case, case["batch"]),
        [Run(recording, model, case, [one]) for one in case["batch"]],
    )
    for tensor in {"encoder_out", "speech_embeds", "inputs_embeds", "logits", "logits_predicting_labels"} & {
        *case["tensors"]
    }:
        singles = torch.cat([one.packed(tensor) for one in alone])
        assert relative_error(together.packed(tensor), singles) <= 1e-5, tensor
    losses = [model(run.features, run.frames, run.layout).loss_sum for run in (together, *alone)]
    assert relative_error(losses[0], sum(losses[1:])) <= 1e-5


@torch.no_grad()
def check_folded(recording, merged, name):
    case = recording.cases[name]
    run = Run(recording, merged, case, case["batch"])
    assert not [name for name in merged.state_dict() if is_lora(name)]
    assert misses(case["tensors"]["logits"], run.packed("logits"), TENSORS) == {}


@torch.no_grad()
def check_answers(recording, model, name, *, together):
    case = recording.cases[name]
    outputs = case["outputs"]
    for group in [outputs] if together else [[one] for one in outputs]:
        before, about, after = recording.asked(case, group)
        speech, lengths = model.hear(*recording.hear(group))
        said = model.respond(speech, lengths, before, about, after, **case["settings"])
        assert said.tolist() == [one["ids"] for one in group]
        layout = lay_out_left(before, lengths, about, after)
        embeds = model.embed(speech, layout)
        for row, one in enumerate(group):
            assert misses(one["embeds"], embeds[row][layout.mask_BL[row]], TENSORS) == {}
