"""Settings in layers: YAML files, then ``dotted.key=value``, with the file and line of each for messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

Place = tuple[Any, ...]
"""Names and list indices that lead to a setting: ``("stages", 0, "steps")``."""


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number, as YAML 1.2 does; YAML 1.1 wants a point and a sign in it."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that :class:`_Loader` would read as a number."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_layers(
    layers: Iterable[str | Path], overrides: Iterable[str]
) -> tuple[dict[str, Any], dict[Place, str], list[str]]:
    """Read and merge settings.

    Args:
        layers: YAML files; a later one wins, mappings are merged, lists and mappings of another ``kind`` replaced.
        overrides: ``dotted.key=value`` with a YAML value; a number in the key picks from a list.

    Returns:
        (settings, where each comes from, a line for every fault).
    """
    settings: dict[str, Any] = {}
    origins: dict[Place, str] = {}
    faults: list[str] = []
    for layer in layers:
        try:
            text = Path(layer).read_text("utf-8")
            node = yaml.compose(text, _Loader)
            content = yaml.load(text, _Loader)
        except OSError as error:
            faults.append(f"{layer}: cannot be read: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            faults.append(f"{layer}: is no YAML: {' '.join(str(error).split())}")
        else:
            if isinstance(content, dict) and node is not None:
                _merge(settings, plain(content))
                faults += _note_origins(node, (), str(layer), origins)
            else:
                faults.append(f"{layer}: wanted a mapping of settings, got {type(content).__name__}")
    faults += [fault for override in overrides if (fault := _override(settings, override, origins))]
    return settings, origins, faults


def write_yaml(settings: Mapping[str, Any]) -> str:
    """Write settings so that :func:`read_layers` reads the same."""
    text: str = yaml.dump(plain(settings), Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=100)
    return text


def plain(value: Any) -> Any:
    """Copy settings as JSON would: names are text, and nothing is shared between two places."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def fault_line(place: Place, message: str, origins: Mapping[Place, str]) -> str:
    """Write one fault with the nearest known origin."""
    known: Place = next((place[:n] for n in range(len(place), 0, -1) if place[:n] in origins), ())
    origin = f"{origins[known]}: " if known in origins else ""
    return f"{origin}{_dotted(place) or 'recipe'}: {message}"


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        old = into.get(key)
        # another kind has other settings: what the old one had would only be in the way
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            _merge(old, value)
        else:
            into[key] = value


def _note_origins(node: yaml.Node, place: Place, layer: str, origins: dict[Place, str]) -> list[str]:
    """Remember in which line each setting stands; return a line for each that stands twice in one mapping."""
    faults: list[str] = []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            below = (*place, key.value)
            origins[below] = f"{layer}:{key.start_mark.line + 1}"
            if key.value in seen:
                faults.append(fault_line(below, "is set twice", origins))
            seen.add(key.value)
            faults += _note_origins(value, below, layer, origins)
        return faults
    _forget(place, origins)
    if isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            below = (*place, i)
            origins[below] = f"{layer}:{value.start_mark.line + 1}"
            faults += _note_origins(value, below, layer, origins)
    return faults


def _forget(place: Place, origins: dict[Place, str]) -> None:
    """Drop the origins of what stood below a setting that is replaced as a whole."""
    for below in [known for known in origins if len(known) > len(place) and known[: len(place)] == place]:
        del origins[below]


def _override(settings: dict[str, Any], override: str, origins: dict[Place, str]) -> str:
    """Set one ``dotted.key=value``; return what is wrong with it, or nothing."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        return f"{override}: wanted dotted.key=value"
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return f"{override}: the value is no YAML"
    at: Any = settings
    place: Place = ()
    for part in dotted.split("."):
        if place:
            at = at[place[-1]] if isinstance(at, list) else at.setdefault(place[-1], {})
        if not isinstance(at, list | dict):
            return f"{override}: {_dotted(place)} is {at!r}, which has no settings"
        key = int(part) if isinstance(at, list) and part.isdecimal() else part
        if isinstance(at, list) and key not in range(len(at)):
            return f"{override}: {_dotted(place)} has {len(at)} items, there is no {part!r}"
        place = (*place, key)
    at[place[-1]] = plain(value)
    _forget(place, origins)
    origins[place] = override
    return ""
