"""Statistics of a data set, counted here by hand."""

import json

import pytest
import soundfile
from shard_tools import encoded, noise, shard, write_list

from osum_npu.cli.main import main
from osum_npu.data.manifest import write_manifest
from osum_npu.data.statistics import BINS, measure
from osum_npu.tasks import Utterance


@pytest.fixture
def sources(tmp_path):
    soundfile.write(tmp_path / "one.wav", noise(1.0), 16000)
    soundfile.write(tmp_path / "two.wav", noise(2.0, 1), 16000)
    (tmp_path / "same.wav").write_bytes((tmp_path / "one.wav").read_bytes())
    one, two, same = (str(tmp_path / f"{name}.wav") for name in ("one", "two", "same"))
    write_manifest(
        tmp_path / "m.jsonl",
        [
            Utterance(key="a", wav=one, text="hello 你好", lang="en", speaker="s", labels={"gender": "male"}),
            Utterance(key="b", wav=two, text="so so", lang="en", speaker="t", labels={"gender": "female"}, reply="x"),
            Utterance(key="c", wav=same, labels={"gender": "male", "age": "old"}, speaker="s"),
            Utterance(key="d", wav=two, start=0.5, end=1.0, duration=0.5, lang="zh"),
            Utterance(key="e", wav=str(tmp_path / "gone.wav"), lang="zh"),
        ],
    )
    shard(tmp_path / "0.tar", ["a", "z"], seconds=0.25, lang="zh")
    return [tmp_path / "m.jsonl", write_list(tmp_path / "shards_list.txt", "0.tar")]


def amounts(table):
    return {name: (amount.rows, round(amount.seconds, 4)) for name, amount in table.items()}


def test_all_is_counted(sources, tmp_path):
    found = measure(sources)
    assert (found.total.rows, found.total.seconds) == (6, 5.0)
    assert amounts(found.sources) == {str(sources[0]): (4, 4.5), str(sources[1]): (2, 0.5)}
    assert amounts(found.tasks) == {"asr": (4, 3.5), "gender": (3, 4.0), "age": (1, 1.0), "chat": (1, 2.0)}
    assert {task: amounts(labels) for task, labels in found.labels.items()} == {
        "gender": {"female": (1, 2.0), "male": (2, 2.0)},
        "age": {"old": (1, 1.0)},
    }
    assert amounts(found.languages) == {"en": (2, 3.0), "": (1, 1.0), "zh": (3, 1.0)}
    assert (found.speakers, found.texts) == (2, 4)
    texts = ["hello你好", "so so", *(f"hello {sum(map(ord, '0.tar')) + i}" for i in range(2))]
    assert found.words == 3 + 2 + 2 * 2
    letters = "".join(texts).replace(" ", "")
    assert (found.characters, found.distinct_characters) == (len(letters), len(set(letters)))
    assert found.seconds["0"] == 0.25
    assert found.seconds["1"] == 2.0
    assert found.seconds["mean"] == pytest.approx(5 / 6)
    assert len(found.histogram) == BINS
    assert sum(count for _, count in found.histogram) == 6
    assert found.same_key == {"a": [str(source) for source in sources]}
    assert found.same_sound == [[f"{sources[0]}: a", f"{sources[0]}: c"]]
    [fault] = found.faults
    assert fault.startswith(f"{sources[0]}: e: cannot read {tmp_path / 'gone.wav'}")


def test_sounds_are_alike_only_in_the_same_span_and_to_the_byte(tmp_path):
    soundfile.write(tmp_path / "one.wav", noise(1.0), 16000)
    other = noise(1.0)
    other[-1] += 1
    (tmp_path / "two.wav").write_bytes(encoded(other))
    spans = {"a": ("one", 0.0, 0.5), "b": ("one", 0.5, 1.0), "c": ("one", 0.0, 0.5), "d": ("two", 0.0, 0.5)}
    write_manifest(
        tmp_path / "m.jsonl",
        [
            Utterance(key=key, wav=str(tmp_path / f"{name}.wav"), start=start, end=end, duration=0.5)
            for key, (name, start, end) in spans.items()
        ],
    )
    assert measure([tmp_path / "m.jsonl"]).same_sound == [[f"{tmp_path / 'm.jsonl'}: {key}" for key in "ac"]]


def test_the_verb_writes_a_page(sources, tmp_path, capsys):
    assert main(["data", "stats", *map(str, sources), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 keys in several sources, 1 sounds twice, 1 faults" in printed
    stats = json.loads((tmp_path / "out" / "stats.json").read_text("utf-8"))
    assert stats["total"] == {"rows": 6, "seconds": 5.0}
    page = (tmp_path / "out" / "stats.html").read_text("utf-8")
    assert page.count("<rect ") == BINS
    for words in ("Labels of gender", "gone.wav", "not given", "Keys in several sources: 1", "0.001 h"):
        assert words in page
    assert "http://" not in page
    assert "https://" not in page
    assert main(["data", "stats", str(sources[0]), "--out", str(tmp_path / "out"), "--no-audio"]) == 0
    (tmp_path / "bad.jsonl").write_text("{")
    assert main(["data", "stats", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out")]) == 2


def test_names_in_the_page_are_text(sources, tmp_path):
    evil = "<script>alert(1)</script>"
    write_manifest(tmp_path / "m.jsonl", [Utterance(key=evil, wav=str(tmp_path / "one.wav"))])
    shard(tmp_path / "0.tar", ["x"], extra={"osum_npu": {"key": evil}})
    main(["data", "stats", *map(str, sources), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "stats.html").read_text("utf-8")
    assert "&lt;script&gt;alert" in page
    assert "<script>" not in page
