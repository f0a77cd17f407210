"""Rows of .npy and .safetensors files: reading some of them, and one pass over all for statistics.
Nothing here holds more than slices of a file in memory."""
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from runs import Bar, fail, first_line

READ = 2 ** 20                # numbers in a piece of the pass over all: it stays in a CPU's cache
SAMPLE = 2 ** 14              # rows that the median norm, and a first guess of the mean, come from
FAR = 0.02                    # of a guess from the mean, in mean distances of rows from it
DTYPES = dict(F16=torch.float16, BF16=torch.bfloat16, F32=torch.float32, F64=torch.float64)

# --- files ----------------------------------------------------------------------------------------

def head(path, flag):
    """Of a file of rows: shape; dtype; the byte where they begin, or None if numpy must read them,
    as columns or with their bytes swapped."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:                  # has no gaps: it checks that
                names = list(f.keys())
                if len(names) != 1:
                    fail(f"{flag} {path}: holds {len(names)} tensors; save one, [N, D], a file")
                part = f.get_slice(names[0])
                shape, kind = tuple(part.get_shape()), part.get_dtype()
            dtype = DTYPES.get(kind)
            offset = path.stat().st_size - int(np.prod(shape)) * (dtype.itemsize if dtype else 0)
        else:
            a = np.lib.format.open_memmap(path, mode="r")     # never unpickles
            shape, kind = a.shape, a.dtype
            dtype = DTYPES.get(f"F{8 * kind.itemsize}") if kind.kind == "f" else None
            offset = a.offset if a.flags.c_contiguous and kind.isnative else None
    except (OSError, ValueError, EOFError, SafetensorError) as err:
        kind = ".safetensors" if path.suffix == ".safetensors" else ".npy"
        fail(f"{flag} {path}: not a readable {kind} file ({first_line(err)})")
    if len(shape) != 2 or shape[1] == 0 or not dtype:
        fail(f"{flag} {path}: shape {shape}, dtype {kind}; save it as [N, D] rows of float16, "
             "float32 or float64, or in .safetensors bfloat16")
    return shape, dtype, offset

class Shards:
    """Rows of files [n, D], opened anew for each read so that resident memory is bounded."""
    def __init__(self, paths, flag):
        heads = [head(path, flag) for path in paths]
        shapes, dtypes, _ = zip(*heads)
        for path, (_, d) in zip(paths, shapes):
            if d != shapes[0][1]:
                fail(f"{flag} {path}: width {d}, but {paths[0].name} has {shapes[0][1]}; all "
                     "shards need the same D")
        self.paths, self.heads = paths, [(dtype, offset) for _, dtype, offset in heads]
        self.starts = np.cumsum([0] + [n for n, _ in shapes])
        self.n, self.d = int(self.starts[-1]), shapes[0][1]
        same = len(set(dtypes)) == 1 and dtypes[0].itemsize == 2
        self.dtype = dtypes[0] if same else torch.float32     # of what is read

    def read(self, rows, out=None):
        """The rows of these ascending numbers, [len(rows), D]; out: where there is room for them.
        Runs of neighbours are read from the file: through a map each would cost page faults."""
        out = torch.empty(len(rows), self.d, dtype=self.dtype) if out is None else out[:len(rows)]
        cuts = np.unique(np.concatenate([                       # where a run, or a shard, begins
            np.searchsorted(rows, self.starts), np.flatnonzero(np.diff(rows) != 1) + 1,
            np.arange(0, len(rows), 8192)]))
        shards = np.searchsorted(self.starts, rows[cuts[:-1]], "right") - 1
        runs = zip(shards.tolist(), cuts.tolist(), cuts[1:].tolist())
        for i, runs in groupby(runs, itemgetter(0)):
            dtype, offset = self.heads[i]
            slow = np.load(self.paths[i], mmap_mode="r") if offset is None else None
            with open(self.paths[i], "rb", 0) as f:
                for _, a, b in runs:
                    row = int(rows[a] - self.starts[i])
                    if slow is not None:
                        part = slow[row:row + b - a]
                        out[a:b] = torch.from_numpy(part.astype(part.dtype.newbyteorder("=")))
                        continue
                    direct = dtype == self.dtype
                    part = out[a:b] if direct else torch.empty(b - a, self.d, dtype=dtype)
                    f.seek(offset + row * self.d * dtype.itemsize)
                    if f.readinto(part.view(torch.uint8).numpy()) < part.nbytes:
                        fail(f"{self.paths[i]}: has become shorter since the run began")
                    if not direct:
                        out[a:b] = part
        return out

    def pieces(self, desc):
        """Yields (number of the first row, float32 rows) over everything, in order."""
        step = max(1, READ // self.d)
        with Bar(total=self.n, desc=desc, unit="row", unit_scale=True) as bar:
            for first in range(0, self.n, step):
                x = self.read(np.arange(first, min(first + step, self.n))).float()
                yield first, x
                bar.update(len(x))

# --- one pass over everything ---------------------------------------------------------------------

def survey(shards, is_train, flag, drop=None):
    """In one pass: mean [D] and E|x - mean| of the training rows that stay; the rows that go, whose
    norm is above `drop` times the median, ascending; and that norm, or inf. is_train takes numbers
    of neighbours. Fails if any row holds NaN or inf.

    The median, and a guess of the mean, are those of at most SAMPLE rows at random. A guess that is
    FAR off, as by outliers, costs a second pass."""
    sample = np.unique(np.random.default_rng(0).integers(0, shards.n, SAMPLE))
    sample = shards.read(sample).float()
    sample = sample[sample.isfinite().all(1)]
    norms = sample.norm(dim=1)
    cut = drop * norms.median().item() if drop else np.inf
    mean = sample[norms <= cut].mean(0, dtype=torch.double).float().nan_to_num()
    for _ in range(2):
        guess, (mean, norm, dropped) = mean, sums(shards, is_train, flag, mean, cut)
        if norm == 0 and (sample == sample[0]).all():
            fail(f"{flag}: all rows are equal, there is nothing to learn")
        if not 1e-15 < norm < 1e15:
            fail(f"{flag}: rows are {norm:.1e} from their mean on average, and float32 cannot "
                 "hold the squares; bring that between 1e-15 and 1e15 by a constant factor")
        if (mean - guess).norm() <= FAR * norm:
            break
    return mean.numpy(), norm, dropped, cut

def sums(shards, is_train, flag, guess, cut):
    """Mean, E|x - mean| and dropped rows. With y = x - guess and u = y / |y|, |x - mean| is
    |y| - <u, mean - guess>, and at most |mean - guess|^2 / 2 |y| more: FAR^2 / 2 of it."""
    total, n, norms, bad, dropped = torch.zeros(2, shards.d).double(), 0, 0.0, [], []
    for first, x in shards.pieces("check"):
        rows = np.arange(first, first + len(x))
        keep = torch.from_numpy(is_train(rows))
        if cut < np.inf:
            above = x.norm(dim=1) > cut                       # NaN is not, to be refused below
            keep &= ~above
            dropped.append(rows[above.numpy()])
        y = x.sub_(guess)
        norm = y.norm(dim=1)
        if not norm.isfinite().all():
            bad.extend(rows[~y.isfinite().all(1).numpy()].tolist())
        total += torch.stack([keep.float(), keep / norm.clamp_min(1e-30)]) @ y     # of y, and of u
        n, norms = n + keep.sum().item(), norms + norm[keep].sum(dtype=torch.double).item()
    if bad:
        fail(f"{flag}: {len(bad)} of {shards.n} rows hold NaN, inf or more than float32 can (rows "
             f"{', '.join(map(str, bad[:5]))}{', ...' if len(bad) > 5 else ''}); remove them")
    dropped = np.concatenate(dropped) if dropped else np.arange(0)
    (y, u), norm = total / n, norms / n
    return (guess + y).float(), norm - (u @ y).item(), dropped
