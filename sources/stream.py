"""Activations of a language model while it produces them, for --stream: they are never stored.

Stream    The rows of a text in one order. The text is cut into pieces; process p mod W reads,
          tokenises and runs piece p and sends it to the others, so that W processes harvest W
          times as fast, and all see the same rows whatever W is. Dropped is what lm.py drops, and
          the last tokens of a piece, fewer than a context. Rows of a piece that are not needed yet
          are kept for the next time.
Ring      --buffer rows on the training device, fp16, filled once. Half of them are served in an
          order drawn from (seed, number of the half); then exactly these are overwritten by the
          next rows of the stream. So a batch draws from the whole ring, and a row waits for two
          halves on average. Each process holds the whole ring.
Head      The first pieces, 5 % of the text but at most 65,536 rows, are held out. They are stored,
          with the mean, the scale and the norm above which tokens are dropped, all measured on the
          first ring: a small cache like that of lm.py, for every run on this stream and
          evaluate.py. For Othello it has the rows of the first ring, too: the probe needs them.
Resume    state.pt holds the ring, too: 2 D bytes a row whenever it is saved.
"""
import os, shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import count, islice

import numpy as np
import torch
import torch.distributed as dist

from othello import game
from runs import Bar, all_reduce, fail, rank, world_size
from sources import lm
from sources.arrays import PIECE
from sources.shards import Shards
from sources.source import HELD_OUT, Source
from sources.text import Contexts, is_hub_dataset, parts

CHARS, GAMES = 50_000, 256              # in a piece, at least
BATCHES, PASSES = 32, 64                # the default ring holds so many batches, and model passes
TOKENS = dict(cuda=16384, cpu=4096)     # in a pass of the model

def pieces(args):
    """Yields the text in pieces: lists of (part of a document, whether it ends there); for Othello,
    without end, the number of a piece."""
    if lm.is_othello(args.model):
        yield from count()
    piece, size = [], 0
    for part in parts(args.text):
        piece.append(part)
        size += len(part[0])
        if size >= CHARS:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece

