"""Models that are opened to answer prompts."""

import pytest
import torch

import opening
from decoding.generate import GenerationSettings
from runtime.errors import ConfigError
from tests import runs
from tests.block_runs import fit
from tests.support import compose_config


def opened(path, dtype):
    cfg = compose_config(
        "mode=benchmark_eval", "benchmark=reasoning_gym", f"eval.checkpoint_path={path}",
        f"mode.dtype={dtype}",
    )  # fmt: skip
    return opening.open_to_answer(cfg)[0]


def test_stages_answer_in_the_precision_that_is_asked_for(tmp_path):
    """Draft-refine is trained in fp32, a scorer's backbone held in model.dtype."""
    fit(tmp_path, tmp_path / "refined", "draft_refine", "trainer.max_steps=1")
    start = f"training.from_pretrained={tmp_path / 'refined' / 'checkpoints' / 'last.ckpt'}"
    fit(tmp_path, tmp_path / "nce", "nce", start, "trainer.max_steps=1", "model.dtype=bfloat16")
    settings, found = GenerationSettings(max_new_tokens=4), {}
    for name in ("refined", "nce"):
        for dtype in ("null", "bfloat16"):
            model = opened(tmp_path / name / "checkpoints" / "last.ckpt", dtype)
            assert not model.training
            found[name, dtype] = model.generator(settings, device="cpu").identity()
    assert found["refined", "null"]["dtype"] == "float32"
    assert {one["dtype"] for key, one in found.items() if key[1] == "bfloat16"} == {"bfloat16"}
    same = "fingerprint"
    assert found["refined", "bfloat16"][same] == found["nce", "bfloat16"][same]
    assert found["refined", "bfloat16"][same] != found["refined", "null"][same]
    scorer = opened(tmp_path / "nce" / "checkpoints" / "last.ckpt", "bfloat16")
    assert {p.dtype for p in scorer.head.parameters()} == {torch.float32}


def test_a_network_of_its_own_has_no_other_precision(tmp_path):
    runs.fit(tmp_path, tmp_path / "mdlm", "trainer.max_steps=1")
    with pytest.raises(ConfigError, match=r"mode\.dtype=bfloat16: algo=mdlm answers in the"):
        opened(runs.best(tmp_path / "mdlm"), "bfloat16")
