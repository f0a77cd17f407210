"""Rows of .npy files as shuffled batches, in bounded memory however many there are: those of
--activations, and the activations that lm.py harvested."""
import numpy as np
import torch
from tqdm import tqdm

from runs import fail, first_line, rank
from sources.source import HELD_OUT, Source

PIECE = 2 ** 25               # arrays are read and written in pieces of about this many numbers

class Shards:
    """Rows of .npy files [n, D], mapped anew for each read so that resident memory is bounded."""
    def __init__(self, paths, flag):
        self.paths, heads = paths, []
        for path in paths:
            try:
                heads.append(np.load(path, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError, EOFError) as err:
                fail(f"{flag} {path}: not a readable .npy file ({first_line(err)})")
            a = heads[-1]
            if a.ndim != 2 or a.shape[1] == 0 or a.dtype.kind != "f" or a.dtype.itemsize > 8:
                fail(f"{flag} {path}: shape {a.shape}, dtype {a.dtype}; save it as [N, D] rows of "
                     "float16, float32 or float64")
            if a.shape[1] != heads[0].shape[1]:
                fail(f"{flag} {path}: width {a.shape[1]}, but {paths[0].name} has "
                     f"{heads[0].shape[1]}; all shards need the same D")
        self.starts = np.cumsum([0] + [len(a) for a in heads])
        self.n, self.d = int(self.starts[-1]), heads[0].shape[1]
        self.dtype = np.float16 if all(a.dtype == np.float16 for a in heads) else np.float32

    def read(self, rows):
        """The rows of these ascending numbers, [len(rows), D]."""
        out = np.empty((len(rows), self.d), self.dtype)
        for lo in range(0, len(rows), 8192):
            cuts = lo + np.searchsorted(rows[lo:lo + 8192], self.starts)
            for path, start, a, b in zip(self.paths, self.starts, cuts, cuts[1:]):
                if b > a:
                    out[a:b] = np.load(path, mmap_mode="r")[rows[a:b] - start]
        return out

    def pieces(self, desc):
        """Yields (number of the first row, float32 rows) over everything, in order."""
        step = max(1, PIECE // 8 // self.d)
        with np.errstate(over="ignore"), tqdm(total=self.n, desc=desc, unit="row", unit_scale=True,
                                              disable=rank() > 0 or None) as bar:
            for path, start in zip(self.paths, self.starts):
                for lo in range(0, len(np.load(path, mmap_mode="r")), step):
                    a = np.load(path, mmap_mode="r")[lo:lo + step].astype(np.float32)
                    yield int(start) + lo, a
                    bar.update(len(a))

def statistics(shards, is_train, flag):
    """Mean [D] and E|x - mean| over the training rows, in two passes; NaN or inf anywhere fails."""
    total, n, norms, bad = np.zeros(shards.d), 0, 0.0, []
    for first, a in shards.pieces("check"):
        finite = np.isfinite(a).all(1)
        bad.extend((first + np.flatnonzero(~finite)).tolist())
        a = a[finite & is_train(first + np.arange(len(a)))]
        total, n = total + a.sum(0, dtype=np.float64), n + len(a)
    if bad:
        fail(f"{flag}: {len(bad)} of {shards.n} rows hold NaN, inf or more than float32 can (rows "
             f"{', '.join(map(str, bad[:5]))}{', ...' if len(bad) > 5 else ''}); remove them")
    mean = (total / n).astype(np.float32)
    for first, a in shards.pieces("scale"):
        a = a[is_train(first + np.arange(len(a)))] - mean
        norms += float(np.sqrt(np.einsum("nd,nd->n", a, a)).sum(dtype=np.float64))
    if norms == 0:
        fail(f"{flag}: all rows are equal, there is nothing to learn")
    return mean, norms / n

class ArraySource(Source):
    """Shuffled rows of `train`, a list of chunks: chunk c is the rows [c * size, (c + 1) * size).

    Each epoch permutes the chunks; a buffer reads many of them, and batches draw from all of it.
    So the disk is read in runs, and memory is one buffer (256 MB of float32) for any length.
    """
    def __init__(self, args, device, shards, size, train, held, mean, mean_norm, meta):
        super().__init__(args, device, shards.d, mean, mean_norm, meta)
        self.shards, self.size, self.train, self.held = shards, size, train, held
        self.n_train = len(train) * size
        self.per_epoch = self.n_train // args.batch_size              # batches
        if not self.per_epoch:
            fail(f"--batch-size {args.batch_size}: larger than the {self.n_train} training rows; "
                 f"use at most {self.n_train}")
        self.per_buffer = max(1, 2 * PIECE // (shards.d * args.batch_size))
        self.buffer_of = None

    def _load(self, step):
        epoch, i = divmod(step, self.per_epoch)
        number, j = divmod(i, self.per_buffer)
        if self.buffer_of != (epoch, number):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.train)
            batches = range(self.per_epoch)[number * self.per_buffer:][:self.per_buffer]
            place = np.arange(batches[0] * self.batch_size, (batches[-1] + 1) * self.batch_size)
            rows = np.sort(order[place // self.size] * self.size + place % self.size)
            self.buffer = None                                        # before the next is read
            self.buffer = self.shards.read(rows)
            self.shuffle = np.random.default_rng((self.seed, epoch, number)).permutation(len(rows))
            self.buffer_of = epoch, number
        rows = self.shuffle[j * self.batch_size:(j + 1) * self.batch_size][self.slice]
        return torch.from_numpy(self.buffer[rows])

    def heldout_rows(self):
        """The numbers of the rows that heldout() gives, ascending."""
        chunks = np.sort(self.held[:max(1, min(65536, 4 * PIECE // self.d_in) // self.size)])
        return (chunks[:, None] * self.size + np.arange(self.size)).ravel()

    def _heldout(self):
        return torch.from_numpy(self.shards.read(self.heldout_rows()))

def chunk_size(n):
    """Rows in a chunk: 64 neighbours, fewer in short arrays, more in those above 64M rows."""
    return max(min(64, n // 1024), n >> 20, 1)

def open_array(args, device):
    """Source of --activations. The held-out 5 % are chunks of rows, drawn alike for every seed."""
    path = args.activations
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        fail(f"--activations {path}: no such file, or a folder without .npy files")
    shards = Shards(files, "--activations")
    if shards.n < 20:
        fail(f"--activations {path}: {shards.n} rows are too few to train on")
    size = chunk_size(shards.n)
    order = np.random.default_rng(0).permutation(shards.n // size)
    n_held = max(4, round(HELD_OUT * len(order)))
    is_train = np.zeros(len(order) + 1, bool)                # the last, broken chunk is not used
    is_train[order[n_held:]] = True
    mean, norm = statistics(shards, lambda rows: is_train[rows // size], f"--activations {path}")
    return ArraySource(args, device, shards, size, order[n_held:], order[:n_held], mean, norm,
                       {"model_name": str(path)})
