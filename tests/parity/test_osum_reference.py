"""An original checkpoint, imported, against the numbers that the original code computed with it.

See tests/golden/README.md. A batch of the original depends on its padding in two ways, which this project's do not; the
tests of batches put that habit into the encoder.
"""

import numpy as np
import pytest
import recorded
import torch
from recorded import F

from osum_npu.audio.mel import frame_count, log_mel
from osum_npu.checkpoints.osum import import_osum
from osum_npu.checkpoints.osum_keys import llm_prefix, reference_key
from osum_npu.models.layout import lay_out, lay_out_left
from osum_npu.models.llm import decode_packed
from osum_npu.models.lora import is_lora
from osum_npu.models.speech_llm import SpeechLLM
from osum_npu.models.whisper import WhisperEncoder
from osum_npu.parity import relative_error

TENSORS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-3
GOLDEN = recorded.read("osum.json")
SEED = GOLDEN["seed"]
FORWARD = [name for name, case in GOLDEN["cases"].items() if case["kind"] == "forward"]
GENERATE = [name for name, case in GOLDEN["cases"].items() if case["kind"] == "generate"]


def load(folder, *, merge):
    """The model that the importer makes of the original checkpoint."""
    torch.save(recorded.checkpoint(GOLDEN), folder / "infer.pt")
    llm = recorded.write_llm(GOLDEN, folder / "llm")
    config = GOLDEN["config"]
    import_osum(
        folder / "infer.pt",
        folder / "model",
        str(llm),
        merge=merge,
        encoder_heads=config["encoder"]["heads"],
        adapter_heads=config["adapter"]["heads"],
        lora_alpha=(config.get("lora") or {}).get("alpha"),
    )
    return SpeechLLM.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load(tmp_path_factory.mktemp("osum"), merge=False)
    assert model.config.llm_path is not None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("llm.") or is_lora(name))
    return model


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return load(tmp_path_factory.mktemp("merged"), merge=True)


