"""What the documents say is true of the code: links, commands, recipe fields, variables."""

import argparse
import contextlib
import dataclasses
import io
import re
import shlex
import typing
from pathlib import Path

import pytest
import yaml

from osum_npu import config, launch
from osum_npu.cli.data import CORPORA
from osum_npu.cli.main import make_parser
from osum_npu.data.row import FIELDS, STYLE_NAMES
from osum_npu.inference.decoding import DECODINGS, LOOP_BLOCK, LOOP_REPEATS, LOOP_TOKENS
from osum_npu.tasks import LISTED

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / "recipes").glob("**/*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
QUICKSTART = ROOT / "recipes/quickstart/recipe.yaml"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPOKEN = re.compile(r"`(osum-npu [^`]+)`")
VARIABLE = re.compile(r"""["']([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)["']""")
NO_VARIABLES = {"CAUSAL_LM", "CHAT_SEPARATOR", "FSDD_DIR", "PCM_16", "SC_PAGE_SIZE", "SC_PHYS_PAGES"}
NO_VARIABLES |= {"MS_SCHED", "MS_WORKER"}
"""Constants in capitals that name something else."""

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def text(name):
    return (ROOT / name).read_text("utf-8")


def prose(path):
    return FENCE.sub("", path.read_text("utf-8"))


def blocks(path, *languages):
    return [block for language, block in FENCE.findall(path.read_text("utf-8")) if language in languages]


def anchors(path):
    """Names by which GitHub links to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(path):
    """Every ``osum-npu …`` in a document's shell blocks, as words."""
    for block in blocks(path, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                del words[0]
            if words and Path(words[0]).name == "osum-npu":
                yield words[1:]


def parse(words):
    """Return argparse's exit status and what it printed; None where the words are a whole command."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            make_parser().parse_args(words)
    except SystemExit as end:
        return end.code, printed.getvalue()
    return None, ""


def test_there_is_something_to_check():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {path.name for path in DOCUMENTS}
    assert len(list(command_lines(ROOT / "README.md"))) >= 5


@document
def test_links_lead_somewhere(path):
    for link in LINK.findall(prose(path)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path}: {link}"
        assert target.is_relative_to(ROOT), f"{path}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{path}: {link}; the headings are {anchors(target)}"


@document
def test_commands_parse(path):
    for words in command_lines(path):
        status, message = parse(words)
        assert status is None, f"{path}: osum-npu {shlex.join(words)}: {message}"


@document
def test_commands_named_in_a_sentence_exist(path):
    for spoken in SPOKEN.findall(prose(path)):
        words = shlex.split(spoken)[1:]
        verbs = [word for word in words if re.fullmatch(r"[a-z]+", word)]
        options = [word for word in words if word.startswith("--")]
        status, help_text = parse([*verbs, "--help"])
        assert status == 0, f"{path}: {spoken}"
        assert all(option in help_text for option in options), f"{path}: {spoken}"


@document
def test_recipes_in_documents_are_valid(path, tmp_path):
    for number, block in enumerate(blocks(path, "yaml")):
        layer = tmp_path / f"{number}.yaml"
        layer.write_text(block, "utf-8")
        config.load_recipe([QUICKSTART, layer])


def test_commands_are_found_in_a_document(tmp_path):
    path = tmp_path / "x.md"
    path.write_text(
        "```sh\nOSUM_BACKEND=cpu .venv/bin/osum-npu train a.yaml \\\n  b=1  # so\nmake test\n```\n", "utf-8"
    )
    assert list(command_lines(path)) == [["train", "a.yaml", "b=1"]]
    assert parse(["train"])[0] == 2
    assert parse(["fly", "--help"])[0] == 2


def test_every_variable_is_documented():
    code = [path for room in ("osum_npu", "backends", "ops", "recipes") for path in (ROOT / room).rglob("*.py")]
    found = {name for path in code for name in VARIABLE.findall(path.read_text("utf-8"))}
    found |= {
        name for path in ROOT.glob("tests/**/*.py") for name in re.findall("OSUM_[A-Z_]+", path.read_text("utf-8"))
    }
    found |= {value for name, value in vars(launch).items() if name.isupper() and isinstance(value, str)}
    found |= {
        name for path in ROOT.glob("scripts/*") for name in re.findall(r"\bOSUM_[A-Z_]+", path.read_text("utf-8"))
    }
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", text("docs/environment.md")))
    assert {"OSUM_BACKEND", "RANK"} <= found
    assert found - documented - NO_VARIABLES == set()


def test_every_documented_variable_of_the_project_is_used():
    ours, _, _ = text("docs/environment.md").partition("## Read by the libraries")
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", ours))
    places = [
        *ROOT.glob("osum_npu/**/*.py"),
        *ROOT.glob("backends/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("scripts/*"),
        ROOT / "Makefile",
    ]
    places.remove(Path(__file__))
    used = "\n".join(path.read_text("utf-8") for path in places)
    assert [name for name in documented if not re.search(rf"\b{name}\b", used)] == []


def test_the_test_command_of_the_readme_is_that_of_continuous_integration():
    commands = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    assert "make test" in commands
    assert re.search(r"\bmake\b.* test$", text(".ci/run"), re.MULTILINE)


def recipe_classes(kind=config.Recipe):
    """Yield the recipe and every typed part of it."""
    if dataclasses.is_dataclass(kind):
        yield kind
        parts = typing.get_type_hints(kind).values()
    else:
        parts = typing.get_args(kind)
    for part in parts:
        yield from recipe_classes(part)


RECIPE_CLASSES = list(dict.fromkeys(recipe_classes()))


def default_words(field):
    """A field's default as docs/recipes.md writes it."""
    default = field.default
    if hasattr(default, "is_required"):  # pydantic's Field
        if default.is_required():
            return "needed"
        default = default.get_default(call_default_factory=True)
    if default is dataclasses.MISSING:
        return "needed"
    if dataclasses.is_dataclass(default):
        return "its defaults"
    plain = list(default) if isinstance(default, tuple) else default
    return f"`{yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip()}`"


@pytest.mark.parametrize("kind", RECIPE_CLASSES, ids=lambda kind: kind.__name__)
def test_every_recipe_field_is_documented_with_its_default(kind):
    sections = re.split(r"^## (\w+)\n", text("docs/recipes.md"), flags=re.MULTILINE)
    section = dict(zip(sections[1::2], sections[2::2], strict=True))[kind.__name__]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    documented = {name.strip("`"): default for name, _, default, _ in rows[2:]}
    assert documented == {field.name: default_words(field) for field in dataclasses.fields(kind)}


def test_the_recipe_has_the_parts_that_users_set():
    assert {"Stage", "Source", "NewModel", "SpecAugmentConfig", "LoraSettings"} <= {k.__name__ for k in RECIPE_CLASSES}


@pytest.mark.parametrize("task", LISTED.values(), ids=lambda task: task.name)
def test_every_task_is_documented(task):
    page = text("docs/tasks.md")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{task.name}` | `{task.code}`"))
    assert f"`{task.tag}`" in row
    for label in task.labels:
        assert f"`{label}`" in page


def test_decodings_are_documented():
    _, help_text = parse(["infer", "--help"])
    named = re.search(r"--decoding NAME\s+(.*?)\s+\(default", help_text, re.DOTALL)[1]
    assert set(re.findall(r"[\w-]+", named)) - {"or"} == set(DECODINGS)
    assert [name for name in DECODINGS if f"\n| `{name}` |" not in text("docs/tasks.md")] == []
    page = " ".join(text("docs/tasks.md").split())
    assert f"at most {LOOP_BLOCK} tokens that stands at least four times" in page
    assert f"makes at least {LOOP_TOKENS} tokens" in page
    assert LOOP_REPEATS == 4


def test_style_names_are_documented():
    lines = text("docs/tasks.md").splitlines()
    for name, label in STYLE_NAMES.items():
        assert any(line.startswith(f"| `{label}` |") and f"`{name}`" in line for line in lines), name


@pytest.mark.parametrize("name", [*FIELDS, *CORPORA])
def test_every_manifest_field_and_corpus_is_documented(name):
    assert re.search(rf"^\|.*`{name}`", text("docs/data.md"), re.MULTILINE)


def test_every_stage_of_the_quickstart_is_told():
    stages = yaml.safe_load(QUICKSTART.read_text("utf-8"))["stages"]
    told = text("recipes/quickstart/README.md")
    assert [stage["name"] for stage in stages if f"| `{stage['name']}` |" not in told] == []


def test_every_verb_is_in_the_changelog():
    verbs = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert [verb for verb in verbs if f"`{verb}`" not in text("CHANGELOG.md")] == []
