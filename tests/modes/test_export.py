"""An exported folder is the model again, without a pickle, and its card says what is known."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from callbacks.metrics_csv import read_metrics
from data.tokenization import tokenizer_state
from diffusion import BD3LM, Diffusion
from evaluation.model_card import measured
from runtime.checkpoint import read_checkpoint
from runtime.errors import CheckpointError
from runtime.export import is_export
from runtime.run import load_summary
from tests.runs import best, call_main, fit, tiny
from tests.small import small_batch
from tests.support import equal

OPTIONS = ("algo=bd3lm", "block_size=4", "trainer.max_steps=6", "trainer.val_check_interval=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny run with its summary.json and metrics.csv."""
    folder = tmp_path_factory.mktemp("export")
    assert call_main([*tiny(folder), *OPTIONS, f"paths.run_dir={folder}/run"]) == 0
    return folder


@pytest.fixture
def export(folder, tmp_path, capfd):
    """Export with these overrides; returns the exit code, the folder and what was said."""

    def run(*overrides, checkpoint=None, code=0):
        path = checkpoint or best(folder / "run")
        capfd.readouterr()
        found = call_main(["mode=export", f"eval.checkpoint_path={path}", "trainer=cpu",
                           f"paths.run_dir={tmp_path}/export-run", *overrides])  # fmt: skip
        said = capfd.readouterr()
        assert found == code, said.err
        return tmp_path / "export-run" / "export", said.err if code else said.out

    return run


def nll(model):
    """The bound of a fixed batch: every weight has a part in it."""
    batch = small_batch(length=16)
    batch["input_ids"] = batch["input_ids"] % model.special.vocab_size
    with torch.no_grad():
        return model.nll(batch, 2)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_folder_is_the_model(folder, export, weights):
    found, said = export(f"eval.weights={weights}")
    assert f"exported to {found}" in said
    names = {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert names <= {file.name for file in found.iterdir()} and is_export(found)
    assert len({file.stat().st_mode for file in found.iterdir()}) == 1
    original = Diffusion.load_from_checkpoint(best(folder / "run"), weights=weights)
    model = Diffusion.load_from_checkpoint(found)
    assert type(model) is BD3LM and not model.training
    assert equal(dict(model.state_dict()), dict(original.state_dict()))
    assert equal(load_file(found / "model.safetensors"), dict(original.state_dict()))
    assert torch.equal(nll(model), nll(original))
    assert tokenizer_state(model.tokenizer) == tokenizer_state(original.tokenizer)
    assert model.special == original.special
    assert torch.equal(model.sample(2, seed=3).ids, original.sample(2, seed=3).ids)
    other = {"raw": "ema", "ema": "raw"}[weights]
    assert not equal(nll(model), nll(Diffusion.load_from_checkpoint(best(folder / "run"),
                                                                   weights=other)))  # fmt: skip


def test_config_json(folder, export):
    found, _ = export()
    content = json.loads((found / "config.json").read_text())
    stored = read_checkpoint(best(folder / "run"))
    assert content["global_step"] == stored["global_step"]
    assert content["provenance"] == stored["provenance"]
    assert (content["weights"], content["architectures"]) == ("ema", ["BD3LM"])
    ours = stored["hyper_parameters"]["config"]
    for section in ("algo", "model", "noise", "optim", "sampling", "block_size", "seed"):
        assert content["config"][section] == ours[section]
    assert str(folder) not in json.dumps(content)
    assert not {"paths", "checkpointing", "callbacks", "logger"} & content["config"].keys()


PLACES = (
    "data.source.files=/secret/a.txt", "data.source.valid_files=[secret/b.txt]",
    "data.parse={folder: secret/c, model_dir: /secret/d, parser: {model_dir: /secret/e, lang: en}}",
    "data.source.more={a: [/secret/f, ~/secret/g, kept], b: 'file:///secret/h'}",
)  # fmt: skip


@pytest.mark.parametrize("form", ["safetensors", "bd3lms"])
def test_places_are_not_published(folder, export, tmp_path, form):
    """Neither those of the known keys, nor what begins like a path elsewhere."""
    content = read_checkpoint(best(folder / "run"))
    config = OmegaConf.create(content["hyper_parameters"]["config"])
    for text in PLACES:
        key, _, value = text.partition("=")
        OmegaConf.update(config, key, OmegaConf.create(f"x: {value}").x, force_add=True)
    config.data.valid_files = "secret/i"
    config.data.tokenizer_name_or_path = f"{Path.home()}/secret/j"
    content["hyper_parameters"]["config"] = OmegaConf.to_container(config)
    torch.save(content, tmp_path / "a.ckpt")
    found, _ = export(f"mode.format={form}", checkpoint=tmp_path / "a.ckpt")
    for file in found.iterdir():
        published = file.read_bytes()
        assert b"secret" not in published and str(folder).encode() not in published, file
    if form == "safetensors":
        data = json.loads((found / "config.json").read_text())["config"]["data"]
        assert data["files"] is None and data["parse"]["parser"] == {
            "model_dir": None,
            "lang": "en",
        }
        assert data["source"]["more"] == {"a": [None, None, "kept"], "b": None}
        assert data["name"] == "text" and data["source"]["_target_"] == "data.text.TextFiles"
        model = Diffusion.load_from_checkpoint(found)
        assert torch.equal(nll(model), nll(Diffusion.load_from_checkpoint(best(folder / "run"))))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def full_disk_at_the_card(path, text, encoding=None):
    if path.name == "README.md":
        full_disk()
    path.write_bytes(text.encode())


def full_disk_in_rust(*_, **__):
    raise SafetensorError("Error while serializing: IoError(Os { code: 28 })")


BREAKS = {
    "weights": (safetensors.torch, "save_file", full_disk_in_rust, ""),
    "card": (Path, "write_text", full_disk_at_the_card, ""),
    "bd3lms": (torch, "save", full_disk, "mode.format=bd3lms"),
}


@pytest.mark.parametrize("place", BREAKS)
def test_a_broken_export_leaves_the_one_before(export, monkeypatch, tmp_path, place):
    module, name, broken, form = BREAKS[place]
    options = [form] if form else []
    found, _ = export(*options)
    before = contents(found)
    monkeypatch.setattr(module, name, broken)
    _, said = export("eval.weights=raw", *options, code=2)
    assert f"{found}" in said and "cannot be written" in said
    assert len(said.strip().splitlines()) == 1 and ".export-" not in said
    assert contents(found) == before
    _, said = export(f"mode.folder={tmp_path}/new", *options, code=2)
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_not_written_to(export, tmp_path):
    (tmp_path / "mine").mkdir()
    for name, text in (
        ("README.md", "# Mine"), ("model.safetensors", ""), ("config.json", '{"model_type": "x"}'),
    ):  # fmt: skip
        (tmp_path / "mine" / name).write_text(text)
        before = contents(tmp_path / "mine")
        _, said = export(f"mode.folder={tmp_path}/mine", code=2)
        assert "mine: holds something that is no export; allowed: a new or an empty" in said
        assert len(said.strip().splitlines()) == 1 and contents(tmp_path / "mine") == before


def test_a_folder_of_an_export_keeps_its_other_files(export, tmp_path):
    place = f"mode.folder={tmp_path}/out"
    export(place, "mode.format=bd3lms")
    (tmp_path / "out" / "LICENSE").write_text("mine")
    export(place)
    export(place)
    assert (tmp_path / "out" / "LICENSE").read_text() == "mine" and is_export(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".export-*"))


