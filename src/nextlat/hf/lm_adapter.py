"""Any causal model of this library as lm-eval sees a model; importing this needs lm-eval."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nextlat.data.tokenizer import Tokenizer
from nextlat.decoding import Sampling, decode
from nextlat.errors import NextLatError
from nextlat.model.interfaces import CausalLM
from nextlat.statistics import Metric

MAX_NEW_TOKENS = 256
"""Tokens generated where a task sets no limit, as in the harness's own adapter."""
COUNTED = {"cut_contexts": "requests", "cut_answers": "requests", "lost_characters": "characters"}
"""What is counted of each task because it makes its figures differ from what the task means, and of how many."""

Pair = tuple[list[int], list[int]]
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class Wish(NamedTuple):
    """What a task asks of generation."""

    stops: tuple[str, ...]
    most: int
    """New tokens, if they fit behind the prompt."""
    sampling: Sampling


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods and continuations from a :class:`CausalLM`, whatever objective trained it.

    Args:
        lm: the model, on its device.
        tokenizer: of the task it was trained on; its end token stands before a text that has no context.
        longest: tokens that fit; longer contexts of log-likelihoods lose their beginning, which is counted.
        batch_size: rows a forward pass.
        device: of the model.
    """

    def __init__(self, lm: CausalLM, tokenizer: Tokenizer, longest: int, batch_size: int, device: torch.device) -> None:
        super().__init__()
        self.lm, self.tokenizer, self.longest, self.batch_size = lm, None, longest, batch_size
        self._tokenizer, self._device = tokenizer, device
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """By task: the keys and values of :data:`COUNTED`."""

    @property
    def eot_token_id(self) -> int:
        """The end token, which also opens a text."""
        return self._tokenizer.end_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text; special ones are never added."""
        return self._tokenizer.encode(string)

    def counted(self) -> dict[str, Metric]:
        """``<task>.<what>`` for all that was counted and is not 0."""
        return {
            f"{task}.{what}": Metric(float(counts[what]), n=counts[of])
            for task, counts in self.counts.items()
            for what, of in COUNTED.items()
            if counts[what]
        }

    def _count(self, request: Any, text: str, tokens: list[int]) -> Counter[str]:
        counts = self.counts[str(request.task_name)]
        counts["requests"] += 1
        counts["characters"] += len(text)
        # what decoding adds, such as a space in front, is no loss
        counts["lost_characters"] += (Counter(text) - Counter(self._tokenizer.decode(tokens))).total()
        return counts

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood in nats, and whether greedy decoding says it.

        Raises:
            NextLatError: a continuation that has no tokens of its own, or more than fit.
        """
        found: list[Request] = []
        for request in requests:
            context, continuation = texts = request.args
            whole = self.tok_encode(context + continuation)
            before, behind = self._encode_pair(context, continuation) if context else ([], whole)
            if before + behind != whole:
                raise NextLatError(
                    f"the choice {continuation!r} shares a token with the text {context[-40:]!r} before it, so it has "
                    "no probability of its own; put a space into the task's target_delimiter or in front of the choice"
                )
            counts = self._count(request, context + continuation, whole)
            counts["cut_contexts"] += len(whole) > self.longest + 1  # the last token is asked for, not read
            found.append((texts, before, behind))
        return self._loglikelihood_tokens(found)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The same for (texts, context, continuation) in tokens; ``texts`` is ``None`` for windows of longer texts."""
        pairs = [self._checked(*request) for request in requests]
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            for place, answer in zip(part, self._scored([pairs[i] for i in part]), strict=True):
                answers[place] = answer
                texts = requests[place][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _checked(self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Pair:
        """Both parts, the context with at least one token."""
        before, said = texts or ("", "")
        if not continuation:
            raise NextLatError(
                f"the choice {said!r} behind {before[-40:]!r} has 0 tokens of its own and needs at least 1: it is "
                "empty, the tokenizer knows none of its characters, or it merged with the text before it; change the "
                "choice, or put a space into it or into the task's target_delimiter"
            )
        if len(continuation) > self.longest:
            raise NextLatError(
                f"the choice {said[:40]!r}... has {len(continuation)} tokens, and the run was trained on rows of "
                f"{self.longest}; shorten it, or measure it with output_type: loglikelihood_rolling"
            )
        return context or [self.eot_token_id], continuation

    @torch.no_grad()
    def _scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        whole = [(context + continuation)[-(self.longest + 1) :] for context, continuation in pairs]
        width = max(len(tokens) for tokens in whole) - 1
        # causal: what stands behind a row's end does not matter
        rows = torch.tensor([tokens[:-1] + [0] * (width + 1 - len(tokens)) for tokens in whole], device=self._device)
        logits = self.lm(rows).logits
        found = []
        for row, tokens, (_, continuation) in zip(logits, whole, pairs, strict=True):
            last = len(tokens) - 1
            law = row[last - len(continuation) : last].double().log_softmax(-1)
            asked = torch.tensor(continuation, device=self._device)
            value = law.gather(1, asked[:, None]).sum()
            found.append((float(value), bool((law.argmax(-1) == asked).all())))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows as long as fit, in nats."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            self._count(request, text, tokens)
            for window in get_rolling_token_windows(tokens, self.eot_token_id, self.longest, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, the end token or as many tokens as asked for and fit behind the prompt.

        A prompt that fills the row loses its beginning, which is counted: the answer gets the room it asks for, half
        a row at most.

        Raises:
            NextLatError: an option that is not known here.
        """
        prompts = []
        alike: dict[tuple[Wish, int], list[int]] = {}
        for place, request in enumerate(requests):
            context, options = request.args
            tokens = self.tok_encode(context)
            counts = self._count(request, context, tokens)
            wish = read_wish(options)
            if len(tokens) >= self.longest:
                tokens = tokens[-(self.longest - min(wish.most, self.longest // 2)) :]
                counts["cut_contexts"] += 1
            prompts.append(tokens or [self.eot_token_id])
            room = self.longest - len(prompts[-1])
            # one limit a batch, so that answers do not depend on what else is in it and no row outgrows its room
            alike.setdefault((wish, min(wish.most, room)), []).append(place)
        texts = [""] * len(requests)
        for (wish, most), places in alike.items():
            places.sort(key=lambda place: -len(prompts[place]))  # rows of a batch of similar length
            for start in range(0, len(places), self.batch_size):
                part = places[start : start + self.batch_size]
                found = self._continued([prompts[place] for place in part], wish, most)
                for place, (text, ended) in zip(part, found, strict=True):
                    texts[place] = text
                    self.counts[str(requests[place].task_name)]["cut_answers"] += most < wish.most and not ended
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return texts

    def _continued(self, prompts: Sequence[list[int]], wish: Wish, most: int) -> list[tuple[str, bool]]:
        """For each prompt what follows, and whether it came to an end of its own."""
        end = self.eot_token_id
        lengths = [len(prompt) for prompt in prompts]
        rows = torch.tensor([prompt + [end] * (max(lengths) - len(prompt)) for prompt in prompts], device=self._device)
        new: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        open_rows = set(range(len(prompts)))
        for step in decode(self.lm, rows, most, wish.sampling, stop_tokens={end}, lengths=lengths):
            for row, tokens in step:
                if row not in open_rows:
                    continue
                new[row] += [token for token in tokens if token != end]
                texts[row] = self._tokenizer.decode(new[row])
                found = [texts[row].index(stop) for stop in wish.stops if stop in texts[row]]
                if found:
                    texts[row] = texts[row][: min(found)]
                if found or end in tokens:
                    open_rows.discard(row)
            if not open_rows:
                break
        return [(text, row not in open_rows) for row, text in enumerate(texts)]


def read_wish(options: Mapping[str, Any]) -> Wish:
    """The options of a task's ``generation_kwargs``, with the names and defaults that lm-eval has for them.

    Raises:
        NextLatError: an option that is not known here, or sampling without a temperature.
    """
    given = dict(normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS))
    stops = tuple(str(stop) for stop in given.pop("until") if stop)
    most, sampled = given.pop("max_gen_toks"), given.pop("do_sample")
    temperature = float(given.pop("temperature", 0.0))
    if sampled and not temperature:
        raise NextLatError("do_sample is true and temperature is 0; set a temperature above 0, or do_sample: false")
    top_k, top_p = given.pop("top_k", None), given.pop("top_p", None)
    if given:
        raise NextLatError(
            f"generation_kwargs has {', '.join(sorted(given))}, which is not known here; known are until, "
            "max_gen_toks, do_sample, temperature, top_k and top_p; remove it"
        )
    return Wish(stops, most, Sampling(temperature if sampled else 0.0, top_k, top_p))
