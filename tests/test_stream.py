"""--stream: the ring, the order of its rows, the head, --resume, processes, and what is refused."""
import importlib
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.stats import binom

import data
import runs
import topk_sae
from conftest import ROOT, random_lm
from evaluation.saved import SAE
from othello import boards
from sources import lm, stream, text
from test_runs import hooked, torchrun

CPU = torch.device("cpu")
CONTEXT = 127                                  # rows of a context

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text of 40 documents, 10 pieces, of about 120,000 tokens."""
    path = tmp_path_factory.mktemp("text")
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "sleep", "run", "stone"]
    rng = np.random.default_rng(0)
    for i in range(40):
        (path / f"{i}.txt").write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(200)))
    return path

@pytest.fixture(scope="module")
def gpt2(folder, tmp_path_factory):
    return random_lm("gpt2", tmp_path_factory.mktemp("lm"), folder / "0.txt")

def flags(model, folder, tmp_path, *more):
    return [str(a) for a in ("--model", model, "--layer", 2, "--text", folder, "--context", 16, "--cache-dir",
                             tmp_path / "cache", "--stream", "--buffer", 8192, "--batch-size", 256, "--tokens", 25_600,
                             "--d-sae", 64, "--k", 4, "--no-bf16", "--log-every", 20, "--device", "cpu", *more)]

def source_of(argv):
    args = topk_sae.parse_args(argv)
    return data.open_source(args, runs.setup(args))

def train(argv, out, *more):
    topk_sae.train(topk_sae.parse_args([*argv, "--out", str(out), *more]))
    return runs.load_sae(out)[1]

def equal(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)

# --- the ring -------------------------------------------------------------------------------------

class Numbered:
    """A stream whose rows hold their own numbers, as digits that fp16 holds."""
    taken, rows, thread = 0, (), None
    def take(self, ring, slots, bar=None):
        n = torch.arange(self.taken, self.taken + len(slots))
        ring[slots] = torch.stack([n % 1000, n // 1000 % 1000, n // 1000_000], 1).half()
        self.taken += len(slots)

def ring_source(rows, batch, seed=0):
    source = object.__new__(stream.StreamSource)
    source.args, source.device, source.seed, source.batch_size = Namespace(buffer=rows), CPU, seed, batch
    source.last = 99
    source.d_in, source.mean, source.scale, source.slice = 3, torch.zeros(3), 1.0, slice(0, batch)
    source.stream, source.ring, source.refill = Numbered(), None, -1
    source.steps, source.open = rows // 2 // batch, Numbered
    return source

def numbers(x):
    return (x.double() @ torch.tensor([1.0, 1000.0, 1e6]).double()).long()

def test_each_row_is_served_once():
    """After three refills, the rows served and those in the ring are all that were taken, each once."""
    source = ring_source(10_000, 300)
    served = torch.cat([numbers(source.batch(step)) for step in range(3 * 16)])
    source.next_refill()
    assert source.stream.taken == 10_000 + 3 * 16 * 300
    assert sorted([*served.tolist(), *numbers(source.ring).tolist()]) == list(range(source.stream.taken))

def test_batches_are_a_function_of_seed_and_step():
    one, two = ring_source(10_000, 300), ring_source(10_000, 300)
    late = {step: two.batch(step) for step in (40, 41, 20, 3)}                # replays what lies before
    for step in range(42):
        x = one.batch(step)
        assert step not in late or torch.equal(x, late[step])
    assert not torch.equal(ring_source(10_000, 300, seed=1).batch(3), late[3])

def test_batches_are_mixed():
    """As for stored arrays: were each row of a batch of any of the C contexts in the ring with probability 1 / C,
    one batch in 10,000 would have more than `most` rows of one context; none of 200 does. Control:
    a ring that holds 16 contexts for each of its batches (SAELens' buffer held one model batch) fails."""
    def largest(rows):
        source = ring_source(rows, 2048)
        return max(np.unique(numbers(source.batch(step)) // CONTEXT, return_counts=True)[1].max() for step in range(200))
    rows = max(stream.BATCHES * 2048, stream.PASSES * stream.TOKENS["cpu"])
    contexts = rows // CONTEXT
    most = next(c for c in range(99) if 200 * contexts * binom.sf(c, 2048, 1 / contexts) < 1e-4)
    assert largest(rows) <= most < largest(2 * 2048)

def test_pieces_are_mixed(folder, monkeypatch):
    """Each comes once. While a document of 100 pieces is read, its share of 128 in the window rises to 1 - exp(-100 / 128)
    = .54; rings of 20 pieces stay within three standard errors of that, .87. Control: in order they are full of it."""
    monkeypatch.setattr(stream, "WINDOW", 128)
    every = list(range(400))
    order = list(stream.mixed(every))
    assert sorted(order) == every and list(stream.mixed(every)) == order
    share = lambda order: max(np.mean([100 <= p < 200 for p in order[i:i + 20]]) for i in range(0, 400, 20))
    assert 0.3 < share(order) < 0.87 and share(every) == 1
    args = Namespace(text=str(folder), context=16)
    assert sorted(map(str, stream.mixed(stream.pieces(args)))) == sorted(map(str, stream.pieces(args)))

# --- the rows -------------------------------------------------------------------------------------

def test_rows_are_the_models(folder, tmp_path_factory, tmp_path, every_lm):
    """For six architectures: each row in the ring is hidden_states[L] of the text, after position 0."""
    source = source_of(flags(every_lm, folder, tmp_path))
    source.batch(0)
    model, tokenizer, _ = lm.load(every_lm, "x", CPU, getattr(torch, source.meta["dtype"]))
    args, form = source.args, text.Contexts(tokenizer, 16)
    first = source.manifest["held_pieces"]
    ids = np.concatenate([form.cut([i for part in piece for i in form.tokens(*part)])
                          for piece in list(stream.mixed(stream.pieces(args)))[first:first + 4]])[:600]
    with torch.no_grad():
        x = model(torch.from_numpy(ids).long(), output_hidden_states=True).hidden_states[2][:, 1:].flatten(0, 1)
    x = x.float()[x.float().norm(dim=1) <= source.meta["norm_cut"]][:8000]
    assert torch.allclose(source.ring[:len(x)].float(), x, rtol=0.02, atol=0.02) and len(x) == 8000

def test_the_head_is_a_cache_of_rows_that_are_never_served(gpt2, folder, tmp_path):
    """Held-out contexts come first in the text and are not in the stream, in its second pass neither; mean and
    scale are those of the first ring; both are kept for the next run, which needs no model for them."""
    argv = flags(gpt2, folder, tmp_path, "--epochs", 2, "--tokens", 150_000)
    source = source_of(argv)
    ids, where = lm.heldout_tokens(source)
    assert len(source.heldout()) == len(where) and (where % 16 > 0).all()
    tokenizer = lm.load(gpt2, "x", CPU, torch.float32)[1]
    first = next(stream.mixed(stream.pieces(source.args)))[0][0]
    assert ids.ravel()[:1000].tolist() == tokenizer(first, add_special_tokens=False).input_ids[:1000]
    source.batch(0)
    rows = torch.cat([source.scaled(source.ring)])
    assert rows.mean(0).norm() < 0.2 and abs(rows.norm(dim=1).mean() - 32 ** 0.5) < 0.05
    real, begun = stream.Stream.start, []
    stream.Stream.start = lambda self, epoch, piece: begun.append((epoch, piece)) or real(self, epoch, piece)
    try:
        source.batch(585)
    finally:
        stream.Stream.start = real
    assert begun == [(1, source.manifest["held_pieces"])]                    # and the first pass began there, too
    again = source_of(argv)
    assert again.stream is None and torch.equal(again.heldout(), source.heldout()) and again.scale == source.scale
    assert torch.equal(again.batch(3), source_of(argv).batch(3))

def test_last_tokens_alone(gpt2, folder, tmp_path):
    """With --last-token the stream serves the last row of each context, and those alone; so its head."""
    source = source_of(flags(gpt2, folder, tmp_path, "--last-token", "--buffer", 1024, "--tokens", 512))
    source.batch(0)
    model, tokenizer, blocks = lm.load(gpt2, "x", CPU, getattr(torch, source.meta["dtype"]))
    form = text.Contexts(tokenizer, 16)
    first = list(stream.mixed(stream.pieces(source.args)))[source.manifest["held_pieces"]]
    ids = form.cut([i for part in first for i in form.tokens(*part)])[:500]
    x = lm.residual_stream(model, blocks[2], ids)[:, -1]
    assert torch.allclose(source.ring[:500].float(), x, rtol=0.02, atol=0.02)
    ids, where = lm.heldout_tokens(source)
    assert (where % 16 == 15).all() and len(where) == len(ids) == len(source.heldout())

def test_outliers_are_dropped(gpt2, folder, tmp_path, loud):
    """As in the cache: a token with ten times the norm of the others is never served, nor held out."""
    source = source_of(flags(gpt2, folder, tmp_path))
    source.batch(0)
    assert 0.001 < source.meta["dropped"] < 0.2
    for x in (source.ring.float(), source.heldout_raw()):
        assert x.norm(dim=1).max() <= source.meta["norm_cut"] < 0.9 * 10 * x.norm(dim=1).median()

# --- runs -----------------------------------------------------------------------------------------

# SIGKILL within the refill before step 64: the last save is that of step 60
KILL = """from sources.stream import Stream
take, calls = Stream.take, []
def killed(self, ring, slots, bar=None):
    calls.append(1)
    if len(calls) == 5:
        take(self, ring, slots[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    take(self, ring, slots, bar)
Stream.take = killed"""

def test_resume_is_exact(gpt2, folder, tmp_path):
    """Killed during a refill and resumed, a run ends with the very weights of one that was not."""
    argv = flags(gpt2, folder, tmp_path, "--save-every", 0)
    whole, out = train(argv, tmp_path / "whole"), tmp_path / "cut"
    job = subprocess.run([sys.executable, hooked(tmp_path, KILL), *argv, "--out", out], cwd=ROOT, capture_output=True)
    assert job.returncode == -9 and torch.load(out / "state.pt", weights_only=True)["step"] == 60
    assert equal(train(argv, out, "--resume"), whole)
    assert SAE(out).d_in == 32
    assert (out / "state.pt").stat().st_size < 8192 * 32 * 2               # the last save has no ring

def losses(out):
    return [json.loads(line)["loss"] for line in open(out / "metrics.jsonl")]

def test_two_processes_see_the_rows_of_one(gpt2, folder, tmp_path):
    """Head and batches are the same to the bit, before and after refills; the loss to 1e-6, while the weights are."""
    argv = lambda where: flags(gpt2, folder, where, "--log-every", 1, "--tokens", 256 * 40)
    lines = f"""import torch
from sources.stream import StreamSource
real = StreamSource.batch
def batch(self, step):
    x = real(self, step)
    torch.save(x, f"{tmp_path}/{{step}}-{{os.environ['RANK']}}.pt")
    return x
StreamSource.batch = batch"""
    train(argv(tmp_path), tmp_path / "one")
    job = torchrun(hooked(tmp_path, lines), *argv(tmp_path / "other"), "--out", tmp_path / "two")
    assert job.returncode == 0, job.stderr
    heads = [next(p.glob("cache/*stream*")) for p in (tmp_path, tmp_path / "other")]
    for name in ("acts-00000.npy", "mean.npy", "tokens.npy", "manifest.json"):
        assert (heads[0] / name).read_bytes() == (heads[1] / name).read_bytes(), name
    source = source_of(argv(tmp_path))
    for step in (0, 15, 16, 39):                                             # a refill every 16 steps
        parts = [torch.load(tmp_path / f"{step}-{r}.pt", weights_only=True) for r in range(2)]
        assert torch.equal(torch.cat(parts), source.batch(step))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 40 and np.allclose(one[:10], two[:10], rtol=1e-6), (one[:10], two[:10])
    assert np.allclose(one, two, rtol=1e-3)

@pytest.mark.claims
def test_resume_of_two_processes_is_exact(gpt2, folder, tmp_path):
    """With two again, to the bit; with one, the same but for rounding. A rank that fails takes the other with it."""
    argv, out, alone = flags(gpt2, folder, tmp_path, "--save-every", 0), tmp_path / "cut", tmp_path / "alone"
    assert torchrun("topk_sae.py", *argv, "--out", tmp_path / "whole").returncode == 0
    assert torchrun(hooked(tmp_path, KILL), *argv, "--out", out).returncode
    shutil.copytree(out, alone)
    again = torchrun("topk_sae.py", *argv, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    whole = runs.load_sae(tmp_path / "whole")[1]
    assert equal(runs.load_sae(out)[1], whole)
    rest = train(argv, alone, "--resume")
    assert all(torch.allclose(rest[n], whole[n], atol=0.02) for n in whole)
    fail = """import runs
from sources.stream import Stream
if os.environ["RANK"] == "1":
    Stream.harvest = lambda self, piece: runs.fail("--layer: broken")"""
    job = torchrun(hooked(tmp_path, fail), *argv, "--out", tmp_path / "bad")
    said = [line for line in job.stderr.splitlines() if "error: " in line]
    assert job.returncode and len(said) == 1 and "rank 1: error: --layer: broken" in said[0], job.stderr
    assert "connection" not in job.stderr.lower() and "gloo" not in job.stderr.lower(), job.stderr

def test_harvesting_ahead_changes_nothing(gpt2, folder, tmp_path, monkeypatch):
    """As on a GPU, in a thread, but on the CPU: the same batches, also after --resume."""
    source, argv = source_of(flags(gpt2, folder, tmp_path)), flags(gpt2, folder, tmp_path)
    real = stream.Stream.__init__
    def threaded(self, *args):
        real(self, *args)
        self.thread = ThreadPoolExecutor(1)
    monkeypatch.setattr(stream.Stream, "__init__", threaded)
    ahead, second = source_of(argv), source_of(argv)
    for step in range(40):
        assert torch.equal(ahead.batch(step), source.batch(step))
        assert step != 20 or len(ahead.stream.ahead) > 0
    second.restore(ahead.state(True))
    for step in range(40, 100):
        assert torch.equal(second.batch(step), source.batch(step))
    assert len(second.stream.ahead) <= 1                                     # no more after the last refill

@pytest.mark.parametrize("script", ["vanilla", "gated", "matryoshka", "ordered", "gba"])
def test_the_other_scripts_stream(script, gpt2, folder, tmp_path_factory):
    tmp_path = tmp_path_factory.getbasetemp() / "others"                    # with one head
    m = importlib.import_module(f"{script}_sae")
    argv = flags(gpt2, folder, tmp_path, "--tokens", 256 * 20, "--out", tmp_path / script)
    i = argv.index("--k")
    m.train(m.parse_args(argv if script in ("matryoshka", "ordered") else argv[:i] + argv[i + 2:]))
    assert json.loads((tmp_path / script / "cfg.json").read_text())["metadata"]["results"]["fvu"] < 1

def test_a_text_of_unknown_length_ends_the_run(gpt2, folder, tmp_path, one_line, monkeypatch):
    """One line, and the last saved state stays; --epochs then lets it go on."""
    monkeypatch.setattr(stream, "text_size", lambda name: None)
    monkeypatch.setattr(text, "documents", lambda name: (p.read_text() for p in sorted(folder.glob("*.txt"))[:30]))
    monkeypatch.setattr(stream, "PIECE", 32 * 1000)                          # 4,000 rows are held out
    argv = flags(gpt2, folder, tmp_path, "--tokens", 120_000)
    one_line(lambda: train(argv, tmp_path / "unsaved"), "ended after pass 1", "or --epochs 2")
    argv += ["--save-every", "0"]
    one_line(lambda: train(argv, tmp_path / "run"), "ended after pass 1", f"--resume --out {tmp_path / 'run'} --epochs 2")
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] % 10 == 0
    assert train(argv, tmp_path / "run", "--resume", "--epochs", "2")

def test_othello_is_streamed(tmp_path):
    """Its text has no end; a run is evaluated on the board like one on a cache."""
    argv = flags("othello", "", tmp_path, "--layer", 1)
    argv = [a for a in argv if a not in ("--text", "")]
    argv[argv.index("--context") + 1] = "59"
    source = source_of(argv)
    x = source.batch(0)
    assert x.shape == (256, source.d_in) and source.meta["n_train_rows"] >= 8192
    held = boards.HeldOut(source)
    assert len(held.boards) == len(source.heldout())

# --- what is refused ------------------------------------------------------------------------------

def test_refuses(gpt2, folder, tmp_path, one_line, array, monkeypatch):
    def refuse(*words, more=(), where=folder):
        one_line(lambda: source_of(flags(gpt2, where, tmp_path, *more)), *words)
    refuse("--buffer 300", "smaller than two batches", "512", more=["--buffer", 300])
    refuse("--buffer 1000000000000", "GB free", "use at most", more=["--buffer", "1e12"])
    refuse("--cache-tokens", "--stream", more=["--cache-tokens", "1e6"])
    refuse("--tokens 1000000", "--epochs 11", "a longer text", more=["--tokens", "1e6"])
    short = tmp_path / "short.txt"
    short.write_text("alpha beta " * 3000)
    refuse("--text", "fewer than --buffer 8192", "leave out --stream", where=short)
    assert not list((tmp_path / "cache").glob(f"*{os.getpid()}*"))
    for argv in (["--activations", array[0]], ["--model", "toy"]):
        one_line(lambda: source_of([str(a) for a in argv] + ["--stream"]), "--stream", "no meaning")
    one_line(lambda: source_of(["--model", "toy", "--buffer", "9"]), "--buffer", "without --stream")

def test_refuses_to_resume_on_another_text(gpt2, folder, tmp_path, one_line):
    argv = flags(gpt2, tmp_path / "text", tmp_path, "--tokens", 256 * 20)
    (tmp_path / "text").mkdir()
    for path in folder.glob("1*.txt"):
        (tmp_path / "text" / path.name).write_text(path.read_text())
    train(argv, tmp_path / "run")
    before = (tmp_path / "run/state.pt").read_bytes()
    (tmp_path / "text/1.txt").write_text((folder / "2.txt").read_text())
    one_line(lambda: train(argv, tmp_path / "run", "--resume"), "--resume", "the text")
    assert (tmp_path / "run/state.pt").read_bytes() == before

@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_refuses_what_is_no_causal_language_model(kind, folder, tmp_path, one_line):
    if kind == "vit":
        import transformers as tf
        tf.ViTModel(tf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
                    ).save_pretrained(tmp_path / kind)
        random_lm("gpt2", tmp_path, folder / "0.txt")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "gpt2" / name).rename(tmp_path / kind / name)
    else:
        random_lm(kind, tmp_path, folder / "0.txt")
    words = ("is an encoder",) if kind == "bert" else ("no causal language model",)
    for more in ([], ["--stream"]):
        argv = [a for a in flags(tmp_path / kind, folder, tmp_path) if a != "--stream"]
        if not more:
            i = argv.index("--buffer")
            del argv[i:i + 2]
        one_line(lambda: source_of([*argv, *more]), f"--model {tmp_path / kind}", *words, "--activations")
