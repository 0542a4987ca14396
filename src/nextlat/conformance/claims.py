"""What a claim is, how it fails, and the comparisons that claims are made of."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[..., Any]
"""The function under test."""

LONGEST_REASON = 300
FLOAT32_ERROR = 1e-5
"""A relative difference below this is rounding rather than another formula."""


class ClaimError(Exception):
    """A claim does not hold; the message is the reason that is printed."""


class ContractError(ClaimError):
    """The function does not do what its contract asks for, whichever claim called it."""


class Claim(NamedTuple):
    """One sentence about a function and the check behind it."""

    name: str
    sentence: str
    check: Callable[[Any], None]
    """Takes the function behind its contract; raises :class:`ClaimError` when the sentence is not true."""


class Verdict(NamedTuple):
    """What became of a claim."""

    name: str
    reason: str | None
    """One line when the claim fails, ``None`` when it holds."""

    @property
    def holds(self) -> bool:
        """Whether the claim holds."""
        return self.reason is None


def claim(name: str) -> Callable[[Callable[[Any], None]], Claim]:
    """Make a claim of a check; the check's docstring is the sentence."""

    def make(check: Callable[[Any], None]) -> Claim:
        return Claim(name, " ".join((check.__doc__ or "").split()), check)

    return make


def judge(claims: Sequence[Claim], subject: Any, function: Function) -> list[Verdict]:
    """Check claims one after the other; whatever the function raises fails the claim that called it.

    A function that breaks its contract in the first claim would do so in the others: they are left out.

    Args:
        claims: what to check.
        subject: the function behind its contract.
        function: the function itself, to say where it raised.
    """
    verdicts = []
    for one in claims:
        failed = reason = None
        try:
            one.check(subject)
        except ClaimError as failure:
            failed, reason = failure, one_line(str(failure))
        except (Exception, SystemExit) as error:  # the function is foreign code and may raise anything
            reason = one_line(f"raised {described(error)}{_place(error, function)}")
        verdicts.append(Verdict(one.name, reason))
        if len(verdicts) == 1 and isinstance(failed, ContractError):
            break
    return verdicts


def described(error: BaseException) -> str:
    """An exception's type and message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def one_line(text: str) -> str:
    """The text on one line of bearable length."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 4] + " ..."


def _place(error: BaseException, function: Function) -> str:
    """The innermost line of the function's own file that the exception passed through."""
    code = getattr(function, "__code__", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def expect(condition: bool, reason: str) -> None:
    """Fail with the reason unless the condition is met."""
    if not condition:
        raise ClaimError(reason)


def expect_number(
    what: str, found: float, expected: float, tolerance: float = 1e-9, why: str = "", count: int = 1
) -> None:
    """Fail unless two numbers agree within ``tolerance * max(1, |expected|)``; NaN agrees with nothing.

    Args:
        what: the number, as the reason names it.
        found: the function's.
        expected: the right one.
        tolerance: see above.
        why: what the reason ends with.
        count: elements that a sum runs over, to tell a mean from another mistake.
    """
    scale = max(1.0, abs(expected))
    distance = abs(found - expected) / scale
    if not distance <= tolerance:
        if count > 1 and abs(found * count - expected) / scale < FLOAT32_ERROR:
            why = "this is a mean; return the sum and the count"
        elif distance < FLOAT32_ERROR:
            why = "equal in float32 only; compute float64 inputs in float64"
        raise ClaimError(f"{what} is {found:.8g}, expected {expected:.8g}{f': {why}' if why else ''}")


def expect_same(what: str, found: Tensor, expected: Tensor, tolerance: float = 1e-9, why: str = "") -> None:
    """Fail unless two tensors agree in every entry within ``tolerance * max(1, |expected|)``; names the worst."""
    if found.shape != expected.shape:
        raise ClaimError(f"{what} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if found.numel() == 0:
        return
    found, expected = found.detach().double(), expected.detach().double()
    excess = (found - expected).abs() / expected.abs().clamp(min=1.0)
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), found.shape)]
    at = f"{what}{f' at {place}' if place else ''}"
    expect_number(at, found.flatten()[worst].item(), expected.flatten()[worst].item(), tolerance, why)


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    """Gradient of a scalar; zeros where the leaf took no part."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(value, [leaf], retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found
