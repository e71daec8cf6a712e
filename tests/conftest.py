"""What the tests of training, inference and the command line share: a tiny corpus and a model trained on it."""

import pytest
import tiny
from hypothesis import settings

from osum_npu.training.loop import train

pytest.register_assert_rewrite("replay")
settings.register_profile("any machine", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder with train.jsonl (40 rows) and dev.jsonl (8 rows)."""
    folder = tmp_path_factory.mktemp("corpus")
    tiny.write_corpus(folder / "train.jsonl", 40)
    tiny.write_corpus(folder / "dev.jsonl", 8, seed=1)
    return folder


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    """Folder of an uninterrupted run of the tiny recipe, one thread."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with tiny.one_thread():
        train(tiny.recipe(corpus, out))
    return out


def pytest_collection_modifyitems(items):
    """Put what takes longest first: workers that take whole files would end far apart."""
    items.sort(key=lambda item: "training" not in item.path.parts)
