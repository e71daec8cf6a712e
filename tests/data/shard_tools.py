"""Small shards for the tests: short noises and the members that OSUM's own writer makes."""

import io
import json
import tarfile

import numpy as np
import soundfile


def noise(seconds=0.1, seed=0, rate=16000):
    """16-bit noise that no other seed gives."""
    return (3000 * np.random.default_rng(seed).normal(size=round(seconds * rate))).clip(-32768, 32767).astype(np.int16)


def encoded(samples, rate=16000, container="WAV", coding="PCM_16"):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=container, subtype=coding)
    return stream.getvalue()


def write_tar(path, members):
    """Write members (name, content) or ready headers."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            data = content if isinstance(content, bytes) else content.encode()
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def utterance(key, seed=0, seconds=0.1, **fields):
    """Members of one utterance, plain ones unless fields say otherwise."""
    sound = fields.pop("sound", ("wav", encoded(noise(seconds, seed))))
    given = {"txt": f"hello {seed}", **fields}
    members = [(f"{key}.{sound[0]}", sound[1])] if sound else []
    for name, value in given.items():
        if value is not None:
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
            members.append((f"{key}.{name}", text))
    return members


def shard(path, keys, **fields):
    """Write a shard whose utterances differ in their sound."""
    first = sum(map(ord, path.name))
    return write_tar(path, [m for i, key in enumerate(keys) for m in utterance(key, first + i, **fields)])


def write_list(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path
