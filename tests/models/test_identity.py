import dataclasses
import json
import subprocess
import sys

import torch

from models.identity import described, tensors_digest
from tests.support import ROOT

SHOWN = """
import json
from decoding.best_of import BestOf
from decoding.candidates import BeamBayes, SoftmaxSampling
from decoding.chain import Refinement
from models.identity import described
print(json.dumps(described([Refinement(), BestOf(), BestOf(proposal=SoftmaxSampling(0.7))])))
"""


class Own:
    """Somebody's rule, which says nothing of itself."""

    def __init__(self, k):
        self.k = k


@dataclasses.dataclass
class Holder:
    rule: Own
    numbers: tuple[int, ...] = (1, 2)


def test_objects_are_told_by_what_they_hold():
    assert described(Holder(Own(3))) == {
        "class": "Holder", "rule": {"class": "Own", "k": 3}, "numbers": [1, 2],
    }  # fmt: skip
    assert described({"a": None, "b": 1.5}) == {"a": None, "b": 1.5}


def test_two_processes_agree():
    command = [sys.executable, "-c", SHOWN]
    one, other = (subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
                  for _ in range(2))  # fmt: skip
    assert one == other and b" at 0x" not in one
    found = json.loads(one)
    assert found[1]["proposal"] == {"class": "BeamBayes", "max_swap": 1}
    assert found[2]["proposal"]["temperature"] == 0.7


def test_tensors_are_told_by_name_kind_shape_and_bytes():
    tensors = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0)}
    whole = tensors_digest(tensors.items())
    assert tensors_digest(reversed(list(tensors.items()))) == whole
    others = [
        tensors | {"b": torch.tensor(2.0)}, tensors | {"a": torch.zeros(3, 2)},
        tensors | {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": tensors["a"], "c": tensors["b"]},
    ]  # fmt: skip
    assert len({whole, *(tensors_digest(other.items()) for other in others)}) == 5
