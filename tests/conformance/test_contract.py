"""What a user can get wrong around the function: its name, its module, what it returns and raises."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nextlat.cli import main
from nextlat.conformance import KINDS, check, own_dynamics, own_losses
from nextlat.errors import NextLatError

ADAPTER = """
from nextlat import Batch, nextlat_sums

def my_losses(hidden, embedding_weight, head_weight, tokens, targets, documents, horizon, dynamics):
    batch = Batch(tokens, targets, documents)
    return nextlat_sums(hidden, embedding_weight, head_weight, batch, dynamics, horizon)
"""


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def conformance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Runs the command in an empty folder; modules are given as name=source."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, **modules: str) -> Said:
        for name, source in modules.items():
            Path(f"{name}.py").write_text(source, encoding="utf-8")
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "argv", ["nextlat", "conformance", *arguments])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        before = list(sys.path)
        with pytest.raises(SystemExit) as caught:
            main()
        assert sys.path == before
        for name in modules:
            sys.modules.pop(name, None)
        return Said(int(caught.value.code or 0), *capsys.readouterr())

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_functions_pass_by_default(kind: str, conformance: Callable[..., Said]) -> None:
    said = conformance("--kind", kind)
    count = len(KINDS[kind].claims)
    assert (said.code, said.err) == (0, "")
    assert said.out.endswith(f"{count} of {count} claims about {kind} hold for {KINDS[kind].own}\n")
    assert said.out.count("holds  ") == count


def test_a_module_of_the_current_directory_is_found(conformance: Callable[..., Said]) -> None:
    said = conformance("mine:my_losses", "--only", "worked-example", mine=ADAPTER)
    assert said == (0, "holds  worked-example\n1 of 1 claims about losses hold for mine:my_losses\n", "")


def test_a_wrong_implementation_exits_with_one_and_says_why(conformance: Callable[..., Said]) -> None:
    source = ADAPTER.replace("horizon)\n", "horizon, stop_head=False)\n")
    said = conformance("mine:my_losses", mine=source)
    assert said.code == 1
    failing = [line.split()[1] for line in said.out.splitlines() if line.startswith("FAILS")]
    assert failing == ["worked-example", "brute-force", "head-cut", "tied-head"]
    assert "the gradient of kl_1 in head_weight is as large as" in said.out
    assert f"{len(KINDS['losses'].claims) - 4} of" in said.out


def test_list_prints_each_claim_with_a_sentence_and_runs_none(conformance: Callable[..., Said]) -> None:
    for kind, contract in KINDS.items():
        said = conformance("does_not_exist:f", "--kind", kind, "--list")
        assert said.code == 0
        first, *lines = said.out.splitlines()
        assert first == f"FUNCTION{contract.signature}"
        assert [line.split()[0] for line in lines] == [claim.name for claim in contract.claims]
        assert all(line.endswith(".") and len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("mine", ["'mine' is not of the form MODULE:FUNCTION"]),
        (":f", ["not of the form"]),
        ("mine:", ["not of the form"]),
        ("mine.py:f", ["names a file; name the module: mine:f"]),
        ("absent:f", ["no module 'absent' for absent:f", "nor among the installed packages"]),
        ("absent.sub:f", ["no module 'absent' for absent.sub:f"]),
        ("mine:my_loses", ["has no 'my_loses'; did you mean 'my_losses'?", "mine.py"]),
        ("mine:number", ["mine:number is of type int; name a function"]),
        ("mine:Net", ["Net is a class; name an instance or a function"]),
        ("raises:f", ["importing raises raised ZeroDivisionError: division by zero"]),
        ("exits:f", ["importing exits raised SystemExit: 3"]),
        ("lacks:f", ["importing lacks raised ModuleNotFoundError: No module named 'not_there_at_all'"]),
        ("torn:f", ["importing torn raised SyntaxError", "torn.py, line 1"]),
        (".mine:f", ["importing .mine raised"]),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(
    target: str, parts: list[str], conformance: Callable[..., Said]
) -> None:
    modules = {
        "mine": "number = 3\ndef my_losses(): pass\nclass Net: pass\n",
        "raises": "1 / 0\n",
        "exits": "raise SystemExit(3)\n",
        "lacks": "import not_there_at_all\n",
        "torn": "def f(:\n",
    }
    said = conformance(target, **modules)
    assert said.code == 1
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    for part in parts:
        assert part in said.err


def test_names_that_do_not_exist_are_errors_with_the_nearest(conformance: Callable[..., Said]) -> None:
    assert "did you mean 'kl-direction'" in conformance("--only", "kl-directon").err
    assert "did you mean 'multi-token'" in conformance("--kind", "multitoken").err
    with pytest.raises(NextLatError, match="unknown claim of kind dynamics"):
        check(own_dynamics, "dynamics", ["smooth-l1"])


def returned(value: Any) -> str:
    """Why the worked example fails for a function that returns a value."""
    (verdict,) = check(lambda *inputs: value, only=["worked-example"])
    return str(verdict.reason)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_contract_is_said_once(kind: str, conformance: Callable[..., Said]) -> None:
    said = conformance("mine:f", "--kind", kind, mine="def f(*inputs): return 3.0\n")
    first, last = said.out.splitlines()
    assert said.code == 1
    assert first.startswith(f"FAILS  {KINDS[kind].claims[0].name} ")
    assert "returned " in first
    count = len(KINDS[kind].claims)
    assert last == f"0 of {count} claims about {kind} hold for mine:f; the others were not checked"


@pytest.mark.parametrize("size", [0.0, 1e-4])
def test_inputs_changed_in_place_are_named(size: float) -> None:
    def careless(*inputs: Any) -> Any:
        found = own_losses(*inputs)
        inputs[1].data += size
        return found

    verdicts = check(careless, only=["worked-example", "brute-force"])
    reason = "the call changed embedding_weight in place; work on a copy of it"
    assert [verdict.reason for verdict in verdicts] == ([reason] if size else [None, None])


def test_a_mean_is_called_one() -> None:
    def mean(*inputs: Any) -> dict[str, Any]:
        return {name: (value / count.clamp(min=1), count) for name, (value, count) in own_losses(*inputs).items()}

    def mean_of_one(*inputs: Any) -> dict[str, Any]:
        return {name: (value, 1) for name, (value, _) in mean(*inputs).items()}

    names = ["worked-example", "brute-force", "cross-entropy", "tagging-targets", "kl-direction"]
    for verdict in (*check(mean, only=names), *check(mean_of_one, only=names)):
        assert str(verdict.reason).endswith(": this is a mean; return the sum and the count")


def changed(name: str, term: Any) -> str:
    """Why the worked example fails when one term is something else."""

    def function(*inputs: Any) -> dict[str, Any]:
        return {**own_losses(*inputs), name: term}

    (verdict,) = check(function, only=["worked-example"])
    return str(verdict.reason)


def test_wrong_returns_are_said_in_words() -> None:
    assert returned(None) == "returned None, expected a dict of name: (sum, count)"
    assert returned(torch.zeros(3)) == "returned a tensor of shape (3,), expected a dict of name: (sum, count)"
    assert returned((1, 2)).startswith("returned a tuple of 2")
    assert returned({"loss": 1}).startswith(
        "the returned dict lacks ce, latent_1, latent_2, kl_1, kl_2 and has unknown"
    )
    assert changed("extra", 1).startswith("the returned dict has unknown extra; expected the names ce, latent_1")
    assert changed("ce", torch.tensor(1.0)) == "ce is a tensor of shape (), expected a pair (sum, count)"
    assert changed("ce", (1.0, 3)) == "the sum of ce is of type float, expected a scalar tensor"
    assert changed("ce", (torch.ones(2), 3)).startswith("the sum of ce has shape (2,)")
    assert changed("ce", (torch.tensor(1), 3)).startswith("the sum of ce is of torch.int64")
    assert changed("ce", (torch.tensor(1.0), "3")).startswith("the count of ce is of type str")
    assert changed("ce", (torch.tensor(1.0), torch.ones(2))).startswith("the count of ce is a tensor of shape (2,)")
    assert changed("ce", (torch.tensor(1.0), 2.5)) == "the count of ce is 2.5, expected a whole number"
    assert changed("ce", (torch.tensor(1.0), torch.tensor(torch.nan))).startswith("the count of ce is nan")
    assert changed("ce", (torch.tensor(torch.nan), 3)) == "the sum of ce is nan, expected 4.3220735"


def test_counts_may_be_numbers_or_tensors() -> None:
    def plain(*inputs: Any) -> dict[str, Any]:
        return {name: (value, int(count)) for name, (value, count) in own_losses(*inputs).items()}

    def floating(*inputs: Any) -> dict[str, Any]:
        return {name: [value, count.double().view(1)] for name, (value, count) in own_losses(*inputs).items()}

    for function in (plain, floating):
        assert all(verdict.holds for verdict in check(function, only=["worked-example", "zero-prompt"]))


def test_whatever_the_function_raises_fails_the_claim_with_type_message_and_line() -> None:
    def broken(*inputs: Any) -> Any:
        raise RuntimeError("two\nlines")

    def leaving(*inputs: Any) -> Any:
        raise SystemExit

    def endless(*inputs: Any) -> Any:
        raise ValueError("x" * 5000)

    (verdict,) = check(broken, only=["boundary"])
    assert str(verdict.reason).startswith("raised RuntimeError: two lines (test_contract.py:")
    assert check(leaving, only=["boundary"])[0].reason.startswith("raised SystemExit (")  # type: ignore[union-attr]
    assert len(str(check(endless, only=["boundary"])[0].reason)) <= 300
    assert str(check(lambda hidden: {}, only=["boundary"])[0].reason).startswith("raised TypeError: ")


def test_a_function_cannot_spoil_the_inputs_of_later_claims() -> None:
    def careless(*inputs: Any) -> Any:
        found = own_losses(*inputs)
        inputs[3].zero_()
        inputs[4].fill_(-100)
        return found

    # claims without gradients, because autograd itself refuses inputs that were changed after they were read
    names = ["every-source", "prompt-latent", "boundary", "boundary-passed"]
    assert all(verdict.holds for verdict in check(careless, only=names))


def test_wrong_dynamics_returns_are_said_in_words() -> None:
    def reason(value: Any) -> str:
        return str(check(lambda *inputs: value, "dynamics", ["worked-vector"])[0].reason)

    assert reason(None) == "returned NoneType, expected a tensor"
    assert reason(torch.zeros(3)) == "returned shape (3,) for a state of shape (2,), expected (2,)"
