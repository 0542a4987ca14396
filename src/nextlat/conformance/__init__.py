"""Claims that any implementation of the NextLat loss, its dynamics or the rivals' terms can be held to.

``nextlat conformance my_module:my_losses`` runs them from the command line, :func:`check` from a test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nextlat.conformance import dynamics_claims, loss_gradients, loss_positions, loss_robustness, loss_values
from nextlat.conformance import multi_token_claims as multi_token
from nextlat.conformance.claims import Claim, Function, Verdict, judge
from nextlat.conformance.contract import HeadTerms, Losses
from nextlat.conformance.loading import load_function
from nextlat.conformance.own import own_dynamics, own_losses, own_terms
from nextlat.errors import NextLatError, unknown


class Kind(NamedTuple):
    """One contract: how a function is called, and what is claimed about it."""

    signature: str
    own: str
    """Our own function, as it is named on the command line."""
    contract: Callable[[Function], Any]
    claims: Sequence[Claim]


KINDS = {
    "losses": Kind(
        "(hidden, embedding_weight, head_weight, tokens, targets, documents, horizon, dynamics)"
        " -> {name: (sum, count)}",
        "nextlat.conformance:own_losses",
        Losses,
        (*loss_values.CLAIMS, *loss_positions.CLAIMS, *loss_gradients.CLAIMS, *loss_robustness.CLAIMS),
    ),
    "dynamics": Kind(
        "(state, embedding, gain, layer_1, layer_2, layer_3) -> state",
        "nextlat.conformance:own_dynamics",
        dynamics_claims.Network,
        dynamics_claims.CLAIMS,
    ),
    "multi-token": Kind(
        "(states, head_weight, targets, documents, horizon) -> {name: (sum, count)}",
        "nextlat.conformance:own_terms",
        HeadTerms,
        multi_token.CLAIMS,
    ),
}


def find_kind(name: str) -> Kind:
    """The contract of a name."""
    if name not in KINDS:
        raise unknown("kind", name, KINDS)
    return KINDS[name]


def find_claims(kind: str, only: Sequence[str] = ()) -> list[Claim]:
    """The claims of a kind, or the named ones of them.

    Raises:
        NextLatError: an unknown kind or claim.
    """
    known = {one.name: one for one in find_kind(kind).claims}
    for name in only:
        if name not in known:
            raise unknown(f"claim of kind {kind}", name, known)
    return [one for one in known.values() if not only or one.name in only]


def check(function: Function, kind: str = "losses", only: Sequence[str] = ()) -> list[Verdict]:
    """Hold a function to the claims of its contract; a few seconds on one CPU core.

    Args:
        function: see ``KINDS[kind].signature``; what it raises fails the claim that called it.
        kind: ``losses``, ``dynamics`` or ``multi-token``.
        only: names of claims; by default all.

    Returns:
        one verdict a claim, in the order of the claims; of the first alone if the function breaks its contract there.

    Raises:
        NextLatError: an unknown kind or claim, or a class.
    """
    if isinstance(function, type):
        raise NextLatError(f"{function.__name__} is a class; name an instance or a function")
    return judge(find_claims(kind, only), find_kind(kind).contract(function), function)


__all__ = [
    "KINDS",
    "Claim",
    "Kind",
    "Verdict",
    "check",
    "find_claims",
    "find_kind",
    "load_function",
    "own_dynamics",
    "own_losses",
    "own_terms",
]