def test_the_tokenizer_opens_with_transformers(folder, export):
    found, _ = export()
    model = Diffusion.load_from_checkpoint(found)
    tokenizer = AutoTokenizer.from_pretrained(found)
    text = "w1 w2 nothing [MASK]"
    assert tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def test_evaluation_takes_the_folder(folder, export, tmp_path):
    found, _ = export()
    results = []
    for number, path in enumerate((best(folder / "run"), found)):
        run_dir = tmp_path / str(number)
        paths = f"paths.run_dir={run_dir}", f"paths.cache_dir={folder}/cache"
        checkpoint = f"eval.checkpoint_path={path}"
        # Which files they were is not published.
        data = [text for text in tiny(folder) if text.startswith("data")] if number else []
        assert call_main(["mode=ppl_eval", checkpoint, "trainer=cpu", *paths, *data]) == 0
        results.append(load_summary(run_dir)["metrics"]["nll"])
    assert results[0] == results[1]
    more = "algo=bd3lm", "block_size=8", "trainer.max_steps=1", f"training.from_pretrained={found}"
    assert fit(folder, tmp_path / "more", *more)["steps"] == 1


# The card ----------------------------------------------------------------------------------------


def test_card_has_the_numbers_of_the_run(folder, export):
    found, _ = export()
    card = (found / "README.md").read_text()
    step = read_checkpoint(best(folder / "run"))["global_step"]
    [row] = [row for row in read_metrics(folder / "run" / "metrics.csv")
             if row["step"] == step and "val/nll" in row]  # fmt: skip
    assert f"| {row['val/nll']:.4f} (s.e. {row['val/nll_se']:.4f}) |" in card
    assert f"upper bound | {row['val/ppl']:.2f} |" in card
    assert f"| optimiser steps | {step:,} |" in card and "| status of the run | done |" in card
    facts = load_summary(folder / "run")["provenance"]
    assert facts["config_hash"] in card and facts["data_fingerprint"] in card
    assert "bd3lm, blocks of 4 tokens" in card and "not measured" not in card


def test_card_invents_nothing(folder, export, tmp_path):
    """A checkpoint alone, or weights that no validation has seen."""
    lonely = tmp_path / "lonely.ckpt"
    lonely.write_bytes(best(folder / "run").read_bytes())
    card = (export(checkpoint=lonely)[0] / "README.md").read_text()
    assert "| not measured |" in card and "| status of the run | not recorded |" in card
    assert "s.e." not in card
    raw = (export("eval.weights=raw")[0] / "README.md").read_text()
    assert "nats per token, upper bound | not measured |" in raw


