"""LanguageData: batches, identity, resuming, streaming, and a real Lightning run."""

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from data.errors import DataError
from dataloader import LanguageData

WORDS = ["ant", "bee", "cat", "dog", "elk", "fox"]


def make_config(folder, **overrides):
    config = OmegaConf.create(
        {
            "seed": 1,
            "model": {"length": 8},
            "paths": {"cache_dir": str(folder / "cache")},
            "loader": {
                "global_batch_size": 4,
                "batch_size": None,
                "eval_global_batch_size": 4,
                "eval_batch_size": None,
                "num_workers": 0,
            },
            "data": {
                "name": "text",
                "files": str(folder / "corpus.txt"),
                "source": {"_target_": "data.text.TextFiles", "files": "${data.files}"},
                "tokenizer_name_or_path": "word",
                "vocab_size": None,
                "wrap": True,
                "score_padding": False,
                "insert_train_special": True,
                "insert_valid_special": True,
                "insert_train_eos": True,
                "insert_valid_eos": True,
                "streaming": False,
                "cache_dir": "${paths.cache_dir}",
            },
        }
    )
    for key, value in overrides.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return config


@pytest.fixture
def folder(tmp_path):
    lines = [" ".join(WORDS[(i * k) % 6] for k in range(1, 2 + i % 7)) for i in range(120)]
    lines = [f"{line} w{i}" for i, line in enumerate(lines)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def data(folder):
    return LanguageData(make_config(folder))


def test_batch_contract(data):
    (batch,) = data.train_loader(max_steps=1)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "input_ids": (torch.int64, (4, 8)),
        "token_mask": (torch.bool, (4, 8)),
        "loss_mask": (torch.bool, (4, 8)),
        "index": (torch.int64, (4,)),
        "position": (torch.int64, (4,)),
    }
    assert batch["position"].tolist() == [0, 1, 2, 3]
    assert batch["token_mask"].all() and batch["loss_mask"].all()
    assert (batch["input_ids"][:, 0] == data.special.bos).all()
    assert (batch["input_ids"][:, -1] == data.special.eos).all()
    assert batch["input_ids"].max() < data.special.vocab_size


@pytest.mark.parametrize("score_padding", [False, True])
def test_padded_rows_say_what_is_scored(folder, score_padding):
    config = make_config(folder, data__wrap=False, data__score_padding=score_padding)
    data = LanguageData(config)
    for batch in data.eval_loader("validation"):
        is_pad = batch["input_ids"] == data.special.pad
        assert torch.equal(batch["token_mask"], ~is_pad)
        assert is_pad.any()
        assert torch.equal(batch["loss_mask"], ~is_pad | score_padding)
        assert "position" not in batch


@pytest.mark.parametrize("streaming", [False, True])
def test_joined_documents_begin_at_multiples_of_a_configured_number(folder, streaming):
    config = make_config(
        folder, data__wrap=False, data__join=True, data__align="${model.length}", model__length=24,
        data__insert_train_special=False, data__insert_valid_special=False,
        data__streaming=streaming,
    )  # fmt: skip
    whole = LanguageData(config).fingerprint
    config.data.align = 4
    data = LanguageData(config)
    (batch,) = data.train_loader(max_steps=1)
    segment, response = batch["segment"], batch["response"]
    assert whole != data.fingerprint and data.packing_report("train").fill_tokens > 0
    assert (segment.unflatten(1, (-1, 4)) == segment[:, ::4, None]).all()
    assert torch.equal(batch["token_mask"], segment >= 0) and segment.max() > 0
    assert (batch["input_ids"][(segment >= 0) & (response < 0)] == data.special.eos).all()
    # Each document has an EOS of its own before the fill.
    ends = (response == 1) & (batch["input_ids"] == data.special.eos)
    assert ends.sum() == (segment.max(-1).values + 1).sum()
    # As before there was the option.
    config.data.align = None
    plain = LanguageData(config)
    assert "align" not in plain._key("train") and plain.fingerprint != data.fingerprint
    assert "response" not in next(iter(plain.train_loader(max_steps=1)))


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_ranks_and_accumulation_share_the_same_global_batches(folder, world, accumulate):
    alone = LanguageData(make_config(folder)).train_loader(max_steps=9)
    expected = [batch["input_ids"] for batch in alone]
    data = LanguageData(make_config(folder, loader__num_workers=world - 1))
    steps = [torch.zeros(4, 8, dtype=torch.int64) for _ in range(9)]
    for rank in range(world):
        loader = data.train_loader(max_steps=9, rank=rank, world=world, accumulate=accumulate)
        assert len(loader) == 9 * accumulate
        for number, batch in enumerate(loader):
            steps[number // accumulate][batch["position"]] = batch["input_ids"]
    assert all(torch.equal(a, b) for a, b in zip(steps, expected, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_resume_is_the_tail_of_an_unbroken_run(folder, streaming):
    data = LanguageData(make_config(folder, data__streaming=streaming))
    whole = list(data.train_loader(max_steps=40))
    tail = data.train_loader(max_steps=40, start_step=33)
    assert len(tail) == 40
    for resumed, unbroken in zip(tail, whole[33:], strict=True):
        assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_stream_has_the_rows_of_the_cache_in_their_order(folder):
    data = LanguageData(make_config(folder))
    rows = torch.from_numpy(data.rows("train").take(range(8))["input_ids"].astype("int64"))
    stream = LanguageData(make_config(folder, data__streaming=True, loader__num_workers=1))
    batches = list(stream.train_loader(max_steps=2))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), rows)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(8))
    ranks = [list(stream.train_loader(max_steps=2, rank=r, world=2)) for r in range(2)]
    pairs = [torch.cat([a["input_ids"], b["input_ids"]]) for a, b in zip(*ranks, strict=True)]
    assert torch.equal(torch.cat(pairs), rows)


