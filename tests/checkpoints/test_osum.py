"""Checkpoints of OSUM in and out again. That the model computes what the original does: tests/parity."""

import json
import threading
from pathlib import Path

import pytest
import recorded
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from osum_npu.checkpoints import osum, shards
from osum_npu.checkpoints.model_directory import load_model
from osum_npu.checkpoints.osum import export_osum, import_osum
from osum_npu.checkpoints.shards import as_bytes, read_weights
from osum_npu.checkpoints.torch_file import read_torch_file
from osum_npu.cli.main import main
from osum_npu.models.lora import fold_lora, is_lora

GOLDEN = recorded.read("osum.json")
HEADS = GOLDEN["config"]["encoder"]["heads"]
LORA, PLAIN = "llama_model.base_model.model.", "llama_model."
TOKENS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def original():
    return recorded.checkpoint(GOLDEN)


def without_lora(state):
    """As OSUM-EChat's understanding part: no LoRA, another head, a longer table."""
    names = {key: key.replace(LORA, PLAIN).replace(".base_layer", "").replace("speaker", "speech") for key in state}
    state = {names[key]: tensor for key, tensor in state.items() if ".lora_" not in key}
    state["encoder.embed.pos_enc.pe"] = recorded.sinusoids(30000, 32)[None]
    return state


def in_dtype(state, dtype):
    cast = {id(tensor): tensor.to(dtype) for tensor in state.values()}
    return {key: cast[id(tensor)] for key, tensor in state.items()}


def copied(state):
    """Copies that no longer share memory with what they are copies of."""
    return {key: tensor.clone() for key, tensor in state.items()}


def without_copies(state):
    return {key: tensor for key, tensor in state.items() if key not in GOLDEN["aliases"]}


def tied(state):
    state = without_lora(state)
    return {key: state[PLAIN + TOKENS] if key.endswith(HEAD) else tensor for key, tensor in state.items()}


FORMS = {
    "as recorded": lambda state: state,
    "without LoRA": without_lora,
    "bfloat16": lambda state: in_dtype(state, torch.bfloat16),
    "copies apart": copied,
    "without copies": without_copies,
    "tied": tied,
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return recorded.write_llm(GOLDEN, tmp_path_factory.mktemp("base") / "llm")


@pytest.fixture(scope="module")
def bare_llm(tmp_path_factory):
    """Configuration and tokenizer alone."""
    return recorded.write_llm(GOLDEN, tmp_path_factory.mktemp("bare") / "llm", weights=False)


def set_tied(llm, folder):
    """The same LLM with tied embeddings, without weights."""
    AutoTokenizer.from_pretrained(llm).save_pretrained(folder)
    config = json.loads((llm / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}), "utf-8")
    return folder


def save(state, path):
    torch.save(state, path)
    return path


def convert(source, folder, llm, **options):
    return import_osum(Path(source), folder, str(llm), encoder_heads=HEADS, **options)


def same(one, other):
    """Same keys in the same order, with the same dtypes and bits."""
    return list(one) == list(other) and all(
        (one[key].shape, one[key].dtype) == (other[key].shape, other[key].dtype)
        and torch.equal(as_bytes(one[key]), as_bytes(other[key]))
        for key in one
    )


