"""Activations of a language model while it produces them, for --stream: they are never stored.

Stream    The rows of a text in one order. The text is cut into pieces, which are mixed; process
          p mod W tokenises piece p, runs the model on it and sends the rows to the others. So W
          processes harvest W times as fast, and all see the same rows whatever W is. Dropped is
          what lm.py drops, and the last tokens of a piece, fewer than a context: at most 1 %.
Ring      --buffer rows on the training device, fp16, filled once. Half of them are served, in an
          order drawn from (seed, number of the refill); then exactly the rows that were served are
          overwritten by the next of the stream. So a batch draws from the whole ring, and a row
          waits for two halves on average. Each process holds the whole ring, and needs twice its
          memory while it is filled.
Head      The first pieces, 5 % of the text but about 65,536 rows at most, are held out. They are
          stored, with mean, scale and the norm above which tokens are dropped, all measured on the
          first ring: a small cache like that of lm.py, for every run on this stream and
          evaluate.py. For Othello it has the rows of the first ring, too: the probe needs them.
          A text that is sorted, and longer than some 10 MB, should be mixed beforehand.
Resume    state.pt holds the ring, too: 2 D bytes a row whenever it is saved. The text is read from
          its beginning to where it was, but not run through the model.
"""
import contextlib, math, os, shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice

import numpy as np
import torch
import torch.distributed as dist

from othello import game
from runs import BadInput, Bar, all_reduce, fail, rank, rank_0_first, world_size
from sources import lm
from sources.arrays import PIECE
from sources.shards import Shards
from sources.source import HELD_OUT, Source
from sources.text import Contexts, parts, text_size

VERSION = 1                             # of what the rows of a stream depend on below
CHARS, GAMES = 50_000, 256              # in a piece, at least
WINDOW = 256                            # pieces that are mixed
BATCHES, PASSES = 32, 64                # the default ring holds so many batches, and model passes
TOKENS = dict(cuda=16384, cpu=4096)     # in a pass of the model

# --- the rows of a text ---------------------------------------------------------------------------

def pieces(args):
    """Yields the text in pieces: lists of (part of a document, whether the document ends there)."""
    piece, size = [], 0
    for part in parts(args.text):
        piece.append(part)
        size += len(part[0])
        if size >= max(CHARS, 200 * args.context):
            yield piece
            piece, size = [], 0
    if piece:
        yield piece

def mixed(every):
    """The same pieces in another order: always one at random of the next WINDOW, so that no
    document fills the ring."""
    window, rng = [], np.random.default_rng(0)
    for piece in every:
        window.append(piece)
        if len(window) > WINDOW:
            yield window.pop(rng.integers(len(window)))
    for i in rng.permutation(len(window)):
        yield window[i]

def at_once(function, *args):
    """What a thread's submit() gives, but the function has run when it returns."""
    job = Future()
    try:
        job.set_result(function(*args))
    except BadInput as err:
        job.set_exception(err)
    return job

