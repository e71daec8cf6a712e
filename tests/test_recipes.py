"""Every recipe that is shipped can be read, and the words around it are true."""

from pathlib import Path

import pytest

from osum_npu.config import NewModel, dump_recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


def test_there_are_recipes():
    assert any(path.parent.name == "quickstart" for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_parses_and_is_written_as_it_was_read(path, tmp_path):
    recipe = load_recipe([path])
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), "utf-8")
    assert load_recipe([tmp_path / "again.yaml"]) == recipe
    assert recipe.data.train


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_part_of_a_new_model_learns_in_some_stage(path):
    recipe = load_recipe([path])
    if isinstance(recipe.model, NewModel) and recipe.model.llm.kind == "random":
        learned = {part for stage in recipe.stages for part in stage.trainable}
        assert {"encoder", "adapter", "llm"} <= learned
        assert ("ctc" in learned) == recipe.model.ctc
        assert "lora" in learned or recipe.model.lora is None
