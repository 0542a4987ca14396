"""Model FLOPs utilisation: how much of a GPU's arithmetic training makes use of."""

from __future__ import annotations

import re

import torch

from nextlat.config import Config, ModelConfig
from nextlat.model.trunk import feed_forward_width

BF16_PEAK = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A10": 125e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s by the makers' data sheets, without sparsity; the first whose words a device's name has counts."""


def flops_per_token(model: ModelConfig, vocab_size: int, length: int) -> float:
    """FLOPs that training the plain model costs a token: ``6 N + 12 L D T`` (Chowdhery et al., arXiv 2204.02311, B).

    N counts matrices that tokens are multiplied with: blocks and output head, not the embedding table. The attention
    part is that of rows without documents and takes no account of the causal half. Networks beside the plain model
    are left out, so that objectives compare by what they cost on top.

    Args:
        model: sizes of the trunk.
        vocab_size: V.
        length: tokens of a row T.
    """
    width = model.width
    matrices = model.n_layers * (4 * width**2 + 3 * width * feed_forward_width(width)) + vocab_size * width
    return 6.0 * matrices + 12.0 * model.n_layers * width * length


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's dense bf16 FLOP/s; ``None`` on a CPU, in fp32, and for GPUs that are not listed."""
    if device.type != "cuda" or precision != "bf16":
        return None
    words = f" {' '.join(re.findall('[A-Za-z0-9]+', torch.cuda.get_device_name(device)))} "  # an L40 is no L4
    return next((peak for key, peak in BF16_PEAK.items() if f" {key} " in words), None)


class Utilization:
    """Turns tokens per second into a share of the device's peak."""

    def __init__(self, config: Config, vocab_size: int, length: int, device: torch.device) -> None:
        self.peak = peak_flops(device, config.training.precision)
        self.per_token = flops_per_token(config.model, vocab_size, length)

    def row(self, tokens_per_second: float) -> dict[str, float]:
        """``{"mfu": ...}``, or nothing where the peak is not known."""
        return {} if self.peak is None else {"mfu": tokens_per_second * self.per_token / self.peak}
