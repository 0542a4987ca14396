"""The latent dynamics beside a Hugging Face model: two small files that stock loaders ignore."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nextlat.errors import NextLatError
from nextlat.files import explained, write_json
from nextlat.hf.llama import FORMAT, read_facts
from nextlat.objectives.dynamics import DYNAMICS, find_dynamics

WEIGHTS, DESCRIPTION = "nextlat_dynamics.safetensors", "nextlat_dynamics.json"


def save_dynamics(folder: Path | str, dynamics: nn.Module, horizon: int) -> None:
    """Write ``nextlat_dynamics.safetensors`` and ``nextlat_dynamics.json`` into a model's folder.

    Args:
        folder: an existing folder, such as one that ``save_pretrained`` wrote.
        dynamics: one of the library's latent dynamics networks.
        horizon: rollout steps it was trained for.

    Raises:
        NextLatError: a network of another kind, which a file of two sizes could not describe.
    """
    folder = Path(folder)
    kind = next((name for name, known in DYNAMICS.items() if type(dynamics) is known), None)
    if kind is None:
        raise NextLatError(
            f"{type(dynamics).__name__} is not one of the library's dynamics ({', '.join(DYNAMICS)}); "
            "save its state_dict yourself"
        )
    weights = {name: value.detach().cpu().contiguous() for name, value in dynamics.state_dict().items()}
    hidden_dim, twice = weights["layer_1.weight"].shape
    with explained("writing", folder / WEIGHTS):
        save_file(weights, folder / WEIGHTS)
    write_json(
        folder / DESCRIPTION,
        {
            "format": FORMAT,
            "kind": kind,
            "width": twice // 2,
            "hidden_dim": hidden_dim,
            "horizon": horizon,
            "source": "last hidden state, after the final norm",
            "condition": "input embedding of the next token",
            "dtype": str(weights["layer_1.weight"].dtype).removeprefix("torch."),
        },
    )


def load_dynamics(folder: Path | str) -> nn.Module:
    """The latent dynamics that lies in a model's folder, in evaluation mode on the CPU, in the dtype it was saved in.

    Raises:
        NextLatError: there is none, or it is damaged, or of another format.
    """
    folder = Path(folder)
    description = read_facts(folder / DESCRIPTION, {"kind": str, "width": int, "hidden_dim": int})
    try:
        weights = load_file(folder / WEIGHTS)
        dynamics = find_dynamics(description["kind"])(description["width"], description["hidden_dim"])
        dynamics.to(next(iter(weights.values())).dtype)
        dynamics.load_state_dict(weights)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise NextLatError(f"the latent dynamics in {folder} is damaged ({error}); save it again") from None
    return dynamics.eval()
