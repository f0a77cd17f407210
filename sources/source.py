"""What every source of activations gives, and what the scripts see of it.

A source has d_in, mean [D], scale, batch(step), heldout(), meta (for cfg.json) and truth (the Toy
whose features are known, or None). `batch(step)` gives x [B, D] float32 on the device, a pure
function of seed and step: every script sees the same data in the same order, and resuming needs the
step alone (of a stream also what state() gives). Under torchrun B is this process's slice of the
global batch.

The scripts see x' = (x - mean) * scale with E|x'| = sqrt(D) over the training part (the scale of
Anthropic, April 2024; centred first, so that b_dec = 0 is the data mean). runs.fold puts both into
the weights, so a saved SAE takes raw activations.
"""
from concurrent.futures import ThreadPoolExecutor

import torch

import runs

HELD_OUT = 0.05               # share of the data kept for evaluation

class Source:
    """A subclass gives _load(step), or its own batch(step), and _heldout(): raw rows as tensors."""
    truth = None

    def __init__(self, args, device, d_in, mean, mean_norm, meta):
        self.d_in, self.device, self.meta, self.seed = d_in, device, meta, args.seed
        self.batch_size = args.batch_size
        self.mean = torch.as_tensor(mean, dtype=torch.float32, device=device)
        self.scale = d_in ** 0.5 / mean_norm
        self.pool, self.next = ThreadPoolExecutor(1), (None, None)
        share = args.batch_size // runs.world_size()
        self.slice = slice(runs.rank() * share, (runs.rank() + 1) * share)     # of the global batch

    def scaled(self, x):
        return (x.to(self.device, non_blocking=True).float() - self.mean) * self.scale

    def batch(self, step):
        """x [B, D]: this process's slice of global batch `step`, centred, scaled, on the device."""
        if self.device.type != "cuda":
            return self.scaled(self._load(step))
        load = lambda s: self.pool.submit(lambda: self._load(s).pin_memory())
        now = self.next[1] if self.next[0] == step else load(step)
        self.next = step + 1, load(step + 1)                  # the next batch loads meanwhile
        return self.scaled(now.result())

    def state(self, more):
        """What batch() needs beside the step, if more steps follow: nothing, but for a stream."""
        return {}

    def restore(self, saved):
        """Take back what state() gave, for --resume; fails if that was of other data."""

    def heldout(self):
        """x [M, D] that no batch contains, M <= 65536, centred and scaled like the batches."""
        return self.scaled(self._heldout())

    def heldout_raw(self):
        """The same as they are: what a saved SAE takes."""
        return self._heldout().to(self.device).float()