@pytest.mark.parametrize("pieces", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_bit_for_bit(form, pieces, llm, tmp_path, monkeypatch):
    if pieces:
        monkeypatch.setattr(shards, "SHARD_BYTES", 500_000)
    if form == "tied":
        llm = set_tied(llm, tmp_path)
    state = FORMS[form](original())
    source = save(state, tmp_path / "infer.pt")
    config = convert(source, tmp_path / "model", llm)
    assert (config.llm_path is None) == (form in ("bfloat16", "tied"))
    assert (config.lora is None) == (form in ("without LoRA", "tied"))
    export_osum(tmp_path / "model", tmp_path / "again.pt")
    assert same(torch.load(tmp_path / "again.pt", weights_only=True), state)
    assert (tmp_path / "again.pt").stat().st_size < 1.05 * source.stat().st_size

    model, _ = load_model(tmp_path / "model")
    assert model.config.encoder["max_frames"] == state["encoder.embed.pos_enc.pe"].shape[1]
    head, tokens = model.llm.get_output_embeddings().weight, model.llm.get_input_embeddings().weight
    assert (head is tokens) == (form == "tied")
    prefix = PLAIN if config.lora is None else LORA
    for name, tensor in model.llm.state_dict().items():
        assert torch.equal(tensor, state[prefix + name].float()), name
    assert torch.equal(model.marks, state["speech_token_emded.weight"][-2:].float())


@pytest.mark.parametrize("of_file", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_llm", [torch.float32, torch.bfloat16])
def test_the_base_llm_is_left_out_where_it_lies_elsewhere(of_llm, of_file, tmp_path):
    values = in_dtype(original(), torch.bfloat16)  # which all four can express
    llm = recorded.write_llm(GOLDEN, tmp_path / "llm")
    base = {name: tensor.bfloat16().to(of_llm) for name, tensor in read_weights(llm).items()}
    shards.write_weights(llm, "model", base, base.__getitem__)
    state = in_dtype(values, of_file)
    config = convert(save(state, tmp_path / "infer.pt"), tmp_path / "model", llm)
    assert config.llm_path == str(llm)
    assert not [name for name in read_weights(tmp_path / "model") if name.startswith("llm.")]
    assert len(read_weights(tmp_path / "model", "adapter_model")) == sum(".lora_" in key for key in state)
    export_osum(tmp_path / "model", tmp_path / "again.pt")
    assert same(torch.load(tmp_path / "again.pt", weights_only=True), state)
    assert {path.name for path in tmp_path.iterdir()} == {"llm", "infer.pt", "model", "again.pt"}

    llm.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"llm: model\.safetensors is missing or damaged"):
        export_osum(tmp_path / "model", tmp_path / "more.pt")
    export_osum(tmp_path / "model", tmp_path / "more.pt", str(tmp_path / "moved"))
    assert same(torch.load(tmp_path / "more.pt", weights_only=True), state)


def test_a_base_llm_that_differs_in_one_bit_is_kept_inside(llm, tmp_path):
    state = original()
    state[f"{LORA}model.norm.weight"].view(torch.int32)[5] ^= 1
    config = convert(save(state, tmp_path / "infer.pt"), tmp_path / "model", llm)
    assert config.llm_path is None
    loaded = load_model(tmp_path / "model")[0].llm.state_dict()
    assert torch.equal(loaded["model.norm.weight"], state[f"{LORA}model.norm.weight"])


def test_an_llm_folder_without_weights_will_do(bare_llm, tmp_path):
    config = convert(save(original(), tmp_path / "infer.pt"), tmp_path / "model", bare_llm)
    assert config.llm_path is None
    load_model(tmp_path / "model")


def test_the_file_of_deepspeed(llm, tmp_path):
    state = in_dtype(original(), torch.bfloat16)
    (tmp_path / "step_7").mkdir()
    (tmp_path / "step_7.yaml").write_text(f"step: 7\nencoder_conf: {{attention_heads: {HEADS}}}\n", "utf-8")
    more = {"optimizer": None, "global_steps": 7, "param_shapes": [{"a": torch.Size([3])}], "ds_version": "0.14"}
    source = save({"module": state, **more}, tmp_path / "step_7" / "mp_rank_00_model_states.pt")
    import_osum(source, tmp_path / "model", str(llm))
    assert json.loads((tmp_path / "model" / osum.RECORD).read_text("utf-8"))["sidecar"]["step"] == 7
    export_osum(tmp_path / "model", tmp_path / "again.pt")
    assert same(torch.load(tmp_path / "again.pt", weights_only=True), state)


def test_folded_lora(llm, tmp_path):
    source = save(original(), tmp_path / "infer.pt")
    convert(source, tmp_path / "apart", llm)
    config = convert(source, tmp_path / "folded", llm, merge=True)
    assert (config.lora, config.llm_path) == (None, None)
    apart, folded = (load_model(tmp_path / name)[0] for name in ("apart", "folded"))
    assert not [name for name in folded.state_dict() if is_lora(name)]
    one, other = (model.llm.model.layers[0].self_attn.q_proj.weight for model in (apart, folded))
    assert not torch.equal(one, other)
    fold_lora(apart.llm)
    state, other = folded.state_dict(), apart.state_dict()
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.allclose(state[name], other[name], rtol=1e-6, atol=1e-7)] == []

    export_osum(tmp_path / "folded", tmp_path / "folded.pt")  # as a file of the reference without LoRA
    assert set(read_torch_file(tmp_path / "folded.pt")) == {
        key.replace(LORA, PLAIN).replace(".base_layer", "") for key in original() if ".lora_" not in key
    }
    convert(tmp_path / "folded.pt", tmp_path / "again", llm)
    again = load_model(tmp_path / "again")[0].state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_weights_that_were_trained_since_go_back_in_the_dtype_of_the_file(llm, tmp_path):
    state = in_dtype(original(), torch.bfloat16)
    convert(save(state, tmp_path / "infer.pt"), tmp_path / "model", llm)
    model, _ = load_model(tmp_path / "model")
    with torch.no_grad():
        model.marks += 1
        model.encoder.conv1.bias += 1
    model.save_pretrained(tmp_path / "model")  # in float32
    export_osum(tmp_path / "model", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    changed = {key for key in state if not torch.equal(again[key], state[key])}
    assert changed == {"speech_token_emded.weight", "encoder.embed.conv.0.bias"}
    assert {tensor.dtype for tensor in again.values()} == {torch.bfloat16}
    assert torch.equal(again["speech_token_emded.weight"][:-2], state["speech_token_emded.weight"][:-2])


# -- what stands beside the file


def test_the_sidecar_is_heeded_and_kept(llm, tmp_path):
    source = save(original(), tmp_path / "step_1249.pt")
    (tmp_path / "step_1249.yaml").write_text(
        "tag: step_1249\nstep: 1249\nlora_alpha: 16\nlora_dropout: 0.05\nsave_time: 2025/01/02 03:04:05\n"
        f"encoder_conf: {{attention_heads: {HEADS}, output_size: 32}}\nlrs: !!python/tuple [1.0e-05]\n"
        "loss_dict: {loss: !!python/object/apply:numpy.float64 [0.25], acc: .nan}\n",
        "utf-8",
    )
    config = import_osum(source, tmp_path / "model", str(llm))
    assert (config.encoder["heads"], config.lora["alpha"], config.lora["dropout"]) == (HEADS, 16, 0.05)
    kept = json.loads((tmp_path / "model" / osum.RECORD).read_text("utf-8"))["sidecar"]
    assert (kept["step"], kept["lrs"], kept["loss_dict"]["loss"]) == (1249, [1e-05], [0.25])
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "step_1249.pt" in card
    assert "step 1249" in card
    assert convert(source, tmp_path / "other", llm, lora_alpha=8).lora["alpha"] == 8


def test_code_in_a_sidecar_is_not_run(llm, tmp_path):
    source = save(original(), tmp_path / "infer.pt")
    trap = tmp_path / "trapped"
    (tmp_path / "infer.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{trap}']\nlora_alpha: 4\n", "utf-8")
    assert convert(source, tmp_path / "model", llm).lora["alpha"] == 4
    assert not trap.exists()


@pytest.mark.parametrize(("text", "complaint"), [("a: [", "is no YAML"), ("- 1", "wanted a mapping")])
def test_a_broken_sidecar_is_named(text, complaint, llm, tmp_path):
    source = save(original(), tmp_path / "infer.pt")
    (tmp_path / "infer.yaml").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=rf"infer\.yaml: {complaint}"):
        convert(source, tmp_path / "model", llm)


