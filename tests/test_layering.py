"""Imports run one way (the layers are listed in CONTRIBUTING.md): nothing looks up."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

GROUND = {"data"}
BELOW = {
    "objectives": set(),
    "models": {"objectives"},
    "decoding": {"models", "objectives"},
    "data": set(),
    "runtime": {"models", "objectives"},
    "rewards": {"decoding", "models", "objectives"} | GROUND,
    "evaluation": {"rewards", "decoding", "models", "objectives"} | GROUND,
    "callbacks": {"evaluation", "decoding", "models", "objectives", "runtime"} | GROUND,
}
ROOT_MODULES = {path.stem for path in ROOT.glob("*.py")} - {"main"}
OURS = {*BELOW, *ROOT_MODULES, "main", "modes", "tests", "benchmarks", "scripts", "notebooks"}
# What a layer may use besides our own modules and the standard library; None: anything.
SMALL = {"torch", "jaxtyping"}
PRETRAINED = {"transformers", "tokenizers", "safetensors", "huggingface_hub"}
LIBRARIES = {"objectives": SMALL, "models": SMALL | PRETRAINED | {"filelock", "peft"}}
FILES = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.py"), *(p for layer in BELOW for p in (ROOT / layer).rglob("*.py"))]
    if path.name != "main.py"
)


def imported(path: Path) -> Iterator[str]:
    """Top-level names of all imports of a file, also of those inside functions."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield (node.module or "").split(".")[0]


def allowed(path: Path) -> set[str]:
    """Our own names that a file may import."""
    layer = path.parts[0]
    if layer in BELOW:
        return BELOW[layer] | {layer}
    return {*BELOW, *ROOT_MODULES}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_looks_up(path):
    wrong = (set(imported(path)) & OURS) - allowed(path)
    assert not wrong, f"{path} imports {sorted(wrong)}"


@pytest.mark.parametrize("layer", LIBRARIES)
def test_low_layers_use_few_libraries(layer):
    known = OURS | LIBRARIES[layer] | sys.stdlib_module_names
    used = {name for path in FILES if path.parts[0] == layer for name in imported(path)}
    assert used <= known, f"{layer} uses {sorted(used - known)}"


def test_the_check_sees_a_wrong_import(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text("import os\ndef f():\n    from modes.train import run\n")
    assert set(imported(file)) == {"os", "modes"}
