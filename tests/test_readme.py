"""What the README and the pages beside it tell a user to type works.

A fenced block of bash with `<!-- test -->` on the line before it, or the word `test` after the
language, is run from top to bottom, every command with the overrides of `TINY`. The commands of all
other blocks must at least compose.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from runtime.run import load_summary
from tests.support import ROOT

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(
    r"(?P<mark><!-- test -->\n)?```bash(?P<info>[^\n]*)\n(?P<body>.*?)```", re.DOTALL
)
MAIN = ["python", "main.py"]
# What makes a command take seconds: a model of a few thousand weights, two steps.
TINY = {
    "train": (
        "model.hidden_size=16", "model.n_blocks=1", "model.n_heads=2", "trainer=cpu",
        "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1",
        "trainer.enable_progress_bar=false", "loader.global_batch_size=2",
    ),
    "ppl_eval": ("trainer=cpu", "eval.limit_rows=2", "eval.num_draws=1"),
    "sample_eval": ("trainer=cpu", "sampling.batch_size=1", "sampling.length=16"),
    "depth_eval": ("trainer=cpu", "eval.limit_rows=2", "eval.num_draws=1", "mode.num_samples=2"),
    "audit": (),
    "compare": ("trainer=cpu",),
}  # fmt: skip

pytestmark = pytest.mark.skipif(not README.is_file(), reason="README.md is absent")


class Block(NamedTuple):
    """The commands of a fenced block, and whether they are to be run."""

    line: int
    tested: bool
    commands: list[list[str]]


def blocks(text: str) -> Iterator[Block]:
    """Blocks of shell commands; comments are left out, lines that end in a backslash are joined."""
    for found in FENCE.finditer(text):
        body = found["body"].replace("\\\n", " ")
        commands = [shlex.split(line, comments=True) for line in body.splitlines()]
        tested = found["mark"] is not None or "test" in found["info"].split()
        yield Block(text[: found.start()].count("\n") + 1, tested, list(filter(None, commands)))


def main_commands(tested: bool) -> list:
    """Arguments of the `python main.py` commands, each with its line as the name of its test."""
    return [
        pytest.param(command[2:], id=f"{page.stem}-line{block.line}-{number}")
        for page in PAGES
        if page.is_file()
        for block in blocks(page.read_text())
        for number, command in enumerate(block.commands)
        if block.tested == tested and command[:2] == MAIN
    ]


def mode_of(arguments: list[str]) -> str:
    """The mode that a command line asks for."""
    return next((text[5:] for text in arguments if text.startswith("mode=")), "train")


def placed(folder: Path, arguments: list[str]) -> list[str]:
    """A command line with tiny overrides that writes below `folder` alone."""
    arguments = [text.replace("=outputs/", f"={folder}/outputs/") for text in arguments]
    tiny = TINY[mode_of(arguments)]
    if "--multirun" in arguments:
        return [*arguments, *tiny, f"hydra.sweep.dir={folder}/sweep"]
    named = any(text.startswith("paths.run_dir=") for text in arguments)
    return [*arguments, *tiny, *([] if named else [f"paths.run_dir={folder}/run"])]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """For the folders that a command names and a later one reads, and for the token cache."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("arguments", main_commands(tested=True))
def test_command_runs(arguments, shared, tmp_path, call):
    # Commands that name no folder must not find each other's checkpoints.
    folder = shared if any("outputs/" in text for text in arguments) else tmp_path
    done = call(*placed(folder, arguments), f"paths.cache_dir={shared}/cache")
    assert done.returncode == 0, done.stderr
    summaries = list(folder.rglob("summary.json"))
    assert summaries and all(load_summary(path.parent)["status"] == "done" for path in summaries)


@pytest.mark.parametrize("arguments", main_commands(tested=False))
def test_command_composes(arguments):
    overrides = [text for text in arguments if not text.startswith("--")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    # Of a sweep, the first value of every key.
    plain = [
        f"{item.key_or_group}={next(iter(item.sweep_string_iterator()))}"
        if item.is_sweep_override() else text
        for item, text in zip(parsed, overrides, strict=True)
        if not item.key_or_group.startswith("hydra")
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("config", plain)
    values = [item for item in parsed if "." in item.key_or_group and not item.is_sweep_override()]
    for item in values:
        if not item.key_or_group.startswith("hydra"):
            assert OmegaConf.select(cfg, item.key_or_group) == item.value(), item.input_line


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(
        r"\bmake ([a-z0-9-]+)", " ".join(re.findall(r"`([^`]*)`", README.read_text()))
    )
    in_blocks = [
        c[1] for block in blocks(README.read_text()) for c in block.commands if c[0] == "make"
    ]
    assert {*named, *in_blocks} <= targets


def test_links_and_files_exist():
    text = README.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    tests = re.findall(r"`(tests/[\w./]+)`", text)
    missing = [path for path in (*links, *tests) if not (ROOT / path).exists()]
    assert not missing


def test_the_reader_of_blocks():
    joined = "a\n```bash test\npython main.py a=1 \\\n  b=2  # why\n```\n"
    marked, plain = "<!-- test -->\n```bash\nls\n```\n", "```bash\nls\n```\n"
    first, second, third = blocks(joined + marked + plain)
    assert first == Block(2, True, [["python", "main.py", "a=1", "b=2"]])
    assert second.tested and not third.tested
    assert second.commands == third.commands == [["ls"]]