class Stream:
    """The rows of --text, [D] fp16 on the device, in the order that the module's docstring says.
    `cut` is the norm above which tokens are dropped; pieces before `held` are never taken."""
    def __init__(self, args, device, path, dtype, cut=float("inf"), held=0):
        self.args, self.device, self.cut, self.held = args, device, cut, held
        self.model, tokenizer, self.block = lm.model_below(args, device, path, dtype)
        self.D = self.model.config.get_text_config().hidden_size
        self.form = None if lm.is_othello(args.model) else Contexts(tokenizer, args.context)
        self.pool = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self.side = torch.cuda.Stream(device) if self.pool else None
        self.ahead_of = world_size()               # pieces that are read before one is needed
        self.rows = torch.empty(0, self.D, dtype=torch.float16, device=device)     # not needed yet
        self.seek(0, held)

    def seek(self, epoch, piece):
        self.epoch, self.piece, self.ahead = epoch, piece, deque()
        self.text = islice(enumerate(pieces(self.args)), piece, None)

    def ids(self, piece):
        """Contexts int32 [n, T] of a piece."""
        if self.form is None:
            return game.full_games(GAMES, 10 ** 12, piece)[:, :self.args.context].astype(np.int32)
        return self.form.cut([i for part in piece for i in self.form.tokens(*part)])

    def harvest(self, piece):
        """(x fp16 [n, T - 1, D] after position 0, ids int32 [n, T]) of a piece, on the device."""
        ids = self.ids(piece)
        n = max(1, TOKENS.get(self.device.type, 4096) // self.args.context)
        with torch.cuda.stream(self.side) if self.side else nullcontext():
            x = [lm.residual_stream(self.model, self.block, ids[i:i + n])[:, 1:].half()
                 for i in range(0, len(ids), n)]
            x = torch.cat([self.rows.new_empty(0, self.args.context - 1, self.D), *x])
            if not x.isfinite().all():                              # waits for all of the above
                fail(f"--layer {self.args.layer}: {self.args.model} gives NaN there, or overflows "
                     "fp16")
            return x, torch.from_numpy(ids).to(self.device)

    def read_ahead(self):
        """Read pieces until `ahead_of` are there, and harvest those of this process: on a GPU in a
        thread and on a CUDA stream of its own, while the SAE trains."""
        for number, piece in islice(self.text, self.ahead_of - len(self.ahead)):
            job = None
            if number % world_size() == rank():
                job = self.pool.submit(self.harvest, piece).result if self.pool else \
                    partial(lambda found: found, self.harvest(piece))
            self.ahead.append((number, job))

    def next(self):
        """(x, ids) of the next piece, as harvest() gives them; None at the end of the text."""
        self.read_ahead()
        if not self.ahead:
            return None
        number, job = self.ahead.popleft()
        self.piece = number + 1
        x, ids = job() if job else (None, None)
        if job and self.side:
            for part in (x, ids):                  # no memory is used again while this stream reads
                part.record_stream(torch.cuda.current_stream())
        if world_size() > 1:
            owner, T = number % world_size(), self.args.context
            n = torch.tensor([0 if x is None else len(x)], device=self.device)
            dist.broadcast(n, owner)
            if x is None:
                x = self.rows.new_empty(int(n), T - 1, self.D)
                ids = torch.empty(int(n), T, dtype=torch.int32, device=self.device)
            for part in (x, ids):
                dist.broadcast(part, owner)
        return x, ids

    def take(self, ring, slots, desc=None):
        """Write the next len(slots) rows into these rows of the ring [R, D]."""
        with Bar(total=len(slots), desc=desc, unit="row", unit_scale=True, disable=not desc) as bar:
            filled = 0
            while filled < len(slots):
                if not len(self.rows):
                    self.rows = self.kept(self.next() or self.again())
                n = min(len(self.rows), len(slots) - filled)
                ring[slots[filled:filled + n]] = self.rows[:n]
                self.rows, filled = self.rows[n:].clone(), filled + n
                bar.update(n)

    def kept(self, piece):
        """The rows [m, D] of a piece that are not dropped."""
        x = piece[0].flatten(0, 1)
        return x[~(x.float().norm(dim=1) > self.cut)]

    def again(self):
        """The first piece of the next pass over the text, if --epochs allows one."""
        if self.epoch + 1 < (self.args.epochs or 1):
            self.seek(self.epoch + 1, self.held)
            if piece := self.next():
                return piece
        fail(f"--text {self.args.text or '(the standard library)'}: ended after pass "
             f"{self.epoch + 1}; to go on from the last saved state, allow another: --resume --out "
             f"DIR --epochs {self.epoch + 2}; or give a longer text or fewer --tokens")

# --- the head -------------------------------------------------------------------------------------

def measure(args, stream, key, folder):
    """Write the head of a stream to `folder`; the stream then stands where training begins, and
    its rows of the first ring are in stream.rows."""
    games, enough = stream.form is None, min(65536, 4 * PIECE // stream.D)
    known = None if games or is_hub_dataset(args.text) else sum(1 for _ in pieces(args))
    most = round(HELD_OUT * known) if known else enough
    held, first, size = [], [], lambda piece: piece[0].shape[0] * piece[0].shape[1]
    with Bar(total=args.buffer, desc="measure", unit="row", unit_scale=True) as bar:
        while not held or len(held) < most and sum(map(size, held)) < enough:
            held.append(stream.next() or too_short(args, 0))
        stream.held = len(held)
        while (there := sum(map(size, first))) < args.buffer:
            first.append(stream.next() or too_short(args, there))
            bar.update(size(first[-1]))
    norms = torch.cat([x.float().norm(dim=-1).flatten() for x, _ in first])
    stream.cut = lm.NORM_CUT * norms.median().item()
    stored, rows = (first[:] if games else []) + held, []
    n_first = len(first)
    while first:                                            # one by one: the ring is large
        rows.append(stream.kept(first.pop(0)))
    stream.rows = torch.cat(rows)
    parts = stream.rows.split(65536)
    mean = sum(part.sum(0, dtype=torch.float32) for part in parts) / len(stream.rows)
    norm = sum((part.float() - mean).norm(dim=1).sum().item() for part in parts) / len(stream.rows)
    if not norm:
        fail(f"--layer {args.layer}: all activations are equal, there is nothing to learn")
    ids = torch.cat([ids for _, ids in stored]).cpu().numpy()
    keep = torch.cat([~(x.float().norm(dim=-1) > stream.cut) for x, _ in stored])      # [n, T - 1]
    place = torch.arange(ids.size).view(ids.shape)[:, 1:]
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True, exist_ok=True)
    for name, array in dict(
            {"acts-00000": torch.cat([stream.kept(piece) for piece in stored]).cpu().numpy(),
             "where-00000": place[keep.cpu()].numpy(), "tokens": ids, "mean": mean.cpu().numpy()},
            **dict(boards=game.replay(ids)) if games else {}).items():
        lm.save_array(work / f"{name}.npy", array)
    lm.describe(args, key, work, prepend_bos=bool(stream.form and stream.form.bos),
                norm_cut=stream.cut, dropped=1 - len(stream.rows) / len(norms), mean_norm=norm,
                n_train_rows=len(stream.rows) if games else 0, held_pieces=len(held), pieces=known,
                rows_in_a_piece=len(stream.rows) / n_first)
    if not folder.exists():
        os.replace(work, folder)
    shutil.rmtree(work, ignore_errors=True)

def too_short(args, rows):
    fail(f"--text {args.text or '(the standard library)'}: gives {rows:,} rows beside those held "
         f"out, fewer than --buffer {args.buffer}; give a longer text or a smaller --buffer, or "
         "leave out --stream")

# --- the source -----------------------------------------------------------------------------------

def open_stream(args, device):
    """Source of a language model's activations as it produces them. BadInput if the text is too
    short for the flags, as far as its length is known, or the ring too large for the memory."""
    lm.settle(args)
    if args.cache_tokens:
        fail("--cache-tokens: has no meaning with --stream, which stores none; leave it out")
    B, passes = args.batch_size, PASSES * TOKENS.get(device.type, 4096)
    args.buffer = args.buffer or max(BATCHES * B, passes)
    if args.buffer < 2 * B:
        fail(f"--buffer {args.buffer}: smaller than two batches; use at least {2 * B}")
    path, key = lm.rank_0_first(lm.identity, args, device)
    key |= dict(stream=1, buffer=args.buffer)
    folder, stream = lm.folder_of(args, key, "-stream"), None
    everywhere = all_reduce(torch.tensor(float(folder.exists()), device=device), "sum")
    if everywhere < world_size():
        stream = Stream(args, device, path, key["dtype"])
        check_memory(args, device, stream.D)
        measure(args, stream, key, folder)
    return StreamSource(args, device, folder, lm.read_manifest(folder, key), path, stream)

def check_memory(args, device, D):
    """Has the device room for the ring, and as much again for what is harvested meanwhile?"""
    need, free = 4 * args.buffer * D, 2 ** 60
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif os.path.exists("/proc/meminfo"):
        line = next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    if need > free:
        fail(f"--buffer {args.buffer}: {need / 1e9:.1f} GB needed and {free / 1e9:.1f} GB free on "
             f"{device}; use at most {int(args.buffer * 0.9 * free / need)}")

class StreamSource(Source):
    """Batches from the ring. `batch(step)` harvests what lies before: it replays the stream from
    where it is, or from its beginning if the step lies before that."""
    def __init__(self, args, device, folder, manifest, path, stream):
        self.args, self.folder, self.manifest, self.path = args, folder, manifest, path
        self.shards = Shards(sorted(folder.glob("acts-*.npy")), "--cache-dir")
        super().__init__(args, device, self.shards.d, np.load(folder / "mean.npy"),
                         manifest["mean_norm"], {k: manifest[k] for k in lm.META})
        self.stream, self.ring, self.half = stream, None, -1
        self.steps_a_half = args.buffer // 2 // args.batch_size
        self.check_length()

    def about(self):
        return (f"streamed; a ring of {self.args.buffer:,} rows takes "
                f"{2 * self.args.buffer * self.d_in / 1e9:.2f} GB, and as much in state.pt")

    def check_length(self):
        """Is the text long enough for --tokens? It is known for files, and to some per cent."""
        args, steps = self.args, self.args.tokens // self.args.batch_size
        half = self.steps_a_half * args.batch_size
        need = args.buffer + max(0, steps - 1) // self.steps_a_half * half
        pieces = (self.manifest["pieces"] or 0) - self.manifest["held_pieces"]
        there = int(pieces * self.manifest["rows_in_a_piece"])
        if self.manifest["pieces"] and need > 1.05 * there * (args.epochs or 1):
            fail(f"--tokens {args.tokens}: --stream needs {need:,} rows for it, and one pass over "
                 f"--text gives about {there:,}; use --epochs {-(-need // there)}, fewer --tokens "
                 "or a longer text")

    def fill(self):
        """The next half's rows: the whole ring at first, later those that were served."""
        if self.stream is None:
            self.stream = self.open()
        args = self.args
        if self.ring is None:
            check_memory(args, self.device, self.d_in)
            self.ring = torch.empty(args.buffer, self.d_in, dtype=torch.float16, device=self.device)
            self.stream.take(self.ring, torch.arange(args.buffer, device=self.device), "fill")
            in_half = self.steps_a_half * self.batch_size / self.manifest["rows_in_a_piece"]
            if self.device.type == "cuda":
                self.stream.ahead_of = max(world_size(), int(in_half))
        else:
            self.stream.take(self.ring, self.order)
        self.half += 1
        self.shuffle()

    def open(self):
        m = self.manifest
        return Stream(self.args, self.device, self.path, m["dtype"], m["norm_cut"],
                      m["held_pieces"])

    def shuffle(self):
        order = np.random.default_rng((self.seed, self.half)).permutation(self.args.buffer)
        order = order[:self.steps_a_half * self.batch_size]
        self.order = torch.from_numpy(order).to(self.device)

    def batch(self, step):
        half, i = divmod(step, self.steps_a_half)
        if half < self.half:
            self.stream, self.ring, self.half = None, None, -1
        while self.half < half:
            self.fill()
        rows = self.order[i * self.batch_size:(i + 1) * self.batch_size]
        return self.scaled(self.ring[rows[self.slice]])

    def state(self):
        """What --resume needs to go on: the ring, and where the text was."""
        s = self.stream
        return dict(key=self.folder.name, half=self.half, ring=self.ring, rows=s.rows,
                    epoch=s.epoch, piece=s.piece)

    def restore(self, saved):
        if saved["key"] != self.folder.name:
            fail("--resume: the model or the text of that run has changed since; choose another "
                 "--out")
        self.stream, self.ring, self.half = self.open(), saved["ring"], saved["half"]
        self.stream.rows = saved["rows"]
        self.stream.seek(saved["epoch"], saved["piece"])
        self.shuffle()

    def heldout_rows(self):
        """The numbers of the rows that heldout() gives, ascending."""
        return np.arange(self.meta["n_train_rows"], self.shards.n)

    def _heldout(self):
        return self.shards.read(self.heldout_rows())
