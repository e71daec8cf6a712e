"""Checkpoints of OSUM-Pangu in and out again; what is alike in OSUM's is tested there."""

import json
import re

import pangu_folder
import pytest
import recorded
import torch

from osum_npu.checkpoints import osum
from osum_npu.checkpoints.conversion import read_llm_config
from osum_npu.checkpoints.model_directory import end_ids, load_model
from osum_npu.checkpoints.osum_keys import LLM_PREFIXES, is_pangu, own_name, reference_key
from osum_npu.checkpoints.osum_sizes import find_faults, read_sizes
from osum_npu.checkpoints.shards import as_bytes, read_weights
from osum_npu.cli.main import main
from osum_npu.models.llm import build_llm
from osum_npu.models.lora import is_lora
from osum_npu.models.speech_llm import SpeechLLMConfig, peft_name
from osum_npu.planning.sizes import build_on_meta, llm_sizes

GOLDEN, OSUM = recorded.read("osum_pangu.json"), recorded.read("osum.json")
LORA, PLAIN = LLM_PREFIXES


def original():
    return recorded.checkpoint(GOLDEN)


def without_lora(state):
    """As OSUM-Pangu's early checkpoints."""
    own = {key: key.replace(LORA, PLAIN).replace(".base_layer", "") for key in state if ".lora_" not in key}
    return {new: state[key] for key, new in own.items()}


def in_bfloat16(state):
    cast = {id(tensor): tensor.bfloat16() for tensor in state.values()}
    return {key: cast[id(tensor)] for key, tensor in state.items()}


FORMS = {
    "as recorded": lambda state: state,
    "without LoRA": without_lora,
    "bfloat16": in_bfloat16,
    "bfloat16 without LoRA": lambda state: in_bfloat16(without_lora(state)),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """The base LLM of the recorded model, in a folder as openPangu is published."""
    folder = pangu_folder.write(tmp_path_factory.mktemp("base") / "openPangu")
    recorded.write_llm(GOLDEN, folder)
    sizes = json.loads((folder / "config.json").read_text("utf-8"))
    fields = {name: sizes.get(name, value) for name, value in pangu_folder.PUBLISHED.items() if name != "model_type"}
    (folder / "config.json").write_text(json.dumps({**pangu_folder.PUBLISHED, **fields, "eos_token_id": 13}), "utf-8")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(pangu_folder.TOKENIZER), "utf-8")
    return folder


def convert(state, folder, llm, *words):
    torch.save(state, folder / "step_832499.pt")
    command = ["convert", "osum", str(folder / "step_832499.pt"), str(folder / "model"), "--llm", str(llm)]
    assert main([*command, "--encoder-heads", "4", *words]) == 0
    return load_model(folder / "model")


def same(one, other):
    return list(one) == list(other) and all(
        (one[key].shape, one[key].dtype) == (other[key].shape, other[key].dtype)
        and torch.equal(as_bytes(one[key]), as_bytes(other[key]))
        for key in one
    )


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_bit_for_bit(form, llm, tmp_path):
    state = FORMS[form](original())
    model, tokenizer = convert(state, tmp_path, llm)
    assert (model.config.form, model.config.begin_of_text) == ("osum_pangu", "fixed")
    assert (model.config.llm_path is None) == form.startswith("bfloat16")
    assert model.config.encoder["max_frames"] == 30000
    lora = model.config.lora
    assert lora is None if "without" in form else (lora["rank"], lora["alpha"], len(lora["targets"])) == (64, 32, 6)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, end_ids(tmp_path / "model")) == ("[unused10]", 13, [13])

    prefix = PLAIN if lora is None else LORA
    own = model.llm.state_dict()
    assert any(re.search(r"o_proj\.(base_layer\.)?bias", name) for name in own)
    for name, tensor in own.items():
        assert torch.equal(tensor, state[prefix + name].float()), name
    assert torch.equal(model.marks, state["speech_token_emded.weight"][-2:].float())

    assert main(["convert", "osum", "--to-reference", str(tmp_path / "model"), str(tmp_path / "again.pt")]) == 0
    assert same(torch.load(tmp_path / "again.pt", weights_only=True), state)


