"""Semi-autoregressive generation: segments from left to right, each denoised by a reveal rule.

All randomness is drawn before the first pass: for every sample and position one clock, which orders
the positions (`decoding.reveal`), and one quantile, which becomes the token
(`decoding.categorical`). Both are a hash of (seed, sample, position), so a sample does not depend
on the batch that it is generated in, and checkpoints can be compared on equal random numbers.

Legend: B sequences, L length, S positions of the segment, M rows, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decoding.categorical import draw, keyed_uniform64
from decoding.denoiser import Denoiser
from decoding.settings import PRECISIONS, SamplingConfig
from decoding.stopping import StopRules
from objectives.noise import Schedule

# What a random number is for; part of its key.
CLOCK, QUANTILE = range(2)

Prompt = Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class Generation:
    """What was generated, and at what cost.

    Attributes:
        ids: [B, L] on the host; padding from each sequence's end on.
        lengths: tokens of each sequence that count, BOS, prompt and final EOS included.
        stop_reasons: length, eos or entropy.
        nfe: forward passes of the network, each over the whole batch.
        sample_nfe: passes that gave each sequence a token; in the others it waited for the batch.
        new_tokens: tokens drawn, over all sequences.
        seconds: wall time.
    """

    ids: Int[Tensor, "B L"]
    lengths: list[int]
    stop_reasons: list[str]
    nfe: int
    sample_nfe: list[int]
    new_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens drawn per second of wall time, over all sequences."""
        return self.new_tokens / self.seconds

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a pass gives to a sequence that does not wait; nan without a pass."""
        passes = sum(self.sample_nfe)
        return self.new_tokens / passes if passes else float("nan")

    def rows(self) -> list[list[int]]:
        """The tokens of each sequence up to its end."""
        return [row[:end] for row, end in zip(self.ids.tolist(), self.lengths, strict=True)]


@runtime_checkable
class SpecialTokens(Protocol):
    """Ids of the special tokens (`data.tokenization.SpecialIds`)."""

    @property
    def bos(self) -> int:
        """Begins a sequence."""
        ...

    @property
    def eos(self) -> int:
        """Ends a text."""
        ...

    @property
    def pad(self) -> int:
        """Fills what is behind the end."""
        ...

    @property
    def mask(self) -> int:
        """Stands for a token that is hidden."""
        ...


@runtime_checkable
class Generator(Protocol):
    """What `generate` needs of an algorithm."""

    @property
    def special(self) -> SpecialTokens:
        """Ids of the special tokens."""
        ...

    @property
    def noise(self) -> Schedule:
        """The masking schedule."""
        ...

    @property
    def length(self) -> int:
        """Tokens per training sequence."""
        ...

    @property
    def starts_with_bos(self) -> bool:
        """Whether the first token is given and never generated."""
        ...

    def new_denoiser(self, dtype: torch.dtype, kv_cache: bool) -> Denoiser:
        """The way this algorithm predicts tokens, with its weights as they are now."""
        ...


class Canvas:
    """The sequences being generated, with their random numbers.

    Args:
        x_BL: tokens on the device, masked where they are to be generated.
        masked_BL: the same places, on the host.
        rows_B: number of every sample, the key of its randomness.
        seed: the other part of the key.
        config: how tokens are drawn.
        on_step: called with the partly denoised tokens after every pass.
    """

    def __init__(
        self,
        x_BL: Int[Tensor, "B L"],
        masked_BL: Bool[Tensor, "B L"],
        rows_B: Int[Tensor, " B"],
        seed: int,
        config: SamplingConfig,
        on_step: Callable[[Tensor], None] | None,
    ) -> None:
        length = x_BL.shape[1]
        self.x_BL, self.masked_BL = x_BL, masked_BL
        self.clock_BL = keyed_uniform64((seed, CLOCK), rows_B, length)
        self.quantile_N = keyed_uniform64((seed, QUANTILE), rows_B, length).flatten()
        self.quantile_N = self.quantile_N.to(x_BL.device)
        self.config, self.on_step = config, on_step
        self.nfe = 0
        self.nfe_B = torch.zeros(len(rows_B), dtype=torch.long, device=x_BL.device)


class ActiveBlock:
    """The segment start..end of a canvas; see `decoding.reveal.Block`."""

    def __init__(
        self,
        canvas: Canvas,
        denoiser: Denoiser,
        schedule: Schedule,
        start: int,
        masked_BS: Bool[Tensor, "B S"],
    ) -> None:
        self._canvas, self._denoiser = canvas, denoiser
        self._start, self._end = start, start + masked_BS.shape[1]
        self.masked_BS = masked_BS
        self.clock_BS = canvas.clock_BL[:, start : self._end]
        self.schedule = schedule
        self.device = denoiser.device

    def predict(self, rows_M: Int[Tensor, " M"]) -> Float[Tensor, "M V"]:
        """Logits of rows of the flattened [B * S]: one counted pass."""
        self._canvas.nfe += 1
        return self._denoiser.logits(self._canvas.x_BL, self._start, self._end, rows_M)

    def reveal(self, rows_M: Tensor, logits_MV: Tensor, chosen_M: Tensor | None = None) -> None:
        """Draw the tokens of these rows with the quantiles of their positions."""
        canvas, config = self._canvas, self._canvas.config
        size, (_, length) = self._end - self._start, canvas.x_BL.shape
        places_M = rows_M // size * length + self._start + rows_M % size
        tokens_M = draw(
            logits_MV,
            canvas.quantile_N[places_M],
            temperature=config.temperature,
            nucleus_p=config.nucleus_p,
            float64=config.float64,
        )
        flat_N = canvas.x_BL.view(-1)
        if chosen_M is None:
            chosen_M = torch.ones_like(rows_M, dtype=torch.bool)
        flat_N[places_M] = torch.where(chosen_M, tokens_M, flat_N[places_M])
        revealed_B = torch.zeros_like(canvas.nfe_B).index_add_(0, rows_M // size, chosen_M.long())
        canvas.nfe_B += revealed_B > 0
        if canvas.on_step is not None:
            canvas.on_step(canvas.x_BL)


def decode(
    denoiser: Denoiser,
    schedule: Schedule,
    canvas: Canvas,
    stop: StopRules,
) -> int:
    """Denoise a canvas in place and return the number of tokens drawn.

    1. The denoiser cuts the length into segments: blocks, windows or positions.
    2. In each one the rule reveals what is masked in the sequences that still run.
    3. With variable length, the finished segment may end sequences.
    """
    config, new_tokens = canvas.config, 0
    for start, end in denoiser.begin(*canvas.x_BL.shape):
        masked_BS = canvas.masked_BL[:, start:end] & stop.active_B[:, None]
        count = int(masked_BS.sum())
        if count == 0:
            continue
        config.strategy.run(ActiveBlock(canvas, denoiser, schedule, start, masked_BS))
        new_tokens += count
        if config.var_length:
            stop.update(canvas.x_BL.cpu(), start, end)
            if not stop.active_B.any():
                break
    return new_tokens


def generate(
    model: Generator,
    num_samples: int,
    config: SamplingConfig,
    prompt_ids: Prompt | None = None,
    seed: int = 0,
    on_step: Callable[[Tensor], None] | None = None,
    first_sample: int = 0,
) -> Generation:
    """Generate one batch of sequences.

    Args:
        model: the algorithm; its weights are used as they are (see `Algorithm.ema_weights`).
        num_samples: B.
        config: how.
        prompt_ids: tokens that every sample, or each one its own, begins with; of any length. A
            mask token among them is filled in. BOS goes before a prompt that lacks it where the
            model never generates its first token.
        seed: of all randomness; a sample depends on it and its own number only.
        on_step: called after every pass with the tokens [B, L] on the device, to copy from.
        first_sample: number of the first sample.

    Raises:
        ValueError: a prompt that does not fit, or a length the model cannot generate.
    """
    started = time.perf_counter()
    length, special = config.length or model.length, model.special
    with torch.inference_mode():
        denoiser = model.new_denoiser(PRECISIONS[config.precision], config.kv_cache)
        bos = special.bos if model.starts_with_bos else None
        x_BL = with_prompts(prompt_ids, num_samples, length, special.mask, bos)
        masked_BL = x_BL == special.mask
        rows_B = torch.arange(first_sample, first_sample + num_samples)
        canvas = Canvas(x_BL.to(denoiser.device), masked_BL, rows_B, seed, config, on_step)
        stop = StopRules(~masked_BL, special.eos, config.entropy_window, config.min_entropy)
        new_tokens = decode(denoiser, model.noise, canvas, stop)
        x_BL = canvas.x_BL.cpu()
    beyond_BL = torch.arange(length) >= stop.length_B[:, None]
    return Generation(
        ids=x_BL.clone().masked_fill(beyond_BL, special.pad),
        lengths=stop.length_B.tolist(),
        stop_reasons=stop.reasons,
        nfe=canvas.nfe,
        sample_nfe=canvas.nfe_B.tolist(),
        new_tokens=new_tokens,
        seconds=time.perf_counter() - started,
    )


def with_prompts(
    prompt_ids: Prompt | None, batch: int, length: int, mask_id: int, bos_id: int | None
) -> Int[Tensor, "B L"]:
    """Sequences of mask tokens that begin with BOS (unless None) and their prompts.

    Raises:
        ValueError: not one prompt, or one per sample, shorter than `length`.
    """
    rows = _prompt_rows(prompt_ids, batch)
    if bos_id is not None:
        rows = [row if row[:1] == [bos_id] else [bos_id, *row] for row in rows]
    longest = max(len(row) for row in rows)
    if longest > length:
        raise ValueError(f"sampling.length={length}: the prompt alone has {longest} tokens")
    x_BL = torch.full((batch, length), mask_id)
    for x_L, row in zip(x_BL, rows, strict=True):
        x_L[: len(row)] = torch.tensor(row, dtype=torch.long)
    return x_BL


def _prompt_rows(prompt_ids: Prompt | None, batch: int) -> list[list[int]]:
    ids: list[Any] = (
        prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else list(prompt_ids or [])
    )
    if not ids or isinstance(ids[0], int):
        return [list(ids)] * batch
    if len(ids) != batch:
        raise ValueError(
            f"prompt_ids: {len(ids)} prompts for {batch} samples; allowed 1 or {batch}"
        )
    return [list(row) for row in ids]
