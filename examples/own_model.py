"""Add next-latent prediction to a PyTorch model of your own, train it, and take it off again."""

import torch
from torch import nn

from nextlat import IGNORE, Batch, NextLat, TorchModel, total_loss


class TinyLM(nn.Module):
    """Any causal model with an embedding, states and an output head."""

    def __init__(self, vocab: int = 32, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab, bias=False)

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.body(self.embed(tokens))[0]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.states(tokens))


def main(steps: int = 200) -> float:
    torch.manual_seed(0)
    lm = TinyLM()
    model = TorchModel(
        lm,
        hidden=lambda tokens, documents: lm.states(tokens),  # (B, T, D): what the head reads
        embedding=lambda: lm.embed.weight,  # (V, D)
        head=lambda: lm.head.weight,  # (V, D)
    )
    objective = NextLat(model, horizon=2, latent_weight=1.0, kl_weight=1.0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        start = torch.randint(0, 32, (16, 1))
        tokens = (start + 3 * torch.arange(20)) % 32  # (B, T): count up by three
        targets = torch.cat([tokens[:, 1:], torch.full_like(start, IGNORE)], dim=1)
        terms = objective(Batch(tokens, targets))  # {"ce", "latent_1", "kl_1", ...}: sum, count, weight
        loss = total_loss(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    guess = lm(tokens)[:, :-1].argmax(-1)  # the plain model, unchanged
    accuracy = float((guess == tokens[:, 1:]).float().mean())
    print(f"loss {float(loss.detach()):.3f}, next-token accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
