"""YAML as plain values, for the files that an operator writes by hand. A key that stands twice is an error."""

from __future__ import annotations

from typing import Any

import yaml


def read_yaml(text: str | bytes) -> Any:
    """raises: ValueError in one line if it is not YAML, repeats a key, or holds what there can't be (2024-13-45)"""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _refuse_repeated(root)
        return None if root is None else loader.construct_document(root)
    except Exception as error:  # PyYAML's own, and Python's for a date or number that it can't build
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error


def _refuse_repeated(root: Any) -> None:
    """PyYAML takes the last of two, and what stands under the first would be gone without a word."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias may lead back to what it stands in
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = set[str]()
            for key, value in node.value:
                waiting += [key, value]
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        raise ValueError(f"key {key.value!r} is given twice, again in line {key.start_mark.line + 1}")
                    keys.add(key.value)
