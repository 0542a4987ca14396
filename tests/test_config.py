"""Configurations are strict: what is not understood is an error that names its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextlat.config import (
    apply_overrides,
    expand,
    flatten,
    header,
    load_config,
    packaged,
    read_config,
    read_grid,
    read_overrides,
    read_yaml,
    resolve,
)
from nextlat.errors import NextLatError
from nextlat.objectives import OBJECTIVES
from tests.tiny import tiny

PACKAGED = list(packaged())
MINIMAL = """\
task: path_star
objective: gpt
model: {n_layers: 1, n_heads: 2, width: 16}
data: {nodes: 20, graphs: fresh, test_size: 20}
training: {steps: 2, batch_size: 4, learning_rate: 1e-3}
"""


def write(folder: Path, text: str, name: str = "own.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def fault(source: str, *overrides: str) -> str:
    with pytest.raises(NextLatError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def mini_fault(*overrides: str) -> str:
    return fault("path_star/mini", *overrides)


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_configuration_resolves_for_each_of_its_objectives(name: str) -> None:
    sections = read_config(name)[0]["objectives"]
    assert {"gpt", "nextlat"} <= sections.keys()
    for objective in sections:
        config = load_config(name, [f"objective={objective}"])
        assert config.objective == objective
        assert type(config.selected) is OBJECTIVES[objective].Options
        given = config.selected.model_dump(mode="json")
        assert all(given[key] == value for key, value in sections[objective].items() if not isinstance(value, dict))


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_configuration_says_what_it_is_and_how_it_is_run(name: str) -> None:
    comment = header(packaged()[name].read_text(encoding="utf-8"))
    assert comment.startswith(("Path-Star G(", "TinyStories ", "FineWeb-Edu"))
    assert "Command:" in comment
    assert "task:" not in comment


def test_a_resolved_configuration_resolves_to_itself() -> None:
    config = tiny("nextlat", "objective.horizon=3")
    assert resolve(config.plain()) == config


@pytest.mark.parametrize(
    ("override", "place", "near"),
    [
        ("sead=3", "sead", "seed"),
        ("trainning.steps=3", "trainning", "training"),
        ("training.step=3", "training.step", "steps"),
        ("training.learning_rat=3", "training.learning_rat", "learning_rate"),
        ("model.widht=16", "model.widht", "width"),
        ("data.lenght=4", "data.lenght", "length"),
        ("evaluation.exampels=4", "evaluation.exampels", "examples"),
        ("objective.horizn=4", "objectives.nextlat.horizn", "horizon"),
        ("objectives.nextlat.dynamics.hiden_dim=4", "objectives.nextlat.dynamics.hiden_dim", "hidden_dim"),
    ],
)
def test_an_unknown_key_at_any_depth_is_named_with_its_place_and_the_nearest_name(
    override: str, place: str, near: str
) -> None:
    message = mini_fault(override)
    assert message == f"{place}: unknown key; did you mean {near!r}?"


def test_an_unknown_key_that_resembles_nothing_is_answered_with_the_known_ones() -> None:
    assert mini_fault("model.zzz=1") == "model.zzz: unknown key; known keys: n_heads, n_layers, tie_embeddings, width"


@pytest.mark.parametrize("what", ["task", "objective"])
def test_an_unknown_task_or_objective_is_answered_with_the_nearest(what: str) -> None:
    wrong, right = {"task": ("pathstar", "path_star"), "objective": ("nextlatt", "nextlat")}[what]
    assert f"unknown {what} {wrong!r}; did you mean {right!r}?" in mini_fault(f"{what}={wrong}")


def test_an_unknown_objective_in_the_objectives_section_is_refused() -> None:
    assert "unknown objective 'gtp'; did you mean 'gpt'?" in mini_fault("objectives.gtp={}")


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("training.steps=many", "training.steps", "'many'"),
        ("training.steps=2.5", "training.steps", "2.5"),
        ("training.steps='5'", "training.steps", "'5'"),
        ("training.steps=true", "training.steps", "True"),
        ("training.learning_rate=fast", "training.learning_rate", "'fast'"),
        ("training.deterministic=1", "training.deterministic", "1"),
        ("model.width=[16]", "model.width", "[16]"),
        ("seed=x", "seed", "'x'"),
        ("seed=-1", "seed", "-1"),
        ("data.graphs=frozen", "data.graphs", "'frozen'"),
        ("training.schedule=linear", "training.schedule", "'linear'"),
        ("training.learning_rate=.inf", "training.learning_rate", "inf"),
        ("training.learning_rate=0", "training.learning_rate", "0"),
        ("training.steps=0", "training.steps", "0"),
        ("name=a/b", "name", "'a/b'"),
        ("name=2024-01-01", "name", "datetime.date(2024, 1, 1)"),
        ("objective.dynamics.hidden_dim=0", "objectives.nextlat.dynamics.hidden_dim", "0"),
        ("objective.horizon=0", "objectives.nextlat.horizon", "0"),
    ],
)
def test_a_wrong_type_or_value_is_named_with_its_place(override: str, place: str, value: str) -> None:
    assert mini_fault(override).startswith(f"{place} is {value}: ")


def test_every_fault_of_a_section_is_reported_at_once() -> None:
    assert mini_fault("training.steps=x", "training.batch_size=0").count("\n") == 1


def test_a_missing_key_is_named() -> None:
    with pytest.raises(NextLatError, match=r"^model.width: missing; it has no default$"):
        resolve({"task": "path_star", "objective": "gpt", "model": {"n_layers": 1, "n_heads": 1}})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.batch_size=10", "training.accumulation=4"], "accumulation = 4 does not divide batch_size = 10"),
        (["training.schedule=wsd", "training.decay_steps=0"], "decay_steps to at least 1"),
        (["training.schedule=constant", "training.decay_steps=5"], "decay_steps = 5 is not used by schedule constant"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides: list[str], said: str) -> None:
    message = mini_fault(*overrides)
    assert message.startswith("training: ")
    assert said in message


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3", ".1e-2"])
def test_numbers_are_read_in_every_usual_form(text: str) -> None:
    value = read_yaml(f"x: {text}", "here")["x"]
    assert isinstance(value, float)
    assert value == pytest.approx(0.001)
    assert load_config("path_star/mini", [f"training.learning_rate={text}"]).training.learning_rate == value


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("-3", -3), ("1.5", 1.5), ("e3", "e3"), ("1-2", "1-2")])
def test_what_is_not_a_float_stays_what_it_is(text: str, value: Any) -> None:
    found = read_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_a_key_that_appears_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    twice = write(tmp_path, MINIMAL + "objective: nextlat\n")
    assert fault(twice) == "key 'objective' appears twice, line 6; keep one of them"
    nested = write(tmp_path, MINIMAL.replace("steps: 2", "steps: 2, steps: 3"))
    assert "key 'steps' appears twice" in fault(nested)


def test_yaml_merge_keys_work(tmp_path: Path) -> None:
    text = MINIMAL.replace("model: {", "model: &m {") + "sweep: [{model: {<<: *m, width: 32}}]\n"
    (config,) = expand(write(tmp_path, text))
    assert (config.model.width, config.model.n_heads) == (32, 2)


@pytest.mark.parametrize(("text", "kind"), [("- 1\n- 2\n", "list"), ("just words\n", "str"), ("", "NoneType")])
def test_yaml_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    source = write(tmp_path, text)
    assert fault(source) == f"{source} holds a {kind}, not a mapping of keys to values"


@pytest.mark.parametrize("text", ["model: [1, 2", "a: b: c", "x: !!python/object:os.system {}", "\tx: 1"])
def test_invalid_yaml_is_refused_in_one_line_with_the_file_name(tmp_path: Path, text: str) -> None:
    source = write(tmp_path, text)
    message = fault(source)
    assert message.startswith(f"{source} is not valid YAML: ")
    assert "\n" not in message
    assert "line 1" in message


def test_a_list_as_a_key_is_refused(tmp_path: Path) -> None:
    assert fault(write(tmp_path, "? [a, b]\n: 3\n")) == "key ['a', 'b'] in line 1 is not a name"


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "own.yaml"
    source.write_bytes(b"task: \xff\n")
    assert fault(str(source)).startswith(f"{source} is not UTF-8 text")


def test_a_section_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    assert fault(write(tmp_path, MINIMAL.replace("{n_layers: 1, n_heads: 2, width: 16}", "3"))).startswith("model")
    assert "objectives is 3" in fault(write(tmp_path, MINIMAL + "objectives: 3\n"))


def test_a_missing_file_and_an_unknown_packaged_name_are_told_apart(tmp_path: Path) -> None:
    assert f"there is no configuration file {tmp_path / 'no.yaml'}" in fault(str(tmp_path / "no.yaml"))
    assert "unknown configuration 'path_star/mimi'; did you mean 'path_star/mini'?" in fault("path_star/mimi")


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    assert read_overrides(["a=1", "b=[1, x]", "c=null", "d=x=y", "a=1e2", "e="]) == {
        "a": 100.0,
        "b": [1, "x"],
        "c": None,
        "d": "x=y",
        "e": None,
    }


@pytest.mark.parametrize("text", ["seed", "=3", ""])
def test_an_override_without_key_or_equals_sign_is_refused(text: str) -> None:
    with pytest.raises(NextLatError, match="is not an override; write key=value"):
        read_overrides([text])


def test_an_override_that_is_not_yaml_names_its_key() -> None:
    assert mini_fault("model.width=[1").startswith("model.width is not valid YAML")


def test_overrides_reach_into_sections_and_leave_the_original_alone() -> None:
    data = {"a": {"b": 1, "c": {"d": 2}}, "e": None}
    changed = apply_overrides(data, {"a.c.d": 3, "e.f.g": 4, "a": {"b": 5}})
    assert changed == {"a": {"b": 5, "c": {"d": 3}}, "e": {"f": {"g": 4}}}
    assert data == {"a": {"b": 1, "c": {"d": 2}}, "e": None}


def test_an_override_below_a_single_value_is_refused() -> None:
    assert mini_fault("seed.x=3") == "seed.x: seed is a single value and has no key 'x'"


def test_objective_dot_key_sets_the_selected_objective_whatever_the_order() -> None:
    for overrides in (["objective=mtp", "objective.horizon=5"], ["objective.horizon=5", "objective=mtp"]):
        config = load_config("path_star/g5_5", overrides)
        assert config.selected.horizon == 5  # type: ignore[attr-defined]
        assert config.objectives["nextlat"].horizon == 3  # type: ignore[attr-defined]
    config = load_config("path_star/g5_5", ["objective.dynamics.hidden_dim=7"])
    assert config.selected.dynamics.hidden_dim == 7  # type: ignore[attr-defined]


def test_objective_dot_key_is_refused_where_the_objective_has_no_such_key() -> None:
    assert mini_fault("objective=gpt", "objective.horizon=3").startswith("objectives.gpt.horizon: unknown key")


def test_grids_of_ranges_and_lists() -> None:
    assert read_grid(["seed=0..9", "a=x,1,1e-3", "b=3", "c=[1, 2]", "d=-1..1", "e={f: 1, g: 2}"]) == {
        "seed": list(range(10)),
        "a": ["x", 1, 0.001],
        "b": [3],
        "c": [[1, 2]],
        "d": [-1, 0, 1],
        "e": [{"f": 1, "g": 2}],
    }


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(NextLatError, match=r"seed=9\.\.0 is an empty range"):
        read_grid(["seed=9..0"])


def test_nested_grid_keys_are_the_same_as_dotted_ones() -> None:
    nested = {"training": {"steps": [1, 2], "clip": None}, "model.width": [16], "seed": 4}
    assert dict(flatten(nested)) == {
        "training.steps": [1, 2],
        "training.clip": [None],
        "model.width": [16],
        "seed": [4],
    }


def test_a_sweep_is_every_combination_of_the_files_grids_and_the_command_line(tmp_path: Path) -> None:
    text = MINIMAL + "sweep:\n  - seed: [0, 1]\n    training: {steps: [2, 3]}\n  - {seed: 5, training.clip: [1.0]}\n"
    source = write(tmp_path, text)
    assert [(c.seed, c.training.steps, c.training.clip) for c in expand(source)] == [
        (0, 2, None),
        (0, 3, None),
        (1, 2, None),
        (1, 3, None),
        (5, 2, 1.0),
    ]
    crossed = expand(source, ["seed=7,8"])
    assert [(c.seed, c.training.steps, c.training.clip) for c in crossed] == [
        (7, 2, None),
        (7, 3, None),
        (8, 2, None),
        (8, 3, None),
        (7, 2, 1.0),
        (8, 2, 1.0),
    ]
    assert all(config.sweep == [] for config in crossed)


def test_objective_keys_apply_to_those_that_have_them_and_equal_runs_are_made_once() -> None:
    configs = expand("path_star/mini", ["objective=gpt,nextlat", "objective.horizon=1,2", "seed=0..1"])
    made = [(c.objective, getattr(c.selected, "horizon", None), c.seed) for c in configs]
    assert made == [
        ("gpt", None, 0),
        ("gpt", None, 1),
        ("nextlat", 1, 0),
        ("nextlat", 1, 1),
        ("nextlat", 2, 0),
        ("nextlat", 2, 1),
    ]
    assert len({c.name for c in configs}) == len(configs)


def test_an_objective_key_that_no_objective_has_is_refused_in_a_sweep() -> None:
    with pytest.raises(NextLatError, match=r"did you mean 'objective\.horizon'"):
        expand("path_star/mini", ["objective.horizonn=1,2"])


def test_a_sweep_section_that_is_not_a_list_of_grids_is_refused(tmp_path: Path) -> None:
    for section in ("{seed: [0, 1]}", "[3]", "words"):
        with pytest.raises(NextLatError, match="must be a list of grids"):
            expand(write(tmp_path, MINIMAL + f"sweep: {section}\n"))


def test_a_typing_error_inside_a_sweep_is_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match="sead: unknown key; did you mean 'seed'"):
        expand(write(tmp_path, MINIMAL + "sweep: [{sead: [0, 1]}]\n"))


def test_two_runs_of_a_sweep_may_not_share_a_name() -> None:
    with pytest.raises(NextLatError, match="two runs of the sweep would be named 'same'"):
        expand("path_star/mini", ["seed=0,1", "name=same"])


def test_run_names_are_readable_and_stable() -> None:
    assert load_config("path_star/mini").name == "path_star-mini-nextlat-s0"
    overrides = ["training.steps=500", "objective.horizon=4", "seed=3", "training.device=cpu"]
    expected = "path_star-mini-nextlat-s3-horizon4-steps500"
    assert load_config("path_star/mini", overrides).name == expected
    assert load_config("path_star/mini", overrides[::-1]).name == expected
    assert load_config("path_star/mini", ["name=mine", *overrides]).name == "mine"


def test_run_names_are_safe_as_folder_names(tmp_path: Path) -> None:
    name = load_config(write(tmp_path, MINIMAL), ["evaluation.after=[accuracy, rank]", "training.clip=null"]).name
    assert name == "own-gpt-s0-evaluation.after__accuracy____rank__-clipNone"


def test_a_file_name_with_spaces_gives_a_run_that_can_be_opened_again(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL, "my config (2).yaml"), ["data.seed=1"])
    assert config.name == "my_config__2_-gpt-s0-seed1"
    assert resolve(config.plain()).name == config.name


def test_long_names_are_cut_and_stay_different(tmp_path: Path) -> None:
    many = [f"objectives.{name}.horizon=3" for name in ("mtp", "jtp")] + ["training.learning_rate=0.0012345678901"]
    many += ["objectives.nextlat.dynamics.hidden_dim=64", "training.weight_decay=0.123456789", "training.steps=77"]
    names = {load_config("path_star/mini", [*many, f"training.warmup_steps={n}"]).name for n in (1, 2)}
    assert len(names) == 2
    assert all(name is not None and len(name) <= 133 for name in names)


def test_keys_with_the_same_last_part_are_told_apart_in_names() -> None:
    names = {load_config("path_star/mini", [f"{part}.batch_size=100"]).name for part in ("training", "evaluation")}
    assert len(names) == 2


def test_a_range_is_understood_in_the_sweep_section(tmp_path: Path) -> None:
    configs = expand(write(tmp_path, MINIMAL + 'sweep: [{seed: "0..3"}]\n'))
    assert [config.seed for config in configs] == [0, 1, 2, 3]


def test_the_hash_ignores_name_sweep_and_objectives_that_were_not_selected() -> None:
    base = tiny("gpt")
    assert len(base.hash()) == 12
    for override in ("name=other", "sweep=[{seed: [1]}]", "objectives.nextlat.horizon=3", "objectives.mtp={}"):
        assert tiny("gpt", override).hash() == base.hash(), override
    assert tiny("nextlat").hash() != tiny("nextlat", "objectives.nextlat.horizon=3").hash()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "objective=nextlat",
        "model.width=32",
        "model.tie_embeddings=true",
        "data.seed=1",
        "data.nodes=11",
        "training.steps=7",
        "training.learning_rate=2e-3",
        "training.threads=2",
        "training.precision=bf16",
        "evaluation.examples=20",
        "evaluation.after=[accuracy, rank]",
    ],
)
def test_the_hash_changes_with_everything_that_makes_the_result(override: str) -> None:
    assert tiny("gpt", override).hash() != tiny("gpt").hash()


def test_the_hash_does_not_depend_on_how_a_number_was_written_or_on_the_order_of_keys() -> None:
    one = load_config("path_star/mini", ["training.learning_rate=1e-3", "training.steps=5"])
    other = load_config("path_star/mini", ["training.steps=5", "training.learning_rate=0.001"])
    assert one.hash() == other.hash()


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = tiny()
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3
