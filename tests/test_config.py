"""The recipe: layers, overrides, and that every fault is found, named and placed before a device wakes."""

import tempfile
from pathlib import Path

import pytest
import tiny
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.config import RecipeError, dump_recipe, load_recipe, missing_files


@pytest.fixture
def layer(tmp_path):
    return tiny.write_recipe(tmp_path / "tiny.yaml", tmp_path)


def line_of(path, text, nth=1):
    """Number of the nth line that holds ``text``."""
    return [i for i, line in enumerate(path.read_text("utf-8").splitlines(), 1) if text in line][nth - 1]


def faults(*layers, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(layers, overrides)
    assert str(caught.value) == "\n".join(caught.value.faults)
    assert not any("\n" in fault for fault in caught.value.faults)
    return caught.value.faults


# -- all faults at once


FIVE = [
    ("    learning_rate: 3.0e-3\n", "    lerning_rate: 3.0e-3\n", ("stages.0.lerning_rate: there is no such setting",)),
    ("heads: 2, max_frames", "heads: 3, max_frames", ("model.encoder: encoder width 32 is not divisible by 3 heads",)),
    ("precision: float32", "precision: float16", ("precision: input should be 'auto', 'float32' or 'bfloat16'",)),
    ("trainable: [lora]", "trainable: [lorry]", ("stages.2.trainable.0: input should be", "got 'lorry'")),
    ("  workers: 0", "  workers: -1", ("data.workers: input should be greater than or equal to 0, got -1",)),
]


def test_check_prints_a_line_for_each_of_five_faults_and_wakes_no_device(layer):
    text = layer.read_text("utf-8")
    for right, wrong, _ in FIVE:
        assert right in text
        text = text.replace(right, wrong, 1)
    layer.write_text(text, "utf-8")
    done = tiny.osum_npu("check", layer, env={"OSUM_BACKEND": "nonsense"})
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    # a key that is spelt wrong is a setting that does not exist and one that is missing
    [missing] = [line for line in lines if line.endswith("stages.0.learning_rate: is missing")]
    assert missing.startswith(f"{layer}:{line_of(layer, '- name: hear')}: ")
    lines.remove(missing)
    assert len(lines) == 5
    for _, wrong, words in FIVE:
        key = "encoder:" if "heads: 3" in wrong else wrong.strip()
        place = f"{layer}:{line_of(layer, key)}: "
        assert [line for line in lines if line.startswith(place) and all(word in line for word in words)], (
            place,
            lines,
        )


def test_check_of_a_good_recipe_names_the_files_that_are_not_there(layer, tmp_path, capsys):
    from osum_npu.cli.main import main

    assert main(["check", str(layer)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"data.{group}.tones.path: there is no manifest {tmp_path / group}.jsonl" for group in ("train", "dev")
    ]
    for group in ("train", "dev"):
        (tmp_path / f"{group}.jsonl").touch()
    assert main(["check", str(layer)]) == 0
    assert capsys.readouterr().out == "nothing wrong\n"
    assert main(["check", str(layer), "model={kind: saved, path: nowhere}"]) == 1
    assert "model.path: nowhere is no model directory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("stages.0.steps=true", "stages.0.steps: input should be a valid integer, got True"),
        ("stages.0.steps='12'", "stages.0.steps: input should be a valid integer, got '12'"),
        ("stages.0.steps=12.5", "stages.0.steps: input should be a valid integer, got 12.5"),
        ("stages.0.learning_rate='0.1'", "stages.0.learning_rate: input should be a valid number, got '0.1'"),
        ("stages.0.learning_rate=false", "stages.0.learning_rate: input should be a valid number, got False"),
        ("stages.0.learning_rate=.nan", "stages.0.learning_rate: input should be"),
        ("stages.0.tasks={asr: true}", "stages.0.tasks.asr: input should be a valid number, got True"),
        ("stages.0.name=7", "stages.0.name: input should be a valid string, got 7"),
        ("stages.0.trainable=encoder", "stages.0.trainable: input should be a valid array, got 'encoder'"),
        ("model.ctc=1", "model.ctc: input should be a valid boolean, got 1"),
        ("model.ctc='false'", "model.ctc: input should be a valid boolean, got 'false'"),
        ("data.train.tones.path=3", "data.train.tones.path: input should be a valid string, got 3"),
        ("out=", "out: input should be a valid string, got None"),
    ],
)
def test_nothing_is_coerced(layer, override, fault):
    [line] = faults(layer, overrides=[override])
    assert line.startswith(f"{override}: {fault}")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("model.kind=old", "model.kind: must be one of 'new', 'saved', 'whisper', got 'old'"),
        ("model.llm.kind=x", "model.llm.kind: must be one of 'random', 'pretrained', got 'x'"),
        ("model.llm={}", "model.llm.kind: is missing"),
        ("data.train={}", "data.train: dictionary should have at least 1 item"),
        ("data.train.new={weight: 2}", "data.train.new.path: is missing"),
        ("stages.0.tasks={sing: 1}", "stages.0.tasks.sing: there is no task 'sing'; the tasks are asr, "),
        ("stages.0.tasks={asr: 0}", "stages.0: task weights must be above 0; leave out asr"),
        ("model.adapter.heads=5", "model: encoder.width 32 is not divisible by adapter.heads 5"),
        ("stages.1.name=hear", "stages.1.name: two stages are called 'hear'"),
        ("model.lora=null", "stages.2.trainable: trains lora, but model.lora is not set"),
        ("device_adamw=true", "device_adamw: cannot change what learns, and there are 3 stages"),
        ("stages.2.llm_weight=0", "stages.2: nothing to learn from: llm_weight and ctc_weight are both 0"),
        ("seed=-1", "seed: input should be greater than or equal to 0, got -1"),
        ("stages.0.betas=[0.9]", "stages.0.betas.1: is missing"),
        ("model.encoder.n_mels=90", "model.encoder.n_mels: input should be 80 or 128, got 90"),
        (
            "model.adapter.max_positions=49",
            "model: adapter.max_positions 49 is less than the 50 speech embeddings that encoder.max_frames 200",
        ),
        ("stages.2.trainable=[decoder]", "stages.2.trainable: trains decoder, which only a model of kind whisper has"),
        ("stages.2.tasks={SER: 1, asr: 1, emotion: 2}", "stages.2.tasks.emotion: is the same task as 'SER'"),
        ("stages.2.eps=0", "stages.2.eps: input should be greater than 0, got 0"),
        ("data.max_answer_tokens=0", "data.max_answer_tokens: input should be greater than or equal to 1, got 0"),
        ("stages=[]", "stages: "),
        ("model=3", "model: input should be an object, got 3"),
        ("epochs=3", "epochs: there is no such setting"),
        ("stages.3.steps=1", "stages has 3 items, there is no '3'"),
        ("stages.last.steps=1", "stages has 3 items, there is no 'last'"),
        ("stages.².steps=1", "stages has 3 items, there is no '²'"),
        ("seed.x=1", "seed is 5, which has no settings"),
        ("seed=[", "the value is no YAML"),
        ("seed", "wanted dotted.key=value"),
        ("=1", "wanted dotted.key=value"),
    ],
)
def test_what_is_wrong_is_named(layer, override, fault):
    layer.write_text(layer.read_text("utf-8") + "seed: 5\n")
    [line] = faults(layer, overrides=[override])
    assert fault in line
    assert line.startswith((f"{override}: ", f"{layer}:"))


