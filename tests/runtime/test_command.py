"""Values survive the way over a command line; data is named even if nobody has named it."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from runtime.command import as_text, command_for
from tests.support import compose_config

VALUES = (
    None, True, False, 0, -3, 1e-5, 0.25, "", "null", "True", "nan", "12", "1e3", ".5", "./a b/c",
    "/data/corpus.txt", "~/x", "a,b", "k=v", "it's", "back\\slash\\", "\\'", "${x}", "naïve", " x ",
    "s3://bucket/*.txt", [], ["a.txt", "b c.txt", None], [1, [2.5, "x"]], [{"k": "v w", "n": 1}],
)  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_are_read_back(value):
    (text,) = shlex.split(shlex.join([f"data.x={as_text(value)}"]))
    found = OverridesParser.create().parse_override(text).value()
    assert found == value and type(found) is type(value)


def test_data_that_nobody_named_is_named():
    cfg = compose_config("data=text", "data/parse=stanza", "data.files=x")
    command = "python main.py mode=parse_depth data=text data/parse=stanza"
    assert command_for("parse_depth", cfg) == command
    assert command_for("train", compose_config()) == "python main.py mode=train data=pydocs"
