"""What ``generate`` and ``evaluate RUN speculative`` do, once their arguments are read."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nextlat.errors import NextLatError
from nextlat.options import split_names

if TYPE_CHECKING:
    from rich.table import Table

    from nextlat.decoding.acceptance import AcceptanceHead
    from nextlat.decoding.costs import Costs
    from nextlat.decoding.packed import Packed
    from nextlat.decoding.policies import Policy
    from nextlat.decoding.sampling import Sampling
    from nextlat.decoding.tree import Tree
    from nextlat.evaluation.speculative import Arm
    from nextlat.model.interfaces import CausalLM, Drafter
    from nextlat.training.trained import Trained

OFF, AUTO, TREE = "off", "auto", "tree"
NEW_TOKENS = 32
COUNTED_STEPS = 100
"""Training steps whose tokens are counted for a draft vocabulary."""
LONGEST = 16
"""Longest draft of the cost-aware policy, where the drafter sets no limit."""
SHOWN = 5
"""Positions of a draft whose acceptance is printed; the file has all."""


class CheapDrafts(NamedTuple):
    """What drafts are spared; see :mod:`nextlat.decoding.cheap`."""

    tokens: int | None = None
    """Draft the most frequent tokens of the training data only, so many of them."""
    int8: bool = False

    @property
    def asked(self) -> bool:
        """Whether anything is."""
        return self.int8 or self.tokens is not None


class Request(NamedTuple):
    """What ``generate`` is asked for."""

    prompt: str | None
    tokens: str | None
    max_new_tokens: int | None
    """By default 32, or as many as fit."""
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    speculative: str
    cheap: CheapDrafts = CheapDrafts()


def generate_command(run: Path, request: Request, checkpoint: str, device: str | None) -> None:
    """Continue one prompt and print what is new: text for text, token ids for token ids."""
    import torch

    from nextlat.decoding.acceptance import Planned
    from nextlat.decoding.adaptive import CostAware
    from nextlat.decoding.generate import generate
    from nextlat.decoding.policies import Static
    from nextlat.decoding.sampling import Sampling
    from nextlat.decoding.speculative import Statistics
    from nextlat.decoding.tree import Tree
    from nextlat.hf.tokenizer import task_tokenizer

    if (request.prompt is None) == (request.tokens is None):
        raise NextLatError('give either --prompt "some text" or --tokens 1,2,3')
    if request.prompt == "":
        raise NextLatError("--prompt is empty; give some text, or the end token with --tokens, which opens a document")
    if request.speculative == OFF and request.cheap.asked:
        raise NextLatError("--draft-tokens and --draft-int8 say how to draft; add --speculative auto, or a number")
    if request.temperature == 0 and (request.top_k is not None or request.top_p is not None):
        print("at temperature 0 the most likely token is taken; --top-k and --top-p change nothing", file=sys.stderr)
    trained = load(run, checkpoint, device)
    task = trained.built.task
    tokenizer = task_tokenizer(task)
    if request.prompt is None:
        assert request.tokens is not None
        ids = read_tokens(request.tokens, task.vocab_size)
    elif tokenizer is None:
        raise NextLatError(f"{trained.config.task} has no tokenizer; give token ids with --tokens 1,2,3")
    else:
        ids = [tokenizer.end_token, *tokenizer.encode(request.prompt)]  # the end token opens a document
    count = request.max_new_tokens or max(1, min(NEW_TOKENS, task.sequence_length - len(ids)))
    sampling = Sampling(request.temperature, request.top_k, request.top_p)
    lm: CausalLM = trained.built.objective.as_lm()
    drafter: Drafter | None = None
    policy: Policy | Tree | None = None
    if request.speculative != OFF:
        drafter = spared(trained, need_drafter(trained), request.cheap)
    if drafter is not None and request.speculative == AUTO:
        context = len(ids) + count // 2
        lm, costs = prepared(trained, drafter, context, sampling)
        print(costs.advice(longest_draft(drafter)), file=sys.stderr)
        head = fitted_acceptance(trained, request.temperature)
        longest = longest_draft(drafter)
        policy = CostAware(costs, longest) if head is None else Planned(costs, head, longest)
    elif drafter is not None:
        policy = Tree() if request.speculative == TREE else Static(read_length(request.speculative))
    counted = Statistics()
    began = time.perf_counter()
    new = generate(
        lm,
        torch.tensor([ids], device=trained.device),
        count,
        sampling.temperature,
        torch.Generator().manual_seed(request.seed),
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        drafter=drafter,
        policy=policy,
        stop_tokens=() if task.end_token is None else (task.end_token,),
        context_length=task.sequence_length,
        statistics=counted,
    )[0].tolist()
    seconds = time.perf_counter() - began
    if task.end_token in new:
        new = new[: new.index(task.end_token)]  # the rest repeats it
    print(tokenizer.decode(new) if request.prompt is not None and tokenizer else ",".join(map(str, new)))
    if policy is not None:
        print(
            f"{counted.tokens} tokens in {seconds:.2f} s, {counted.tokens_per_round:.2f} a round; kept by position: "
            f"{' '.join(f'{share:.2f}' for share in counted.acceptance) or 'nothing was drafted'}",
            file=sys.stderr,
        )


def load(run: Path, checkpoint: str, device: str | None) -> Trained:
    """A run that can continue its input."""
    from nextlat.training.trained import load_run

    if checkpoint not in ("newest", "best"):
        raise NextLatError(f"--checkpoint is {checkpoint!r}; choose newest or best")
    trained = load_run(run, device, checkpoint)
    if not trained.built.task.next_token:
        raise NextLatError(f"{run} was trained on {trained.config.task} to label its input; it cannot continue it")
    return trained


def need_drafter(trained: Trained) -> Drafter:
    """The objective's drafter, or an error that says which objectives have one."""
    drafter = trained.built.objective.drafter()
    if drafter is None:
        raise NextLatError(
            f"{trained.path} was trained with {trained.config.objective}, which drafts nothing; decode it without "
            "--speculative, or train nextlat, or mtp or jtp with a horizon of at least 1"
        )
    return drafter


