"""A configuration without the places of this machine: what others may read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Files of one's own, also where they are named relative to some folder.
_PLACES = (
    "training.from_pretrained", "data.cache_dir", "data.files", "data.valid_files",
    "data.source.files", "data.source.valid_files", "data.parse.folder", "data.parse.model_dir",
    "data.parse.parser.model_dir",
)  # fmt: skip
_ABSOLUTE = re.compile(r"(file:)?[/~\\]|[A-Za-z]:[/\\]|\.\.?[/\\]")


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which files, folders and all texts that begin like a path are null."""
    return _without(config, "")


def _without(value: Any, key: str) -> Any:
    if key in _PLACES:
        return None
    if isinstance(value, Mapping):
        return {
            name: _without(item, f"{key}.{name}" if key else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_without(item, key) for item in value]
    return None if isinstance(value, str) and _is_place(value) else value


def _is_place(text: str) -> bool:
    return bool(_ABSOLUTE.match(text)) or str(Path.home()) in text