@pytest.mark.parametrize("heads", [None, 0, 5])
def test_heads_that_no_file_tells_are_asked_for(heads, llm, tmp_path):
    source = save(original(), tmp_path / "infer.pt")
    with pytest.raises(ValueError, match=r"a number that divides 32, got .*--encoder-heads"):
        import_osum(source, tmp_path / "model", str(llm), encoder_heads=heads)


@pytest.mark.parametrize(("form", "end"), [("as recorded", "<|endoftext|>"), ("without LoRA", "<|im_end|>")])
def test_the_end_mark_is_that_of_the_system(form, end, llm, tmp_path):
    own = tmp_path / "llm"
    recorded.write_llm(GOLDEN, own, weights=False)
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>" if form == "as recorded" else "<|endoftext|>"
    tokenizer.save_pretrained(own)
    convert(save(FORMS[form](original()), tmp_path / "infer.pt"), tmp_path / "model", own)
    assert load_model(tmp_path / "model")[1].eos_token == end


# -- what is wrong with a file

KEYS = list(GOLDEN["parameters"])


def spoil(state, key, fault):
    """Spoil one key; return what the complaint must say."""
    shape = tuple(state[key].shape)
    wanted = f"({', '.join(map(str, shape))})"
    if fault == "missing":
        del state[key]
        return f"{key} is missing: wanted {wanted}"
    if fault == "renamed":
        state[f"{key}x"] = state.pop(key)
        return f"{key}x, {wanted}, is unknown"
    if fault == "misshapen":
        state[key] = torch.zeros(*shape, 2)
        return f"{key} is ({', '.join(map(str, (*shape, 2)))}): wanted {wanted}"
    state[key] = torch.zeros(shape, dtype=torch.int8)
    return f"{key} is int8: wanted floating-point numbers"


