"""Hugging Face models: the objective on them, stock Llama folders out of runs and back, the evaluation harness.

Names are loaded when they are first used; importing this package imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextlat.hf.adapter import HFModel as HFModel
    from nextlat.hf.dynamics import load_dynamics as load_dynamics
    from nextlat.hf.dynamics import save_dynamics as save_dynamics
    from nextlat.hf.export import export_run as export_run
    from nextlat.hf.gentle import GentleNextLat as GentleNextLat
    from nextlat.hf.harness import run_harness as run_harness
    from nextlat.hf.llama import load_llama as load_llama
    from nextlat.hf.restore import import_run as import_run

_HOMES = {
    "GentleNextLat": "gentle",
    "HFModel": "adapter",
    "export_run": "export",
    "import_run": "restore",
    "load_dynamics": "dynamics",
    "load_llama": "llama",
    "run_harness": "harness",
    "save_dynamics": "dynamics",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nextlat.hf' has no attribute {name!r}")
    return getattr(import_module(f"nextlat.hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