def test_stream_refuses_many_workers_and_no_rows(folder):
    config = make_config(folder, data__streaming=True, loader__num_workers=2)
    with pytest.raises(DataError, match=r"loader\.num_workers=2: streamed data takes 0 or 1"):
        LanguageData(config).train_loader(max_steps=1)
    config = make_config(folder, data__streaming=True, model__length=5000)
    with pytest.raises(DataError, match="streamed training data does not fill a single row"):
        list(LanguageData(config).train_loader(max_steps=1))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_each_row_once(data, world):
    n = len(data.rows("validation"))
    loaders = [data.eval_loader("validation", rank=r, world=world) for r in range(world)]
    seen = [batch["index"] for loader in loaders for batch in loader]
    assert sorted(torch.cat(seen).tolist()) == list(range(n))
    assert sum(len(loader) for loader in loaders) == len(seen)
    limited = [data.eval_loader("validation", 2, rank=r, world=world) for r in range(world)]
    assert sorted(i for loader in limited for b in loader for i in b["index"].tolist()) == [0, 1]


def test_fingerprint_follows_everything_that_changes_rows(folder):
    original = LanguageData(make_config(folder)).fingerprint
    assert LanguageData(make_config(folder)).fingerprint == original
    changes = [
        {"model__length": 9},
        {"data__wrap": False},
        {"data__insert_train_eos": False},
        {"data__vocab_size": 9},
        {"data__streaming": True},
    ]
    found = {LanguageData(make_config(folder, **change)).fingerprint for change in changes}
    assert len(found) == len(changes) and original not in found
    (folder / "corpus.txt").write_text("a b\n\nc d")
    assert LanguageData(make_config(folder)).fingerprint != original


def test_a_given_tokenizer_replaces_the_configured_one(folder, data):
    config = make_config(folder, data__tokenizer_name_or_path="bpe", data__vocab_size=300)
    assert LanguageData(config, tokenizer=data.tokenizer).fingerprint == data.fingerprint


def test_plain_dict_is_accepted(folder):
    config = OmegaConf.to_container(make_config(folder), resolve=True)
    assert len(LanguageData(config).rows("validation")) > 0


def test_unigram_perplexity_lies_below_uniform(data):
    assert 1 < data.unigram_metrics("validation")["unigram_ppl"] < data.special.vocab_size


def test_errors_name_the_keys(folder, data):
    with pytest.raises(DataError, match=r"trainer\.max_steps=-1: must be at least 1"):
        data.train_loader(max_steps=-1)
    with pytest.raises(DataError, match=r"loader\.global_batch_size=4 is not 3 rank\(s\)"):
        data.train_loader(max_steps=1, world=3)
    with pytest.raises(DataError, match="'text' has no split 'test'"):
        data.test_dataloader()
    large = LanguageData(make_config(folder, loader__global_batch_size=4096))
    with pytest.raises(DataError, match=r"rows, loader\.global_batch_size=4096 needs"):
        large.train_loader(max_steps=1)
    long = LanguageData(make_config(folder, model__length=5000))
    with pytest.raises(DataError, match=r"does not fill one row of model\.length=5000"):
        long.rows("train")


def test_checkpoint_of_other_data_is_refused(folder, data):
    state = data.state_dict()
    assert state == {"samples_seen": 0, "fingerprint": data.fingerprint, "global_batch_size": 4}
    data.load_state_dict(state)
    other = LanguageData(make_config(folder, model__length=9))
    message = f"trained on data {data.fingerprint}.* gives data {other.fingerprint}"
    with pytest.raises(DataError, match=message):
        other.load_state_dict(state)
    larger = LanguageData(make_config(folder, loader__global_batch_size=8))
    with pytest.raises(DataError, match=r"global_batch_size=4, this configuration has 8"):
        larger.load_state_dict(state)


class Recorder(L.LightningModule):
    """Remembers which rows it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append((batch["index"].tolist(), batch["position"].tolist()))
        return self.weight * 0

    def validation_step(self, batch, _):
        self.log("rows", float(len(batch["index"])), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, max_steps, checkpoint=None, **overrides):
    trainer = L.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    model = Recorder()
    trainer.fit(
        model, LanguageData(make_config(folder, **overrides)), ckpt_path=checkpoint,
        weights_only=checkpoint is not None,
    )  # fmt: skip
    return trainer, model.seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_resumes_at_the_same_row(folder, workers, recwarn):
    _, unbroken = fit(folder, 45, loader__num_workers=workers)
    trainer, first = fit(folder, 17)
    trainer.save_checkpoint(folder / "last.ckpt")
    assert len(first) == 34
    resumed, rest = fit(folder, 45, folder / "last.ckpt", loader__num_workers=workers)
    assert resumed.global_step == 45
    assert first + rest == unbroken
    assert not [w for w in recwarn if "not resumable" in str(w.message)]
    with pytest.raises(DataError, match="cannot resume"):
        fit(folder, 45, folder / "last.ckpt", data__insert_train_eos=False)