def spared(trained: Trained, drafter: Drafter, cheap: CheapDrafts) -> Drafter:
    """The drafter, with fewer tokens or bits if asked for."""
    from nextlat.decoding.cheap import cheaper, count_targets, frequent_tokens

    if not cheap.asked:
        return drafter
    task, training = trained.built.task, trained.config.training
    vocabulary = None
    if cheap.tokens is not None:
        counts = count_targets(task, training.batch_size, min(COUNTED_STEPS, training.steps))
        vocabulary = frequent_tokens(counts, cheap.tokens).to(trained.device)
    return cheaper(drafter, vocabulary, int8=cheap.int8)


def longest_draft(drafter: Drafter) -> int:
    """Longest draft behind the known token that is worth trying."""
    return LONGEST if drafter.max_length is None else min(LONGEST, drafter.max_length - 1)


def read_length(text: str) -> int:
    """``--speculative`` as a number of tokens."""
    try:
        return int(text)
    except ValueError:
        raise NextLatError(f"--speculative is {text!r}; choose off, auto, tree, or how many tokens to draft") from None


def prepared(trained: Trained, drafter: Drafter, context: int, sampling: Sampling) -> tuple[Packed, Costs]:
    """The model with packed weights where they pay, and what drafting and verifying then cost here, for one row."""
    from nextlat.decoding.costs import measure_costs
    from nextlat.decoding.packed import packed

    fast = packed(trained.built.objective.as_lm())
    print(fast.report(), file=sys.stderr)
    return fast, measure_costs(fast, drafter, 1, context, sampling=sampling, device=trained.device)


def fitted_acceptance(trained: Trained, temperature: float) -> AcceptanceHead | None:
    """The acceptance head of a run, if one was fitted at this temperature."""
    from nextlat.training.acceptance import acceptance_head, acceptance_path

    if not acceptance_path(trained.path).is_file():
        return None
    try:
        head = acceptance_head(trained, temperature)
    except NextLatError as error:
        print(f"{error}; lengths follow the drafter's own probabilities", file=sys.stderr)
        return None
    print("lengths follow the acceptance head that was fitted to this run", file=sys.stderr)
    return head


