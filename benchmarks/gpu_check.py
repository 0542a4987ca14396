"""What to run first on a CUDA machine: both objectives train, and the GPU agrees with the CPU.

Usage: ``PYTHONPATH=src python3 benchmarks/gpu_check.py``. Exits 0 with a table, 1 on a disagreement, 2 without a GPU.
"""

from __future__ import annotations

import sys

import torch

from nextlat.batch import Batch
from nextlat.config import load_config
from nextlat.objectives import OBJECTIVES, total_loss
from nextlat.training.build import build
from nextlat.training.optimizers import make_optimizer

TOLERANCE = 2e-4


def loss_and_gradient(objective: torch.nn.Module, batch: Batch) -> tuple[float, torch.Tensor]:
    objective.zero_grad()
    loss = total_loss(objective(batch))
    loss.backward()
    flat = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(flat).double().cpu()


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA GPU is visible to torch")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    worst = 0.0
    for name in OBJECTIVES:
        config = load_config("path_star/mini", [f"objective={name}"])
        task, objective = build(config)
        batch = task.rows(0, 0, config.training.batch_size)._replace(keys=torch.arange(config.training.batch_size))
        documents = torch.zeros_like(batch.tokens)
        documents[:, batch.tokens.shape[1] // 2 :] = 1
        for packed in (False, True):
            rows = batch._replace(documents=documents) if packed else batch
            loss_cpu, gradient_cpu = loss_and_gradient(objective.cpu(), rows)
            loss_gpu, gradient_gpu = loss_and_gradient(objective.cuda(), rows.to("cuda"))
            error = float((gradient_gpu - gradient_cpu).norm() / gradient_cpu.norm())
            worst = max(worst, error)
            print(f"{name:8} packed={packed!s:5} loss {loss_cpu:.6f} / {loss_gpu:.6f}  gradient error {error:.1e}")
        optimizer = make_optimizer(objective, config.training)
        losses = []
        for step in range(20):
            rows = task.rows(step, 0, config.training.batch_size).to("cuda")
            rows = rows._replace(keys=torch.arange(config.training.batch_size, device="cuda"))
            optimizer.zero_grad()
            loss = total_loss(objective(rows))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        print(f"{name:8} 20 steps: {losses[0]:.3f} -> {losses[-1]:.3f}")
        if not losses[-1] < losses[0]:
            return 1
    print(f"worst gradient error {worst:.1e} (limit {TOLERANCE:.0e})")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
