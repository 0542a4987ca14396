"""Each deliberately broken implementation fails exactly where it should, and no claim is empty."""

from __future__ import annotations

import pytest

from nextlat.conformance import KINDS, check
from tests.conformance import broken
from tests.conformance import broken_parts as parts

INTEGRATIVE = {
    "losses": {"worked-example", "brute-force"},
    "dynamics": {"worked-vector"},
    "multi-token": {"brute-force"},
}
"""Claims that look at everything at once, so that most bugs fail them too."""

LOSSES = {
    broken.FirstPositionsOnly: "worked-example brute-force every-source",
    broken.LatentOnPadding: "brute-force padding padding-values all-padding",
    broken.KLCountsPadding: "brute-force padding padding-targets all-padding zero-transitions",
    broken.KLOnPrompt: "worked-example brute-force prompt-token-losses zero-prompt",
    broken.KLCapped: "brute-force accumulation",
    broken.KLMaskOfSource: "worked-example brute-force prompt-token-losses",
    broken.LatentOnAnswersOnly: "worked-example brute-force prompt-latent",
    broken.LastPromptPositionDropped: "worked-example brute-force prompt-token-losses",
    broken.DropsBoundaryOnly: (
        "worked-example brute-force boundary-passed document-order other-documents packed-equals-alone"
    ),
    broken.ComparesEndpoints: "brute-force repeated-ids",
    broken.RisingIdsOnly: "brute-force document-order",
    broken.CrossesDocuments: (
        "worked-example brute-force boundary boundary-passed repeated-ids document-order other-documents "
        "packed-equals-alone zero-transitions"
    ),
    broken.StopsAfterThreeSteps: "brute-force horizon-alignment rolled-states-live",
    broken.LeaksFromFourthStep: (
        "brute-force boundary-passed repeated-ids document-order other-documents packed-equals-alone"
    ),
    broken.EndTokenIsBoundary: "documents-none",
    broken.TokenZeroIsPadding: "worked-example token-zero",
    broken.TokenZeroEndsDocument: "worked-example token-zero",
    broken.TrustsPaddingTargets: "padding-targets",
    broken.MultipliesMask: "padding-values",
    broken.SumsFeatures: "worked-example brute-force feature-mean",
    broken.PooledSteps: (
        "worked-example brute-force per-step-terms every-source prompt-token-losses prompt-latent "
        "boundary-passed repeated-ids other-documents packed-equals-alone zero-transitions horizon-beyond-row"
    ),
    broken.OneCountForAllSteps: (
        "worked-example brute-force per-step-terms every-source prompt-token-losses boundary-passed repeated-ids "
        "packed-equals-alone zero-transitions horizon-beyond-row"
    ),
    broken.WeighsSteps: "worked-example brute-force per-step-terms",
    broken.SixteenRows: "every-source boundary-passed accumulation",
    broken.Means: (
        "worked-example brute-force cross-entropy tagging-targets kl-direction feature-mean other-documents "
        "packed-equals-alone accumulation huge-logits"
    ),
    broken.CallsBackward: "worked-example",
    broken.ShiftsStates: "worked-example",
    broken.LatentNamedMSE: "worked-example",
    broken.EmptyMeanIsNaN: "zero-prompt zero-transitions horizon-beyond-row",
    broken.SkipsEmptySteps: "zero-prompt zero-transitions horizon-beyond-row",
    broken.ShortensHorizon: "packed-equals-alone horizon-beyond-row",
    broken.SquaredError: "worked-example brute-force smooth-l1",
    broken.SwappedKL: "worked-example brute-force kl-direction",
    broken.TeacherAtSource: "worked-example brute-force horizon-alignment kl-direction head-weight source-live",
    broken.FeedsCurrentToken: "worked-example brute-force horizon-alignment",
    broken.ShiftsTokens: "tagging-targets document-order",
    broken.LiveHead: "worked-example brute-force head-cut tied-head",
    broken.LiveTiedHead: "tied-head",
    broken.LiveTarget: "worked-example brute-force target-cut",
    broken.LiveTeacher: "worked-example brute-force teacher-cut",
    broken.DetachedSource: "worked-example brute-force source-live",
    broken.DetachedEmbeddings: "worked-example brute-force embeddings-live",
    broken.DetachedRolledStates: "worked-example brute-force rolled-states-live",
    broken.FrozenDynamics: "dynamics-live rolled-states-live",
    broken.OwnEmbedding: (
        "worked-example brute-force horizon-alignment kl-direction smooth-l1 feature-mean per-step-terms "
        "embedding-table head-weight token-zero embeddings-live"
    ),
    broken.StaleHead: "head-weight",
    broken.StaleEmbedding: "kl-direction feature-mean embedding-table embeddings-live",
    broken.DocumentsOfFirstRow: "brute-force boundary boundary-passed repeated-ids row-permutation",
    broken.SumsInLowPrecision: "low-precision",
    broken.SmoothedLabels: "worked-example brute-force cross-entropy tagging-targets huge-logits",
    broken.NaiveSoftmax: "huge-logits",
    broken.NaiveKL: "huge-logits",
}

DYNAMICS = {
    parts.HiddenFirst: "worked-vector concatenation-order",
    parts.LayerNormed: "worked-vector rms-norm",
    parts.NormedApart: "worked-vector joint-norm",
    parts.NoGain: "gain",
    parts.TanhGELU: "worked-vector exact-gelu",
    parts.NormedResidual: "worked-vector raw-residual epsilon",
    parts.NoResidual: "worked-vector concatenation-order rms-norm joint-norm gain exact-gelu raw-residual",
    parts.NormedOutput: "worked-vector concatenation-order rms-norm joint-norm gain exact-gelu raw-residual epsilon",
    parts.SmallEpsilon: "worked-vector epsilon",
    parts.NoEpsilon: "worked-vector epsilon",
    parts.NormsWholeBatch: "leading-dimensions",
}

