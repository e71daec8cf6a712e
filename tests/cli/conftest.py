"""What the tests of the verbs share: the CPU, and a manifest of twenty faults."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
from faults import TWENTY


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("OSUM_BACKEND", "cpu")
    with tiny.one_thread():
        yield


@pytest.fixture
def faulty(corpus, tmp_path):
    """A manifest with a faulty row after every good one, and the line of each fault."""
    good = [json.loads(line) for line in (corpus / "train.jsonl").read_text("utf-8").splitlines()]
    for row in good:
        row["wav"] = str(corpus / row["wav"])
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").touch()
    whole = Path(good[0]["wav"]).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    lines, places = [], {}
    for row, name in zip(good, [*TWENTY, *[None] * len(good)], strict=False):
        lines.append(json.dumps(row).encode())
        if name is not None:
            change = TWENTY[name][0]
            plain = {"key": f"bad {name}", "wav": good[0]["wav"], "txt": "do"}
            lines.append(change if isinstance(change, bytes) else json.dumps({**plain, **change}).encode())
            places[name] = len(lines)
    manifest = tmp_path / "faulty.jsonl"
    manifest.write_bytes(b"\n".join(lines) + b"\n")
    return manifest, places, len(good)
