"""Any causal model of this library as lm-eval sees a model; importing this needs lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nextlat.data.tokenizer import Tokenizer
from nextlat.decoding import Sampling, decode
from nextlat.model.interfaces import CausalLM

MAX_NEW_TOKENS = 256
"""Tokens generated where a task sets no limit, as in the harness's own adapter."""

Request = tuple[tuple[str, str], list[int], list[int]]


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods and continuations from a :class:`CausalLM`, whatever objective trained it.

    Args:
        lm: the model, on its device.
        tokenizer: of the task it was trained on; its end token stands before a text that has no context.
        longest: tokens that fit; longer contexts lose their beginning.
        batch_size: rows a forward pass.
        device: of the model.
    """

    def __init__(self, lm: CausalLM, tokenizer: Tokenizer, longest: int, batch_size: int, device: torch.device) -> None:
        super().__init__()
        self.lm, self.tokenizer, self.longest, self.batch_size = lm, None, longest, batch_size
        self._tokenizer, self._device = tokenizer, device

    @property
    def eot_token_id(self) -> int:
        """The end token, which also opens a text."""
        return self._tokenizer.end_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text; special ones are never added."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): its log-likelihood in nats, and whether greedy decoding says it."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            for place, answer in zip(part, self._scored([requests[i][1:] for i in part]), strict=True):
                answers[place] = answer
                request = requests[place][0]
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    @torch.no_grad()
    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        whole = [(context + continuation)[-(self.longest + 1) :] for context, continuation in pairs]
        width = max(len(tokens) for tokens in whole) - 1
        # causal: what stands behind a row's end does not matter
        rows = torch.tensor([tokens[:-1] + [0] * (width + 1 - len(tokens)) for tokens in whole], device=self._device)
        logits = self.lm(rows).logits
        found = []
        for row, tokens, (_, continuation) in zip(logits, whole, pairs, strict=True):
            count = min(len(continuation), len(tokens) - 1)
            law = row[len(tokens) - 1 - count : len(tokens) - 1].double().log_softmax(-1)
            asked = torch.tensor(tokens[len(tokens) - count :], device=self._device)
            value = law.gather(1, asked[:, None]).sum()
            found.append((float(value), bool((law.argmax(-1) == asked).all())))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows as long as fit, in nats."""
        sums = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.longest, 1)
            pairs = [(("", text), *make_disjoint_window(window)) for window in windows]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, the end token or ``max_gen_toks``, ``batch_size`` prompts at a time."""
        texts = [""] * len(requests)
        asked = [request.args for request in requests]
        alike: dict[str, list[int]] = {}
        for place, (_, options) in enumerate(asked):
            alike.setdefault(repr(sorted(options.items())), []).append(place)
        for places in alike.values():
            places.sort(key=lambda place: -len(asked[place][0]))  # rows of a batch of similar length
            for start in range(0, len(places), self.batch_size):
                part = places[start : start + self.batch_size]
                found = self._continued([asked[place][0] for place in part], dict(asked[part[0]][1]))
                for place, text in zip(part, found, strict=True):
                    texts[place] = text
                    self.cache_hook.add_partial("generate_until", asked[place], text)
        return texts

    def _continued(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = min(int(options.get("max_gen_toks", MAX_NEW_TOKENS)), max(1, self.longest - 1))
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        room, end = max(1, self.longest - most), self.eot_token_id
        prompts = [(self.tok_encode(context) or [end])[-room:] for context in contexts]
        lengths = [len(prompt) for prompt in prompts]
        rows = torch.tensor([prompt + [end] * (max(lengths) - len(prompt)) for prompt in prompts], device=self._device)
        new: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        open_rows = set(range(len(prompts)))
        for step in decode(self.lm, rows, most, Sampling(temperature), stop_tokens={end}, lengths=lengths):
            for row, tokens in step:
                if row not in open_rows:
                    continue
                new[row] += [token for token in tokens if token != end]
                texts[row] = self._tokenizer.decode(new[row])
                found = [texts[row].index(stop) for stop in stops if stop and stop in texts[row]]
                if found:
                    texts[row] = texts[row][: min(found)]
                    open_rows.discard(row)
            if not open_rows:
                break
        return texts
