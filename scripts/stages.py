"""Recipes of several runs of main.py: each is a stage, and a finished one is not run again."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Overrides that name a file whose content matters, not only its place.
_FILES = ("eval.checkpoint_path=", "training.from_pretrained=")


class Stages:
    """Stages below one folder, of which `jobs` may run at a time."""

    def __init__(self, out: Path, jobs: int) -> None:
        self.out, self.jobs = out, jobs

    def run(self, name: str, *overrides: str) -> dict:
        """One stage, by the name of its folder."""
        print(f"{name} ...", flush=True)
        metrics = stage(self.out / name, *overrides)
        shown = {key: value for key, value in metrics.items() if key.count("/") < 2}
        print(f"{name}: {dict(list(shown.items())[:12])}", flush=True)
        return metrics

    def together(self, calls: Sequence[Callable[[], object]]) -> None:
        """Several stages, `jobs` at a time."""
        with ThreadPoolExecutor(self.jobs) as pool:
            for done in [pool.submit(call) for call in calls]:
                done.result()


def stage(folder: Path, *overrides: str) -> dict:
    """Run main.py into `folder` unless that is done; returns its summary's metrics.

    Done means with the same overrides and the same checkpoint. A training that was broken off goes
    on where it was.
    """
    files = (text for text in overrides if text.startswith(_FILES))
    asked = [*overrides, *map(_state, files)]
    note, summary = folder / "done.json", folder / "summary.json"
    if not note.is_file() or json.loads(note.read_text()) != asked:
        if note.is_file() and (folder / "checkpoints").is_dir():
            # It would resume, from weights that answer another question.
            raise SystemExit(f"{folder}: trained with other overrides; give another --out")
        note.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "main.py"), f"paths.run_dir={folder}", *overrides]
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / "output.log"
        with output.open("w") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            said = output.read_text(errors="replace").rstrip().rpartition("\n")[2]
            raise SystemExit(f"{folder}: exit {done.returncode}: {said} ({output} has all of it)")
        note.write_text(json.dumps(asked))
    return json.loads(summary.read_text())["metrics"]


def _state(override: str) -> str:
    """Tells one content of the file that an override names from another."""
    status = Path(override.partition("=")[2]).stat()
    return f"{status.st_size} bytes, {status.st_mtime_ns}"