def test_folded_lora_keeps_the_biases(llm, tmp_path):
    state = original()
    model, _ = convert(state, tmp_path, llm, "--merge")
    assert (model.config.lora, model.config.llm_path, model.config.form) == (None, None, "osum_pangu")
    layer = f"{LORA}model.layers.1.self_attn.o_proj"
    down, up = (state[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
    own = model.llm.model.layers[1].self_attn.o_proj
    assert torch.equal(own.bias, state[f"{layer}.base_layer.bias"])
    assert torch.allclose(own.weight, state[f"{layer}.base_layer.weight"] + up @ down * 32 / 64, atol=1e-6)


@pytest.mark.parametrize("begin", [True, False])
def test_fixed_texts_begin_as_the_tokenizer_begins_a_call(begin, llm, tmp_path):
    settings = {**pangu_folder.TOKENIZER, "add_bos_token": begin}
    own = tmp_path / "llm"
    own.mkdir()
    for path in llm.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    (own / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    model, tokenizer = convert(original(), tmp_path, own)
    assert model.config.begin_of_text == ("fixed" if begin else "none")
    assert (tokenizer("今").input_ids[0] == tokenizer.bos_token_id) == begin


def test_osum_and_osum_echat_are_no_openpangu():
    assert is_pangu(GOLDEN["parameters"])
    assert is_pangu(without_lora(original()))
    assert not is_pangu(OSUM["parameters"])
    assert not is_pangu(key.replace("speaker_head", "speech_head") for key in OSUM["parameters"])


def test_a_bias_that_is_missing_is_named(llm, tmp_path, capsys):
    state = original()
    del state[f"{LORA}model.layers.1.self_attn.o_proj.base_layer.bias"]
    torch.save(state, tmp_path / "infer.pt")
    words = [str(tmp_path / "infer.pt"), str(tmp_path / "model"), "--llm", str(llm), "--encoder-heads", "4"]
    assert main(["convert", "osum", *words]) == 2
    complaint = f"{LORA}model.layers.1.self_attn.o_proj.base_layer.bias is missing: wanted (48)"
    assert capsys.readouterr().err.splitlines()[1:] == [complaint]


# -- at full size


HUGE = "FreedomIntelligence/openPangu-Embedded-7B-V1.1"


def full_size(*, lora=True):
    """A checkpoint of the released shapes; a tensor of it is one number that is repeated, of the base LLM nought.

    Names are those that were recorded, with 24 blocks of the encoder and 34 layers of the LLM.
    """
    small = original() if lora else without_lora(original())
    sizes = {"llm": {48: 4096, 24: 1024, 80: 12800, 300: 153376}, "encoder": {32: 1024, 128: 4096}}
    state = {}
    for key, tensor in small.items():
        part = "llm" if key.startswith((PLAIN, "speech_head", "speech_token", "embed_tokens", "lm_head")) else "encoder"
        shape = [sizes[part].get(size, size) for size in tensor.shape]
        if key.startswith("speech_llama_proj"):
            shape = [4096, 1024][: tensor.ndim]
        repeats = {PLAIN: 34, "encoder.": 24}
        count = next((n for prefix, n in repeats.items() if key.startswith(prefix)), 0)
        if count and re.search(r"(layers|encoders)\.1\.", key):
            continue
        names = [re.sub(r"(layers|encoders)\.0\.", rf"\1.{i}.", key) for i in range(count)] if count else [key]
        for name in dict.fromkeys(names):
            base = key.startswith(PLAIN) and ".lora_" not in key
            state[name] = torch.full([], 0.0 if base else 0.5, dtype=torch.bfloat16).expand(shape)
    width = sizes["encoder"][32]
    state["encoder.embed.pos_enc.pe"] = recorded.sinusoids(30000, width)[None].bfloat16()
    state["speech_transformer.embed.pos_enc.pe"] = recorded.interleaved(5000, width)[None].bfloat16()
    return state | {alias: state[key if lora else key.replace(LORA, PLAIN)] for alias, key in GOLDEN["aliases"].items()}


def millions(model, which):
    return round(sum(p.numel() for name, p in model.named_parameters() if which(name)) / 1e6, 2)


@pytest.mark.parametrize("lora", [True, False])
def test_full_size_is_the_published_one(lora):
    state = full_size(lora=lora)
    config = read_sizes(state, {}, llm_sizes(HUGE), None, 4, None)
    assert (config.encoder["width"], config.encoder["layers"], config.encoder["heads"]) == (1024, 24, 16)
    copies = osum.copied_keys(state, tied=False)
    assert find_faults(state, copies, config) == []
    model = build_on_meta(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    if lora:
        assert (config.lora["rank"], config.lora["alpha"]) == (64, 32)
        assert millions(model, is_lora) == 131.47
    assert millions(model, lambda name: name.startswith("adapter.")) == 52.49
    base = sum(p.numel() for name, p in model.named_parameters() if name.startswith("llm.") and not is_lora(name))
    assert base == pytest.approx(8.0e9, rel=0.01)
    named = {key: own_name(key) for key in state if key not in copies and own_name(key)}
    prefix = LORA if lora else PLAIN
    assert set(named.values()) == set(model.state_dict()) - {"encoder.positional_embedding"}
    assert {reference_key(name, prefix): name for name in named.values()} == named


def write_noughts(path, tensors):
    """Write safetensors of noughts as a header and a hole, which takes no room on the disk."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.slow  # compares 16 GB of noughts with 16 GB of noughts, and writes 1 GB
def test_full_size_there_and_back(llm, tmp_path, monkeypatch):
    state = full_size()
    with torch.device("meta"):
        base = build_llm(llm_sizes(HUGE)).bfloat16().state_dict()
    folder = tmp_path / "llm"
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((llm / name).read_bytes())
    sizes = {**llm_sizes(HUGE), "model_type": "PanguEmbedded", "bias": True}
    (folder / "config.json").write_text(json.dumps(sizes), "utf-8")
    write_noughts(folder / "model.safetensors", base)
    torch.save(state, tmp_path / "infer.pt")
    assert (tmp_path / "infer.pt").stat().st_size < 100e6
    target = tmp_path / "model"
    assert main(["convert", "osum", str(tmp_path / "infer.pt"), str(target), "--llm", str(folder)]) == 0

    config = SpeechLLMConfig.from_pretrained(target)
    assert (config.llm_path, config.form) == (str(folder), "osum_pangu")
    config.llm, config.llm_path = read_llm_config(config.llm_path), None
    model = build_on_meta(config)
    kept = {name: tensor.shape for name, tensor in read_weights(target).items()}
    kept |= {name: tensor.shape for name, tensor in read_weights(target, "adapter_model").items()}
    lacking = {
        n: t.shape for n, t in model.state_dict().items() if kept.get(peft_name(n) if is_lora(n) else n) != t.shape
    }
    assert {name.removeprefix("llm.").replace(".base_layer", ""): shape for name, shape in lacking.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    assert (millions(model, is_lora), millions(model, lambda name: name.startswith("adapter."))) == (131.47, 52.49)

    written = {}
    monkeypatch.setattr(osum, "write_torch_file", lambda tensors, _: written.update(tensors))  # 17 GB
    osum.export_osum(target, tmp_path / "again.pt")
    assert list(written) == list(state)
    assert {k: (t.shape, t.dtype) for k, t in written.items()} == {k: (t.shape, t.dtype) for k, t in state.items()}
    small = [key for key, tensor in state.items() if tensor.numel() < 5e7]
    assert len(small) > len(state) - 150
    assert [key for key in small if not torch.equal(written[key], state[key])] == []
