"""A checkpoint is there whole or not at all, and damage is found before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nextlat.errors import NextLatError
from nextlat.objectives import Objective
from nextlat.training import checkpoint as checkpoints
from nextlat.training.build import build
from nextlat.training.checkpoint import (
    checkpoint_name,
    discard,
    list_checkpoints,
    load_state,
    load_weights,
    newest,
    save_checkpoint,
    verify,
)
from nextlat.training.run import RunDirectory
from tests.tiny import ALL, files_below, start, tiny

STATE = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "best": 0.5}


def network(objective: str = "nextlat", seed: int = 0) -> Objective:
    return build(tiny(objective, f"seed={seed}")).objective


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, 7, network(), STATE)


@pytest.mark.parametrize("objective", ALL)
def test_weights_and_state_come_back_exactly(objective: str, tmp_path: Path) -> None:
    one, other = network(objective), network(objective, seed=1)
    with torch.no_grad():
        for parameter in one.parameters():  # gains and other constants of the start as well
            parameter.add_(torch.rand(parameter.shape))
    path = save_checkpoint(tmp_path, 7, one, STATE)
    assert load_weights(path, other) == 7
    restored = other.state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in one.state_dict().items())
    assert load_state(path)["best"] == 0.5
    assert load_state(path)["optimizer"]["state"][0]["step"] == 3.0


def test_the_plain_model_lies_in_a_file_of_its_own_under_clean_names(saved: Path) -> None:
    names = set(load_file(saved / "model.safetensors"))
    assert {"embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "norm.weight", "lm_head.weight"} <= names
    assert not any("dynamics" in name or name.startswith("model.") for name in names)
    assert {name.split(".")[0] for name in load_file(saved / "objective.safetensors")} == {
        "norm",
        "layer_1",
        "layer_2",
        "layer_3",
    }


def test_a_checkpoint_of_tied_embeddings_comes_back_tied(tmp_path: Path) -> None:
    config = tiny("gpt", "model.tie_embeddings=true")
    one, other = build(config).objective, build(config.model_copy(update={"seed": 1})).objective
    load_weights(save_checkpoint(tmp_path, 1, one, {}), other)
    assert torch.equal(other.model.lm_head.weight, one.model.embed_tokens.weight)
    assert other.model.lm_head.weight is other.model.embed_tokens.weight


def test_names_sort_by_step(tmp_path: Path) -> None:
    for step in (1000, 2, 30):
        save_checkpoint(tmp_path / "checkpoints", step, network("gpt"), {})
    found = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert found == ["step_000000002", "step_000000030", "step_000001000"]
    assert newest(tmp_path).name == checkpoint_name(1000)


def test_the_manifest_names_every_file_with_size_and_checksum(saved: Path) -> None:
    manifest = verify(saved)
    assert manifest["step"] == 7
    assert set(manifest["files"]) == {"model.safetensors", "objective.safetensors", "state.pt"}
    assert manifest["files"]["state.pt"]["bytes"] == (saved / "state.pt").stat().st_size
    assert files_below(saved.parent) == [saved.name, *(f"{saved.name}/{name}" for name in files_below(saved))]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (truncate, "it is truncated"),
    (flip, "does not match its checksum"),
    (Path.unlink, "lacks"),
]


@pytest.mark.parametrize("file", ["model.safetensors", "objective.safetensors", "state.pt"])
@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_every_kind_of_damage_is_found_before_loading(
    saved: Path, file: str, damage: Callable[[Path], Any], said: str
) -> None:
    damage(saved / file)
    untouched = network(seed=1)
    before = {name: value.clone() for name, value in untouched.state_dict().items()}
    with pytest.raises(NextLatError) as caught:
        load_weights(saved, untouched)
    assert said in str(caught.value)
    assert file in str(caught.value)
    assert f"delete {saved}" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in untouched.state_dict().items())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3, "step": 1}', '{"step": 1}'])
def test_a_damaged_manifest_is_found(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    with pytest.raises(NextLatError, match=r"manifest\.json is damaged"):
        verify(saved)


def test_a_missing_manifest_is_found(saved: Path) -> None:
    (saved / "manifest.json").unlink()
    with pytest.raises(NextLatError, match=r"has no manifest\.json"):
        verify(saved)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, network("gpt"), {})
    with pytest.raises(NextLatError, match="does not fit the configuration"):
        load_weights(path, build(tiny("gpt", "model.width=32")).objective)
    with pytest.raises(NextLatError, match="does not fit the configuration"):
        load_weights(path, network("nextlat"))


def test_state_is_loaded_without_running_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = save_checkpoint(tmp_path / "checkpoints", 1, network("gpt"), {"trap": Trap()})
    with pytest.raises(Exception, match="weights_only"):
        load_state(path)
    assert not (tmp_path / "ran").exists()


def fail_at(monkeypatch: pytest.MonkeyPatch, what: str, error: BaseException, folder: Path) -> list[list[str]]:
    """Make one step of writing fail; the list returned receives the checkpoints that could be seen just then."""
    seen = []

    def failing(*args: Any, **kwargs: Any) -> None:
        seen.append([path.name for path in list_checkpoints(folder)])
        raise error

    target = torch if what == "torch.save" else checkpoints.os if what == "rename" else checkpoints
    monkeypatch.setattr(target, {"torch.save": "save"}.get(what, what), failing)
    return seen


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("save_model", SafetensorError("I/O error: No space left on device (os error 28)")),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        ("torch.save", OSError(28, "No space left on device")),
        ("write_json", OSError(28, "No space left on device")),
        ("_describe", OSError(5, "Input/output error")),
        ("rename", OSError(28, "No space left on device")),
        ("write_json", KeyboardInterrupt()),
    ],
)
def test_a_failure_at_any_point_of_writing_keeps_the_old_checkpoint_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: BaseException
) -> None:
    old = save_checkpoint(tmp_path, 7, network(), STATE)
    with monkeypatch.context() as patch:
        seen = fail_at(patch, what, error, tmp_path)
        expected = NextLatError if isinstance(error, Exception) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            save_checkpoint(tmp_path, 9, network(seed=1), STATE)
    assert seen == [[old.name]]
    if expected is NextLatError:
        assert "step_000000009" in str(caught.value)
        assert (isinstance(error, OSError) and error.errno == 5) or "free some space" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert load_weights(old, network(seed=2)) == 7


def test_writing_a_step_again_replaces_it_whole(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 7, network("nextlat"), STATE)
    again = network("nextlat", seed=1)
    path = save_checkpoint(tmp_path, 7, again, STATE)
    other = network("nextlat", seed=2)
    load_weights(path, other)
    assert torch.equal(other.model.embedding_weight, again.model.embedding_weight)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_discarded_checkpoint_is_never_seen_half_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, 7, network("gpt"), STATE)
    rmtree = checkpoints.shutil.rmtree

    def interrupted(doomed: Path, ignore_errors: bool = False) -> None:
        if doomed.exists():
            (doomed / "manifest.json").unlink()
            raise KeyboardInterrupt
        rmtree(doomed, ignore_errors)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        discard(path)
    assert list_checkpoints(tmp_path) == []
    assert files_below(tmp_path)[0].startswith(".discarded-")


def test_leftovers_of_a_killed_writer_are_removed_when_the_run_is_opened(runs: Path) -> None:
    run, built = start(tiny("gpt"), runs)
    save_checkpoint(run.checkpoints, 3, built.objective, STATE)
    run.close()
    for name in (".writing-step_000000004", ".discarded-step_000000002"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "state.pt").touch()
    (run.path / ".metrics.csv.123.tmp").touch()
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_000000003"]
    RunDirectory.open(run.path, lock=False)
    assert (run.checkpoints / ".writing-step_000000004").exists()  # a reader leaves a writer's files alone
    RunDirectory.open(run.path).close()
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000000003"]
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_a_run_directory_appears_whole_or_not_at_all(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nextlat.training.run as module

    def failing(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", failing)
        with pytest.raises(NextLatError, match="the disk is full while creating run directory"):
            RunDirectory.create(tiny(), runs, {})
    assert list(runs.iterdir()) == []
    run = RunDirectory.create(tiny(), runs, {"extra": 3})
    run.close()
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["extra"] == 3
    assert environment["config_hash"] == tiny().hash()
    assert {"torch", "python", "commit", "hardware", "threads", "started"} <= environment.keys()
    assert RunDirectory.open(run.path, lock=False).config == tiny()
