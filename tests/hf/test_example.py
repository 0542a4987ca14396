"""The example of docs/huggingface.md, run."""

from __future__ import annotations

from examples import huggingface


def test_the_warm_up_lowers_the_kl_alone_and_joint_training_keeps_the_model_learning() -> None:
    for phases in huggingface.main().values():
        before, warm, after = phases["before"], phases["warmed up"], phases["after"]
        assert warm["ce"] == before["ce"]
        assert warm["kl_1"] < 0.9 * before["kl_1"]
        assert after["ce"] < before["ce"]
