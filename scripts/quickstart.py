"""From nothing to samples: train on real English, evaluate, sample, say what came out.

    python scripts/quickstart.py [--out FOLDER] [override ...]

Each stage is one command of main.py, shown before it runs. Started again it goes on where it was:
what is done is not done again, and training resumes.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTE = "done.json"  # what a stage that ended well had been asked
# Threads that sleep while they wait for each other: by default they spin, and if anything else is
# running on two cores, a spinning thread keeps the one it waits for from its core (8 times slower).
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
SAMPLES = ("sampling.batch_size=4", "sampling.nucleus_p=0.9", "sampling.temperature=0.8")


def stage(title: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """Run main.py into `folder`, its output shown as it comes, unless that has been done.

    Returns:
        The summary of the run. Ends this process with main.py's exit code if that failed.
    """
    print(f"\n== {title}", flush=True)
    if is_done(folder, overrides):
        print(f"done before, see {shown(folder)}")
    else:
        arguments = ["main.py", f"paths.run_dir={shown(folder)}", *overrides]
        print(f"$ python {shlex.join(arguments)}\n", flush=True)
        (folder / NOTE).unlink(missing_ok=True)
        code = wait(subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT))
        if code:
            print(f"\nstopped with exit code {code}; the same command goes on from here")
            raise SystemExit(code)
        (folder / NOTE).write_text(json.dumps(overrides))
    return json.loads((folder / "summary.json").read_text())


def wait(process: subprocess.Popen) -> int:
    """The exit code of a process; Ctrl-C reaches it too, and it saves before it ends."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def is_done(folder: Path, overrides: tuple[str, ...]) -> bool:
    """Whether this stage has ended well with these overrides."""
    note = folder / NOTE
    return note.is_file() and json.loads(note.read_text()) == list(overrides)


def shown(path: Path) -> str:
    """A path as a reader in the repository would type it."""
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)


def closing(out: Path, training: dict, likelihood: dict, samples: dict) -> str:
    """What came out, where it is, and what to try next."""
    ppl, unigram = likelihood["metrics"]["ppl"], likelihood["metrics"]["unigram_ppl"]
    train, checkpoint = shown(out / "train"), shown(out / "train" / "checkpoints" / "best.ckpt")
    return f"""
== What came out

validation perplexity   {ppl:.1f} per token (an upper bound)
unigram perplexity      {unigram:.1f}: what knowing the token frequencies alone gives
training                {training["steps"]} steps, {training["wall_s"]:.0f} s
sampling                {samples["metrics"]["tokens_per_s"]:.0f} tokens per second

curves                  {train}/curves.png
metrics                 {train}/metrics.csv
checkpoint              {checkpoint}
samples                 {shown(out / "samples" / "samples.jsonl")}

== What to try next (after `source .venv/bin/activate`)

python main.py --help
python main.py algo=bd3lm block_size=16 training.from_pretrained={checkpoint}
python main.py algo=ar
python main.py mode=sample_eval eval.checkpoint_path={checkpoint} sampling.prompt='The'
python main.py data=text 'data.files=[README.md]'"""


def main() -> None:
    """Three stages and a closing word."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "quickstart")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for training")
    options = parser.parse_args()
    out = options.out.resolve()
    if not is_done(out / "train", tuple(options.overrides)):
        for later in ("likelihood", "samples"):  # of another checkpoint, if they are there
            (out / later / NOTE).unlink(missing_ok=True)
    training = stage("Train on the language reference of Python", out / "train", *options.overrides)
    checkpoint = f"eval.checkpoint_path={shown(out / 'train' / 'checkpoints' / 'best.ckpt')}"
    likelihood = stage("Evaluate", out / "likelihood", "mode=ppl_eval", checkpoint)
    samples = stage("Sample", out / "samples", "mode=sample_eval", checkpoint, *SAMPLES)
    print(closing(out, training, likelihood, samples))


if __name__ == "__main__":
    main()