def test_ctc_that_is_not_there(layer):
    lines = faults(layer, overrides=["model.ctc=false"])
    assert [line.partition(": ")[2] for line in lines] == [
        f"stages.{i}: uses the CTC head, but model.ctc is not true" for i in (0, 1)
    ]


WHISPER = "model={kind: whisper, path: somewhere}"


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("stages.0.trainable=[encoder, llm]", "stages.0.trainable: trains llm; a Whisper has encoder and decoder"),
        ("stages.0.ctc_weight=1", "stages.0.ctc_weight: uses a CTC head, which a model of kind whisper does not have"),
        (
            "stages.0.natural=0.5",
            "stages.0.natural: asks in natural language, but a model of kind whisper is asked by its",
        ),
        (
            "stages.0.tasks={intent: 1}",
            "stages.0.tasks.intent: is about text alone, which a model of kind whisper has no",
        ),
        ("model.config={}", "model: wanted either path or config, the other null"),
        ("model.path=null", "model: wanted either path or config, the other null"),
        ("model.lora={}", "model.lora: there is no such setting"),
    ],
)
def test_what_a_whisper_does_not_have(layer, override, fault):
    stages = "stages=[{name: all, trainable: [encoder, decoder], steps: 1, learning_rate: 1e-3}]"
    assert load_recipe([layer], [WHISPER, stages]).model.path == "somewhere"
    [line] = faults(layer, overrides=[WHISPER, stages, override])
    assert fault in line