@settings(deadline=None, max_examples=12)
@given(
    st.dictionaries(
        st.sampled_from(KEYS), st.sampled_from(["missing", "renamed", "misshapen", "int8"]), max_size=6, min_size=1
    )
)
def test_every_key_that_does_not_fit_is_listed_once(bare_llm, tmp_path_factory, faults):
    folder = tmp_path_factory.mktemp("spoiled")
    state = without_copies(original())
    complaints = [spoil(state, key, fault) for key, fault in faults.items()]
    with pytest.raises(ValueError, match="does not fit") as caught:
        convert(save(state, folder / "infer.pt"), folder / "model", bare_llm)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{folder / 'infer.pt'} does not fit OSUM with the LLM ")
    for complaint in complaints:
        assert sum(line.startswith(complaint) for line in lines) == 1, complaint
    assert len(lines) == len(complaints) + sum(fault == "renamed" for fault in faults.values())
    assert not (folder / "model").exists()


def test_a_copy_that_differs_and_a_table_that_was_learned_are_named(llm, tmp_path):
    state = copied(original())
    state["lm_head.weight"][3, 5] += 1
    state["encoder.embed.pos_enc.pe"][0, 700] += 0.1
    with pytest.raises(ValueError, match="does not fit") as caught:
        convert(save(state, tmp_path / "infer.pt"), tmp_path / "model", llm)
    _, *lines = str(caught.value).splitlines()
    assert lines == [
        "encoder.embed.pos_enc.pe is off by 0.1: wanted the sinusoids that the reference computes",
        f"lm_head.weight holds other numbers than {LORA}{HEAD}: wanted a copy of it",
    ]


def test_the_wrong_llm_is_told_by_its_keys(llm, tmp_path):
    other = tmp_path / "llm"
    other.mkdir()
    AutoTokenizer.from_pretrained(llm).save_pretrained(other)
    config = json.loads((llm / "config.json").read_text("utf-8"))
    del config["layer_types"]
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), "utf-8")
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight is missing: wanted \(80, 48\)"):
        convert(save(original(), tmp_path / "infer.pt"), tmp_path / "model", other)