def test_only_the_row_of_the_checkpoint_counts():
    rows = [
        {"step": 3, "val/nll": 2.0}, {"step": 3, "train/loss": 9.0}, {"step": 6, "val/nll": 1.0},
    ]  # fmt: skip
    assert measured(None, rows, 3, True).validation == {"val/nll": 2.0}
    assert measured(None, rows, 4, True).validation == {}
    assert measured(None, rows, 3, False).validation == {}


# For bd3lms --------------------------------------------------------------------------------------


def test_bd3lms_format(folder, export):
    found, _ = export("mode.format=bd3lms")
    assert sorted(file.name for file in found.iterdir()) == ["README.md", "model.ckpt"]
    for weights in ("raw", "ema"):
        original = Diffusion.load_from_checkpoint(best(folder / "run"), weights=weights)
        model = Diffusion.load_from_checkpoint(found / "model.ckpt", weights=weights)
        assert torch.equal(nll(model), nll(original))
    again, _ = export(checkpoint=found / "model.ckpt")
    assert "| imported from | bd3lms |" in (again / "README.md").read_text()
    once_more, _ = export(checkpoint=again)
    assert "| imported from | bd3lms |" in (once_more / "README.md").read_text()


# What goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode.format=onnx"], "mode.format=onnx: allowed safetensors, bd3lms"),
        (["mode.push_to_hub=nobody"], "mode.push_to_hub=nobody: allowed: user/name, null"),
        (["model.length=8"], "model.length: mode=export publishes the checkpoint as it is"),
        (["mode.folder=/proc/none"], "/proc/none: cannot be written"),
        (["mode.folder=/proc/none", "mode.format=bd3lms"], "/proc/none: cannot be written"),
    ],
)
def test_one_line(export, overrides, message):
    _, said = export(*overrides, code=2)
    assert message in said and len(said.strip().splitlines()) == 1


def test_a_folder_that_is_no_export(export, tmp_path):
    _, said = export(checkpoint=tmp_path, code=2)
    assert f"eval.checkpoint_path={tmp_path}: a folder; allowed: a checkpoint file" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"format": 2}'),
        ("config.json", b"[]"),
        ("model.safetensors", b"short"),
        ("tokenizer.json", None),
    ],
)
def test_a_damaged_folder(export, name, content):
    found, _ = export()
    if content is None:
        (found / name).unlink()
    else:
        (found / name).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Diffusion.load_from_checkpoint(found)
    assert str(found) in str(error.value) and "\n" not in str(error.value)


def test_a_hostile_folder(export):
    found, _ = export()
    content = json.loads((found / "config.json").read_text())
    content["config"]["model"] |= {"_target_": "os.system"}
    (found / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"os\.system: not an allowed target"):
        Diffusion.load_from_checkpoint(found)


def test_resuming_from_the_folder_is_refused(folder, export, capfd):
    found, _ = export()
    code = call_main([*tiny(folder), *OPTIONS, f"checkpointing.resume_ckpt_path={found}"])
    assert code == 2
    assert f"checkpointing.resume_ckpt_path={found}: a folder" in capfd.readouterr().err


# The hub -----------------------------------------------------------------------------------------


class Hub:
    """Writes down what it is asked."""

    asked: list = []  # noqa: RUF012

    def create_repo(self, name, repo_type, exist_ok):
        self.asked.append((name, repo_type, exist_ok))
        return f"https://hub.test/{name}"

    def upload_folder(self, folder_path, repo_id, repo_type):
        self.asked.append((sorted(file.name for file in folder_path.iterdir()), repo_id, repo_type))


def test_push(export, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    found, said = export("mode.push_to_hub=me/mine")
    created, uploaded = Hub.asked
    assert created == ("me/mine", "model", True)
    assert uploaded == (sorted(file.name for file in found.iterdir()), "me/mine", "model")
    assert "README.md" in uploaded[0] and "pushed to https://hub.test/me/mine" in said
    assert (found / "README.md").read_text().count("# me/mine") == 1


def test_no_network(export, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Hub, "create_repo", offline)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    found, said = export("mode.push_to_hub=me/mine", code=2)
    assert "mode.push_to_hub=me/mine: the hub did not take it (ConnectionError: no route)" in said
    assert f"hf upload me/mine {found}" in said and len(said.strip().splitlines()) == 1
    assert is_export(found) and (found / "README.md").is_file()


def test_summary_of_the_export(export, tmp_path):
    found, _ = export()
    summary = load_summary(tmp_path / "export-run")
    assert (summary["mode"], summary["algo"], summary["status"]) == ("export", "bd3lm", "done")
    assert summary["metrics"]["parameters"] == sum(
        tensor.numel() for name, tensor in load_file(found / "model.safetensors").items()
        if "inv_freq" not in name
    )  # fmt: skip
    assert OmegaConf.load(tmp_path / "export-run" / "config.yaml").algo.name == "bd3lm"