def test_faults_of_several_places_come_in_one_list(layer, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("# nothing\n\nseed: high\n")
    lines = faults(layer, second, overrides=["log_every=0", "model.lora=null", "stages.1.steps=x"])
    assert [line.split(": ")[0] for line in lines] == [
        "stages.1.steps=x",
        f"{second}:3",
        "log_every=0",
        f"{layer}:{line_of(layer, 'trainable: [lora]')}",
    ]


def test_files_that_are_no_recipe(tmp_path):
    paths = [tmp_path / name for name in ("missing", "list", "text", "torn", "binary", "empty")]
    for path, content in zip(paths[1:], (b"[1]", b"hello", b"a: [1", b"\xff\xfe\0", b""), strict=True):
        path.write_bytes(content)
    lines = faults(*paths, overrides=["nonsense"])
    assert [line.split(": ")[1][:6] for line in lines] == [
        "cannot",
        "wanted",
        "wanted",
        "is no ",
        "is no ",
        "wanted",
    ] + ["wanted"]
    assert [line.split(": ")[0] for line in lines] == [*map(str, paths), "nonsense"]


def test_a_key_set_twice_is_no_silent_choice(layer):
    layer.write_text(layer.read_text("utf-8").replace("    steps: 8\n", "    steps: 8\n    steps: 80\n"))
    [line] = faults(layer)
    assert line == f"{layer}:{line_of(layer, 'steps: 80')}: stages.1.steps: is set twice"


# -- layers and overrides


def test_layers_merge_mappings_and_replace_lists(layer, tmp_path):
    second, third = tmp_path / "second.yaml", tmp_path / "third.yaml"
    second.write_text(
        "model: {encoder: {width: 64}}\nstages: [{name: all, trainable: [llm], steps: 2, learning_rate: 1e-4}]"
    )
    third.write_text("model: {encoder: {width: 96}, lora: null}\ndata: {train: {more: {path: x}}}")
    base, merged = load_recipe([layer]), load_recipe([layer, second, third], ["model.encoder.heads=4"])
    assert (merged.model.encoder.width, merged.model.encoder.heads, merged.model.encoder.layers) == (96, 4, 1)
    assert merged.model.lora is None
    assert [stage.name for stage in merged.stages] == ["all"]
    assert merged.stages[0].tasks == {"asr": 1.0}
    assert list(merged.data.train) == ["tones", "more"]
    assert merged.data.train["tones"] == base.data.train["tones"]
    assert merged.data.dev == base.data.dev


def test_a_mapping_of_another_kind_is_replaced(layer, tmp_path):
    second, third = tmp_path / "second.yaml", tmp_path / "third.yaml"
    second.write_text("model: {llm: {kind: pretrained, path: far}}")
    third.write_text("model: {llm: {path: farther}}")
    assert load_recipe([layer, second, third]).model.llm.path == "farther"


def test_what_a_list_replaces_is_not_blamed(layer, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("\nstages:\n  - {trainable: [llm]}\n")
    assert {line.split(": ")[0] for line in faults(layer, second)} == {f"{second}:3"}


def test_overrides_reach_into_lists_and_new_mappings(layer):
    recipe = load_recipe(
        [layer],
        [
            "stages.1.tasks.asr=5",
            "stages.1.betas=[0.8, 0.95]",
            "stages.0.spec_augment.time_masks=7",
            "data.dev.new.path=a",
        ],
    )
    assert recipe.stages[1].tasks["asr"] == 5
    assert recipe.stages[1].tasks["gender"] == 1
    assert recipe.stages[1].betas == (0.8, 0.95)
    assert recipe.stages[0].spec_augment.time_masks == 7
    assert recipe.stages[0].spec_augment.frequency_masks == load_recipe([layer]).stages[1].spec_augment.frequency_masks
    assert recipe.data.dev["new"].path == "a"


def test_names_may_look_like_numbers(layer):
    text = layer.read_text("utf-8").replace("train: {tones:", "train: {2024:")
    layer.write_text(text)
    recipe = load_recipe([layer], ["data.train.2024.weight=3", "stages.0.name=1e-3x"])
    assert recipe.data.train["2024"].weight == 3


def test_an_override_changes_one_of_two_that_share_an_anchor(layer):
    text = layer.read_text("utf-8").replace("tasks: {asr: 1, gender: 1}", "tasks: *all")
    layer.write_text(text.replace("tasks: {asr: 1, timestamps", "tasks: &all {asr: 1, timestamps"))
    recipe = load_recipe([layer], ["stages.1.tasks.asr=9"])
    assert recipe.stages[1].tasks["asr"] == 9
    assert recipe.stages[2].tasks["asr"] == 1


@pytest.mark.parametrize("text", ["1e-3", "1.E-3", "0.001", "1.0e-3", "+1e-03"])
def test_exponents_without_a_point_are_numbers(layer, text):
    recipe = load_recipe([layer], [f"stages.0.learning_rate={text}", f"model.llm.config.initializer_range={text}"])
    assert recipe.stages[0].learning_rate == 0.001
    assert recipe.model.llm.config["initializer_range"] == 0.001


def test_tasks_by_code_and_tag(layer):
    words = "{SER: 1, <TRANSCRIBE><AGE>: 2, chat: 3, age+gender: 4, <AGE> <GENDER>: 5}"
    tasks = load_recipe([layer], [f"stages.2.tasks={words}"]).stages[2].tasks
    assert tasks == {"emotion": 1, "age": 2, "chat": 3, "age+gender": 4, "age+gender-only": 5}


# -- written and read again


def test_the_merged_recipe_reads_as_itself(layer, tmp_path):
    recipe = load_recipe([layer], ["out='1e-3'", "stages.0.learning_rate=1e-5"])
    written = tmp_path / "written.yaml"
    written.write_text(dump_recipe(recipe), "utf-8")
    assert load_recipe([written]) == recipe
    assert recipe.out == "1e-3"
    stages = yaml.safe_load(dump_recipe(recipe))["stages"]
    assert {"clip", "betas", "warmup_steps", "weight_decay"} <= stages[0].keys()  # defaults are spelled out


@settings(max_examples=30, deadline=None)
@given(
    out=st.text(min_size=1).filter(lambda text: text.strip() == text),
    seed=st.integers(0, 2**32 - 1),
    rate=st.floats(0, 1, exclude_min=True, exclude_max=True),
    weight=st.floats(0, 1000, exclude_min=True),
    source=st.text(min_size=1, max_size=5).filter(lambda text: "." not in text and text.strip() == text),
    flag=st.booleans(),
    micro=st.none() | st.floats(1e-3, 1e6),
)
def test_whatever_a_recipe_holds_is_read_back(out, seed, rate, weight, source, flag, micro):
    with tempfile.TemporaryDirectory() as folder:
        layer = tiny.write_recipe(Path(folder) / "tiny.yaml", folder)
        content = yaml.safe_load(layer.read_text("utf-8"))
        content |= {"out": out, "seed": seed}
        content["data"]["train"][source] = {"path": out, "weight": weight}
        content["stages"][0] |= {"learning_rate": rate, "shortest_first": flag, "micro_batch_seconds": micro}
        layer.write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
        recipe = load_recipe([layer])
        assert (recipe.out, recipe.seed, recipe.stages[0].learning_rate) == (out, seed, rate)
        assert recipe.data.train[source].weight == weight
        written = Path(folder) / "written.yaml"
        written.write_text(dump_recipe(recipe), "utf-8")
        assert load_recipe([written]) == recipe
        assert dump_recipe(load_recipe([written])) == written.read_text("utf-8")


def test_show_prints_what_train_would_run(layer, capsys):
    from osum_npu.cli.main import main

    assert main(["show", str(layer), "stages.0.steps=77"]) == 0
    assert capsys.readouterr().out == dump_recipe(load_recipe([layer], ["stages.0.steps=77"]))
    assert main(["show", str(layer), "stages.0.steps=0"]) == 2
    assert "stages.0.steps" in capsys.readouterr().err


def test_missing_files_of_a_saved_model(layer, tmp_path):
    (tmp_path / "config.json").touch()
    recipe = load_recipe([layer], [f"model={{kind: saved, path: {tmp_path}}}"])
    assert all(line.startswith("data.") for line in missing_files(recipe))
