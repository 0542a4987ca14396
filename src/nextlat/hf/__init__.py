"""Hugging Face models: the objective on them, stock Llama folders out of runs and back, the evaluation harness.

Names are loaded when they are first used; importing this package imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from nextlat.lazy import lazy_names

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
    "GentleNextLat": "nextlat.hf.gentle",
    "HFModel": "nextlat.hf.adapter",
    "export_run": "nextlat.hf.export",
    "import_run": "nextlat.hf.restore",
    "load_dynamics": "nextlat.hf.dynamics",
    "load_llama": "nextlat.hf.llama",
    "run_harness": "nextlat.hf.harness",
    "save_dynamics": "nextlat.hf.dynamics",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