class Stream:
    """The rows of --text, fp16 on the device, in the order that the module's docstring says. `cut`
    is the norm above which tokens are dropped; the first `held` pieces are held out."""
    def __init__(self, args, device, path, dtype, cut=float("inf"), held=0):
        self.args, self.device, self.cut, self.held = args, device, cut, held
        self.first = lm.first_position(args)
        self.model, tokenizer, self.block = lm.model_below(args, device, path, dtype)
        self.D = self.model.config.get_text_config().hidden_size
        self.contexts = None if lm.is_othello(args.model) else Contexts(tokenizer, args.context)
        self.thread = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.rows, self.chars = deque(), 0       # tensors of rows not taken yet; characters read
        self.start(0, held)

    def start(self, epoch, piece):
        """Go to this piece of this pass over the text."""
        self.epoch, self.piece, self.ahead = epoch, piece, deque()
        every = mixed(pieces(self.args)) if self.contexts else count(1)       # games have no end
        self.text = islice(enumerate(every), piece, None)

    def ids(self, piece):
        """Contexts int32 [n, T] of a piece."""
        if not self.contexts:
            return game.full_games(GAMES, 10 ** 12, piece)[:, :self.args.context].astype(np.int32)
        return self.contexts.cut([i for part in piece for i in self.contexts.tokens(*part)])

    def harvest(self, piece):
        """(x fp16 [n, T - first, D] from position `first` on, ids int32 [n, T]) of a piece, on the
        device."""
        ids, T = self.ids(piece), self.args.context
        n = max(1, TOKENS.get(self.device.type, TOKENS["cpu"]) // T)
        with torch.cuda.stream(self.side) if self.side else contextlib.nullcontext():
            x = [lm.residual_stream(self.model, self.block, ids[i:i + n])[:, self.first:].half()
                 for i in range(0, len(ids), n)]
            none = torch.empty(0, T - self.first, self.D, device=self.device).half()
            x = torch.cat([*x, none])
            if x.isnan().any():                                     # waits for all of the above
                fail(f"--layer {self.args.layer}: {self.args.model} gives NaN there")
            return x, torch.from_numpy(ids).to(self.device)

    def look_ahead(self, n):
        """Read pieces until n wait, and harvest those of this process: on a CPU at once, on a GPU
        in a thread and on a CUDA stream of its own, while the SAE trains."""
        for number, piece in islice(self.text, max(0, n - len(self.ahead))):
            submit = self.thread.submit if self.thread else at_once
            job = submit(self.harvest, piece) if number % world_size() == rank() else None
            chars = sum(len(part) for part, _ in piece) if self.contexts else 0
            self.ahead.append((number, chars, job))

    def next(self):
        """(x, ids) of the next piece, as harvest() gives them; None at the end of the text."""
        if not self.ahead:
            self.look_ahead(world_size())
        if not self.ahead:
            return None
        number, chars, job = self.ahead.popleft()
        self.piece, self.chars = number + 1, self.chars + chars
        x, ids = self.sent(number % world_size(), job) if world_size() > 1 else job.result()
        for part in (x, ids) if self.side else ():   # not to be freed while this stream reads them
            part.record_stream(torch.cuda.current_stream())
        return x, ids

    def sent(self, owner, job):
        """The result of `job`, which the process `owner` has, in every process."""
        T, x, n = self.args.context, None, torch.tensor([-1], device=self.device)
        try:
            if job:
                x, ids = job.result()
                n.fill_(len(x))
        finally:                                                  # if it failed, the others stop
            dist.broadcast(n, owner)
        if n < 0:
            raise SystemExit(2)
        if x is None:
            x = torch.empty(int(n), T - self.first, self.D, dtype=torch.float16,
                            device=self.device)
            ids = torch.empty(int(n), T, dtype=torch.int32, device=self.device)
        dist.broadcast(x, owner)
        dist.broadcast(ids, owner)
        return x, ids

    def keep(self, x):
        """Which tokens [n, T - first] of x are not dropped."""
        return x.float().norm(dim=-1) <= self.cut

    def take(self, ring, slots, bar=None):
        """Write the next len(slots) rows into these rows of the ring [R, D]."""
        while len(slots):
            if not self.rows:
                x, _ = self.next() or self.next_epoch()
                self.rows.append(x[self.keep(x)])
            rows = self.rows.popleft()
            n = min(len(rows), len(slots))
            ring[slots[:n]] = rows[:n]
            if n < len(rows):
                self.rows.appendleft(rows[n:].clone())
            slots = slots[n:]
            if bar is not None:
                bar.update(n)

    def next_epoch(self):
        """The first piece of the next pass over the text, if --epochs allows one."""
        if self.epoch + 1 < (self.args.epochs or 1):
            self.start(self.epoch + 1, self.held)
            if piece := self.next():
                return piece
        out, more = self.args.out, f"--epochs {self.epoch + 2}"
        fail(f"--text {name(self.args)}: ended after pass {self.epoch + 1}; " + (
            f"to go on: the same command with --resume --out {out} {more}"
            if out and (out / "state.pt").exists() else
            f"choose a longer text, fewer --tokens or {more}"))

def name(args):
    return args.text or "(the standard library)"

# --- the head -------------------------------------------------------------------------------------

def measure(args, stream, key, folder):
    """Harvest held-out pieces and the first ring, and write the head of the stream to `folder`.
    The stream then stands where training begins, and has the rows of the first ring."""
    n_rows = lambda found: sum(x.shape[0] * x.shape[1] for x, _ in found)
    size = text_size(args.text) if stream.contexts else None
    held, first, enough = [], [], min(65536, 4 * PIECE // stream.D)
    with Bar(total=args.buffer, desc="measure", unit="row", unit_scale=True) as bar:
        while not held or n_rows(held) < enough and not (size and stream.chars > HELD_OUT * size):
            held.append(stream.next() or too_short(args, 0))
        stream.held = len(held)
        while (there := n_rows(first)) < args.buffer:
            bar.update(there - bar.n)
            first.append(stream.next() or too_short(args, there))
    norms = torch.cat([x.float().norm(dim=-1).flatten() for x, _ in first])
    stream.cut = lm.NORM_CUT * norms.median().item()
    if stream.cut == float("inf"):
        fail(f"--layer {args.layer}: {args.model} overflows fp16 there")
    facts = dict(prepend_bos=bool(stream.contexts and stream.contexts.bos), norm_cut=stream.cut,
                 held_pieces=len(held), text_size=size, rows_in_a_piece=n_rows(first) / len(first))
    stored = [*(() if stream.contexts else first), *held]
    while first:                                          # one by one, since the ring is large
        x, _ = first.pop(0)
        stream.rows.append(x[stream.keep(x)])
    n = sum(map(len, stream.rows))
    mean = sum(rows.sum(0, dtype=torch.float32) for rows in stream.rows) / n
    norm = sum((rows.float() - mean).norm(dim=1).sum().item() for rows in stream.rows) / n
    if not norm:
        fail(f"--layer {args.layer}: all activations are equal, there is nothing to learn")
    facts |= dict(dropped=1 - n / len(norms), mean_norm=norm,
                  n_train_rows=0 if stream.contexts else n,
                  rows_per_character=(n + n_rows(held)) / stream.chars if size else None)
    write_head(args, stream, key, folder, stored, mean, facts)

def write_head(args, stream, key, folder, stored, mean, facts):
    """Pieces to store, mean [D] and manifest, as a folder that lm.py could have made."""
    ids = torch.cat([ids for _, ids in stored]).cpu().numpy()
    x = torch.cat([x for x, _ in stored]).cpu()                            # [n, T - first, D]
    keep, place = stream.keep(x), torch.arange(ids.size).view(ids.shape)[:, stream.first:]
    arrays = {"acts-00000": x[keep].numpy(),
              "where-00000": place[keep].numpy(), "tokens": ids, "mean": mean.cpu().numpy()}
    if not stream.contexts:
        arrays["boards"] = game.replay(ids)
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True, exist_ok=True)
    for file, array in arrays.items():
        lm.save_array(work / f"{file}.npy", array)
    lm.describe(args, key, work, **facts)
    with contextlib.suppress(OSError):                    # another process wrote the same before
        os.replace(work, folder)
    shutil.rmtree(work, ignore_errors=True)

def too_short(args, rows):
    fail(f"--text {name(args)}: gives {rows:,} rows beside those held out, fewer than --buffer "
         f"{args.buffer}; give a longer text or a smaller --buffer, or leave out --stream")

# --- the source -----------------------------------------------------------------------------------

def open_stream(args, device):
    """Source of a language model's activations as it produces them. BadInput if the text is too
    short for the flags, as far as its length is known, or the ring too large for the memory."""
    lm.settle(args)
    if args.cache_tokens:
        fail("--cache-tokens: has no meaning with --stream, which stores none; leave it out")
    B, in_pass = args.batch_size, TOKENS.get(device.type, TOKENS["cpu"])
    args.buffer = args.buffer or max(BATCHES * B, PASSES * in_pass)
    if args.buffer < 2 * B:
        fail(f"--buffer {args.buffer}: smaller than two batches; use at least {2 * B}")
    path, key = rank_0_first(lm.identity, args, device)
    key |= dict(stream=VERSION, buffer=args.buffer)
    folder, stream = lm.folder_of(args, key, "-stream"), None
    heads = all_reduce(torch.tensor(float(folder.exists()), device=device), "sum")
    if heads < world_size():
        stream = Stream(args, device, path, key["dtype"])
        check_memory(args, device, stream.D)
        measure(args, stream, key, folder)
    stream = stream if args.tokens else None             # evaluate.py needs the head alone
    return StreamSource(args, device, folder, lm.read_manifest(folder, key), path, stream)

def check_memory(args, device, D):
    """Has the device room for twice the ring? That is what filling it takes, and on a GPU what is
    harvested ahead takes half of it later. The model and the SAE come on top."""
    need, free = 4 * args.buffer * D, 2 ** 60
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + (                # and what torch has in store
            torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    elif os.path.exists("/proc/meminfo"):
        line = next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if need > free:
        fail(f"--buffer {args.buffer}: {need / 1e9:.1f} GB needed and {free / 1e9:.1f} GB free on "
             f"{device}; use at most {int(args.buffer * 0.9 * free / need)}")
    if rank() == 0:
        print(f"stream: a ring of {args.buffer:,} rows, {need / 2e9:.2f} GB, twice that while it "
              "is filled", flush=True)

class StreamSource(Source):
    """Batches from the ring. A batch of a later refill is harvested when it is asked for; one of
    an earlier refill replays the stream from its beginning."""
    def __init__(self, args, device, folder, manifest, path, stream):
        self.args, self.folder, self.manifest, self.path = args, folder, manifest, path
        self.shards = Shards(sorted(folder.glob("acts-*.npy")), "--cache-dir")
        super().__init__(args, device, self.shards.d, np.load(folder / "mean.npy"),
                         manifest["mean_norm"], {k: manifest[k] for k in lm.META})
        self.stream, self.ring, self.refill = stream, None, -1
        self.steps = args.buffer // 2 // args.batch_size             # between two refills
        self.last = max(0, args.tokens // args.batch_size - 1) // self.steps      # refill
        self.check_length()

    def about(self):
        return (f"streamed, {self.meta['dropped']:.2%} of the rows dropped (norm above "
                f"{self.meta['norm_cut']:.0f})")

    def check_length(self):
        """Is the text long enough for --tokens? For files that is known, about; for hub data sets
        it is not."""
        args, m = self.args, self.manifest
        if m["text_size"] and args.tokens:
            need = args.buffer + self.last * self.steps * args.batch_size
            there = round((1 - HELD_OUT) * m["text_size"] * m["rows_per_character"])
            if need > there * (args.epochs or 1):
                fail(f"--tokens {args.tokens}: --stream needs {need:,} rows for it, and a pass "
                     f"over --text gives about {there:,}; use --epochs {-(-need // there)}, "
                     "fewer --tokens or a longer text")

    def next_refill(self):
        """Fill the ring, or overwrite the rows that were served."""
        if self.stream is None:
            self.stream = self.open()
        if self.ring is None:
            if not self.stream.rows:                                 # else they take half of it
                check_memory(self.args, self.device, self.d_in)
            R = self.args.buffer
            self.ring = torch.empty(R, self.d_in, dtype=torch.float16, device=self.device)
            with Bar(total=R, desc="fill", unit="row", unit_scale=True) as bar:
                self.stream.take(self.ring, torch.arange(R, device=self.device), bar)
        else:
            self.stream.take(self.ring, self.order)
        self.refill += 1
        self.shuffle()

    def open(self):
        m = self.manifest
        return Stream(self.args, self.device, self.path, m["dtype"], m["norm_cut"],
                      m["held_pieces"])

    def shuffle(self):
        """Draw the order in which half of the ring is served; on a GPU begin with the next half."""
        order = np.random.default_rng((self.seed, self.refill)).permutation(self.args.buffer)
        order = order[:self.steps * self.batch_size]
        self.order = torch.from_numpy(order).to(self.device)
        if self.stream.thread and self.refill < self.last:
            self.stream.look_ahead(math.ceil(len(order) / self.manifest["rows_in_a_piece"]))

    def batch(self, step):
        refill, i = divmod(step, self.steps)
        if refill < self.refill:
            self.stream, self.ring, self.refill = None, None, -1
        while self.refill < refill:
            self.next_refill()
        rows = self.order[i * self.batch_size:(i + 1) * self.batch_size]
        return self.scaled(self.ring[rows[self.slice]])

    def state(self, more):
        """What --resume needs: the ring, what is left of a piece, and the place in the text."""
        if not more:
            return dict(key=self.folder.name)
        s = self.stream
        return dict(key=self.folder.name, refill=self.refill, ring=self.ring, epoch=s.epoch,
                    piece=s.piece, rows=torch.cat([*s.rows, self.ring[:0]]))

    def restore(self, saved):
        if saved["key"] != self.folder.name:
            fail("--resume: the model, the text or --bf16's dtype differs from that run's; choose "
                 "another --out")
        if "ring" not in saved:
            return
        self.stream, self.ring, self.refill = None, saved["ring"], saved["refill"]
        self.stream = self.open()
        self.stream.rows.append(saved["rows"])
        self.stream.start(saved["epoch"], saved["piece"])
        self.shuffle()

    def heldout_rows(self):
        """The numbers of the rows that heldout() gives, ascending."""
        first = self.meta["n_train_rows"]
        return np.arange(first, min(self.shards.n, first + 65536))

    def _heldout(self):
        return self.shards.read(self.heldout_rows())
