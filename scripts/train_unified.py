"""The published command line of the draft-refine runs, as one of main.py.

    python scripts/train_unified.py --config configs/large_scale/NAME.yaml [KEY=VALUE ...]

becomes `main.py experiment=large_scale/NAME ...`, which it prints and then is. Names that the
published runs have and this project has not:

    combine=beam_bayes | softmax_sampling            bon/proposal=...
    combine=perround | lastround | select_each       bon.score_agg=...
    proposal_temperature=0.7                         bon.proposal.temperature=0.7
    score_scale=learnable | fixed                    scorer.scale.mode=...
    score_scale=b2fix                                scorer.scale.mode=learnable, in fp32
    --resume DIR                                     checkpointing.resume_ckpt_path=DIR

All other overrides are handed on. Unknown names end with exit code 2.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.command import as_text  # noqa: E402
from runtime.devices import global_rank  # noqa: E402
from runtime.errors import ConfigError  # noqa: E402

EXPERIMENTS = ROOT / "configs" / "experiment" / "large_scale"
OLD_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    # One key for two things: where candidates come from, and which rounds their scores are of.
    "combine": {
        "beam_bayes": ("bon/proposal=beam_bayes",),
        "softmax_sampling": ("bon/proposal=softmax_sampling",),
        "perround": ("bon.score_agg=perround",),
        "lastround": ("bon.score_agg=lastround",),
        # It has a round after every pass of the chain, and none besides.
        "select_each": ("bon.score_agg=select_each", "bon.rounds=1"),
    },
    "score_scale": {
        "learnable": ("scorer.scale.mode=learnable",),
        "fixed": ("scorer.scale.mode=fixed",),
        "b2fix": ("scorer.scale.mode=learnable", "scorer.scale.dtype=float32"),
    },
}
TEMPERATURE = "proposal_temperature"
REMARK = (
    "score_scale=b2fix: a scale that learns and is kept in fp32, which cures the published plateau;"
    " what b2fix stood for is not published"
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; allowed: --config NAME, --resume DIR, KEY=VALUE ...")


def names() -> list[str]:
    """The runs that `--config` may name."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*_stage*.yaml"))


def translate(arguments: Sequence[str]) -> list[str]:
    """The overrides of main.py that a published command line means.

    Raises:
        ConfigError: an unknown option, run, or value of an old name.
    """
    parser = _Parser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="configs/large_scale/NAME.yaml")
    parser.add_argument("--resume", metavar="DIR", help="a full state, or a checkpoint file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    found = parser.parse_intermixed_args(arguments)
    name = Path(found.config).name.removesuffix(".yaml")
    if name not in names():
        raise ConfigError(f"--config {found.config}: no such run; allowed: {', '.join(names())}")
    overrides = [f"experiment=large_scale/{name}"]
    for override in found.overrides:
        overrides += translate_override(override)
    if found.resume is not None:
        overrides.append(f"checkpointing.resume_ckpt_path={as_text(found.resume)}")
    return overrides


def translate_override(override: str) -> tuple[str, ...]:
    """One override under the names of this project.

    Raises:
        ConfigError: an old name with a value that it never had.
    """
    key, _, value = override.partition("=")
    if key == TEMPERATURE:
        return (f"bon.proposal.temperature={value}",)
    if key not in OLD_NAMES:
        return (override,)
    if value not in OLD_NAMES[key]:
        raise ConfigError(f"{key}={value}: unknown; allowed: {', '.join(OLD_NAMES[key])}")
    return OLD_NAMES[key][value]


def main(arguments: Sequence[str]) -> int:
    """Become main.py; returns only if that cannot be."""
    try:
        overrides = translate(arguments)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    if global_rank() == 0:
        if "score_scale=b2fix" in arguments:
            print(REMARK)
        print(shlex.join(["python", "main.py", *overrides]), flush=True)
    os.execv(sys.executable, [sys.executable, str(ROOT / "main.py"), *overrides])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
