"""Rows of .npy files as shuffled batches, in bounded memory however many there are: those of
--activations, and the activations that lm.py harvested."""
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from tqdm import tqdm

from runs import fail, first_line, rank
from sources.source import HELD_OUT, Source

PIECE = 2 ** 25               # arrays are read and written in pieces of about this many numbers
ROWS, BATCHES = 2 ** 18, 64   # a buffer has at least so many rows, and batches,
MEMORY = 4 * 2 ** 30          # but no more bytes than this
CHUNK = 16                    # rows in a chunk, at most

class Shards:
    """Rows of .npy files [n, D], opened anew for each read so that resident memory is bounded."""
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
        self.heads = [(a.dtype, a.offset, not a.flags.c_contiguous) for a in heads]

    def read(self, rows):
        """The rows of these ascending numbers, [len(rows), D]. Runs of neighbours are read from the
        file: through a map each of them would cost page faults."""
        out = np.empty((len(rows), self.d), self.dtype)
        cuts = np.unique(np.concatenate([                       # where a run, or a shard, begins
            np.searchsorted(rows, self.starts), np.flatnonzero(np.diff(rows) != 1) + 1,
            np.arange(0, len(rows), 8192)]))
        shards = np.searchsorted(self.starts, rows[cuts[:-1]], "right") - 1
        runs = zip(shards.tolist(), cuts.tolist(), cuts[1:].tolist())
        for i, runs in groupby(runs, itemgetter(0)):
            dtype, offset, by_columns = self.heads[i]
            columns = np.load(self.paths[i], mmap_mode="r") if by_columns else None
            with open(self.paths[i], "rb", 0) as f:
                for _, a, b in runs:
                    row = int(rows[a] - self.starts[i])
                    if by_columns:
                        out[a:b] = columns[row:row + b - a]
                        continue
                    part = np.empty((b - a, self.d), dtype)
                    f.seek(offset + row * part.strides[0])
                    if f.readinto(part) < part.nbytes:
                        fail(f"{self.paths[i]}: has become shorter since the run began")
                    out[a:b] = part
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
        norms += float(np.sqrt(np.einsum("nd,nd->n", a, a, dtype=np.float64)).sum())
    if norms == 0:
        fail(f"{flag}: all rows are equal, there is nothing to learn")
    if not 1e-15 < norms / n < 1e15:
        fail(f"{flag}: rows are {norms / n:.1e} from their mean on average, and float32 cannot "
             "hold the squares; bring that between 1e-15 and 1e15 by a constant factor")
    return mean, norms / n

class ArraySource(Source):
    """Shuffled rows of `train`, a list of chunks: chunk c is the rows [c * size, (c + 1) * size).

    Each epoch permutes the chunks; a buffer of R rows reads many of them, and batches draw from all
    of it. So the disk is read in runs, and still a row meets only (size - 1) B / R others of its
    chunk in a batch. R is max(2^18, 64 B), so this is at most 15 / 64; twice as much where equal
    buffers in an epoch make R smaller by half, and more where MEMORY does.
    Memory: R D numbers in the dtype of the shards, MEMORY bytes at most, of which each process
    keeps only what it serves; and half a byte for each row of the array, for the permutation.
    """
    def __init__(self, args, device, shards, size, train, held, mean, mean_norm, meta):
        super().__init__(args, device, shards.d, mean, mean_norm, meta)
        self.shards, self.size, self.train, self.held = shards, size, train, held
        self.n_train = len(train) * size
        self.per_epoch = self.n_train // args.batch_size              # batches
        if not self.per_epoch:
            fail(f"--batch-size {args.batch_size}: larger than the {self.n_train} training rows; "
                 f"use at most {self.n_train}")
        rows = min(max(ROWS, BATCHES * args.batch_size),
                   MEMORY // (shards.d * np.dtype(shards.dtype).itemsize))
        self.buffers = -(-self.per_epoch // max(1, rows // args.batch_size))    # in an epoch
        self.order_of = self.buffer_of = None

    def _load(self, step):
        epoch, i = divmod(step, self.per_epoch)
        number = i * self.buffers // self.per_epoch
        first, end = (-(-n * self.per_epoch // self.buffers) for n in (number, number + 1))
        if self.order_of != epoch:
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.train)
            self.order_of = epoch
        if self.buffer_of != (epoch, number):
            self.buffer = None                                        # before the next is read
            place = np.arange(first * self.batch_size, end * self.batch_size)
            chunk = self.order[place // self.size].astype(np.int64)
            rows = np.sort(chunk * self.size + place % self.size)
            mixed = np.random.default_rng((self.seed, epoch, number)).permutation(len(rows))
            mixed = mixed.reshape(-1, self.batch_size)[:, self.slice]         # of this process
            kept = np.zeros(len(rows), bool)
            kept[mixed] = True
            self.buffer, self.where = self.shards.read(rows[kept]), (np.cumsum(kept) - 1)[mixed]
            self.buffer_of = epoch, number
        return torch.from_numpy(self.buffer[self.where[i - first]])

    def heldout_rows(self):
        """The numbers of the rows that heldout() gives, ascending."""
        n = max(1, min(65536, 4 * PIECE // self.d_in) // self.size)
        chunks = np.sort(self.held[:n]).astype(np.int64)
        return (chunks[:, None] * self.size + np.arange(self.size)).ravel()

    def _heldout(self):
        return torch.from_numpy(self.shards.read(self.heldout_rows()))

def chunk_size(n):
    """Rows in a chunk: CHUNK neighbours, fewer in short arrays."""
    return max(min(CHUNK, n // 1024), 1)

def numbers(first, end):
    """[first, end) as an array of 32 bits where they suffice: there are many chunks."""
    return np.arange(first, end, dtype=np.int32 if end < 2 ** 31 else np.int64)

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
    order = np.random.default_rng(0).permutation(numbers(0, shards.n // size))
    n_held = max(4, round(HELD_OUT * len(order)))
    is_train = np.zeros(len(order) + 1, bool)                # the last, broken chunk is not used
    is_train[order[n_held:]] = True
    mean, norm = statistics(shards, lambda rows: is_train[rows // size], f"--activations {path}")
    return ArraySource(args, device, shards, size, order[n_held:], order[:n_held], mean, norm,
                       {"model_name": str(path)})
