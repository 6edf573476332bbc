"""The standard harness (`lm_eval`) asks, and any model of this project answers.

`lm_eval` is an optional package: import this module only where it is to be used.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data.errors import DataError
from decoding.generate import GenerationRequest, GenerationResult, GenerationSettings, Generator
from decoding.likelihood import Pair, Scores, prefix_id
from decoding.stop_strings import cut_before

NAME = "palimpsest"
# Of an answer, where a task says nothing; the harness's own number.
MAX_GEN_TOKS = 256
# What a task may ask of an answer, and requests that change nothing.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}
# Description, unit and total of something long; gives what is called with the number just done.
Progress = Callable[[str, str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Respondent:
    """A model that is asked.

    Attributes:
        name: what the user calls it.
        tokenizer: of prompts and answers, maybe with a chat template.
        make_generator: what writes answers under some settings.
        scores: what gives texts their likelihood.
        max_positions: tokens of a prompt and its answer.
        max_pair: tokens of a context and the continuation that is scored behind it: one more than
            the positions of a causal model, which does not read the last token.
        stop_ids: tokens that end an answer.
    """

    name: str
    tokenizer: Any
    make_generator: Callable[[GenerationSettings], Generator]
    scores: Scores
    max_positions: int
    max_pair: int
    stop_ids: tuple[int, ...]


def without_padding(requests: Sequence[Instance]) -> tuple[list[Instance], list[int]]:
    """The requests that are meant, and for every request given the place of the one to answer it.

    The harness gives all ranks as many requests by repeating a rank's last one beyond its
    `repeats`, for models whose ranks wait for each other. Here they do not, and what is asked twice
    would be counted twice.
    """
    meant: list[Instance] = []
    places: list[int] = []
    times: Counter[int] = Counter()
    last: dict[int, int] = {}
    for request in requests:
        times[id(request)] += 1
        if times[id(request)] <= (request.repeats or 1):
            last[id(request)] = len(meant)
            meant.append(request)
        places.append(last[id(request)])
    return meant, places


@register_model(NAME)
class HarnessModel(TemplateLM):
    """The harness's view of a model.

    Where `torch.distributed` runs, the harness gives every rank its share of the requests, padded
    (`without_padding`).

    Args:
        respondent: the model.
        progress: counts answers and likelihoods on the terminal.
        batch_size: likelihoods between two counts; the scores make batches of these.
        seed: of sampled answers.
        thinking: `enable_thinking` of the chat template.

    Attributes:
        counts: prompts and contexts that were `truncated`, and requests that `failed` (no answer;
            the empty text stands for it).
        notes: by task and document, of every answer what it cost and how it ended.
    """

    def __init__(
        self,
        respondent: Respondent,
        progress: Progress,
        batch_size: int = 32,
        seed: int = 0,
        thinking: bool = False,
    ) -> None:
        super().__init__()
        self.respondent, self.tokenizer = respondent, respondent.tokenizer
        self.progress, self.batch_size = progress, batch_size
        self.seed, self.thinking = seed, thinking
        self._device = torch.device("cpu")
        self.counts: Counter[str] = Counter(truncated=0, failed=0)
        self.notes: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        return self.prefix_token_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text that has nothing before it."""
        return prefix_id(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """By which the harness keeps prompts of different templates apart."""
        return self.respondent.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """A text as tokens; a BOS that is written out is not put before it again."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None and begin is not None and string.startswith(begin):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text that the model was made for.

        Raises:
            DataError: the tokenizer has no chat template, or the template refuses the turns.
        """
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"model={self.respondent.name}: the tokenizer has no chat template; allowed:"
                " mode.apply_chat_template=false"
            )
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                enable_thinking=self.thinking,
            )
        # Templates refuse by an exception of their own language.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"model={self.respondent.name}: its chat template refuses ({reason})"
            ) from error

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to every request, in order, up to the first of its `until`.

        Prompts that leave no room for `max_gen_toks` lose their beginning, which is counted.

        Raises:
            DataError: options of a task that no model here has.
        """
        requests, places = without_padding(requests)
        asked = self._questions(requests)
        by_settings: dict[GenerationSettings, list[GenerationRequest]] = defaultdict(list)
        for question, settings in asked:
            by_settings[settings].append(question)
        results: dict[str, GenerationResult] = {}
        with self.progress("answers", "requests", len(requests)) as tick:
            for settings, group in by_settings.items():
                group.sort(key=lambda one: len(one.prompt_ids or ()), reverse=True)
                for result in self.respondent.make_generator(settings).generate(group):
                    results[result.id] = result
                    tick(1)
        answers = []
        for request, (question, settings) in zip(requests, asked, strict=True):
            result = results[question.id]
            self._note(request, result)
            answers.append(cut_before(result.text, settings.stop_strings))
        return [answers[place] for place in places]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) of every request in nats, and whether it is greedy."""
        requests, places = without_padding(requests)
        values = super().loglikelihood(requests, disable_tqdm=True)
        return [values[place] for place in places]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p(text) of every request, in nats.

        A text longer than the model is read in windows, each token predicted once.
        """
        requests, places = without_padding(requests)
        windows: list[Pair] = []
        owner: list[int] = []
        for place, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.respondent.max_pair - 1, 1
            )
            found = [make_disjoint_window(pair) for pair in pairs]
            windows += found
            owner += [place] * len(found)
        totals = [0.0] * len(requests)
        for place, (value, _) in zip(owner, self._score(windows), strict=True):
            totals[place] += value
        return [totals[place] for place in places]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of contexts that are too long the end is read, which is counted."""
        longest, pairs = self.respondent.max_pair, []
        for (_, text), context, continuation in requests:
            if not 1 <= len(continuation) < longest:
                raise DataError(
                    f"continuation {text[:40]!r}: {len(continuation)} tokens; allowed 1 .."
                    f" {longest - 1}"
                )
            room = longest - len(continuation)
            self.counts["truncated"] += len(context) > room
            pairs.append((context[-room:], continuation))
        return self._score(pairs)

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """The likelihoods of pairs, the longest first; what reads the same comes together."""
        order = sorted(
            range(len(pairs)),
            key=lambda place: (-len(pairs[place][0]) - len(pairs[place][1]), *pairs[place]),
        )
        found: dict[int, tuple[float, bool]] = {}
        with self.progress("likelihoods", "requests", len(pairs)) as tick:
            for first in range(0, len(order), self.batch_size):
                places = order[first : first + self.batch_size]
                values = self.respondent.scores.loglikelihood([pairs[place] for place in places])
                found.update(zip(places, values, strict=True))
                tick(len(places))
        return [found[place] for place in range(len(pairs))]

    def _questions(
        self, requests: Sequence[Instance]
    ) -> list[tuple[GenerationRequest, GenerationSettings]]:
        """What to answer, and how."""
        times: Counter[str] = Counter()
        asked = []
        for request in requests:
            context, options = request.args
            settings = self._settings(options)
            room = self.respondent.max_positions - settings.max_new_tokens
            if room < 1:
                raise DataError(
                    f"max_gen_toks={settings.max_new_tokens}: model={self.respondent.name} has"
                    f" {self.respondent.max_positions} positions; allowed: less, by"
                    " mode.gen_kwargs={max_gen_toks: ...}"
                )
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            self.counts["truncated"] += len(tokens) > room
            # What is sampled depends on it: repeated requests must differ, and nothing else may.
            name = f"{request.task_name}/{request.doc_id}/{request.idx}"
            request_id = f"{name}/{times[name]}"
            times[name] += 1
            asked.append((GenerationRequest(request_id, prompt_ids=tokens[-room:]), settings))
        return asked

    def _settings(self, options: Mapping[str, Any]) -> GenerationSettings:
        """A task's `generation_kwargs` as the settings of a generation."""
        asked = normalize_gen_kwargs(dict(options), MAX_GEN_TOKS)
        for key, value in asked.items():
            if key not in _KNOWN and value != _NEUTRAL.get(key):
                raise DataError(
                    f"generation_kwargs {key}={value}: not to be had here; allowed:"
                    f" {', '.join(sorted(_KNOWN))}, or mode.gen_kwargs={{{key}: null}}"
                )
        until = tuple(dict.fromkeys(filter(None, asked["until"])))
        return GenerationSettings(
            max_new_tokens=asked["max_gen_toks"],
            temperature=float(asked.get("temperature", 1.0)) if asked["do_sample"] else 0.0,
            top_p=float(asked.get("top_p", 1.0)),
            top_k=int(asked.get("top_k", 0)),
            seed=self.seed,
            stop_ids=self._stop_ids(until),
            stop_strings=until,
        )

    def _stop_ids(self, until: Sequence[str]) -> tuple[int, ...]:
        """Special tokens end an answer by their number: they are not in its text."""
        known = self.tokenizer.added_tokens_decoder.items()
        named = {number for number, token in known if token.special and token.content in until}
        return tuple(sorted({*self.respondent.stop_ids, *named}))

    def _note(self, request: Instance, result: GenerationResult) -> None:
        self.counts["failed"] += result.error is not None
        about = {"num_tokens": result.num_tokens, "finish": result.finish}
        about |= {} if result.work is None else {"work": result.work}
        about |= {} if result.error is None else {"error": result.error}
        self.notes[str(request.task_name), int(request.doc_id or 0)].append(about)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """How many processes share the requests."""
        return dist.get_world_size() if dist.is_initialized() else 1

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, stacked."""
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks, on one of them."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, gathered, dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()