CONTENTS = {
    "a list": [torch.ones(2)],
    "nothing": {},
    "no tensors": {"epoch": 3, "state": "none"},
    "another system": {"dims": torch.ones(2), "decoder.blocks.0.attn.query.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_file_of_something_else_is_named(content, llm, tmp_path):
    with pytest.raises(ValueError, match=r"infer\.pt (holds no state dict|is no checkpoint of OSUM)"):
        convert(save(content, tmp_path / "infer.pt"), tmp_path / "model", llm)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.booleans())
def test_a_file_that_was_cut_off_is_named(llm, tmp_path_factory, place, old):
    folder = tmp_path_factory.mktemp("cut")
    state = {"encoder.embed.conv.0.weight": torch.ones(4, 80, 3), "more": torch.ones(300)}
    torch.save(state, folder / "infer.pt", _use_new_zipfile_serialization=not old)
    content = (folder / "infer.pt").read_bytes()
    (folder / "infer.pt").write_bytes(content[: place % len(content)])
    with pytest.raises(ValueError, match=r"infer\.pt cannot be read: .*wanted a state dict"):
        convert(folder / "infer.pt", folder / "model", llm)
    assert [path.name for path in folder.iterdir()] == ["infer.pt"]


@settings(deadline=None, max_examples=25)
@given(st.binary(max_size=200))
def test_any_bytes_are_no_checkpoint(llm, tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "infer.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"infer\.pt cannot be read"):
        convert(folder / "infer.pt", folder / "model", llm)


def test_a_file_of_an_old_torch_is_read(llm, tmp_path):
    torch.save(original(), tmp_path / "infer.pt", _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "infer.pt", tmp_path / "model", llm).llm_path == str(llm)


def test_code_in_a_checkpoint_is_not_run(llm, tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "trapped"), "w")

    save({"module": original(), "trap": Trap()}, tmp_path / "infer.pt")
    with pytest.raises(ValueError, match=r"infer\.pt cannot be read"):
        convert(tmp_path / "infer.pt", tmp_path / "model", llm)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("missing", ["config", "tokenizer", "everything"])
def test_an_llm_folder_that_lacks_something_is_named(missing, bare_llm, tmp_path):
    folder = tmp_path / "llm"
    if missing != "everything":
        folder.mkdir()
        for path in bare_llm.iterdir():
            if not path.name.startswith(missing):
                (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(
        ValueError, match=f"the LLM '{folder}' has no {'tokenizer' if missing == 'tokenizer' else 'config'}"
    ):
        convert(save(original(), tmp_path / "infer.pt"), tmp_path / "model", folder)


# -- what is there already


def test_what_is_there_already_is_not_touched(llm, tmp_path):
    source = save(original(), tmp_path / "infer.pt")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear", "utf-8")
    for taken in (tmp_path / "home", source):
        with pytest.raises(ValueError, match=f"{taken} is there already"):
            convert(source, taken, llm)
    assert (tmp_path / "home" / "letters.txt").read_text("utf-8") == "dear"


def test_a_failure_on_the_way_leaves_nothing(llm, tmp_path, monkeypatch):
    source = save(original(), tmp_path / "infer.pt")

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(osum, "write_companions", full)
        with pytest.raises(OSError, match="no space left"):
            convert(source, tmp_path / "model", llm)
    assert [path.name for path in tmp_path.iterdir()] == ["infer.pt"]
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "broken_off.txt").write_text("by a kill", "utf-8")
    convert(source, tmp_path / "model", llm)
    assert not (tmp_path / "model" / "broken_off.txt").exists()

    (tmp_path / "again.pt").write_text("older", "utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="no space left"):
            export_osum(tmp_path / "model", tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_text("utf-8") == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pt", "infer.pt", "model"]


def test_a_model_that_was_not_converted_cannot_go_back(llm, tmp_path):
    convert(save(original(), tmp_path / "infer.pt"), tmp_path / "model", llm)
    model, _ = load_model(tmp_path / "model")
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"trained has no reference\.json .* copied from there"):
        export_osum(tmp_path / "trained", tmp_path / "again.pt")


# -- the command, and how much memory it takes


def test_the_command(llm, tmp_path, capsys):
    state = original()
    source, model, again = save(state, tmp_path / "infer.pt"), tmp_path / "model", tmp_path / "new" / "again.pt"
    words = ["convert", "osum", str(source), str(model)]
    assert main(words) == 2
    assert "needs --llm" in capsys.readouterr().err
    assert main([*words, "--llm", str(llm), "--encoder-heads", str(HEADS)]) == 0
    assert capsys.readouterr().out == f"model: {model}\nLLM: by reference, {llm}\n"
    assert main(["convert", "osum", "--to-reference", str(model), str(again)]) == 0
    assert capsys.readouterr().out == f"checkpoint: {again}\n"
    assert same(torch.load(again, weights_only=True), state)
    del state["speech_llama_proj.bias"]
    save(state, source)
    assert main([*words[:3], str(tmp_path / "other"), "--llm", str(llm), "--encoder-heads", str(HEADS)]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == ["speech_llama_proj.bias is missing: wanted (48)"]


def anonymous_bytes():
    """Memory of this process that is not that of a file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def growth(work):
    """How many bytes of anonymous memory a call takes at most."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return peak - before


def test_memory_does_not_grow_with_the_file(bare_llm, tmp_path):
    wide = 150_000  # 14 MB for each of eight tensors
    config = json.loads((bare_llm / "config.json").read_text("utf-8"))
    AutoTokenizer.from_pretrained(bare_llm).save_pretrained(tmp_path / "llm")
    changed = {**config, "vocab_size": wide, "intermediate_size": wide}
    (tmp_path / "llm" / "config.json").write_text(json.dumps(changed), "utf-8")
    state = without_lora(original())
    for key, tensor in state.items():
        shape = [wide if size in (300, 80) and key.startswith(PLAIN) else size for size in tensor.shape]
        state[key] = torch.ones(shape).bfloat16() if wide in shape else tensor.bfloat16()
    for alias in GOLDEN["aliases"]:
        state[alias] = state[PLAIN + (TOKENS if "tokens" in alias else HEAD)]
    source = save(state, tmp_path / "infer.pt")
    size = source.stat().st_size
    assert size > 110e6
    del state
    assert growth(lambda: convert(source, tmp_path / "model", tmp_path / "llm")) < 0.4 * size
    assert growth(lambda: export_osum(tmp_path / "model", tmp_path / "again.pt")) < 0.4 * size
    assert same(read_torch_file(tmp_path / "again.pt"), read_torch_file(source))


def test_settings_in_yaml_are_read_as_wenet_writes_them(tmp_path):
    """The sidecar is what yaml.dump makes of Python objects."""
    from osum_npu.checkpoints.sidecar import read_sidecar

    (tmp_path / "a.yaml").write_text(yaml.dump({"lrs": (1e-5,), "epoch": 0, "conf": {"set": {"x"}}}), "utf-8")
    content = read_sidecar(tmp_path / "a.pt")
    assert (content["lrs"], content["epoch"]) == ([1e-5], 0)
    assert read_sidecar(tmp_path / "b.pt") == {}
