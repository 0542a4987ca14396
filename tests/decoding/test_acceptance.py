"""A head foresees what becomes of drafted tokens, is saved beside the run, and says what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextlat import generate
from nextlat.commands import fit_acceptance_command
from nextlat.decoding import Sampling
from nextlat.decoding.acceptance import AcceptanceHead, Planned
from nextlat.decoding.costs import Costs
from nextlat.decoding.foresight import Calibration, Examples, Fit, calibration, collect, fit
from nextlat.decoding.policies import Known, Static
from nextlat.decoding.speculative import Statistics, decode
from nextlat.errors import NextLatError
from nextlat.model.cache import Cache
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.training.acceptance import acceptance_head, acceptance_path, fit_acceptance, texts
from nextlat.training.trained import load_run
from tests.decoding.test_speculative import prompts, trained
from tests.tiny import files_below, run_whole, tiny

EMBEDDING = torch.randn(9, 3, generator=torch.Generator().manual_seed(5))


def planted(count: int = 8000, width: int = 4) -> Examples:
    """The second token depends on an entry of the state and one of the embedding together; the third never came."""
    g = torch.Generator().manual_seed(0)
    states, tokens = 5 + 3 * torch.randn(count, width, generator=g), torch.randint(9, (count,), generator=g)
    second = (3 * torch.sign((states[:, 1] - 5) * EMBEDDING[tokens, 2])).sigmoid()
    labels = torch.stack([torch.full((count,), 0.8), second, torch.full((count,), torch.nan)], 1)
    return Examples(states, tokens, labels, torch.arange(count) // 40)


def test_a_planted_relation_is_learned_and_better_calibrated_than_positions_alone() -> None:
    found = fit(planted(), EMBEDDING, steps=1200)
    # chances cannot be known better than by their own entropy
    labels = planted().labels[:, :2].double()
    least = float(-(labels * labels.log() + (1 - labels) * (1 - labels).log()).mean())
    assert found.head_score.log_loss < least + 0.06
    assert found.constant.log_loss > least + 0.2
    assert found.head_score.brier < 0.3 * found.constant.brier
    assert (found.examples, found.held_out) == (6400, 1600)
    chances = found.head(found.head.read(planted().states, planted().tokens)).sigmoid()
    torch.testing.assert_close(chances[:, 0].mean(), torch.tensor(0.8), rtol=0, atol=0.03)


def test_the_fit_is_as_long_as_there_are_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    whole = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: steps.append(whole(*args)))
    fit(planted(4000), EMBEDDING)  # 2800 are fitted to, 400 watched and 800 measured on
    assert len(steps) == 16 * 3 + 1  # the last at a learning rate of 0
    del steps[:]
    fit(planted(120), EMBEDDING)
    assert len(steps) == 16 + 1


def test_few_examples_are_not_learned_by_heart() -> None:
    g = torch.Generator().manual_seed(1)
    few = Examples(
        torch.randn(300, 200, generator=g),
        torch.randint(9, (300,), generator=g),
        (torch.rand(300, 2, generator=g) < 0.7).float(),  # by chance alone
        torch.arange(300) // 5,
    )
    found = fit(few, EMBEDDING, steps=600)
    # with the last weights it is above 2
    assert found.head_score.log_loss == pytest.approx(found.constant.log_loss, abs=0.1)


def weights(head: AcceptanceHead) -> Tensor:
    return torch.cat([p.flatten() for p in head.parameters()])


def test_fitting_is_reproducible_and_measures_on_other_prompts() -> None:
    one, other = fit(planted(400), EMBEDDING, steps=20), fit(planted(400), EMBEDDING, steps=20)
    assert torch.equal(weights(one.head), weights(other.head))
    changed = planted(400)._replace(labels=planted(400).labels.clone())
    changed.labels[320:] = 0.5  # the held-out prompts
    assert torch.equal(weights(fit(changed, EMBEDDING, steps=20).head), weights(one.head))
    with pytest.raises(NextLatError, match="drafts of 2 prompts are there; three are needed"):
        fit(planted(80), EMBEDDING)
    assert fit(planted(120), EMBEDDING, steps=2).held_out == 40


def test_calibration_is_log_loss_and_squared_error_of_the_tokens_whose_turn_came() -> None:
    found = calibration(torch.tensor([0.5, 0.9, 0.1]), torch.tensor([1.0, 1.0, torch.nan]))
    assert found.log_loss == pytest.approx((0.693147 + 0.105361) / 2, abs=1e-5)
    assert found.brier == pytest.approx((0.25 + 0.01) / 2, abs=1e-6)


def test_survival_is_the_product_of_chances_by_state_and_token() -> None:
    g = torch.Generator().manual_seed(0)
    head = AcceptanceHead(EMBEDDING, 4, 5, generator=g)
    torch.nn.init.normal_(head.out.weight, std=0.1, generator=g)
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=g)
    states, tokens = torch.randn(3, 4, generator=g), torch.tensor([0, 6, 2])
    chances = head(torch.cat([states, EMBEDDING[tokens]], 1)).sigmoid()
    survival = head.folded()
    torch.testing.assert_close(survival(states, tokens), chances.cumprod(1))
    torch.testing.assert_close(survival(states.double(), tokens), chances.cumprod(1))
    assert len({round(x, 4) for x in chances[:, 1].tolist()}) == 3
    assert not torch.allclose(survival(states, tokens.flip(0)), survival(states, tokens))
    assert "embedding" not in head.state_dict()


class Foreseen:
    """In place of a head: survival of (B, K), made beforehand."""

    def __init__(self, curves: list[list[float]]) -> None:
        self.curves, self.length = torch.tensor(curves), len(curves[0])

    def folded(self) -> Callable[[Tensor, Tensor], Tensor]:
        def survival(states: Tensor, tokens: Tensor) -> Tensor:
            assert len(states) == len(tokens) == len(self.curves)
            return self.curves

        return survival


def known(*rooms: int) -> Known:
    rows = len(rooms)
    return Known(torch.zeros(rows, dtype=torch.int64), torch.tensor(rooms), torch.zeros(rows, 1))


STAIRS = Costs(0.1, {1: 1.0, 2: 1.1, 3: 1.8, 4: 1.8, 5: 1.8})


@pytest.mark.parametrize(
    ("curves", "rooms"),
    [
        ([[0.9, 0.8, 0.1, 0.0]], [9]),
        ([[0.6, 0.5, 0.1, 0.0]], [9]),  # plain decoding is worth more
        ([[0.2, 0.1, 0.1, 0.0]], [9]),
        ([[0.9, 0.9, 0.9, 0.9]], [9]),  # worth the step up only together with the level ground behind it
        ([[0.9, 0.9, 0.9, 0.9]], [2]),  # of which there is not enough
        ([[0.9, 0.9, 0.9, 0.9], [0.1, 0.0, 0.0, 0.0]], [9, 9]),
        ([[0.9, 0.9, 0.9, 0.9], [0.1, 0.0, 0.0, 0.0]], [9, 0]),
        ([[0.9, 0.9, 0.9, 0.9], [0.1, 0.0, 0.0, 0.0]], [0, 9]),
    ],
)
def test_the_planned_length_is_worth_most_at_the_rate_reached(curves: list[list[float]], rooms: list[int]) -> None:
    policy = Planned(STAIRS, Foreseen(curves), 4)  # type: ignore[arg-type]
    rows = torch.tensor(curves)[torch.tensor(rooms) > 0]
    longest = min(4, max(rooms))
    worth = [1 + float(rows.mean(0)[:n].sum()) - policy.rate * STAIRS.round(n) for n in range(longest + 1)]
    assert policy.plan(known(*rooms)) == worth.index(max(worth))
    assert Planned(STAIRS, Foreseen(curves), 2).max_length == 2  # type: ignore[arg-type]
    assert Planned(STAIRS, Foreseen(curves), 9).max_length == 4  # type: ignore[arg-type]
    assert Planned(STAIRS, Foreseen(curves), 0).plan(known(*rooms)) == 0  # type: ignore[arg-type]


def test_the_planned_lengths_differ() -> None:
    made = [
        Planned(STAIRS, Foreseen([curve]), 4).plan(known(9))  # type: ignore[arg-type]
        for curve in ([0.2, 0.1, 0.1, 0.0], [0.9, 0.1, 0.0, 0.0], [0.9, 0.9, 0.9, 0.9])
    ]
    assert made == [0, 1, 4]


def played(policy: Planned, kept_from: int, rounds: int = 400) -> list[bool]:
    """Whether each round drafted; a drafted token is kept from one round on."""
    made = []
    for n in range(rounds):
        made.append(policy.plan(known(1)) > 0)
        policy.learn([int(made[-1])], [int(made[-1] and n >= kept_from)])
    return made


def test_drafts_that_do_not_pay_are_given_up_and_tried_again() -> None:
    policy = Planned(Costs(0.1, {1: 1.0, 2: 1.1}), Foreseen([[0.9]]), 1)  # type: ignore[arg-type]
    made = played(policy, kept_from=200)
    assert all(made[:10])  # the first losses are not believed
    assert sum(made[60:192]) == 4  # one in 33 rounds
    assert all(made[-60:])  # noticed again
    assert policy.drafts_pay
    # what was gained and lost long ago does not hide that drafts pay again
    for _ in range(2000):
        policy.learn([int(policy.plan(known(1)) > 0)], [0])
    assert not policy.drafts_pay
    assert all(played(policy, kept_from=0, rounds=200)[-20:])
    with pytest.raises(NextLatError, match="memory is 1 rounds"):
        Planned(STAIRS, Foreseen([[0.5]]), memory=1)  # type: ignore[arg-type]


def test_the_rate_is_of_all_rounds_so_that_a_poor_draft_is_left_out_where_others_pay() -> None:
    policy = Planned(Costs(0.1, {1: 1.0, 2: 1.1}), Foreseen([[0.9]]), 1, memory=20)  # type: ignore[arg-type]
    for _ in range(400):
        policy.learn([1], [1])
        policy.learn([0], [0])
    assert policy.rate == pytest.approx(3 / 2.2, abs=0.03)  # two tokens for 1.2, one for 1
    poor = Foreseen([[0.25]])
    assert Planned(Costs(0.1, {1: 1.0, 2: 1.1}), poor, 1).plan(known(1)) == 0  # type: ignore[arg-type]


class Constant:
    """A model and a drafter with one law each, whatever the text."""

    P = torch.tensor([0.3, 0.5, 0.2])
    Q = torch.tensor([0.6, 0.3, 0.1])
    max_length = None
    vocabulary: Tensor | None = None

    def __call__(self, tokens: Tensor, cache: Cache | None = None, logits_at: Tensor | None = None) -> LMOutput:
        if cache is not None:
            cache.advance(tokens.shape[1])
        hidden = torch.zeros(*tokens.shape, 1)
        logits = self.P.log().expand(*states_at(hidden, logits_at).shape[:2], -1)
        return LMOutput(logits, hidden, cache)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return Cache((1, rows, capacity, 1, 1), self.P)

    def observe(self, output: LMOutput, accepted: Tensor) -> int:
        return 0

    def step(self, state: int, token: Tensor) -> tuple[int, Tensor]:
        return state, self.Q.log().expand(len(token), -1)


class Reduced(Constant):
    """Drafts two of the three tokens."""

    Q = torch.tensor([0.6, 0.4])
    vocabulary = torch.tensor([0, 2])


@pytest.mark.parametrize("model", [Constant(), Reduced()])
def test_at_a_temperature_the_label_is_p_over_q_and_turns_come_as_often_as_drafts_are_kept(model: Constant) -> None:
    g = torch.Generator().manual_seed(0)
    texts, new = 4000, 4  # drafts of 3 tokens, of 2 and of 1
    prompts = [(torch.tensor([0]), new)] * texts
    made = collect(model, model, prompts, Sampling(1.0), 3, g)  # type: ignore[arg-type]
    assert made.states.shape == (texts * 3, 1)
    assert made.labels.shape == (texts * 3, 3)
    tokens = torch.arange(3) if model.vocabulary is None else model.vocabulary
    sure = made.labels[~made.labels.isnan()]
    ratios = (model.P[tokens] / model.Q).clamp(max=1).unique()
    assert all((ratios - label).abs().min() < 1e-6 for label in sure.unique())
    # each token of a draft is kept with probability sum min(p, q), and has its turn if all before it were
    kept = float(torch.minimum(model.P[tokens], model.Q).sum())
    came = 1 - made.labels.isnan().float().mean(0)
    # of the three places of a text one leaves room for three tokens, one for two, one for one
    torch.testing.assert_close(came, torch.tensor([3, 2 * kept, kept**2]) / 3, rtol=0, atol=0.02)
    assert float(sure.mean()) == pytest.approx(kept, abs=0.01)


def test_greedy_examples_are_those_of_a_draft_from_every_place() -> None:
    objective, new, length = trained(), 12, 4
    lm, drafter = objective.as_lm(), objective.drafter()
    assert drafter is not None
    rows = [row[: 3 + n] for n, row in enumerate(prompts())]  # unlike in length
    made = collect(lm, drafter, [(row, new) for row in rows], Sampling(0.0), length)
    for number, row in enumerate(rows):
        text = generate(lm, row[None], new)[0]
        labels, states = [], []
        for place in range(new - 1):
            whole = torch.cat([row, text[:place]])
            output = lm(whole[None])
            states.append(output.hidden[0, -1].float())
            state = drafter.observe(output, torch.tensor([len(whole) - 1]))
            token = text[place : place + 1]
            labels.append([float("nan")] * length)
            for i, wanted in enumerate(text[place + 1 : place + 1 + length].tolist()):
                state, logits = drafter.step(state, token)
                token = logits.argmax(-1)
                labels[-1][i] = float(int(token) == wanted)
                if not labels[-1][i]:
                    break
        mine = made.take(made.prompts == number)
        torch.testing.assert_close(mine.labels, torch.tensor(labels), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(mine.states, torch.stack(states), rtol=1e-4, atol=1e-5)
        assert torch.equal(mine.tokens, text[:-1])
    assert 0 < float(made.labels.nanmean()) < 1

    few = collect(lm, drafter, [(row, new) for row in rows], Sampling(0.0), length, most=20)
    assert 8 <= len(few.labels) <= 32 < len(made.labels)
    with pytest.raises(NextLatError, match="at least 2 tokens"):
        collect(lm, drafter, [(rows[0], 1)], Sampling(0.0), 2)


def test_a_head_plans_lossless_drafts() -> None:
    objective = trained().float()
    head = AcceptanceHead(objective.model.embedding_weight, 16, 6, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(head.out.weight, generator=torch.Generator().manual_seed(1))
    policy, counted = Planned(Costs(0.05), head, 4), Statistics()
    made = generate(objective.as_lm(), prompts(), 15, drafter=objective.drafter(), policy=policy, statistics=counted)
    assert torch.equal(made, generate(objective.as_lm(), prompts(), 15))
    assert 0 < sum(counted.drafted) < counted.rounds * 4


def test_a_policy_reads_the_state_before_the_known_token_of_every_row() -> None:
    objective = trained()
    lm, drafter = objective.as_lm(), objective.drafter()
    seen: list[Known] = []

    class Watches(Static):
        reads_states = True

        def plan(self, known: Known) -> int:
            seen.append(known)
            return len(seen) % 3

    rows = prompts()[:2]
    stop = int(generate(lm, rows[:1], 4)[0, 3])
    texts = [row.tolist() for row in rows]
    rounds = decode(lm, rows, 12, Sampling(), drafter=drafter, policy=Watches(2), stop_tokens=(stop,))
    for number, made in enumerate(rounds):
        if number:
            going = [text for row, text in zip(rows, texts, strict=True) if text[-1] != stop or len(text) == len(row)]
            shown = seen[number - 1]
            assert shown.tokens.tolist() == [text[-1] for text in going]
            assert shown.states is not None
            wanted = torch.stack([lm(torch.tensor(text[:-1])[None]).hidden[0, -1] for text in going])
            torch.testing.assert_close(shown.states, wanted, rtol=1e-5, atol=1e-6)
        for row, tokens in made:
            texts[row] += tokens
    assert len(seen[0].tokens) == 2
    assert len(seen[-1].tokens) == 1


def test_drafts_are_no_longer_than_planned() -> None:
    class One(Static):
        def plan(self, known: Known) -> int:
            return 1

    objective, counted = trained(), Statistics()
    generate(objective.as_lm(), prompts(), 9, drafter=objective.drafter(), policy=One(4), statistics=counted)
    assert len(counted.drafted) == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("acceptance")
    return {
        name: run_whole(tiny(name, "training.evaluate_every=null", name=name), folder) for name in ("nextlat", "gpt")
    }


def test_what_was_fitted_is_saved_and_read_back(finished: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = finished["nextlat"]
    with pytest.raises(NextLatError, match=r"acceptance\.safetensors does not exist; fit it with `nextlat fit-acc"):
        acceptance_head(load_run(run))
    path, found = fit_acceptance(load_run(run), prompts=10, steps=5, length=2)
    assert path == acceptance_path(run)
    assert files_below(run / "posthoc") == ["acceptance.safetensors"]
    head = acceptance_head(load_run(run))
    assert head.state_dict().keys() == found.head.state_dict().keys()
    assert all(torch.equal(value, found.head.state_dict()[name]) for name, value in head.state_dict().items())
    assert torch.equal(head.embedding, load_run(run).built.objective.model.embedding_weight)
    assert not any(parameter.requires_grad for parameter in head.parameters())

    fit_acceptance_command(run, 0.0, 10, None, 3, None, None)
    assert acceptance_head(load_run(run), 0.0).length == 3
    with pytest.raises(NextLatError, match=r"fitted at temperature 0, and this is temperature 0\.7; fit it"):
        acceptance_head(load_run(run), 0.7)
    said = capsys.readouterr().out
    assert all(word in said for word in ("head", "the position alone", "log loss", str(path)))

    with pytest.raises(NextLatError, match="was fitted to the model of step 6, and this is step 5"):
        acceptance_head(load_run(run)._replace(step=5))
    path.write_bytes(b"torn")
    with pytest.raises(NextLatError, match="is damaged; fit it again"):
        acceptance_head(load_run(run))


@pytest.mark.parametrize("loss", [0.3, 0.7])
def test_a_head_that_is_worse_than_positions_is_pointed_out(
    loss: float, finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Fit(AcceptanceHead(EMBEDDING, 1, 1), Calibration(loss, 0.1), Calibration(0.5, 0.1), 8, 2)
    monkeypatch.setattr("nextlat.training.acceptance.fit_acceptance", lambda *_: (Path("head"), made))
    fit_acceptance_command(finished["nextlat"], 0.0, 10, None, 1, None, None)
    assert ("fit it to more than 10 of them" in capsys.readouterr().out) == (loss > 0.5)


def test_a_run_without_drafts_is_refused(finished: dict[str, Path]) -> None:
    with pytest.raises(NextLatError, match="trained with gpt, which drafts nothing; fit a run of nextlat, mtp or jtp"):
        fit_acceptance(load_run(finished["gpt"]))
    assert not acceptance_path(finished["gpt"]).exists()
    trained_run = load_run(finished["nextlat"])
    trained_run.built.task.next_token = False
    with pytest.raises(NextLatError, match="to label its input; it cannot continue it"):
        fit_acceptance(trained_run)
    with pytest.raises(NextLatError, match="prompts=2, length=16"):
        fit_acceptance(load_run(finished["nextlat"]), prompts=2)


def test_running_text_is_cut_to_the_document_of_its_middle() -> None:
    class Text:
        def rows(self, step: int, start: int, stop: int) -> Any:
            from nextlat.batch import Batch

            tokens = torch.arange(10)[None] + 100 * (2 * step + start)
            return Batch(tokens, tokens + 1, torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]))

    found = list(texts(Text(), 2, 3))  # type: ignore[arg-type]
    assert [(prompt.tolist(), new) for prompt, new in found] == [
        ([2, 3, 4], 5),
        ([102, 103, 104], 5),
        ([202, 203, 204], 5),
    ]
