"""Hydra reads, finds and merges the same files once: a twentieth of a second instead of a fifth."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, create_defaults_list
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
_load = ConfigRepository.load_config
_merge = ConfigLoaderImpl._compose_config_from_defaults_list
# Pickled, because that makes a copy in a sixth of the time of a deep copy.
_loaded: dict[tuple, bytes] = {}
_merged: dict[tuple, bytes] = {}
_lists: dict[tuple, DefaultsList] = {}


@contextmanager
def remembering() -> Iterator[None]:
    """Inside, Hydra remembers what it has made of the files of the project.

    Which files those are depends on the overrides that choose options; values are set later, on a
    copy. Files elsewhere are read each time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", _load_of)
        patch.setattr(config_loader_impl, "create_defaults_list", _list_of)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", _merge_of)
        yield


def _load_of(self: ConfigRepository, config_path: str) -> Any:
    places = _places(self)
    if places is None:
        return _load(self, config_path)
    key = (places, config_path)
    if key not in _loaded:
        _loaded[key] = pickle.dumps(_load(self, config_path))
    return pickle.loads(_loaded[key])


def _list_of(
    repo: Any, config_name: str, overrides_list: list, prepend_hydra: bool, skip_missing: bool
) -> DefaultsList:
    options = (repo, config_name, overrides_list, prepend_hydra, skip_missing)
    places = _places(repo)
    if places is None:
        return create_defaults_list(*options)
    values = Overrides(repo, overrides_list).config_overrides
    choices = tuple(o.input_line for o in overrides_list if all(o is not v for v in values))
    key = (places, config_name, choices, prepend_hydra, skip_missing)
    if key not in _lists:
        _lists[key] = create_defaults_list(*options)
    return replace(_lists[key], config_overrides=values)


def _merge_of(self: ConfigLoaderImpl, defaults: list, repo: Any) -> DictConfig:
    places = _places(repo)
    if places is None:
        return _merge(self, defaults, repo)
    key = (places, repr(defaults))
    if key not in _merged:
        _merged[key] = pickle.dumps(_merge(self, defaults, repo))
    return pickle.loads(_merged[key])


def _places(repo: Any) -> tuple[str, ...] | None:
    """Where the files lie; None if some are not of the project."""
    sources = repo.get_sources()
    own = [s.scheme() != "file" or Path(s.path).is_relative_to(ROOT) for s in sources]
    return tuple(source.path for source in sources) if all(own) else None
