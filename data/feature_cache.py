"""What a frozen target says of every token of a data set, on disk: asked once, read many times.

A folder holds, per split, three arrays with one entry per token (padding has none) and the place
where every row begins: the tapped layers, e = W^T p and H(p) of the target's next-token
distribution p. `manifest.json` says of which rows, which target and which layers they are; rows are
written in order, so a killed writer goes on where it was.

Legend: R rows, L tokens of a row, T tokens of all rows, E width of the taps, D features, U places.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.storage import atomic_file

FORMAT = "palimpsest.features.1"
MANIFEST = "manifest.json"
SETTING = "algo.feature_cache"
# numpy has no bfloat16; the bits are kept as integers.
DTYPES = {"float32": (torch.float32, np.float32), "bfloat16": (torch.bfloat16, np.uint16)}


class Sizes(NamedTuple):
    """Shape of a split's arrays: R rows with T tokens, E and D features."""

    rows: int
    tokens: int
    taps: int
    features: int

    def bytes(self, dtype: str) -> int:
        """What the arrays take on disk."""
        width = np.dtype(DTYPES[dtype][1]).itemsize
        return self.tokens * ((self.taps + self.features) * width + 4) + 8 * (self.rows + 1)


class FeatureCache:
    """One split of a folder.

    Args:
        folder: the folder.
        split: train, validation or test.
        identity: what the features are of; compared with what the folder says.

    Raises:
        DataError: it is not there, not finished, or of something else.
    """

    def __init__(self, folder: str | Path, split: str, identity: Mapping[str, Any]) -> None:
        self.folder, self.split = Path(folder), split
        manifest = read_manifest(self.folder, split)
        if manifest is None:
            raise DataError(
                f"{SETTING}={folder}: no features of {split}; python main.py mode=cache_features"
                " writes them"
            )
        check_identity(manifest, identity, self.folder)
        self.sizes = Sizes(*manifest["sizes"])
        if manifest["rows_done"] < self.sizes.rows:
            raise DataError(
                f"{SETTING}={folder}: {split} has {manifest['rows_done']} of {self.sizes.rows}"
                " rows; run mode=cache_features again, it goes on where it was"
            )
        self.dtype = manifest["dtype"]
        self._start = np.load(_path(self.folder, split, "start.npy"))
        self._arrays = _open_arrays(self.folder, split, self.sizes, self.dtype, "r")

    def taps(self, row_B: Tensor, length: int) -> Tensor:
        """[B, L, E] the tapped layers of rows, 0 on padding."""
        result = torch.zeros(len(row_B), length, self.sizes.taps)
        for place, row in enumerate(row_B.tolist()):
            here = slice(self._start[row], self._start[row + 1])
            values = _to_tensor(self._arrays["taps"][here], self.dtype)
            result[place, : len(values)] = values
        return result

    def predictions(self, row_U: Tensor, place_U: Tensor) -> tuple[Tensor, Tensor]:
        """e [U, D] and H [U] at places of rows."""
        token_U = self._start[row_U.numpy()] + place_U.numpy()
        expected = _to_tensor(self._arrays["expected"][token_U], self.dtype)
        return expected.float(), torch.from_numpy(self._arrays["entropy"][token_U])


