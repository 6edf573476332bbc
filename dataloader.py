"""The data of a run: `LanguageData` turns a configuration into batches for every algorithm."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from data.arrow import Rows, cache_path, open_or_build
from data.batches import BatchSampler, ShardedLoader, row_loader, stream_loader
from data.blocks import IDS, Block, PackingReport
from data.encoding import encode_documents
from data.errors import DataError
from data.fingerprint import fingerprint
from data.left_out import why_empty
from data.ordering import (
    GlobalBatchSampler,
    MicroBatch,
    ShardedBatchSampler,
    check_batch_sizes,
)
from data.packing import PackingOptions, pack
from data.parse_store import Parser, ParseStore
from data.parsed import ParsedSource
from data.source import Document, Source, require_split
from data.tokenization import (
    SpecialIds,
    load_tokenizer,
    special_ids,
    tokenizer_fingerprint,
    with_mask_token,
)
from data.unigram import unigram_cross_entropy
from objectives.keyed import keyed_uniform
from runtime.command import command_for
from runtime.config import instantiate, locate, to_plain
from runtime.shared_target import open_target

log = logging.getLogger(__name__)

_SPLITS_OF_STAGE = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}


class LanguageData(L.LightningDataModule):
    """Source, tokenizer, token cache and loaders of one configuration.

    Everything is made when first asked for, so it works inside a `Trainer` and without one.

    Args:
        config: the composed configuration; read are `data`, `loader`, `model.length` and `seed`.
        tokenizer: used instead of the configured one, e.g. that of a checkpoint.
    """

    def __init__(
        self,
        config: DictConfig | Mapping[str, Any],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        super().__init__()
        self.config = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
        self._given_tokenizer = tokenizer
        self._rows: dict[str, Rows] = {}

    @cached_property
    def source(self) -> Source:
        """The documents, with the depths that `data.parse` found, if it is set."""
        store = self.parse_store
        if store is None:
            return self.plain_source
        command = partial(command_for, "parse_depth", self.config)
        return ParsedSource(self.plain_source, store, command)

    def is_parsed(self, splits: Sequence[str]) -> bool:
        """Whether `data.parse` is unset, or has parsed those of the splits that there are."""
        store = self.parse_store
        if store is None:
            return True
        there = [split for split in splits if split in self.plain_source.splits]
        return all(store.index_path(split).is_file() for split in there)

    @cached_property
    def plain_source(self) -> Source:
        """The documents as they are, built from `data.source`."""
        return instantiate(self.config.data.source)

    @cached_property
    def parser(self) -> Parser:
        """What `data.parse` asks for; it loads its models when it is used."""
        return instantiate(self.config.data.parse.parser)

    @cached_property
    def parse_store(self) -> ParseStore | None:
        """Where the parse is kept; None without `data.parse`."""
        parse = self.config.data.get("parse")
        if parse is None:
            return None
        return ParseStore(
            parse.folder,
            self.plain_source.name,
            self._plain_content,
            self.parser.options(),
            parse.documents_per_part,
        )

    @cached_property
    def _plain_content(self) -> str:
        # Asking the source may mean hashing many gigabytes, so it is asked once.
        return self.plain_source.fingerprint()

    @cached_property
    def _content(self) -> str:
        parsed = isinstance(self.source, ParsedSource)
        return self.source.fingerprint() if parsed else self._plain_content

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, trained on the training documents if `bpe` or `word` is asked for."""
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        data = self.config.data
        if data.tokenizer_name_or_path == "target":
            return _target_tokenizer(self.config.model)
        has_train = "train" in self.plain_source.splits
        return load_tokenizer(
            data.tokenizer_name_or_path,
            documents=self._texts("train") if has_train else None,
            corpus_fingerprint=self._plain_content,
            vocab_size=data.get("vocab_size"),
            cache_dir=data.cache_dir,
        )

    @cached_property
    def special(self) -> SpecialIds:
        """Ids of the special tokens, and the vocabulary size of a model for this data."""
        return special_ids(self.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the training rows: documents, tokenizer and packing."""
        return fingerprint(self._key("train") | {"streaming": bool(self.config.data.streaming)})

    def require_features(self, names: Sequence[str]) -> None:
        """Look into the first training document for what an algorithm needs of every word.

        Raises:
            DataError: it does not carry a feature.
        """
        if not names:
            return
        first: Document = next(self.source.documents("train"), {})
        missing = [name for name in names if name not in first.get("features", {})]
        if missing:
            raise DataError(
                f"masking={self.config.masking.name}: data={self.config.data.name} has no"
                f" {missing[0]} of words; parse it (python main.py mode=parse_depth"
                f" data/parse=stanza data=...) and add data/parse=stanza here; data=grammar and"
                " data=conllu have gold trees; masking=none needs none"
            )

    def rows(self, split: str) -> Rows:
        """The packed rows of a split, from the token cache, which is built first if need be.

        Raises:
            DataError: the split does not exist or does not fill a single row.
        """
        if split not in self._rows:
            rows = self._open_rows(split)
            if not len(rows):
                length = self.config.model.length
                data = to_plain(self.config.data)
                raise DataError(f"{split} split of {why_empty(data, length, rows.report)}")
            self._rows[split] = rows
        return self._rows[split]

    def packing_report(self, split: str) -> PackingReport:
        """What became of the documents of a split; its rows are packed if need be."""
        if not self._is_streamed(split):
            return self._open_rows(split).report
        report = PackingReport()
        for _ in self._pack(split, report):
            pass
        return report

    def prepare_data(self) -> None:
        """Build tokenizer and token caches; Lightning calls it once per machine."""
        task = None if self.trainer is None else self.trainer.state.fn
        self.setup("fit" if task is None else task.value)

    def setup(self, stage: str | None = None) -> None:
        """Open what `stage` (fit, validate or test) needs."""
        for split in _SPLITS_OF_STAGE.get(stage or "fit", ()):
            if not self._is_streamed(split):
                self.rows(split)

    def train_dataloader(self) -> ShardedLoader:
        """The training batches from the trainer's current step to its last one."""
        assert self.trainer is not None, "without a trainer, call train_loader"
        # An algorithm that learns from a batch several times takes a step each time.
        updates = OmegaConf.select(self.config, "algo.updates", default=1)
        return self.train_loader(
            start_step=self.trainer.global_step // updates,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            accumulate=self.trainer.accumulate_grad_batches,
            max_steps=self.trainer.max_steps // updates,
        )

    def train_loader(
        self, *, max_steps: int, start_step: int = 0, rank: int = 0, world: int = 1,
        accumulate: int = 1,
    ) -> ShardedLoader:  # fmt: skip
        """The training batches of one rank, for the steps `start_step` to `max_steps`.

        Its length is that of the whole run, `max_steps * accumulate` micro-batches.

        Raises:
            DataError: sizes that do not fit together, too few rows, or no last step.
        """
        if max_steps < 1:
            raise DataError(f"trainer.max_steps={max_steps}: must be at least 1")
        size = self.config.loader.global_batch_size
        micro = self.config.loader.batch_size or max(1, size // (world * accumulate))
        check_batch_sizes(size, micro, world, accumulate)
        shares = {"rank": rank, "world": world, "accumulate": accumulate}
        if self._is_streamed("train"):
            loader = stream_loader(
                self._streamed_pass,
                size,
                micro,
                max_steps,
                score_padding=self.config.data.score_padding,
                num_workers=self.config.loader.num_workers,
                start_step=start_step,
                **shares,
            )
        else:
            rows = self.rows("train")
            start = start_step * size
            sampler = GlobalBatchSampler(
                len(rows), size, micro, self.config.seed, max_steps, start_sample=start, **shares
            )
            loader = self._row_loader(rows, sampler)
        return ShardedLoader(loader, max_steps * accumulate)

    def val_dataloader(self) -> ShardedLoader:
        """This rank's share of the validation rows."""
        return self.eval_loader("validation")

    def test_dataloader(self) -> ShardedLoader:
        """This rank's share of the test rows."""
        return self.eval_loader("test")

    def eval_loader(
        self, split: str, limit_rows: int | None = None, *, rank: int | None = None,
        world: int | None = None,
    ) -> ShardedLoader:  # fmt: skip
        """Rows `rank::world` of a split (of its first `limit_rows`), each once, without padding.

        `rank` and `world` are the trainer's if there is one, else 0 and 1.
        """
        if rank is None or world is None:
            trainer = self.trainer
            rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        rows = self.rows(split)
        count = len(rows) if limit_rows is None else min(limit_rows, len(rows))
        if self.trainer is not None and count < world:
            # Lightning would skip the pass on a rank without rows, and the others wait for it.
            raise DataError(f"{split}: {count} rows cannot be spread over {world} processes")
        loader = self.config.loader
        batch_size = loader.eval_batch_size or max(1, loader.eval_global_batch_size // world)
        sampler = ShardedBatchSampler(count, batch_size, rank, world)
        return ShardedLoader(self._row_loader(rows, sampler), len(sampler))

    def drawn_loader(self, split: str, batches: int, key: tuple[int, ...]) -> DataLoader:
        """`batches` batches of rows drawn from a whole split, the same for the same key.

        The first rows are unlike the others: packing begins with the longest documents.
        """
        rows, loader = self.rows(split), self.config.loader
        size = loader.eval_batch_size or loader.eval_global_batch_size
        lot_R = keyed_uniform(key, torch.arange(len(rows)), 1)[:, 0]
        drawn_R = lot_R.argsort()[: batches * size].sort().values
        batches_of = [MicroBatch(part.numpy(), None) for part in drawn_R.split(size)]
        return self._row_loader(rows, batches_of)

    def unigram_metrics(self, split: str) -> dict[str, float]:
        """`unigram_ppl`: what any model must beat, per real token; empty without training rows."""
        if "train" not in self.source.splits or self._is_streamed("train"):
            return {}
        nats = unigram_cross_entropy(
            self.rows("train"), self.rows(split), self.special.vocab_size, ignore_bos=True
        )
        return {"unigram_ppl": math.exp(nats)}

    def texts_of_rows(self, split: str, index: Sequence[int] | np.ndarray) -> list[str]:
        """Decoded text of rows of a split, special tokens left out."""
        tokens = self.rows(split).take(np.asarray(index, dtype=np.int64))[IDS]
        return self.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must agree with."""
        size = self.config.loader.global_batch_size
        steps = 0 if self.trainer is None else self.trainer.global_step
        steps //= OmegaConf.select(self.config, "algo.updates", default=1)
        return {
            "samples_seen": steps * size,
            "fingerprint": self.fingerprint,
            "global_batch_size": size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint saw this data in this order; the place follows from its step.

        Raises:
            DataError: other data, or another global batch size.
        """
        if state_dict["fingerprint"] != self.fingerprint:
            raise DataError(
                f"cannot resume: the checkpoint was trained on data {state_dict['fingerprint']}, "
                f"this configuration gives data {self.fingerprint}; restore data, tokenizer and "
                "model.length"
            )
        size = self.config.loader.global_batch_size
        if state_dict["global_batch_size"] != size:
            raise DataError(
                f"cannot resume: the checkpoint has loader.global_batch_size="
                f"{state_dict['global_batch_size']}, this configuration has {size}"
            )

    def _row_loader(self, rows: Rows, sampler: BatchSampler) -> DataLoader:
        score_padding, workers = self.config.data.score_padding, self.config.loader.num_workers
        return row_loader(rows, sampler, score_padding=score_padding, num_workers=workers)

    def _open_rows(self, split: str) -> Rows:
        require_split(self.source, split)
        key = self._key(split)
        path = cache_path(self.config.data.cache_dir, key)
        rows = open_or_build(path, key, self.special.vocab_size, partial(self._pack, split))
        log.info("%s %s: %s (%s)", self.config.data.name, split, rows.report, path)
        return rows

    def _is_streamed(self, split: str) -> bool:
        # Held-out rows are read again and again and must be counted: they are always cached.
        return bool(self.config.data.streaming) and split == "train"

    def _texts(self, split: str) -> Iterator[str]:
        for document in self.plain_source.documents(split):
            yield document["text"]

    def _options(self, split: str) -> PackingOptions:
        data = self.config.data
        training = split == "train"
        return PackingOptions(
            length=self.config.model.length,
            wrap=data.wrap,
            insert_special=data.insert_train_special if training else data.insert_valid_special,
            insert_eos=data.insert_train_eos if training else data.insert_valid_eos,
            join=data.get("join", False),
            per_row=data.get("documents_per_row"),
            align=1 if data.get("align") is None else data.align,
        )

    def _key(self, split: str) -> dict[str, str | int | bool | None]:
        data = OmegaConf.to_container(self.config.data, resolve=True)
        assert isinstance(data, dict)
        encoder = {"encoder": _encoder_identity(data["encoder"])} if data.get("encoder") else {}
        return {
            "source": str(self.config.data.name),
            "split": split,
            "content": self._content,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            **encoder,
            **self._options(split).identity(),
        }

    def _pack(self, split: str, report: PackingReport) -> Iterator[Block]:
        documents, options = self.source.documents(split), self._options(split)
        encoder = self.config.data.get("encoder")
        encode = encode_documents if encoder is None else instantiate(encoder)
        return pack(documents, self.tokenizer, self.special, options, report, encode)

    def _streamed_pass(self) -> Iterator[Block]:
        """One pass over the training documents; what was not used is reported when it ends."""
        report = PackingReport()
        try:
            yield from self._pack("train", report)
        finally:
            log.info("%s train, streamed: %s", self.config.data.name, report)


def _encoder_identity(options: dict[str, Any]) -> str:
    """Of an encoder: its options, and the edition of what it makes of documents under them."""
    edition = getattr(locate(options["_target_"], "data.encoder._target_"), "edition", 1)
    # The first has no number, as in caches older than editions.
    return fingerprint(options if edition == 1 else [options, edition])


def _target_tokenizer(model: DictConfig) -> PreTrainedTokenizerFast:
    if "mask_token" not in model:
        raise DataError(
            f"data.tokenizer_name_or_path=target: model={model.get('name')} is a network without a"
            " tokenizer of its own; allowed: a target (model=smollm2, ...), or another tokenizer"
        )
    target = open_target(cast(dict, OmegaConf.to_container(model, resolve=True)))
    tokenizer = cast(PreTrainedTokenizerFast, target.tokenizer)
    return with_mask_token(tokenizer, target.mask_token_id)
