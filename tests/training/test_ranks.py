"""Several processes train as one."""

import tiny
from safetensors.torch import load_file

from osum_npu.parity import relative_error
from osum_npu.training.log import read_log
from osum_npu.training.loop import train


def losses(out):
    return [row.get("loss", row.get("ctc_loss")) for row in read_log(out / "log.jsonl") if "learning_rate" in row]


def test_two_processes_learn_what_one_learns(corpus, tmp_path):
    """Steps of odd sizes, micro batches, a step whose second share is empty, a file that only one rank meets."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    lines = (corpus / "train.jsonl").read_text("utf-8").splitlines()
    broken = lines[3].replace("003.wav", "gone.wav").replace(str(corpus), str(tmp_path))
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("\n".join([*lines[:3], broken, *lines[4:]]), "utf-8")
    (tmp_path / "train").symlink_to(corpus / "train")
    changes = [*tiny.WITHOUT_CHANCE, f"data.train.tones.path={manifest}", "stages.2.batch_seconds=1.0"]
    with tiny.one_thread():
        train(tiny.recipe(corpus, alone, *changes))
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", corpus)
    done = tiny.torchrun(recipe, f"out={together}", *changes, processes=2)
    assert done.returncode == 0, done.stdout
    assert "2 × cpu" in done.stdout
    assert len(losses(alone)) == len(losses(together)) == 14
    assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(losses(alone), losses(together)))
    for name in ("model.safetensors", "adapter_model.safetensors"):
        want, got = load_file(alone / "model" / name), load_file(together / "model" / name)
        assert want.keys() == got.keys()
        # AdamW divides by the size of a gradient, so where that is rounding noise the weights differ by more than it.
        assert max(relative_error(got[key], want[key]) for key in want) <= 1e-3
    assert (together / "skipped.txt").read_text("utf-8") == (alone / "skipped.txt").read_text("utf-8")
    resumed = tiny.torchrun(recipe, f"out={together}", *changes, processes=2)
    assert resumed.returncode == 0, resumed.stdout
