"""The loop, optimisers, checkpoints, run directories, sweeps."""
