"""Path-Star against its text form, read and written independently of the library."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError
from nextlat.tasks.base import Outputs, Prompts
from nextlat.tasks.path_star import Graphs, PathStar, PathStarOptions, basin, draw_graphs, fingerprint
from tests.oracles.path_star import Story, arm_from, decode, identity, parse, true_path


def task(batch_size: int = 8, run_seed: int = 0, **options: int | str) -> PathStar:
    chosen: dict[str, int | str] = {"degree": 2, "length": 4, "nodes": 12, "train_size": 200, "test_size": 100}
    return PathStar(PathStarOptions(**(chosen | options)), run_seed, batch_size)


def crowded(**options: int | str) -> PathStar:
    """Few distinct graphs, 6,720 of G(2, 3) on 8 labels, so that unguarded draws collide all the time."""
    return task(**({"length": 3, "nodes": 8, "train_size": 1500, "test_size": 1500, "batch_size": 500} | options))


def texts(of: PathStar, tokens: Tensor) -> list[str]:
    return [decode(row, of.options.nodes) for row in tokens.tolist()]


def stories(of: PathStar, batch: Batch) -> list[Story]:
    return [parse(text) for text in texts(of, batch.tokens)]


def all_test_stories(of: PathStar) -> list[Story]:
    return [story for batch in of.evaluation("test") for story in stories(of, batch)]


# Layout


@pytest.mark.parametrize(
    ("degree", "length", "edges", "prompt", "total", "horizon"),
    [(2, 10, 18, 57, 68, 8), (5, 5, 20, 63, 69, 3), (7, 7, 42, 129, 137, 5), (2, 5, 8, 27, 33, 3)],
)
def test_lengths_of_the_published_graphs(
    degree: int, length: int, edges: int, prompt: int, total: int, horizon: int
) -> None:
    star = task(degree=degree, length=length, nodes=100, test_size=3, train_size=10)
    batch = star.rows(0, 0, 4)
    assert star.options.edges == edges
    assert star.prompt_length == prompt
    assert star.sequence_length + 1 == total  # the end token is a target only, never read
    assert horizon == star.options.length - 2
    assert batch.tokens.shape == batch.targets.shape == (4, total - 1)
    assert star.vocab_size == 105
    assert star.next_token


def test_a_row_reads_edges_then_question_then_path() -> None:
    star = task(nodes=12)
    graphs = Graphs(np.array([7]), np.array([[[1, 2, 3], [10, 11, 0]]]), np.array([[3, 1, 0, 5, 4, 2]]))
    batch = star.batch(graphs)
    assert texts(star, batch.tokens) == ["7,10|1,2|7,1|11,0|10,11|2,3/7,3=7,1,2,3"]
    answer = batch.targets[0, star.prompt_length - 1 :].tolist()
    assert answer == [7, 1, 2, 3, star.end_token]
    assert (batch.targets[0, : star.prompt_length - 1] == IGNORE).all()
    assert batch.documents is None


def test_token_ids_follow_the_node_labels() -> None:
    star = task(nodes=12)
    assert (star.bar, star.equals, star.slash, star.blank, star.end_token) == (12, 13, 14, 15, 16)
    assert star.vocab_size == 17


@pytest.mark.parametrize("variant", ["standard", "reverse"])
def test_every_target_is_the_next_token_or_the_end(variant: str) -> None:
    star = task(variant=variant)
    batch = star.rows(0, 0, 8)
    asked = batch.targets != IGNORE
    assert asked[:, star.prompt_length - 1 :].all()
    assert not asked[:, : star.prompt_length - 1].any()  # the last prompt token, =, does count
    assert torch.equal(batch.targets[:, star.prompt_length - 1 : -1], batch.tokens[:, star.prompt_length :])
    assert (batch.targets[:, -1] == star.end_token).all()
    assert (batch.tokens[:, star.prompt_length - 1] == star.equals).all()


def test_the_arm_is_chosen_where_the_centre_is_read_inside_the_answer() -> None:
    star = task()
    batch = star.rows(0, 0, 8)
    for row, story in enumerate(stories(star, batch)):
        assert batch.tokens[row, star.prompt_length] == story.centre
        assert batch.targets[row, star.prompt_length] == true_path(story)[1]


# Graphs


@pytest.mark.parametrize(("degree", "length", "nodes"), [(2, 4, 12), (5, 5, 30), (2, 3, 5), (3, 7, 19)])
def test_the_answer_is_the_path_found_by_following_parents_from_the_goal(degree: int, length: int, nodes: int) -> None:
    star = task(degree=degree, length=length, nodes=nodes, train_size=20, test_size=4, batch_size=20)
    for story in stories(star, star.rows(0, 0, 20)):
        assert story.answer == true_path(story)
        assert len(story.answer) == length


@pytest.mark.parametrize("graphs", ["fixed", "fresh"])
def test_every_graph_is_a_star_of_disjoint_arms(graphs: str) -> None:
    star = task(degree=3, length=4, nodes=11, graphs=graphs)
    for story in stories(star, star.rows(0, 0, 8)):
        assert len(story.edges) == len(set(story.edges)) == 9
        assert len({node for edge in story.edges for node in edge}) == 10
        assert all(0 <= node < 11 for edge in story.edges for node in edge)
        starts = [child for parent, child in story.edges if parent == story.centre]
        arms = [arm_from(story, first) for first in starts]
        assert [len(arm) for arm in arms] == [4, 4, 4]
        assert story.goal in [arm[-1] for arm in arms]


def test_edges_labels_and_goals_are_spread_evenly() -> None:
    # an arm, a place in the edge list or a label that gives the goal away would be a shortcut
    star = task(nodes=10, test_size=3000, train_size=1)
    told = all_test_stories(star)
    n = len(told)
    first_of_goal_arm = Counter(story.edges.index((story.centre, true_path(story)[1])) for story in told)
    goals = Counter(story.goal for story in told)
    orders = Counter(
        next(child for parent, child in story.edges if parent == story.centre) == true_path(story)[1] for story in told
    )
    for counter, cells in ((first_of_goal_arm, 6), (goals, 10), (orders, 2)):
        assert len(counter) == cells
        error = math.sqrt(n * (1 / cells) * (1 - 1 / cells))
        assert all(abs(count - n / cells) < 4 * error for count in counter.values())


def test_number_of_distinct_graphs() -> None:
    assert PathStarOptions(nodes=12, train_size=1, test_size=1).distinct_graphs == 3_991_680
    assert PathStarOptions(nodes=10, train_size=1, test_size=1).distinct_graphs == 604_800
    assert PathStarOptions(nodes=8, train_size=1, test_size=1).distinct_graphs == 40_320
    # by enumeration: 5 labels, 2 arms of one edge... the smallest star with l = 3 on 5 labels
    tiny = PathStarOptions(length=3, nodes=5, train_size=1, test_size=1)
    drawn = draw_graphs(tiny, 5000, np.random.default_rng(0))
    star = PathStar(tiny, 0, 1)
    assert len({identity(story) for story in stories(star, star.batch(drawn))}) == tiny.distinct_graphs == 120


# Splits


def test_train_and_test_never_share_a_graph() -> None:
    star = crowded()
    held_out = {identity(story) for story in all_test_stories(star)}
    seen = {identity(story) for step in range(3) for story in stories(star, star.rows(step, 0, 500))}
    assert not held_out & seen
    free = draw_graphs(star.options, 1500, np.random.default_rng(0))
    unguarded = {identity(story) for story in stories(star, star.batch(free))}
    assert len(held_out & unguarded) > 100  # the guard had work to do


def test_fresh_graphs_never_meet_the_test_set() -> None:
    star = crowded(graphs="fresh", test_size=3360)
    held_out = {identity(story) for story in all_test_stories(star)}
    assert len(held_out) == 3360
    for step in range(3):
        assert not held_out & {identity(story) for story in stories(star, star.rows(step, 0, 500))}


def test_test_graphs_are_all_distinct() -> None:
    star = crowded()
    assert len({identity(story) for story in all_test_stories(star)}) == 1500


def test_a_held_out_graph_stays_held_out_when_its_edges_are_written_in_another_order() -> None:
    star = crowded(test_size=1500, train_size=1500)
    written = {text.split("=")[0] for batch in star.evaluation("test") for text in texts(star, batch.tokens)}
    held_out = {identity(story) for story in all_test_stories(star)}
    for text in {text.split("=")[0] for step in range(3) for text in texts(star, star.rows(step, 0, 500).tokens)}:
        assert text not in written
        assert identity(parse(text + "=")) not in held_out


def test_the_run_seed_orders_the_graphs_and_the_data_seed_draws_them() -> None:
    one, other = crowded(run_seed=1), crowded(run_seed=2)
    first = [identity(s) for step in range(3) for s in stories(one, one.rows(step, 0, 500))]
    second = [identity(s) for step in range(3) for s in stories(other, other.rows(step, 0, 500))]
    assert first != second
    assert Counter(first) == Counter(second)
    assert torch.equal(one.prompts("test").tokens, other.prompts("test").tokens)
    redrawn = crowded(seed=5)
    assert not torch.equal(one.prompts("test").tokens, redrawn.prompts("test").tokens)


def test_the_train_split_for_evaluation_holds_graphs_that_were_trained_on() -> None:
    star = crowded(train_size=1800, test_size=300, batch_size=600)
    trained = {identity(s) for step in range(3) for s in stories(star, star.rows(step, 0, 600))}
    measured = [s for batch in star.evaluation("train") for s in stories(star, batch)]
    assert len(measured) == 300
    assert {identity(s) for s in measured} <= trained


def test_the_fresh_train_split_avoids_the_test_set() -> None:
    star = crowded(graphs="fresh", test_size=2000)
    held_out = {identity(story) for story in all_test_stories(star)}
    measured = {identity(s) for batch in star.evaluation("train") for s in stories(star, batch)}
    assert not held_out & measured


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(NextLatError, match="no split 'val'; choose test or train"):
        task().prompts("val")


# Rows are functions of (seed, step, row)


@pytest.mark.parametrize("graphs", ["fixed", "fresh"])
def test_rows_do_not_depend_on_what_was_asked_before(graphs: str) -> None:
    walked, jumped = task(graphs=graphs), task(graphs=graphs)
    for step in range(60):
        last = walked.rows(step, 0, 8)
    direct = jumped.rows(59, 0, 8)  # in the third epoch of 200 fixed graphs
    assert torch.equal(last.tokens, direct.tokens)
    assert torch.equal(last.targets, direct.targets)
    assert torch.equal(walked.rows(3, 0, 8).tokens, jumped.rows(3, 0, 8).tokens)  # and back again
    assert not torch.equal(direct.tokens, jumped.rows(58, 0, 8).tokens)


@pytest.mark.parametrize("graphs", ["fixed", "fresh"])
@pytest.mark.parametrize("step", [0, 24, 25])
def test_slices_of_a_step_agree_with_its_whole_batch(graphs: str, step: int) -> None:
    # ranks that shuffle with their own seed would see overlapping rows; step 24 spans two epochs
    star = task(graphs=graphs, train_size=195)
    whole = star.rows(step, 0, 8)
    for start, stop in ((0, 3), (3, 4), (4, 8), (5, 5)):
        part = task(graphs=graphs, train_size=195).rows(step, start, stop)
        assert torch.equal(part.tokens, whole.tokens[start:stop])
        assert torch.equal(part.targets, whole.targets[start:stop])


def test_every_fixed_graph_is_seen_exactly_once_an_epoch() -> None:
    star = crowded(train_size=50, test_size=10, batch_size=8)  # epochs end inside batches

    def seen() -> Iterator[tuple[object, ...]]:
        for step in range(19):
            for story in stories(star, star.rows(step, 0, 8)):
                yield (*story.edges, story.centre, story.goal)

    rows = list(seen())
    epochs = [rows[start : start + 50] for start in (0, 50, 100)]
    graphs = Counter((*s.edges, s.centre, s.goal) for s in stories(star, star.batch(star.train)))
    assert sum(graphs.values()) == 50
    for epoch in epochs:
        assert Counter(epoch) == graphs
    assert epochs[0] != epochs[1] != epochs[2]


def test_fresh_graphs_differ_from_step_to_step_and_from_seed_to_seed() -> None:
    star, other = task(graphs="fresh", run_seed=1), task(graphs="fresh", run_seed=2)
    assert not torch.equal(star.rows(0, 0, 8).tokens, star.rows(1, 0, 8).tokens)
    assert not torch.equal(star.rows(0, 0, 8).tokens, other.rows(0, 0, 8).tokens)
    assert torch.equal(star.prompts().tokens, other.prompts().tokens)


def test_fixed_graphs_are_the_same_graphs_in_every_epoch_of_training() -> None:
    star = task(train_size=8)
    first, second = (sorted(texts(star, star.rows(step, 0, 8).tokens)) for step in (0, 1))
    assert first == second


# Variants


def test_reverse_writes_the_path_from_goal_to_centre_and_nothing_else_changes() -> None:
    standard, reverse = task(), task(variant="reverse")
    for one, other in zip(
        texts(standard, standard.rows(0, 0, 8).tokens), texts(reverse, reverse.rows(0, 0, 8).tokens), strict=True
    ):
        assert one.split("=")[0] == other.split("=")[0]
        assert parse(other).answer == true_path(parse(one))[::-1]
    prompts = reverse.prompts()
    assert torch.equal(prompts.answers.flip(1), standard.prompts().answers)
    assert torch.equal(prompts.forced[:, reverse.prompt_length :], prompts.answers)


def test_teacherless_rows_hide_the_path_from_the_input_and_keep_it_in_the_targets() -> None:
    standard, hidden = task(), task(variant="teacherless")
    one, other = standard.rows(0, 0, 8), hidden.rows(0, 0, 8)
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.tokens[:, : standard.prompt_length], other.tokens[:, : standard.prompt_length])
    assert (other.tokens[:, standard.prompt_length :] == hidden.blank).all()
    assert texts(hidden, other.tokens)[0].endswith("=$$$$")
    prompts = hidden.prompts()
    assert prompts.parallel
    assert not standard.prompts().parallel
    assert (prompts.forced[:, hidden.prompt_length :] == hidden.blank).all()
    assert torch.equal(prompts.answers, standard.prompts().answers)


@pytest.mark.parametrize("variant", ["standard", "reverse", "teacherless"])
def test_prompts_answers_and_evaluation_batches_are_the_same_graphs(variant: str) -> None:
    star = task(variant=variant, test_size=1200)
    prompts = star.prompts()
    batches = list(star.evaluation())
    assert sum(len(batch.tokens) for batch in batches) == 1200
    tokens, targets = torch.cat([b.tokens for b in batches]), torch.cat([b.targets for b in batches])
    assert torch.equal(prompts.forced, tokens)
    assert torch.equal(prompts.tokens, tokens[:, : star.prompt_length])
    assert torch.equal(prompts.answers, targets[:, star.prompt_length - 1 : -1])
    for text, answer in zip(texts(star, prompts.tokens), prompts.answers.tolist(), strict=True):
        path = true_path(parse(text))
        assert answer == (path[::-1] if variant == "reverse" else path)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 1}, "greater than or equal to 2"),
        ({"length": 2}, "greater than or equal to 3"),
        ({"nodes": 6}, r"G\(2,4\) has 7 nodes and only 6 labels.*at least 7"),
        ({"nodes": 8, "train_size": 20_000, "test_size": 161}, "20161 graphs are asked for and only 40320"),
        ({"nodes": 8, "graphs": "fresh", "test_size": 20_161}, "20161 graphs are asked for"),
        ({"train_size": 0}, "greater than or equal to 1"),
        ({"test_size": 0}, "greater than or equal to 1"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"variant": "backwards"}, "variant"),
        ({"graphs": "stale"}, "graphs"),
        ({"lenght": 5}, "lenght"),
        ({"degree": 2.5}, "degree"),
        ({"degree": "2"}, "degree"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int | float | str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PathStarOptions(**options)


def test_half_of_all_graphs_may_be_used() -> None:
    PathStarOptions(nodes=8, train_size=20_000, test_size=160)
    PathStarOptions(nodes=8, graphs="fresh", test_size=20_160, train_size=10**9)  # fresh ones are not stored


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PathStarOptions().degree = 3


# Fingerprints


def some_graphs(n: int = 300) -> Graphs:
    return draw_graphs(PathStarOptions(degree=3, length=4, nodes=14), n, np.random.default_rng(0))


def test_fingerprint_ignores_the_order_of_edges_and_of_the_other_arms() -> None:
    graphs = some_graphs()
    plain = fingerprint(graphs)
    assert (plain == fingerprint(graphs._replace(order=graphs.order[:, ::-1]))).all()
    assert (plain == fingerprint(graphs._replace(arms=graphs.arms[:, [0, 2, 1]]))).all()


def test_fingerprint_sees_goal_centre_and_every_edge() -> None:
    graphs = some_graphs()
    plain = fingerprint(graphs)
    other_goal = graphs._replace(arms=graphs.arms[:, [1, 0, 2]])
    assert (plain != fingerprint(other_goal)).all()
    swapped = graphs.arms.copy()
    swapped[:, 0, 0] = graphs.centre
    other_centre = graphs._replace(centre=graphs.arms[:, 0, 0], arms=swapped)
    assert (plain != fingerprint(other_centre)).all()
    inner = graphs.arms.copy()
    inner[:, 1, [1, 2]] = graphs.arms[:, 1, [2, 1]]  # an edge turned round in an arm that is not the answer
    assert (plain != fingerprint(graphs._replace(arms=inner))).all()
    traded = graphs.arms.copy()
    traded[:, 1, 2], traded[:, 2, 2] = graphs.arms[:, 2, 2], graphs.arms[:, 1, 2]
    assert (plain != fingerprint(graphs._replace(arms=traded))).all()


def test_equal_fingerprints_mean_equal_graphs() -> None:
    star = crowded()
    graphs = draw_graphs(star.options, 4000, np.random.default_rng(1))
    told = [identity(story) for story in stories(star, star.batch(graphs))]
    pairs = set(zip(told, fingerprint(graphs).tolist(), strict=True))
    assert len(pairs) == len(set(told)) == len({value for _, value in pairs}) < 4000


# Scores


def outputs_of(star: PathStar, greedy: Tensor, sampled: Tensor, forced_logits: Tensor) -> Outputs:
    return Outputs(greedy, sampled, forced_logits, star.prompts())


def one_hot_logits(star: PathStar, tokens: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(tokens, star.vocab_size).float()


@pytest.mark.parametrize(("degree", "nodes"), [(2, 12), (5, 30)])
def test_walking_a_random_arm_scores_one_in_d(degree: int, nodes: int) -> None:
    n = 2000
    star = task(degree=degree, nodes=nodes, test_size=n)
    rng = np.random.default_rng(0)
    guesses = []
    for text in texts(star, star.prompts().tokens):
        story = parse(text)
        firsts = [child for parent, child in story.edges if parent == story.centre]
        guesses.append(arm_from(story, firsts[rng.integers(degree)]))
    guess = torch.tensor(guesses)
    # with the true path as input only the branch is a guess: afterwards the arm is known
    forced = star.prompts().answers.clone()
    forced[:, 1] = guess[:, 1]
    metrics = star.score(outputs_of(star, guess, guess, one_hot_logits(star, forced)))
    chance = 1 / degree
    error = math.sqrt(chance * (1 - chance) / n)
    for name in ("whole_path_greedy", "whole_path_sampled", "token_2", "forced_token_2", "forced_whole_path"):
        assert abs(metrics[name].value - chance) < 3 * error, name
        assert metrics[name].chance == chance, name
        assert metrics[name].n == n
        assert metrics[name].low < chance < metrics[name].high, name
    assert metrics["token_1"].value == 1.0  # the copied centre must not be taken for planning
    assert metrics["token_1"].chance is None
    assert metrics["forced_token_3"].value == metrics["forced_token_4"].value == 1.0
    assert metrics["token_3"].value == metrics["token_4"].value == metrics["token_2"].value
    assert metrics["basin"].value == "shortcut"


@pytest.mark.parametrize("variant", ["standard", "reverse"])
def test_score_equals_a_recount(variant: str) -> None:
    star = task(variant=variant, test_size=60)
    answers = star.prompts().answers
    g = torch.Generator().manual_seed(0)

    def spoiled() -> Tensor:
        wrong = torch.rand(answers.shape, generator=g) < 0.2
        return torch.where(wrong, (answers + 1) % 12, answers)

    greedy, sampled, forced = spoiled(), spoiled(), spoiled()
    metrics = star.score(outputs_of(star, greedy, sampled, one_hot_logits(star, forced)))
    for name, tokens in (("whole_path_greedy", greedy), ("whole_path_sampled", sampled), ("forced_whole_path", forced)):
        hits = sum(row == true for row, true in zip(tokens.tolist(), answers.tolist(), strict=True))
        assert 0 < hits < 60
        assert metrics[name].value == hits / 60
    for name, tokens in (("token", greedy), ("forced_token", forced)):
        for place in range(4):
            hits = sum(row[place] == true[place] for row, true in zip(tokens.tolist(), answers.tolist(), strict=True))
            assert metrics[f"{name}_{place + 1}"].value == hits / 60
    assert ("branch_margin" in metrics) == (variant == "standard")
    per_token = {f"{kind}_{place}" for kind in ("token", "forced_token") for place in range(1, 5)}
    whole = {"whole_path_greedy", "whole_path_sampled", "forced_whole_path", "basin"}
    assert set(metrics) - {"branch_margin"} == per_token | whole


def test_reverse_has_no_branch_and_its_second_token_no_chance_level() -> None:
    star = task(variant="reverse", test_size=10)
    answers = star.prompts().answers
    metrics = star.score(outputs_of(star, answers, answers, one_hot_logits(star, answers)))
    assert metrics["token_2"].chance is None
    assert metrics["basin"].value == "solved"


def test_branch_margin_by_hand() -> None:
    star = task(degree=3, length=3, nodes=9, test_size=2, train_size=1)
    prompts = star.prompts()
    logits = torch.zeros(2, 3, star.vocab_size)
    expected = []
    for row, text in enumerate(texts(star, prompts.tokens)):
        story = parse(text)
        firsts = [child for parent, child in story.edges if parent == story.centre]
        right = true_path(story)[1]
        wrong = [first for first in firsts if first != right]
        logits[row, 1] = 50.0  # nodes off the centre, signs and the centre itself must not count
        logits[row, 1, right] = 1.0 + row
        logits[row, 1, wrong[0]], logits[row, 1, wrong[1]] = -3.0, 2.5
        expected.append(1.0 + row - 2.5)
    margin = star.score(outputs_of(star, prompts.answers, prompts.answers, logits))["branch_margin"]
    assert margin.value == pytest.approx(sum(expected) / 2)
    # two items 1 apart: standard error 1/2
    assert margin.high - margin.low == pytest.approx(2 * 1.959964 * 0.5, rel=1e-6)
    assert margin.n == 2


@pytest.mark.parametrize(
    ("accuracy", "chance", "name"),
    [
        (1.0, 0.5, "solved"),
        (0.90, 0.5, "solved"),
        (0.899, 0.5, "partial"),
        (0.551, 0.5, "partial"),
        (0.55, 0.5, "shortcut"),
        (0.5, 0.5, "shortcut"),
        (0.45, 0.5, "shortcut"),
        (0.449, 0.5, "broken"),
        (0.0, 0.5, "broken"),
        (0.25, 0.2, "shortcut"),
        (0.251, 0.2, "partial"),
        (0.15, 0.2, "shortcut"),
        (0.149, 0.2, "broken"),
    ],
)
def test_basin_thresholds(accuracy: float, chance: float, name: str) -> None:
    assert basin(accuracy, chance) == name


def test_the_basin_is_named_by_greedy_whole_paths() -> None:
    star = task(test_size=100)
    answers = star.prompts().answers
    wrong = answers.clone()
    wrong[:, 3] = (wrong[:, 3] + 1) % 12
    metrics = star.score(outputs_of(star, answers, wrong, one_hot_logits(star, wrong)))
    assert metrics["basin"].value == "solved"
    assert metrics["whole_path_sampled"].value == 0.0


def test_description_states_graph_size_and_chance() -> None:
    described = task(degree=3, length=3, nodes=9, test_size=1, train_size=1).description()
    other = task(degree=3, length=3, nodes=9, test_size=1, train_size=1, seed=1).description()
    assert len(described["test_sha256"]) == 64
    assert described.pop("test_sha256") != other["test_sha256"]
    assert described == {
        "graph": "G(3,3)",
        "distinct_graphs": math.factorial(9) // (math.factorial(2) * math.factorial(2)),
        "chance": 1 / 3,
    }


def test_prompts_are_integers_of_one_length() -> None:
    prompts: Prompts = task().prompts()
    assert all(part.dtype is torch.int64 for part in prompts[:3])
    assert prompts.tokens.shape == (100, 21)
    assert prompts.answers.shape == (100, 4)
    assert prompts.forced.shape == (100, 25)