class HabitEncoder(WhisperEncoder):
    """Whisper's encoder with the original's habit.

    Between the convolutions, padding is not set to zero; and behind them, the mask is every second place of the padded
    one, from the first or the second place on, so that half a frame more counts where the padded length is odd.
    """

    def convolve(self, mel_BTM, frames):
        padded = mel_BTM.shape[1]
        x_FC, (longest, *_) = super().convolve(mel_BTM, [padded] * len(frames))
        lengths = tuple((n + padded % 2) // 2 for n in frames)
        return torch.cat([x_EC[:n] for x_EC, n in zip(x_FC.split(longest), lengths)]), lengths


@pytest.fixture
def habit(model):
    model.encoder.__class__ = HabitEncoder
    yield model
    model.encoder.__class__ = WhisperEncoder


def wave(samples):
    return torch.from_numpy(F.waveform(f"osum.wave.{samples}", samples, SEED))


def hear(waves):
    """Features and frames of a batch, as the product computes them."""
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    samples = [len(one) for one in waves]
    return log_mel(padded, samples, GOLDEN["config"]["features"]["n_mels"]), [frame_count(n) for n in samples]


def ids(given):
    return F.token_ids(**given, seed=SEED) if given else []


class Run:
    """One recorded forward case, computed by a model."""

    def __init__(self, model, utterances):
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
        self.features, self.frames = hear([wave(one["wave"]) for one in utterances])
        self.speech, self.speech_length = model.hear(self.features, self.frames)
        for hook in hooks:
            hook.remove()
        self.encoder_length = self.tensors["encoder_out"][1]
        end = GOLDEN["config"]["eos_token_id"]
        answers = [[*ids(one["label"]), end] for one in utterances]
        prompts = [ids(one["prompt"]) for one in utterances]
        self.layout = lay_out(prompts, self.speech_length, answers)
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


def computed_by(request, case):
    """The product for a single utterance, the product with the original's habit for a batch."""
    return request.getfixturevalue("habit" if len(case["batch"]) > 1 else "model")


def misses(record, tensor, tolerance):
    """What differs from a record by more than the tolerance, relative to the tensor's root-mean-square."""
    differences = F.differences(record, tensor.detach().numpy())
    return {name: difference for name, difference in differences.items() if not difference < tolerance}


@pytest.mark.parametrize("key", GOLDEN["weight_check"])
def test_the_weights_are_those_of_the_recording(key):
    weight = F.weight(key, GOLDEN["parameters"][key], SEED)
    assert max(F.differences(GOLDEN["weight_check"][key], weight).values()) < 1e-6


@pytest.mark.parametrize("samples", GOLDEN["features"])
def test_features(samples):
    features, frames = hear([wave(int(samples))])
    assert frames == [len(features[0])]
    assert misses(GOLDEN["features"][samples], features[0], TENSORS) == {}


@torch.no_grad()
@pytest.mark.parametrize("name", FORWARD)
def test_tensors_and_loss(name, request):
    case = GOLDEN["cases"][name]
    model = computed_by(request, case)
    run = Run(model, case["batch"])
    assert run.frames == case["feature_lengths"]
    assert list(run.encoder_length) == case["encoder_lengths"]
    assert list(run.speech_length) == case["speech_lengths"]
    assert set(case["tensors"]) == {*run.tensors, "logits_predicting_labels"}
    for tensor, record in case["tensors"].items():
        assert misses(record, run.packed(tensor), TENSORS) == {}, tensor
    output = model(run.features, run.frames, run.layout)
    assert output.label_count == case["n_targets"]
    assert output.loss_sum.item() / output.label_count == pytest.approx(float(case["loss"]), rel=LOSS)


@torch.no_grad()
@pytest.mark.parametrize("name", FORWARD)
def test_positions_and_labels(name, request):
    case = GOLDEN["cases"][name]
    assert [segment for segment in case["layout"] if segment != "prompt"] == case["layout"][-5:]
    layout = Run(computed_by(request, case), case["batch"]).layout
    labels = torch.full_like(layout.position_BL, -100)
    labels.view(-1)[layout.predictor_N + 1] = layout.label_N
    valid = [np.array(F.expand(mask), bool) for mask in case["attention_mask"]]
    for theirs, mine in (("position_ids", layout.position_BL), ("labels", labels)):
        rows = [np.array(F.expand(row))[inside] for row, inside in zip(case[theirs], valid)]
        assert mine[layout.mask_BL].tolist() == np.concatenate(rows).tolist(), theirs


@pytest.mark.parametrize("name", [name for name in FORWARD if "grads" in GOLDEN["cases"][name]])
def test_gradients(name, request):
    case = GOLDEN["cases"][name]
    model = computed_by(request, case)
    run = Run(model, case["batch"])
    model.zero_grad()
    output = model(run.features, run.frames, run.layout)
    (output.loss_sum / output.label_count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == case["params_with_grad"]
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert total == pytest.approx(float(case["grad_l2_total"]), rel=GRADIENTS)
    prefix = llm_prefix(GOLDEN["parameters"])
    by_key = {reference_key(name, prefix): gradient for name, gradient in gradients.items()}
    for key, record in case["grads"].items():
        assert misses(record, by_key[key.removesuffix("[-2:]")], GRADIENTS) == {}, key


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in FORWARD if "speech_embeds_batch_against_single" in GOLDEN["cases"][n]])
def test_the_habit_changes_what_it_changed(name, habit):
    case = GOLDEN["cases"][name]
    together = Run(habit, case["batch"])
    for row, change in enumerate(case["speech_embeds_batch_against_single"]):
        alone = Run(habit, case["batch"][row : row + 1])
        mine = together.speech.split(together.speech_length)[row]
        lengths = [len(mine), len(alone.speech)]
        assert lengths == change["lengths_batch_single"]
        one, other = (run[: min(lengths)] for run in (mine, alone.speech))
        # three digits are recorded, and the least changes are rounding errors
        assert (one - other).abs().max().item() == pytest.approx(change["max_abs"], rel=6e-3, abs=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FORWARD if len(GOLDEN["cases"][name]["batch"]) > 1])
def test_without_the_habit_a_batch_is_its_singles(name, model):
    utterances = GOLDEN["cases"][name]["batch"]
    together, alone = Run(model, utterances), [Run(model, [one]) for one in utterances]
    for tensor in ("encoder_out", "speech_embeds", "inputs_embeds", "logits", "logits_predicting_labels"):
        singles = torch.cat([one.packed(tensor) for one in alone])
        assert relative_error(together.packed(tensor), singles) <= 1e-5, tensor
    losses = [model(run.features, run.frames, run.layout).loss_sum for run in (together, *alone)]
    assert relative_error(losses[0], sum(losses[1:])) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FORWARD if len(GOLDEN["cases"][name]["batch"]) == 1])
def test_folded_weights_compute_the_same(name, merged):
    case = GOLDEN["cases"][name]
    run = Run(merged, case["batch"])
    assert not [name for name in merged.state_dict() if is_lora(name)]
    assert misses(case["tensors"]["logits"], run.packed("logits"), TENSORS) == {}


@torch.no_grad()
@pytest.mark.parametrize("together", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize("name", GENERATE)
def test_answers(name, together, model):
    case = GOLDEN["cases"][name]
    outputs = case["outputs"]
    for group in [outputs] if together else [[one] for one in outputs]:
        features, frames = hear([wave(one["wave"]) for one in group])
        prompts = [ids(one["prompt"]) for one in group]
        said = model.generate(features, frames, prompts, **case["settings"])
        assert said.tolist() == [one["ids"] for one in group]
        speech, lengths = model.hear(features, frames)
        layout = lay_out_left(prompts, lengths)
        embeds = model.embed(speech, layout)
        for row, one in enumerate(group):
            assert misses(one["embeds"], embeds[row][layout.mask_BL[row]], TENSORS) == {}