def read_tokens(text: str, vocab_size: int) -> list[int]:
    """``1,2,3`` as token ids of a vocabulary."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise NextLatError(f"--tokens is {text!r}; write ids with commas between them, such as 1,2,3") from None
    for token in ids:
        if not 0 <= token < vocab_size:
            raise NextLatError(f"--tokens names {token}, and the vocabulary has the tokens 0 to {vocab_size - 1}")
    return ids


class Survey(NamedTuple):
    """What ``evaluate RUN speculative`` is asked for."""

    domains: str | None
    prompts: int
    prompt_tokens: int | None
    max_new_tokens: int | None
    temperature: float
    cheap: CheapDrafts = CheapDrafts()
    lengths: Sequence[int] = (0, 2, 3, 4, 5, 6, 8, 10)


def speculative_command(run: Path, survey: Survey, checkpoint: str, device: str | None) -> None:
    """Measure acceptance and speed by domain; print a table for each and write ``evaluations/speculative.json``."""
    from functools import partial

    from rich.console import Console

    from nextlat.decoding.acceptance import Planned
    from nextlat.decoding.adaptive import CostAware
    from nextlat.decoding.policies import Static
    from nextlat.decoding.sampling import Sampling
    from nextlat.decoding.tree import Tree
    from nextlat.evaluation.domains import domain_names, domain_prompts
    from nextlat.evaluation.speculative import measure_domain, metrics
    from nextlat.files import explained, write_json
    from nextlat.hf.tokenizer import task_tokenizer
    from nextlat.tasks.base import Prompted
    from nextlat.training.environment import commit
    from nextlat.training.loop import results

    trained = load(run, checkpoint, device)
    drafter, task = spared(trained, need_drafter(trained), survey.cheap), trained.built.task
    tokenizer = task_tokenizer(task)
    half = task.sequence_length // 2
    answer = task.prompts(task.splits[0]).answers.shape[1] if isinstance(task, Prompted) else half
    new = survey.max_new_tokens or answer
    names = split_names(survey.domains) or domain_names(task, tokenizer)
    length = survey.prompt_tokens or half
    fetched = run.parent.parent / "data" / "domains"
    check_room(run, task.sequence_length, length, new)
    prompts = {name: domain_prompts(name, task, tokenizer, survey.prompts, length, fetched) for name in names}
    length = max(len(prompt) for made in prompts.values() for prompt in made)  # a task's own are as long as they are
    check_room(run, task.sequence_length, length, new)
    longest = longest_draft(drafter)
    sampling = Sampling(survey.temperature)
    fast, costs = prepared(trained, drafter, length + new // 2, sampling)
    lengths = sorted({n for n in survey.lengths if n <= longest} | {min(longest, max(survey.lengths))})
    policies: dict[str, Callable[[], Policy | Tree]] = {str(n): partial(Static, n) for n in lengths}
    policies["tree"] = Tree
    policies["adaptive"] = partial(CostAware, costs, longest)
    head = fitted_acceptance(trained, survey.temperature)
    if head is not None:
        policies["learned"] = partial(Planned, costs, head, longest)
    stop = () if task.end_token is None else (task.end_token,)
    print(f"{trained.config.objective} of {run} at step {trained.step}, temperature {survey.temperature:g}")
    print(f"{survey.prompts} prompts of each domain, one at a time, {new} new tokens")
    print(costs.advice(longest))
    found = {}
    for name in names:
        moved = [prompt.to(trained.device) for prompt in prompts[name]]
        found[name] = measure_domain(
            fast, drafter, moved, new, sampling, policies, stop, baseline=trained.built.objective.as_lm()
        )
        Console(soft_wrap=True).print(domain_table(f"{name}, {len(moved[0])} prompt tokens", found[name]))
    print("kept: drafted tokens that were kept; the token that every round yields anyway is not among them")
    print("0: plain decoding with the weights that drafts get, so that what packing gains is not laid to drafts")
    if sampling.greedy:
        unlike = sum(arm.different for arms in found.values() for arm in arms.values())
        texts = len(names) * len(policies) * survey.prompts
        print(f"{unlike} of {texts} texts differ from plain decoding; equal logits can be told apart by rounding only")
    folder = run / "evaluations"
    with explained("creating", folder):
        folder.mkdir(exist_ok=True)
    warm = "" if sampling.greedy else f"-temperature-{sampling.temperature:g}"
    file = folder / f"speculative{warm}{'-best' if checkpoint == 'best' else ''}.json"
    written = results(metrics(found, sampling), trained.config, trained.step, commit())
    setting = {
        "temperature": sampling.temperature,
        "prompt_tokens": length,
        "new_tokens": new,
        "prompts": survey.prompts,
        "draft_tokens": survey.cheap.tokens,
        "draft_int8": survey.cheap.int8,
        "packing": fast.report(),
        "draft_cost": costs.draft,
        "draft_overhead": costs.overhead,
        "verification_cost": {str(k): price for k, price in costs.verify.items()},
    }
    write_json(file, written | {"setting": setting})
    print(f"wrote {file}")


def check_room(run: Path, room: int, prompt: int, new: int) -> None:
    """Refuse texts that are longer than the rows that a run was trained on."""
    if prompt + new > room:
        raise NextLatError(
            f"prompts of {prompt} tokens and {new} new ones do not fit the {room} tokens of the rows that {run} was "
            "trained on; lower --prompt-tokens or --max-new-tokens"
        )


def domain_table(title: str, arms: Mapping[str, Arm]) -> Table:
    """One line for each way of drafting."""
    from rich.table import Table

    from nextlat.evaluation.speculative import PLAIN, ratio

    table = Table(title=title, box=None, pad_edge=False, title_justify="left", title_style="bold")
    for column in ("drafts", "drafted", "kept", "tokens a round", "speed / plain", "kept by position"):
        table.add_column(column, justify="left" if column in ("drafts", "kept by position") else "right")
    for name, arm in arms.items():
        counted = arm.statistics
        rounds = max(counted.rounds, 1)
        if name != PLAIN:
            table.add_row(
                name,
                f"{sum(counted.drafted) / rounds:.2f}",
                f"{sum(counted.accepted) / rounds:.2f}",
                f"{counted.tokens_per_round:.2f}",
                f"{ratio(arms, name):.2f}",
                " ".join(f"{share:.2f}" for share in arm.acceptance[:SHOWN]),
            )
    return table
