"""From documents to batches: packing."""

from nextlat.data.packing import Documents, Plan, best_fit, collect, fixed_stride, pack, packed_rows

__all__ = ["Documents", "Plan", "best_fit", "collect", "fixed_stride", "pack", "packed_rows"]
