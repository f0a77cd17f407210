"""Rows of files as shuffled batches, in bounded memory however many there are: those of
--activations, and the activations that lm.py harvested."""
import hashlib, json
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from runs import fail, first_line, lock, rank, rank_0_first, replacing
from sources.shards import Shards, survey
from sources.source import HELD_OUT, Source

PIECE = 2 ** 25               # arrays are written in pieces of about this many numbers
ROWS, BATCHES = 2 ** 18, 64   # a buffer has at least so many rows, and batches,
MEMORY = 4 * 2 ** 30          # but no more bytes than this
CHUNK = 16                    # rows in a chunk, at most
SMALL = 2 ** 28               # numbers that are surveyed at each start, rather than once

# --- batches --------------------------------------------------------------------------------------

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
                   MEMORY // (shards.d * shards.dtype.itemsize))
        self.buffers = -(-self.per_epoch // max(1, rows // args.batch_size))    # in an epoch
        self.order_of = self.buffer_of = self.room = None

    def _load(self, step):
        epoch, i = divmod(step, self.per_epoch)
        number = i * self.buffers // self.per_epoch
        first, end = (-(-n * self.per_epoch // self.buffers) for n in (number, number + 1))
        if self.order_of != epoch:
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.train)
            self.order_of = epoch
        if self.buffer_of != (epoch, number):
            place = np.arange(first * self.batch_size, end * self.batch_size)
            chunk = self.order[place // self.size].astype(np.int64)
            rows = np.sort(chunk * self.size + place % self.size)
            mixed = np.random.default_rng((self.seed, epoch, number)).permutation(len(rows))
            mixed = mixed.reshape(-1, self.batch_size)[:, self.slice]         # of this process
            kept = np.zeros(len(rows), bool)
            kept[mixed] = True
            if self.room is None:                     # for all buffers: new ones leave fragments
                most = -(-self.per_epoch // self.buffers) * mixed.shape[1]
                self.room = torch.empty(most, self.d_in, dtype=self.shards.dtype)
            self.buffer = self.shards.read(rows[kept], self.room)
            self.where = torch.from_numpy((np.cumsum(kept) - 1)[mixed])
            self.buffer_of = epoch, number
        return self.buffer[self.where[i - first]]

    def heldout_rows(self):
        """The numbers in `shards` of the rows that heldout() gives, ascending."""
        n = max(1, min(65536, 4 * PIECE // self.d_in) // self.size)
        chunks = np.sort(self.held[:n]).astype(np.int64)
        return (chunks[:, None] * self.size + np.arange(self.size)).ravel()

    def _heldout(self):
        return self.shards.read(self.heldout_rows())

def chunk_size(n):
    """Rows in a chunk: CHUNK neighbours, fewer in short arrays."""
    return max(min(CHUNK, n // 1024), 1)

def numbers(first, end):
    """[first, end) as an array of 32 bits where they suffice: there are many chunks."""
    return np.arange(first, end, dtype=np.int32 if end < 2 ** 31 else np.int64)

# --- --activations --------------------------------------------------------------------------------

class Split:
    """Rows of shards in another order: those to train on, then those held out, each ascending, and
    without those that are dropped. Memory: 16 bytes a held-out row, 8 a dropped one."""
    def __init__(self, shards, held, dropped):
        gone = np.union1d(held, dropped)
        self.shards, self.d, self.dtype = shards, shards.d, shards.dtype
        self.held = np.setdiff1d(held, dropped, assume_unique=True)
        self.before = gone - np.arange(len(gone))             # rows to train on before each
        self.n_train = shards.n - len(gone)
        self.n = self.n_train + len(self.held)

    def numbers(self, rows):
        """The numbers in `shards` of these."""
        i = rows - self.n_train
        return np.where(i < 0, rows + np.searchsorted(self.before, rows, "right"),
                        self.held[i.clip(0)])

    def read(self, rows, out=None):
        return self.shards.read(self.numbers(rows), out)

def files_of(path):
    """The shards of --activations, in the order of their names."""
    if path.is_file():
        return [path]
    files = sorted([*path.glob("*.npy"), *path.glob("*.safetensors")])
    if not files:
        fail(f"--activations {path}: no such file, or a folder without .npy or .safetensors files")
    if len({file.suffix for file in files}) > 1:
        fail(f"--activations {path}: holds .npy and .safetensors files; leave those of one kind")
    return files

def check_ids(path, n):
    try:
        ids = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as err:
        fail(f"--context-ids {path}: not a readable .npy file ({first_line(err)})")
    if ids.shape != (n,) or ids.dtype.kind not in "iu":
        fail(f"--context-ids {path}: shape {ids.shape}, dtype {ids.dtype}; it needs one integer "
             f"for each of the {n} rows of --activations")

def held_out(shards, size, path):
    """The rows for evaluation, ascending: HELD_OUT of the chunks or, with a file of --context-ids,
    of the contexts. Drawn alike for every seed."""
    rng = np.random.default_rng(0)
    if not path:
        order = rng.permutation(numbers(0, shards.n // size))
        chunks = np.sort(order[:max(4, round(HELD_OUT * len(order)))]).astype(np.int64)
        return (chunks[:, None] * size + np.arange(size)).ravel()
    def parts():                                              # each a new map: memory is bounded
        for first in range(0, shards.n, PIECE // 8):
            yield first, np.load(path, mmap_mode="r")[first:first + PIECE // 8]
    every = np.unique(np.concatenate([np.unique(part) for _, part in parts()]))
    if len(every) < 20:
        fail(f"--context-ids {path}: {len(every)} contexts are too few, some of which are held "
             "out; give at least 20, or leave it out")
    held = rng.permutation(every)[:round(HELD_OUT * len(every))]
    return np.concatenate([first + np.flatnonzero(np.isin(part, held)) for first, part in parts()])

def known(args, shards, find):
    """find(), a dict of arrays, which the first run on a large array leaves in --cache-dir for all
    later ones; under torchrun rank 0 does, and the others wait."""
    if shards.n * shards.d < SMALL:
        return find()
    files = [*shards.paths, *([args.context_ids] if args.context_ids else [])]
    key = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    key = json.dumps([1, HELD_OUT, args.drop_norm, key]).encode()
    folder = args.cache_dir or Path("~/.cache/six-saes").expanduser()
    file = folder / f"{args.activations.stem}-{hashlib.sha256(key).hexdigest()[:12]}.npz"
    def make():
        with lock(folder / f"{file.name}.lock", "--cache-dir"):
            if not file.exists():
                with replacing(file, "--cache-dir") as tmp, open(tmp, "wb") as f:
                    np.savez(f, **find())
    rank_0_first(make)                           # the others find it, unless on another disk
    try:
        with np.load(file, allow_pickle=False) as found:
            return dict(found)
    except (OSError, ValueError, EOFError, BadZipFile) as err:
        fail(f"--cache-dir: {file} is damaged ({first_line(err)}); delete it and run again")

def open_array(args, device):
    """Source of --activations; says what was dropped, and what is held out."""
    path, ids, drop = args.activations, args.context_ids, args.drop_norm
    shards = Shards(files_of(path), "--activations")
    if shards.n < 20:
        fail(f"--activations {path}: {shards.n} rows are too few to train on")
    if ids:
        check_ids(ids, shards.n)
    size = chunk_size(shards.n)
    def find():
        held = held_out(shards, size, ids)
        def is_train(rows):                                   # ascending neighbours
            mask = np.ones(len(rows), bool)
            lo, hi = np.searchsorted(held, [rows[0], rows[-1] + 1])
            mask[held[lo:hi] - rows[0]] = False
            return mask
        mean, norm, dropped, cut = survey(shards, is_train, f"--activations {path}", drop)
        return dict(mean=mean, norm=norm, dropped=dropped, cut=cut, held=held)
    found = known(args, shards, find)
    split = Split(shards, found["held"], found["dropped"])
    meta = dict(model_name=str(path), dropped=len(found["dropped"]) / shards.n,
                norm_cut=float(found["cut"]) if drop else None)
    if rank() == 0:
        print(f"dropped: {meta['dropped']:.2%} of {shards.n:,} rows (norm above "
              f"{meta['norm_cut']:.4g}, {drop:g} x the median)" if drop else
              "note: no position and no outlier is dropped; attention sinks, if the rows have any, "
              "hold much of the variance (--drop-norm)", flush=True)
        if not ids:
            print("note: neighbouring rows may share a context, and then held-out rows have "
                  "neighbours in training (--context-ids)", flush=True)
    held = np.random.default_rng(0).permutation(
        numbers(-(-split.n_train // size), split.n // size))
    return ArraySource(args, device, split, size, numbers(0, split.n_train // size), held,
                       found["mean"], float(found["norm"]), meta)
