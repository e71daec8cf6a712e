"""The YAML file that WeNet writes beside a checkpoint: step, epoch, losses and the whole configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from osum_npu.layers import plain


class _Loader(yaml.SafeLoader):
    """Reads what Python's own tags mark (tuples, numpy's numbers) as plain lists, mappings and text."""


def _by_form(loader: _Loader, _tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _by_form)


def read_sidecar(checkpoint: Path) -> dict[str, Any]:
    """Read ``NAME.yaml`` beside ``NAME.pt``, or beside the folder that DeepSpeed's file lies in; empty without one.

    Source: wenet/utils/checkpoint.py.

    Raises:
        ValueError: the file is no YAML mapping.
    """
    named = checkpoint.absolute()
    if named.name.startswith("mp_rank_"):
        named = named.parent  # STEP/mp_rank_00_model_states.pt and STEP.yaml
    path = named.with_name(f"{named.name.removesuffix('.pt')}.yaml")
    if not path.is_file():
        return {}
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted a mapping of settings, got {type(content).__name__}")
    settings: dict[str, Any] = plain(content)
    return settings
