"""A head foresees what becomes of drafted tokens, is saved beside the run, and says what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextlat import generate
from nextlat.commands import fit_acceptance_command
from nextlat.decoding import Sampling
from nextlat.decoding.acceptance import AcceptanceHead, Examples, calibration, collect, fit, law_features
from nextlat.decoding.adaptive import CostAware
from nextlat.decoding.costs import Costs
from nextlat.decoding.drafting import Drafted
from nextlat.errors import NextLatError
from nextlat.model.cache import Cache
from nextlat.model.interfaces import LMOutput, states_at
from nextlat.training.acceptance import acceptance_head, acceptance_path, fit_acceptance, texts
from nextlat.training.trained import load_run
from tests.decoding.test_speculative import prompts, trained
from tests.tiny import files_below, run_whole, tiny


def planted(count: int = 4000, width: int = 6) -> Examples:
    """Labels that depend on entropy and on one direction of the state, and not on the token's probability."""
    g = torch.Generator().manual_seed(0)
    features, states = torch.randn(count, 4, generator=g), torch.randn(count, width, generator=g)
    labels = (1.5 * features[:, 2] - 2 * states[:, 1]).sigmoid()
    return Examples(features, states, torch.rand(count, generator=g), labels, torch.arange(count) // 40)


def test_a_planted_relation_is_learned_and_better_calibrated_than_constant_and_bins() -> None:
    found = fit(planted(), steps=300)
    # chances cannot be known better than by their own entropy
    labels = planted().labels.double()
    least = float(-(labels * labels.log() + (1 - labels) * (1 - labels).log()).mean())
    assert found.head_score.log_loss < least + 0.05
    assert found.constant.log_loss > least + 0.2
    assert found.bins.log_loss == pytest.approx(found.constant.log_loss, abs=0.02)  # the guess says nothing here
    assert found.head_score.brier < 0.2 * found.constant.brier
    assert (found.examples, found.held_out) == (3200, 800)


def test_without_the_state_only_the_law_is_used() -> None:
    with_state, without = fit(planted(), steps=150), fit(planted(), steps=150, use_state=False)
    assert with_state.head_score.log_loss < without.head_score.log_loss - 0.05
    assert without.head_score.log_loss < without.constant.log_loss - 0.05
    assert without.head.reading is None


def test_fitting_is_reproducible_and_measures_on_other_prompts() -> None:
    one, other = fit(planted(400), steps=20), fit(planted(400), steps=20)
    assert torch.equal(one.head.layer_1.weight, other.head.layer_1.weight)
    changed = planted(400)._replace(labels=planted(400).labels.clone())
    changed.labels[320:] = 0.5  # the held-out prompts
    assert torch.equal(fit(changed, steps=20).head.layer_1.weight, one.head.layer_1.weight)
    with pytest.raises(NextLatError, match="two are needed"):
        fit(planted(40))


def test_calibration_is_log_loss_and_squared_error() -> None:
    found = calibration(torch.tensor([0.5, 0.9]), torch.tensor([1.0, 1.0]))
    assert found.log_loss == pytest.approx((0.693147 + 0.105361) / 2, abs=1e-5)
    assert found.brier == pytest.approx((0.25 + 0.01) / 2, abs=1e-6)


def test_features_are_those_of_the_law_that_was_drawn_from() -> None:
    law = torch.tensor([[0.7, 0.3, 0.0]])
    drafted = Drafted(3, torch.tensor([1]), torch.zeros(1, 3), torch.zeros(1, 4), law)
    entropy = -(0.7 * torch.tensor(0.7).log() + 0.3 * torch.tensor(0.3).log())
    wanted = torch.stack([torch.tensor(0.7).log(), torch.tensor(0.3).log(), entropy, torch.tensor(3.0).log()])
    torch.testing.assert_close(law_features(drafted), wanted[None])


class Constant:
    """A model and a drafter with one law each, whatever the text."""

    P = torch.tensor([0.3, 0.5, 0.2])
    Q = torch.tensor([0.6, 0.3, 0.1])
    max_length = None
    vocabulary: Tensor | None = None

    def __call__(self, tokens: Tensor, cache: Cache, logits_at: Tensor | None = None) -> LMOutput:
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


def test_at_a_temperature_the_label_is_p_over_q() -> None:
    model, g = Constant(), torch.Generator().manual_seed(0)
    made = collect(model, model, [(torch.tensor([0]), 400)], Sampling(1.0), 2, g)  # type: ignore[arg-type]
    assert made.states is None
    q = (made.guesses**2).round(decimals=4)
    torch.testing.assert_close(q.unique(), torch.tensor([0.1, 0.3, 0.6]))
    torch.testing.assert_close(made.labels, torch.where(q == 0.6, 0.5, 1.0))
    # a draft's second token has its turn if the first is kept: 0.6 * 0.5 + 0.4 of the time
    first = made.features[:, 3] == 0
    assert float((~first).sum() / first.sum()) == pytest.approx(0.7, abs=0.06)


def test_labels_are_the_chances_of_tokens_whose_turn_came() -> None:
    objective, sampling = trained(), Sampling(0.0)
    made = collect(objective.as_lm(), objective.drafter(), [(row, 20) for row in prompts()], sampling, 3)  # type: ignore[arg-type]
    assert set(made.labels.tolist()) == {0.0, 1.0}  # whether the most likely tokens agree
    assert made.prompts.unique().tolist() == [0, 1, 2, 3]
    assert made.states is not None and made.states.shape == (len(made.labels), 16)
    # a position behind a rejected one is never there: the position falls back to 1 after every 0
    positions = made.features[:, 3].exp().round().int().tolist()
    for label, this, after in zip(made.labels.tolist(), positions, positions[1:], strict=False):
        assert after == 1 if label == 0 else after in (1, this + 1)

    with pytest.raises(NextLatError, match="at least 3 tokens"):
        collect(objective.as_lm(), objective.drafter(), [(prompts()[0], 2)], sampling, 2)  # type: ignore[arg-type]


def test_a_head_is_an_estimator_of_the_cost_aware_policy() -> None:
    objective = trained().float()
    head = AcceptanceHead(16, generator=torch.Generator().manual_seed(0))
    policy = CostAware(Costs(0.05), 4, estimator=head.estimate)
    made = generate(objective.as_lm(), prompts(), 15, drafter=objective.drafter(), policy=policy)
    assert torch.equal(made, generate(objective.as_lm(), prompts(), 15))


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
    assert head.reading is not None
    assert not any(parameter.requires_grad for parameter in head.parameters())

    fit_acceptance_command(run, 0.0, 10, 2, 5, False, None)
    assert acceptance_head(load_run(run), 0.0).reading is None
    with pytest.raises(NextLatError, match=r"fitted at temperature 0, and this is temperature 0\.7; fit it"):
        acceptance_head(load_run(run), 0.7)
    said = capsys.readouterr().out
    assert all(word in said for word in ("head", "bins learned online", "a constant", "log loss", str(path)))

    with pytest.raises(NextLatError, match="was fitted to the model of step 6, and this is step 5"):
        acceptance_head(load_run(run)._replace(step=5))
    path.write_bytes(b"torn")
    with pytest.raises(NextLatError, match="is damaged; fit it again"):
        acceptance_head(load_run(run))


def test_a_run_without_drafts_is_refused(finished: dict[str, Path]) -> None:
    with pytest.raises(NextLatError, match="trained with gpt, which drafts nothing; fit a run of nextlat, mtp or jtp"):
        fit_acceptance(load_run(finished["gpt"]))
    assert not acceptance_path(finished["gpt"]).exists()
    trained_run = load_run(finished["nextlat"])
    trained_run.built.task.next_token = False
    with pytest.raises(NextLatError, match="to label its input; it cannot continue it"):
        fit_acceptance(trained_run)
    with pytest.raises(NextLatError, match="prompts=1, length=8"):
        fit_acceptance(load_run(finished["nextlat"]), prompts=1)


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
