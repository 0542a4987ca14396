"""Next-latent prediction on Hugging Face models: warm up, train jointly, save, and generate without nextlat."""

import argparse
import inspect
import tempfile

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nextlat import Batch, total_loss
from nextlat.hf import GentleNextLat, load_dynamics, save_dynamics

TEXT = torch.tensor(list(inspect.getsource(argparse).encode()))  # bytes are the tokens: 0 to 255
LENGTH = 64


def rows(step: int, count: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TEXT) - LENGTH - 1, (count, 1), generator=generator)
    window = TEXT[starts + torch.arange(LENGTH + 1)]
    return Batch(tokens=window[:, :-1], targets=window[:, 1:])


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    gpt2 = GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH, bos_token_id=None, eos_token_id=None
    )
    return {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}


def losses(objective: GentleNextLat) -> dict[str, float]:
    objective.eval()
    with torch.no_grad():
        terms = objective(rows(10**6))
    return {name: float(terms[name].sum / terms[name].count) for name in ("ce", "kl_1")}


def train(objective: GentleNextLat, steps: int, rate: float) -> None:
    objective.train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=rate)
    for _ in range(steps):
        loss = total_loss(objective(rows(1000 + objective.steps_made)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        objective.advance()


def generated(model: torch.nn.Module, new: int = 24) -> Tensor:
    prompt = torch.tensor([list(b"def __init__(self")])
    out: Tensor = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return out[0]


def main(pretrain: int = 30, warmup: int = 20, joint: int = 20) -> dict[str, dict[str, dict[str, float]]]:
    report: dict[str, dict[str, dict[str, float]]] = {}
    for name, model in models().items():
        model.train()
        # Stands for the pretrained model that you would load: a few steps of the cross-entropy alone.
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(pretrain):
            batch = rows(step)
            logits = model(input_ids=batch.tokens).logits
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
            optimizer.step()

        objective = GentleNextLat(
            model, horizon=1, kl_weight=0.1, warmup_steps=warmup, ramp_steps=joint // 2, gradient_cap=0.5
        )
        report[name] = {"before": losses(objective)}
        train(objective, warmup, 3e-3)
        report[name]["warmed up"] = losses(objective)
        train(objective, joint, 1e-3)
        report[name]["after"] = losses(objective)

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)  # the plain model, as if nothing had been there
            save_dynamics(folder, objective.dynamics, objective.horizon)
            again = AutoModelForCausalLM.from_pretrained(folder).eval()
            load_dynamics(folder)
        text = generated(again)
        assert torch.equal(text, generated(model))
        for phase, values in report[name].items():
            print(f"{name:<6} {phase:<10} cross-entropy {values['ce']:.3f}  KL {values['kl_1']:.3f}")
        print(f"{name:<6} writes {bytes(text.tolist())!r}")
    return report


if __name__ == "__main__":
    main()