HEADS = {
    parts.FirstAnswerTokenDropped: "brute-force first-answer-token",
    parts.NoDocuments: "brute-force boundary boundary-passed repeated-ids zero-counts",
    parts.HeadsDropBoundaryOnly: "brute-force boundary-passed",
    parts.HeadsCompareEndpoints: "brute-force repeated-ids",
    parts.AsksPadding: "padding",
    parts.HeadsMultiplyMask: "padding-values",
    parts.HeadsStopAfterThree: (
        "brute-force targets-ahead every-position boundary-passed repeated-ids live-head live-states"
    ),
    parts.HeadsLeakFromFourth: "brute-force boundary-passed repeated-ids",
    parts.EndTargetIsBoundary: "documents-none",
    parts.HeadsCallBackward: "brute-force",
    parts.FirstPositionsAsked: "brute-force every-position",
    parts.TargetsOfNext: "brute-force targets-ahead",
    parts.HeadsEmptyMeanIsNaN: "zero-counts",
    parts.FrozenHead: "brute-force live-head",
    parts.HeadsMeans: "brute-force targets-ahead accumulation",
    parts.AddsFirstSlot: "brute-force targets-ahead live-states",
    parts.SharedSlot: (
        "brute-force targets-ahead every-position first-answer-token boundary boundary-passed repeated-ids "
        "padding live-states"
    ),
}

ALL = [
    (kind, variant, set(failing.split()))
    for kind, table in (("losses", LOSSES), ("dynamics", DYNAMICS), ("multi-token", HEADS))
    for variant, failing in table.items()
]


@pytest.mark.parametrize(("kind", "variant", "expected"), ALL, ids=[variant.__name__ for _, variant, _ in ALL])
def test_a_broken_implementation_fails_exactly_where_it_should(kind: str, variant: type, expected: set[str]) -> None:
    verdicts = check(variant(), kind)
    assert {verdict.name for verdict in verdicts if not verdict.holds} == expected
    assert all(verdict.reason for verdict in verdicts if not verdict.holds)


def test_every_broken_implementation_is_in_the_table() -> None:
    bases = (broken.Losses, parts.Network, parts.Heads)
    made = {
        v
        for v in {**vars(broken), **vars(parts)}.values()
        if isinstance(v, type) and issubclass(v, bases) and v not in bases
    }
    assert made - {variant for _, variant, _ in ALL} == {broken.AlwaysFloat32}


@pytest.mark.parametrize("kind", KINDS)
def test_every_claim_is_failed_by_a_broken_implementation_and_named_by_a_short_list(kind: str) -> None:
    names = [claim.name for claim in KINDS[kind].claims]
    assert len(set(names)) == len(names)
    failing = [expected for other, _, expected in ALL if other == kind]
    for name in names:
        lists = [expected for expected in failing if name in expected]
        assert lists, f"no broken implementation fails {name}"
        if name not in {*INTEGRATIVE[kind], "per-step-terms"}:  # mixed-up steps show wherever a step is summed
            assert min(len(expected - INTEGRATIVE[kind]) for expected in lists) <= 4, name


@pytest.mark.parametrize(
    ("kind", "right"), [("losses", broken.Losses), ("dynamics", parts.Network), ("multi-token", parts.Heads)]
)
def test_the_implementation_that_the_bugs_were_put_into_is_right(kind: str, right: type) -> None:
    assert [verdict for verdict in check(right(), kind) if not verdict.holds] == []


def test_an_implementation_that_casts_to_float32_is_told_so() -> None:
    (verdict,) = check(broken.AlwaysFloat32(), only=["cross-entropy"])
    assert "equal in float32 only; compute float64 inputs in float64" in str(verdict.reason)


def test_the_reason_names_what_was_measured() -> None:
    reasons = {
        broken.SwappedKL: ("kl-direction", "this is KL(student || teacher)"),
        broken.SquaredError: ("smooth-l1", "latent_1 of the residual -1.01 is 0.51005, expected 0.51"),
        broken.SumsFeatures: ("feature-mean", "width 6 is 3, expected 18"),
        broken.CallsBackward: ("worked-example", "the call filled hidden.grad; leave backward() to the caller"),
        broken.ShiftsStates: ("worked-example", "the call changed hidden in place"),
        broken.LatentNamedMSE: ("worked-example", "lacks latent_1, latent_2 and has unknown mse_1, mse_2"),
        broken.FirstPositionsOnly: ("every-source", "the 22 transitions (row, source) (0, 0)"),
        broken.LiveHead: ("head-cut", "the gradient of kl_1 in head_weight is as large as"),
        broken.EmptyMeanIsNaN: ("zero-prompt", "the sum of ce is nan, expected exactly 0"),
        broken.ShortensHorizon: ("horizon-beyond-row", "the returned dict lacks latent_2, latent_3, latent_4, kl_2"),
        broken.DetachedSource: ("source-live", "the gradient of latent_1 in the source state is 0, expected"),
        broken.SumsInLowPrecision: ("low-precision", "is torch.bfloat16, expected torch.float32 or wider"),
    }
    for variant, (name, part) in reasons.items():
        (verdict,) = check(variant(), only=[name])
        assert part in str(verdict.reason), verdict