class FeatureWriter:
    """Writes one split, row after row.

    Args:
        folder, split, identity: see `FeatureCache`.
        lengths_R: tokens of every row.
        taps, features: E and D.
        dtype: float32 or bfloat16.

    Raises:
        DataError: another cache is there, or the disk has no room for this one.
    """

    def __init__(
        self, folder: str | Path, split: str, identity: Mapping[str, Any],
        lengths_R: Sequence[int] | np.ndarray, taps: int, features: int, dtype: str,
    ) -> None:  # fmt: skip
        if dtype not in DTYPES:
            raise DataError(f"mode.dtype={dtype}: allowed {', '.join(DTYPES)}")
        self.folder, self.split, self.dtype = Path(folder), split, dtype
        self._start = np.append(0, np.cumsum(np.asarray(lengths_R, dtype=np.int64)))
        self.sizes = Sizes(len(lengths_R), int(self._start[-1]), taps, features)
        manifest = read_manifest(self.folder, split)
        if manifest is not None:
            check_identity(manifest, identity, self.folder)
            if manifest["dtype"] != dtype or list(manifest["sizes"]) != list(self.sizes):
                raise DataError(f"{folder}: holds features of {split} in another form; remove it")
        self._manifest: dict[str, Any] = manifest or {
            "format": FORMAT, "identity": dict(identity), "sizes": list(self.sizes),
            "dtype": dtype, "rows_done": 0,
        }  # fmt: skip
        if manifest is None:
            self._require_room()
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(_path(self.folder, split, "start.npy"), SETTING) as file:
                np.save(file, self._start)
        mode = "r+" if manifest else "w+"
        self._arrays = _open_arrays(self.folder, split, self.sizes, dtype, mode)
        if manifest is None:
            self._save()

    @property
    def rows_done(self) -> int:
        """Rows that need not be asked for again."""
        return self._manifest["rows_done"]

    def write(self, taps_BLE: Tensor, expected_BLD: Tensor, entropy_BL: Tensor) -> None:
        """The next rows, padded at their ends."""
        for taps, expected, entropy in zip(taps_BLE, expected_BLD, entropy_BL, strict=True):
            row = self._manifest["rows_done"]
            here = slice(self._start[row], self._start[row + 1])
            size = here.stop - here.start
            self._arrays["taps"][here] = _to_numpy(taps[:size], self.dtype)
            self._arrays["expected"][here] = _to_numpy(expected[:size], self.dtype)
            self._arrays["entropy"][here] = entropy[:size].float().cpu().numpy()
            self._manifest["rows_done"] += 1

    def flush(self) -> None:
        """Bring everything written so far to the disk, then count it."""
        for array in self._arrays.values():
            array.flush()
        self._save()

    def _save(self) -> None:
        with atomic_file(_path(self.folder, self.split, MANIFEST), SETTING) as file:
            file.write(json.dumps(self._manifest, indent=2).encode())

    def _require_room(self) -> None:
        existing = next(p for p in [self.folder, *self.folder.absolute().parents] if p.exists())
        needed, free = self.sizes.bytes(self.dtype), shutil.disk_usage(existing).free
        if needed > free:
            raise DataError(
                f"{self.folder}: features of {self.split} take {needed / 1e9:.1f} GB, the disk has"
                f" {free / 1e9:.1f} GB free; name another folder, or train without a cache"
            )


def read_manifest(folder: Path, split: str) -> dict[str, Any] | None:
    """What a split of a cache says of itself; None if there is none.

    Raises:
        DataError: it is damaged or of another format.
    """
    path = _path(folder, split, MANIFEST)
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        known = manifest["format"] == FORMAT and manifest["dtype"] in DTYPES
        if known and isinstance(manifest["rows_done"], int) and len(manifest["sizes"]) == 4:
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{path}: not a feature cache of this format; remove the folder")


def check_identity(manifest: Mapping[str, Any], identity: Mapping[str, Any], folder: Path) -> None:
    """Raise DataError, naming what differs, unless a cache is of these rows and this target."""
    for key, value in identity.items():
        if manifest["identity"].get(key) != value:
            raise DataError(
                f"{SETTING}={folder}: its {key} is {manifest['identity'].get(key)}, this run has"
                f" {value}; write another cache (mode=cache_features)"
            )


def _path(folder: Path, split: str, name: str) -> Path:
    return folder / f"{split}.{name}"


def _open_arrays(
    folder: Path, split: str, sizes: Sizes, dtype: str, mode: str
) -> dict[str, np.memmap]:
    kind = DTYPES[dtype][1]
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "taps": (kind, (sizes.tokens, sizes.taps)),
        "expected": (kind, (sizes.tokens, sizes.features)),
        "entropy": (np.float32, (sizes.tokens,)),
    }
    arrays: dict[str, np.memmap] = {}
    for name, (form, shape) in shapes.items():
        path = _path(folder, split, f"{name}.bin")
        wanted = int(np.prod(shape)) * np.dtype(form).itemsize
        if mode != "w+" and (not path.is_file() or path.stat().st_size != wanted):
            raise DataError(f"{path}: damaged, {wanted} bytes expected; remove the folder")
        arrays[name] = np.memmap(path, dtype=form, mode=cast(Any, mode), shape=shape)
    return arrays


def _to_numpy(values: Tensor, dtype: str) -> np.ndarray:
    values = values.detach().cpu().to(DTYPES[dtype][0])
    return (values.view(torch.uint16) if dtype == "bfloat16" else values).numpy()


def _to_tensor(values: np.ndarray, dtype: str) -> Tensor:
    tensor = torch.from_numpy(np.array(values))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
