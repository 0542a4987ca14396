"""Our trunk as a stock Llama checkpoint, and a stock Llama checkpoint as our trunk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nextlat.errors import NextLatError
from nextlat.model.norm import EPS
from nextlat.model.rotary import ROPE_BASE
from nextlat.model.trunk import INIT_STD, Transformer, feed_forward_width

WEIGHTS = "model.safetensors"
FORMAT = 1
"""Of the files that only this library reads: the record of a run, and the description of a latent dynamics."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def llama_config(
    trunk: Transformer, longest: int, end_token: int | None, opens_text: bool = False, dtype: str = "float32"
) -> dict[str, Any]:
    """The ``config.json`` of a stock ``LlamaForCausalLM`` that computes what the trunk computes.

    Args:
        trunk: the plain model.
        longest: becomes ``max_position_embeddings``: the longest row the model was trained on. Rotary positions
            have no table, so nothing breaks beyond it; engines take it as the length they may rely on.
        end_token: the task's end token, if it has one.
        opens_text: whether the end token also opens a document, as in packed text.
        dtype: ``float32`` or ``bfloat16``.
    """
    head_width = trunk.width // trunk.n_heads
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": trunk.vocab_size,
        "hidden_size": trunk.width,
        "intermediate_size": feed_forward_width(trunk.width),
        "num_hidden_layers": len(trunk.layers),
        "num_attention_heads": trunk.n_heads,
        "num_key_value_heads": trunk.n_heads,
        "head_dim": head_width,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "initializer_range": INIT_STD,
        "rms_norm_eps": EPS,
        # transformers reads the first since version 5, and everything older the second
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "rope_theta": ROPE_BASE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": is_tied(trunk),
        "bos_token_id": end_token if opens_text else None,
        "eos_token_id": end_token,
        "pad_token_id": None,  # a padding id would freeze its row of the embedding when the model is trained on
        "use_cache": True,
        # the name since transformers 4.56, and the one that everything older reads
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def is_tied(trunk: Transformer) -> bool:
    """Whether the output head is the embedding table."""
    return trunk.head_weight is trunk.embedding_weight


def llama_name(name: str) -> str:
    """The name that a weight of the trunk has in a stock checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def llama_weights(trunk: Transformer) -> dict[str, Tensor]:
    """The trunk's weights under their stock names; a tied head is left out."""
    return {
        llama_name(name): value.detach().cpu().contiguous()
        for name, value in trunk.state_dict().items()
        if not (is_tied(trunk) and name == "lm_head.weight")
    }


def load_llama(folder: Path | str) -> Transformer:
    """A stock Llama checkpoint as our trunk, in fp32, on the CPU.

    Args:
        folder: holds ``config.json`` and ``model.safetensors`` (or its shards and their index).

    Raises:
        NextLatError: no such checkpoint, or one whose architecture the trunk does not have.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    _check_architecture(config, folder)
    trunk = Transformer(
        config["vocab_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["hidden_size"],
        bool(config.get("tie_word_embeddings", False)),
    )
    stored = _read_weights(folder)
    weights: dict[str, Tensor] = {}
    for name, place in trunk.state_dict().items():
        stock = "model.embed_tokens.weight" if is_tied(trunk) and name == "lm_head.weight" else llama_name(name)
        if stock not in stored or stored[stock].shape != place.shape:
            found = tuple(stored[stock].shape) if stock in stored else "nothing"
            raise NextLatError(f"{folder} has {found} as {stock}, and its config.json asks for {tuple(place.shape)}")
        weights[name] = stored[stock].to(place.dtype)
    # buffers of old checkpoints; anything else would change what the model computes
    unknown = sorted(stored.keys() - {llama_name(name) for name in weights})
    unknown = [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise NextLatError(f"{folder} holds {unknown[0]}, which the trunk has no place for; export plain weights")
    trunk.load_state_dict(weights)
    return trunk.eval()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or an error that names the file."""
    if not file.is_file():
        raise NextLatError(f"{file.parent} has no {file.name}; give the folder of an exported or stock Llama model")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NextLatError(f"{file} is not JSON ({error}); export the model again") from None
    if not isinstance(data, dict):
        raise NextLatError(f"{file} holds a {type(data).__name__}, not an object; export the model again")
    return data


def read_facts(file: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object of this library's, with at least these entries.

    Raises:
        NextLatError: another format, an entry that is missing or of another type.
    """
    facts = read_json(file)
    if facts.get("format") != FORMAT:
        raise NextLatError(
            f"{file} has format {facts.get('format')!r}, and this version of nextlat reads {FORMAT}; read it with the "
            "version that wrote it, or export the run again"
        )
    for name, kind in kinds.items():
        if not isinstance(facts.get(name), kind):
            raise NextLatError(
                f"{file} has {facts.get(name)!r} as {name!r}, and it must be of type {kind.__name__}; export the run "
                "again"
            )
    return facts


def _check_architecture(config: dict[str, Any], folder: Path) -> None:
    """Refuse what the trunk does not compute, with all reasons at once."""
    if config.get("model_type") != "llama":
        raise NextLatError(
            f"{folder} is a {config.get('model_type')!r} model and the trunk is a Llama; "
            "train such a model where it is, with nextlat.NextLat(model, ...)"
        )
    width, heads = config["hidden_size"], config["num_attention_heads"]
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", ROPE_BASE))
    expected: dict[str, tuple[Any, Any]] = {
        "num_key_value_heads": (config.get("num_key_value_heads") or heads, heads),
        "head_dim": (config.get("head_dim") or width // heads, width // heads),
        "intermediate_size": (config["intermediate_size"], feed_forward_width(width)),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "rms_norm_eps": (config.get("rms_norm_eps", 1e-6), EPS),
        "rope_theta": (theta, ROPE_BASE),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "attention_bias": (bool(config.get("attention_bias", False)), False),
        "mlp_bias": (bool(config.get("mlp_bias", False)), False),
    }
    wrong = [f"{key} is {found}, not {ours}" for key, (found, ours) in expected.items() if found != ours]
    if wrong:
        raise NextLatError(
            f"{folder} is a Llama of another shape than the trunk ({'; '.join(wrong)}); "
            "train it where it is, with nextlat.NextLat(model, ...)"
        )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{WEIGHTS}.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            weights |= load_file(folder / name)
        except FileNotFoundError:
            raise NextLatError(f"{folder} has no {name}; only safetensors weights are read") from None
        except SafetensorError as error:
            raise NextLatError(f"{folder / name} is damaged ({error}); copy or export it again") from None
    return weights
