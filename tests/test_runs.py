"""Runs of every script: saving, SAELens, resume, Ctrl-C, torchrun, bad losses, every flag."""
import copy
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from unittest import mock

import numpy as np
import pytest
import torch

import data
import runs
import sparse
from sources import toy as toys
from conftest import ROOT, mcc

PENALTY = ["--l1", 30, "--l1-warmup", 3, "--target-l0", 3, "--p-end", 0.5, "--lr", 0.03]
TIED = ["--tied", *PENALTY, "--lr", 0.1]
K = ["--k", 3, "--auxk", 5]
GBA = ["--groups", 3, "--high", 0.06, "--low", 0.01, "--bias-every", 3, "--gamma-down", 0.4]
VARIANTS = {                      # script, class, architecture in SAELens, flags of toy_run
    "topk": ("topk_sae", "TopKSAE", "topk", K),
    "matryoshka": ("matryoshka_sae", "MatryoshkaSAE", "jumprelu", [*K, "--k-start", 6.5]),
    "ordered": ("ordered_sae", "OrderedSAE", "topk", [*K, "--k-start", 6, "--sweep", 0.8]),
    "vanilla": ("vanilla_sae", "VanillaSAE", "standard", PENALTY),
    "tied": ("vanilla_sae", "VanillaSAE", "standard", TIED),
    "gated": ("gated_sae", "GatedSAE", "gated", PENALTY),
    "gba": ("gba_sae", "GBASAE", "jumprelu", GBA),
    "gba-relu": ("gba_sae", "GBASAE", "standard", [*GBA, "--relu", "--train-b-dec", "--untied"])}
TOPK = {"topk", "matryoshka", "ordered"}                    # with --k and AuxK
L1 = {"vanilla", "tied", "gated"}                           # with a penalty
OPTIONS = {"tied": dict(tied=True), "gba-relu": dict(relu=True, train_b_dec=True, untied=True)}      # of the class
OPTIONS |= {variant: dict(k=3) for variant in TOPK}
FLAGS = {"tied": ["--tied"], "gba": ["--high", 0.3, "--low", 0.1]} | {v: ["--k", 3] for v in TOPK}
FLAGS["gba-relu"] = [*FLAGS["gba"], "--relu", "--train-b-dec", "--untied"]
RECOVERS = {"topk": [], "matryoshka": ["--balance", 0], "ordered": ["--full-share", 0.9],
            "vanilla": [], "gated": [], "gba": ["--groups", 1, "--high", 0.06]}
each_variant = pytest.mark.parametrize("variant", VARIANTS)

def quick_for(*names):
    """Each variant; those that are not named among the claims alone, for time."""
    return pytest.mark.parametrize("variant", [v if v in names else pytest.param(v, marks=pytest.mark.claims)
                                               for v in VARIANTS])

def script(variant):
    return importlib.import_module(VARIANTS[variant][0])

def run(variant, *argv):
    return script(variant).train(script(variant).parse_args([str(a) for a in argv]))

def toy_flags(variant):
    return ["--model", "toy", "--toy", "song", "--d-sae", 200, "--batch-size", 64, "--tokens",
            64 * 30, "--dead-after", 64 * 3, "--no-bf16", "--log-every", 10, *VARIANTS[variant][3]]

def toy_run(variant, out, *argv):
    """30 steps on the toy 'song', so wide that many latents count as dead at any time. Where there
    is a penalty or a ceiling, codes are dense at first and sparse at the end. Scaling and results are of
    4,096 samples, for time."""
    with mock.patch.object(toys, "ROWS", 4096):
        return run(variant, *toy_flags(variant), *(["--out", out] if out else []), *argv)

def equal(a, b):
    return [n for n, p in a.named_parameters() if not torch.equal(p, b.get_parameter(n))] == []

# --- saving ---------------------------------------------------------------------------------------

@each_variant
def test_saved_sae_takes_raw_activations(variant, array, tmp_path):
    """Saved and loaded, the SAE gives on raw x what training saw on x' = (x - mean) * scale."""
    path, _ = array
    m, cls, architecture, flags = script(variant), *VARIANTS[variant][1:]
    argv = ["--activations", path, "--d-sae", 32, "--tokens", 50_000, "--no-bf16", "--batch-size",
            256, "--out", tmp_path / "run", *FLAGS.get(variant, [])]
    sae = run(variant, *argv)
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)["sae"]
    source = data.open_source(m.parse_args([str(a) for a in argv]), torch.device("cpu"))
    assert abs(source.mean.norm() - 120) < 10 and source.scale < 0.5           # far from 0 and 1
    inner = getattr(m, cls)(16, 32, **OPTIONS.get(variant, {})).eval()
    inner.load_state_dict(state)
    if variant == "matryoshka":
        assert sae.threshold[0] > 0
        inner.threshold.copy_(sae.threshold * source.scale)
    x = torch.from_numpy(np.load(path)[:500])
    scaled = (x - source.mean) * source.scale
    for outer in (sae, m.load(tmp_path / "run")):
        assert torch.allclose(outer.encode(x) * source.scale, inner.encode(scaled), atol=1e-4)
        assert torch.allclose(outer(x), inner(scaled) / source.scale + source.mean, atol=1e-3)
        assert torch.allclose(outer.W_dec.norm(dim=1), torch.ones(32), atol=1e-5)
    shapes = {n: tuple(t.shape) for n, t in runs.load_sae(tmp_path / "run")[1].items()}
    biases = ["b_gate", "b_mag", "r_mag"] if variant == "gated" else ["b_enc"]
    biases += ["threshold"] if architecture == "jumprelu" else []
    assert shapes == dict({b: (32,) for b in biases}, W_enc=(16, 32), W_dec=(32, 16), b_dec=(16,))
    cfg = json.loads((tmp_path / "run/cfg.json").read_text())
    assert cfg["architecture"] == architecture and cfg["d_in"] == 16
    assert cfg["metadata"]["float32_matmul"] == torch.get_float32_matmul_precision()
    l0 = cfg["metadata"]["results"]["l0"]
    assert abs(l0 - 3) < 0.06 if variant in TOPK else l0 > 0

def recovery_flags(variant):
    flags = ["--d-sae", 32, "--k", 3] if variant in TOPK else ["--d-sae", 64]
    return flags + (["--target-l0", 3.5] if variant in L1 else []) + RECOVERS[variant]

@pytest.mark.parametrize("variant", RECOVERS)
def test_user_array_recovers_its_features(variant, array, tmp_path):
    """Claim: on a user's array, 'song' moved and stretched, the features are found, MCC at least .9 (TopK and
    L1: .95; BatchTopK: .85, as seeds 0 to 4 give .89 to .94, .92 on average). Control: untrained, below .7."""
    path, toy = array
    sae = run(variant, "--activations", path, "--tokens", 1e6, "--batch-size", 512, "--out",
              tmp_path / "run", *recovery_flags(variant))
    assert mcc(toy.features, sae.W_dec) >= dict(topk=0.95, vanilla=0.95, matryoshka=0.85).get(variant, 0.9)
    torch.manual_seed(0)
    untrained = getattr(script(variant), VARIANTS[variant][1])(*sae.W_dec.T.shape, **OPTIONS.get(variant, {}))
    assert mcc(toy.features, untrained.W_dec) < 0.7

@each_variant
def test_saelens_agrees(variant, array, tmp_path):
    """SAELens loads the run directory and gives the same codes and reconstructions to 1e-5."""
    if not find_spec("sae_lens"):
        return                                 # benchmarks/results/saelens.txt records runs of it
    from sae_lens import SAE
    path, _ = array
    run(variant, "--activations", path, "--d-sae", 32, "--tokens", 50_000, "--batch-size", 256,
        "--out", tmp_path / "run", *FLAGS.get(variant, []))
    theirs, ours = SAE.load_from_disk(tmp_path / "run"), script(variant).load(tmp_path / "run")
    x = torch.from_numpy(np.load(path)[:500])
    with torch.no_grad():
        z = theirs.encode(x)
        assert z.count_nonzero() > 500
        assert torch.allclose(z, ours.encode(x), rtol=1e-5, atol=1e-5)
        assert torch.allclose(theirs.decode(z), ours(x), rtol=1e-5, atol=1e-5)
    assert theirs.cfg.architecture() == VARIANTS[variant][2]

@each_variant
def test_memory_layout_and_dtype_survive_training(variant, tmp_path):
    """W_enc is [D, F] but lies in memory as F rows of D, which the sparse gradients rely on; bf16 is
    for matmuls, parameters stay float32."""
    sae = toy_run(variant, tmp_path / "run", "--bf16")
    assert all(p.dtype == torch.float32 for p in sae.parameters())
    if hasattr(sae, "W_enc"):
        assert sae.W_enc.shape == (16, 200) and sae.W_enc.T.is_contiguous()

# --- interruptions --------------------------------------------------------------------------------

@pytest.mark.parametrize("bf16", ["--no-bf16", "--bf16"])
@each_variant
def test_resumed_equals_uninterrupted(variant, bf16, tmp_path, monkeypatch, capsys):
    """Stopped between steps (as by Ctrl-C) and resumed, a run ends at the very same bits."""
    whole = toy_run(variant, tmp_path / "whole", bf16)
    real, calls = script(variant).train_step, []
    def step(*a, **kw):
        calls.append(1)
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*a, **kw)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(script(variant), "train_step", step)
        toy_run(variant, tmp_path / "cut", bf16)
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "cut/state.pt", weights_only=True)["step"] == 20
    assert not (tmp_path / "cut/cfg.json").exists()
    assert equal(whole, toy_run(variant, tmp_path / "cut", bf16, "--resume"))
    read = lambda run: [{k: v for k, v in json.loads(line).items() if k != "tok_s"}
                        for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
    assert read("whole") == read("cut")
    if variant not in TOPK:
        saved = torch.load(tmp_path / "whole/state.pt", weights_only=True)["state"]
        assert saved["sparse"]                                     # as for step 0 it never is
        assert variant not in L1 or float(saved["p"]) == 0.5

def test_resume_of_another_script(tmp_path, one_line):
    toy_run("vanilla", tmp_path / "run")
    one_line(lambda: toy_run("gated", tmp_path / "run", "--resume"), "--resume", "another script")

def test_resume_of_a_run_from_before_a_flag(tmp_path, one_line):
    """A run that had no --last-token goes on, unless it would get one now, or lacks a flag that has a default."""
    toy_run("topk", tmp_path / "run")
    path = tmp_path / "run/state.pt"
    saved = torch.load(path, weights_only=True)
    for flag, works in (("last_token", True), ("k", False)):
        torch.save({**saved, "flags": {k: v for k, v in saved["flags"].items() if k != flag}}, path)
        again = lambda: toy_run("topk", tmp_path / "run", "--resume")
        again() if works else one_line(again, "--resume", "another version")

@pytest.mark.parametrize("variant, flags", [*((v, []) for v in VARIANTS),
                                            ("matryoshka", ["--random-widths"])])
def test_resumes_from_a_save(variant, flags, tmp_path, monkeypatch):
    """Killed without warning after step 17: the save of step 10 is exact, and the log goes on from there."""
    whole = toy_run(variant, tmp_path / "whole", *flags)
    real, calls = script(variant).train_step, []
    def step(*a, **kw):
        calls.append(1)
        if len(calls) == 18:
            raise MemoryError
        return real(*a, **kw)
    with monkeypatch.context() as m, pytest.raises(MemoryError):
        m.setattr(script(variant), "train_step", step)
        toy_run(variant, tmp_path / "cut", "--save-every", 0, "--log-every", 1, *flags)
    assert torch.load(tmp_path / "cut/state.pt", weights_only=True)["step"] == 10
    again = lambda: toy_run(variant, tmp_path / "cut", "--resume", "--save-every", 0, "--log-every", 1,
                            *flags)
    assert equal(whole, again())
    steps = [json.loads(line)["step"] for line in open(tmp_path / "cut/metrics.jsonl")]
    assert steps == list(range(1, 31))
    with open(tmp_path / "cut/metrics.jsonl", "a") as f:
        f.write('{"step": 31, "lo')                                      # as a full disk leaves it
    assert equal(whole, again())                                         # finished: nothing to do

def test_saves_by_the_clock(tmp_path, monkeypatch):
    """--save-every is in minutes, fractions too: with steps of 3 s, state.pt is written at the first check after each 36 s
    since the last, and at the end; by default not before the end."""
    now, real, saves = [0.0], runs.save_state, []
    def end_step(self, *args, end_step=runs.Run.end_step):
        now[0] += 3
        end_step(self, *args)
    monkeypatch.setattr(runs.Run, "end_step", end_step)
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(runs, "save_state", lambda *args: saves.append(args[-1]) or real(*args))
    toy_run("topk", tmp_path / "a", "--save-every", 0.6, "--tokens", 64 * 70)
    assert saves == [20, 40, 60, 70]
    toy_run("topk", tmp_path / "b", "--tokens", 64 * 70)
    assert saves[4:] == [70]

def test_ctrl_c_on_the_command_line(tmp_path):
    argv = ["topk_sae.py", "--model", "toy", "--k", "5", "--tokens", "1e9", "--log-every", "10",
            "--out", str(tmp_path / "run")]
    run = subprocess.Popen([sys.executable, *argv], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    for line in run.stdout:
        if line.startswith("step"):
            break
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err
    assert f"--resume --out {tmp_path / 'run'}" in out and (tmp_path / "run/state.pt").exists()

def torchrun(*argv):
    """Two processes of a script."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                           *map(str, argv)], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})

def hooked(tmp_path, line):
    """A file that runs topk_sae.py as a user does, after this line of Python."""
    path = tmp_path / "hooked.py"
    path.write_text(f"import os, runpy, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport data\n{line}\n"
                    f"runpy.run_path({str(ROOT / 'topk_sae.py')!r}, run_name='__main__')\n")
    return path

def test_ctrl_c_before_the_loop(tmp_path):
    """While data are made ready: one line, exit code 130, no run directory."""
    path = hooked(tmp_path, "signal.signal(signal.SIGINT, signal.default_int_handler)\n"   # which a job in the background lacks
                  "data.open_source = lambda *args: signal.raise_signal(signal.SIGINT)")
    job = subprocess.run([sys.executable, path, "--model", "toy", "--out", tmp_path / "run"], text=True,
                         capture_output=True)
    assert job.returncode == 130 and job.stderr == "stopped; what was saved before is intact\n", job.stderr
    assert not (tmp_path / "run").exists()

# --- one process at a time in a run directory -----------------------------------------------------

@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of tmp_path / 'run', until it is killed."""
    (tmp_path / "run").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "run" / runs.LOCK],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()

def test_a_second_start_is_refused(other, tmp_path, one_line, monkeypatch):
    """Also a second --resume; a start without --out goes elsewhere. Killed, a process is in nobody's way."""
    out = tmp_path / "run"
    one_line(lambda: toy_run("topk", out), f"--out {out}", "another process", "choose another")
    names = iter([out, tmp_path / "next"])                  # as if both had found the first one free
    with monkeypatch.context() as m:
        m.setattr(runs, "default_dir", lambda args: next(names))
        toy_run("topk", None)
    assert (tmp_path / "next/cfg.json").exists() and [p.name for p in out.iterdir()] == [runs.LOCK]
    shutil.copy(tmp_path / "next/state.pt", out)
    one_line(lambda: toy_run("topk", out, "--resume"), f"--out {out}", "another process")
    (out / "state.pt").unlink()
    other.kill()
    other.wait()
    toy_run("topk", out)
    toy_run("topk", out, "--resume")                        # its lock is this process's own
    one_line(lambda: toy_run("topk", out), "not empty")

@pytest.mark.claims
@pytest.mark.parametrize("out", [["--out", "run"], []], ids=["same", "default"])
def test_two_starts_at_once(out, tmp_path):
    """Of two processes with the same new --out one is refused; without --out they take two directories."""
    argv = [sys.executable, ROOT / "topk_sae.py", "--model", "toy", "--tokens", str(2048 * 300), *out]
    jobs = [subprocess.Popen(argv, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)]
    errors = [job.communicate(timeout=300)[1] for job in jobs]
    assert sorted(job.returncode for job in jobs) == ([0, 2] if out else [0, 0]), errors
    assert len(list(tmp_path.rglob("cfg.json"))) == (1 if out else 2)
    assert not out or len(max(errors).splitlines()) == 1 and "--out run" in max(errors), errors

def test_every_rank_says_what_failed(tmp_path):
    """Where rank 1 alone fails, its error is printed, once, with its rank."""
    path = hooked(tmp_path, "sys.argv += ['--toy', 'nonsense'] if os.environ['RANK'] == '1' else []")
    job = torchrun(path, "--model", "toy", "--device", "cpu", "--tokens", "1e9", "--out", tmp_path / "run")
    said = [line for line in job.stderr.splitlines() if ": error: " in line]
    assert job.returncode and len(said) == 1 and ", rank 1: error: --toy nonsense" in said[0], job.stderr

def test_one_process_names_no_rank(capsys):
    runs.print_error("no")
    assert capsys.readouterr().err.endswith(": error: no\n") and runs.world_size() == 1

@quick_for("topk", "gated")
def test_two_processes_equal_one(variant, tmp_path):
    """torchrun with two processes gives the weights of one process at the same global batch, and the very
    same weights if it is stopped and resumed. (p ends at .9 here: the gradient of z^.5 at z = 0 makes 1e-4
    of the 1e-8 by which sums round apart.)"""
    argv = [str(a) for a in [*toy_flags(variant), "--tokens", 64 * 25, "--device", "cpu",
                             "--log-every", 5, *(["--p-end", 0.9] if variant in L1 else [])]]
    script = VARIANTS[variant][0]
    job = torchrun(f"{script}.py", *argv, "--out", tmp_path / "two")
    assert job.returncode == 0, job.stderr
    cut = None
    if variant not in ("topk", "gated"):                   # those of the quick run, for time
        (tmp_path / "cut.py").write_text(f"""import os, signal, {script} as script
real = script.train_step
def step(sae, opt, x, state, step, *rest):
    if step == 12 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)
    return real(sae, opt, x, state, step, *rest)
script.train_step = step
script.train(script.parse_args())
""")
        torchrun(tmp_path / "cut.py", *argv, "--out", tmp_path / "cut")
        assert torch.load(tmp_path / "cut/state.pt", weights_only=True)["step"] == 20
        again = torchrun(f"{script}.py", *argv, "--out", tmp_path / "cut", "--resume")
        assert again.returncode == 0, again.stderr
        cut = runs.load_sae(tmp_path / "cut")[1]
    run(variant, *argv, "--out", tmp_path / "one")
    one, two = (runs.load_sae(tmp_path / name)[1] for name in ("one", "two"))
    for n, p in two.items():
        assert cut is None or torch.equal(p, cut[n]), n
        atol = 1e-5 if variant in TOPK else 1e-4
        assert torch.allclose(p, one[n], atol=atol), (n, (p - one[n]).abs().max())
    logs = [[json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
            for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 5
    assert variant not in TOPK or logs[0][-1]["aux"] > 0                       # AuxK took part
    for a, b in zip(*logs):
        assert all(a[k] == pytest.approx(b[k], rel=1e-3) for k in a if k != "tok_s")
    assert job.stdout.count("held out") == 1
    if variant not in TOPK:                                # of the global batch, as a resumed run gets it
        a, b = (torch.load(tmp_path / name / "state.pt", weights_only=True)["state"] for name in ("one", "two"))
        assert float(a["per_token"]) == pytest.approx(float(b["per_token"]), rel=1e-5)

@each_variant
def test_gradients_have_norm_1(variant, tmp_path, monkeypatch):
    """As Adam sees them: after the first step its first moments are (1 - beta1) of a gradient."""
    real, norms = script(variant).train_step, []
    def step(sae, opt, *rest):
        terms = real(sae, opt, *rest)
        moments = [state["exp_avg"] for state in opt.state.values()]
        norms.append(torch.nn.utils.get_total_norm(moments).item() / (1 - script(variant).BETAS[0]))
        return terms
    monkeypatch.setattr(script(variant), "train_step", step)
    toy_run(variant, tmp_path / "run", "--tokens", 64 * 3)
    assert norms[0] == pytest.approx(1, rel=1e-4)

@pytest.mark.parametrize("script_flags", ["gba --toy flat --batch-size 32 --groups 1 --high 0.001 --gamma-down 1 --tokens 4e4",
                                          "vanilla --tied --l1 50 --toy song --batch-size 64 --tokens 4e4 --l1-warmup 50"])
def test_a_batch_in_which_nothing_fires(script_flags, tmp_path):
    """Its gradient is 0 and has no norm to be divided by; the weights stay finite."""
    name, *flags = script_flags.split()
    with mock.patch.object(toys, "ROWS", 4096):
        sae = run(name, "--model", "toy", *flags, "--d-sae", 32, "--out", tmp_path / "run")
    assert all(p.isfinite().all() for p in sae.parameters())
    assert json.loads((tmp_path / "run/cfg.json").read_text())["metadata"]["results"]["l0"] < 1

@pytest.mark.parametrize("variant, fault", [(v, fault) for v in VARIANTS for fault in ("nan", "inf", "room")
                                            if fault != "room" or v not in TOPK])
def test_a_step_that_is_left_out_changes_nothing(variant, fault, tmp_path, monkeypatch):
    """Bit for bit: weights, moments, controllers, statistics. The batch holds NaN, or squares overflow,
    or, as on CUDA, more latents are active than there is room for: their number alone is kept, for more
    room at the next check."""
    real, calls = script(variant).train_step, []
    class Seen(Exception): pass
    def step(sae, opt, x, state, step, args, *rest):
        if step < 24:                                      # no update of biases after step 24
            return real(sae, opt, x, state, step, args, *rest)
        everything = lambda: copy.deepcopy([dict(sae.state_dict()), opt.state_dict()["state"], {
            k: v for k, v in state.items() if k not in ("per_token", "weight", "p", "p_next", "n")}])
        before, active = everything(), state.get("per_token")
        if fault == "room":
            monkeypatch.setattr(sparse, "encode", lambda *rest: sparse.encode_fixed(*rest[:4], room=5))
        real(sae, opt, x * dict(nan=torch.nan, inf=1e30, room=1)[fault], state, step, args, *rest)
        flat = lambda tree: tree if not isinstance(tree, (dict, list)) else [
            leaf for part in (tree.values() if isinstance(tree, dict) else tree)
            for leaf in (flat(part) if isinstance(part, (dict, list)) else [part])]
        pairs = list(zip(flat(before), flat(everything()), strict=True))
        assert len(pairs) > 10 and all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)
        assert active is None or (float(state["per_token"]) == float(active)) == (fault != "room")
        raise Seen
    monkeypatch.setattr(script(variant), "train_step", step)
    with pytest.raises(Seen):
        toy_run(variant, tmp_path / "run")

@each_variant
def test_equal_rows_do_not_cost_the_weights(variant, array, tmp_path):
    """Held-out rows that are all equal have no variance to explain: FVU is null, and the SAE is saved."""
    x = np.load(array[0])[:2000]
    np.save(tmp_path / "X.npy", x)
    argv = ["--activations", tmp_path / "X.npy", "--d-sae", 32, "--batch-size", 64, "--tokens", 64 * 10,
            *FLAGS.get(variant, [])]
    source = data.open_source(script(variant).parse_args([str(a) for a in argv]), torch.device("cpu"))
    x[source.shards.numbers(source.heldout_rows())] = np.float32(0.1)                          # whose mean is rounded
    np.save(tmp_path / "X.npy", x)
    run(variant, *argv, "--out", tmp_path / "run")
    cfg, tensors = runs.load_sae(tmp_path / "run")
    assert cfg["metadata"]["results"]["fvu"] is None and len(tensors) >= 3
    assert np.isfinite(cfg["metadata"]["results"]["l0"])

def test_a_batch_without_power_has_no_fvu(tmp_path, monkeypatch):
    monkeypatch.setattr(toys.ToySource, "batch", lambda self, step: torch.zeros(64, 16))
    toy_run("topk", tmp_path / "run")
    assert '"fvu": null' in (tmp_path / "run/metrics.jsonl").read_text()

def test_float32_of_a_cpu():
    """oneDNN's, but torch's own on Intel without bf16, and wherever AMX would make bf16 of it."""
    cpu = "processor\t: 0\nvendor_id\t: {}\nmodel name\t: {}\nflags\t\t: fpu avx2 avx512f{}\n".format
    intel = cpu("GenuineIntel", "Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz", "")
    cooper_lake = cpu("GenuineIntel", "Intel(R) Xeon(R) Gold 6348H", " avx512_bf16")
    amd = cpu("AuthenticAMD", "AMD EPYC 7763", "")
    arm = "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU implementer\t: 0x41\n"
    assert [runs.float32_matmul(text, False) for text in (intel, cooper_lake, amd, arm, "")] == [
        "high", "medium", "medium", "medium", "medium"]
    assert runs.float32_matmul(cooper_lake + "amx_tile", True) == runs.float32_matmul("", True) == "high"

@each_variant
def test_non_finite_loss_stops_with_the_last_good_state(variant, tmp_path, monkeypatch, one_line):
    real = toys.ToySource.batch
    def batch(self, step):
        x = real(self, step)
        return x * float("nan") if step == 35 else x
    monkeypatch.setattr(toys.ToySource, "batch", batch)
    one_line(lambda: toy_run(variant, tmp_path / "run", "--tokens", 64 * 50), "not finite", "step 40",
             "--lr")
    saved = torch.load(tmp_path / "run/state.pt", weights_only=True)
    assert variant in TOPK or saved["state"]["sparse"] and saved["state"]["per_token"] > 0.01
    tensors = [*saved["sae"].values(), *(t for s in saved["opt"]["state"].values() for t in s.values()),
               *(t for t in saved["state"].values() if torch.is_tensor(t))]
    assert all(t.isfinite().all() for t in tensors)

@pytest.mark.claims
@each_variant
def test_compile_changes_nothing_but_speed(variant, tmp_path, monkeypatch, one_line):
    if not any(map(shutil.which, runs.COMPILERS)):              # then only that it says so
        return one_line(lambda: toy_run(variant, tmp_path / "b", "--compile"), "--compile", "compiler")
    with monkeypatch.context() as m:
        m.setattr(runs, "COMPILERS", ["no-such-compiler"])
        one_line(lambda: toy_run(variant, tmp_path / "c", "--compile"), "--compile", "compiler")
    flags = ["--p-end", 1 if variant == "gated" else 0.9] if variant in L1 else []     # see above
    plain = toy_run(variant, tmp_path / "a", *flags)
    compiled = toy_run(variant, tmp_path / "b", *flags, "--compile")
    for n, p in plain.named_parameters():
        assert torch.allclose(p, compiled.get_parameter(n), atol=1e-4), n

# --- CUDA -----------------------------------------------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@each_variant
def test_no_host_synchronisation_in_a_step(variant):
    """CUDA reports any wait of the host for the device; steps between two checks have none."""
    torch.manual_seed(0)
    m, flags = script(variant), ["--batch-size", 512, "--d-sae", 8192, "--bf16"]
    flags += ["--k", 8, "--auxk", 8] if variant in TOPK else []
    args = m.parse_args([str(a) for a in flags])
    args.steps, args.lr, args.warmup, args.l1_warmup, args.k_start = 100, 1e-3, 1, 1, 16
    args.gamma_down = args.gamma_up = args.bias_every = 1
    options = dict(k=8) if variant in TOPK else OPTIONS.get(variant, {})
    sae, x = getattr(m, VARIANTS[variant][1])(64, 8192, **options).cuda(), torch.randn(512, 64).cuda()
    opt = runs.adam(sae, 1e-3, m.BETAS)
    args.widths = [512, 8192]
    state = dict(m.init_state(args, "cuda"), dead=torch.arange(4000, device="cuda"), per_token=9.0)
    m.train_step(sae, opt, x, state, 0, args)                              # allocations, libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2, 3):
            m.train_step(sae, opt, x, state, step, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("variant", sorted(TOPK))
def test_cuda_loss_equals_the_cpu_s(variant):
    """One batch, some latents dead: value and gradients on both devices."""
    m, grads = script(variant), {}
    args = Namespace(auxk=8, auxk_alpha=1 / 32)
    torch.manual_seed(0)
    sae, x = getattr(m, VARIANTS[variant][1])(64, 1024, 8), torch.randn(512, 64)
    state = dict(dead=torch.arange(0, 1024, 9), n=8 * 512, widths=torch.tensor([100, 1024]),
                 weights=torch.tensor([1.0, 1.0]), survival=torch.linspace(1, 0.5, 1024))
    for device in ("cpu", "cuda"):
        sae = sae.to(device)
        sae.zero_grad()
        state = {n: v.to(device) if torch.is_tensor(v) else v for n, v in state.items()}
        loss = m.sparse_loss(sae, x.to(device), state, args)[0]
        loss.backward()
        grads[device] = [loss.detach().cpu(), *(p.grad.cpu() for p in sae.parameters())]
    for a, b in zip(*grads.values()):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max())

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("variant", RECOVERS)
def test_cuda_run_finds_the_features(variant, array, tmp_path):
    path, toy = array
    sae = run(variant, "--activations", path, "--tokens", 1e6, "--batch-size", 512, "--device",
              "cuda", "--out", tmp_path / "run", *recovery_flags(variant))
    assert mcc(toy.features, sae.W_dec.cpu()) >= (0.95 if variant in ("topk", "vanilla") else 0.9)

# --- flags ----------------------------------------------------------------------------------------

CHANGES = {                       # flags that change the weights of toy_run, and a value that does
    "toy": "song:1", "d_sae": 190, "tokens": 64 * 25, "batch_size": 32, "lr": 1e-3, "warmup": 9,
    "dead_after": 64, "seed": 1, "bf16": None, "k": 2, "auxk": 2, "auxk_alpha": 0.5,
    "l1": 5, "l1_warmup": 20, "target_l0": 20, "p_end": 0.3, "k_start": 10, "k_anneal": 0.5,
    "widths": [20, 200], "random_widths": None, "balance": 0.3, "prefix_law": "zipf",
    "full_share": 0.2, "sweep": 0.3, "groups": 2, "high": 0.2, "low": 0.002, "bias_every": 2,
    "gamma_down": 0.2, "gamma_up": 0.0, "relu": None, "train_b_dec": None}
ELSEWHERE = {                     # flags whose effect another test shows
    "model", "layer", "text", "context", "cache_tokens", "cache_dir", "activations", "device",
    "last_token", "stream", "buffer", "epochs", "drop_norm", "context_ids", "out", "resume", "compile", "dense", "log_every",
    "save_every", "tied", "untied"}
ONLY_LOGGED = {"dead_after"}      # where no AuxK acts on the dead

def flags_of(variant):
    return set(vars(script(variant).parse_args([])))

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    outs = {v: tmp_path_factory.mktemp("base") / v for v in VARIANTS}
    return {v: (toy_run(v, outs[v]), outs[v]) for v in VARIANTS}

SHARED = {"toy", "d_sae", "tokens", "batch_size", "lr", "warmup", "seed", "bf16"}    # in a shared span

@pytest.mark.parametrize("variant, flag", [
    pytest.param(v, f, marks=[pytest.mark.claims] if f in SHARED and v not in ("topk", "gba") else [])
    for v in VARIANTS for f in CHANGES if f in flags_of(v) and (v != "gba-relu" or f == "toy")])
def test_flag_takes_effect(variant, flag, base, tmp_path):
    value = CHANGES[flag]
    sae = toy_run(variant, tmp_path / "run", "--" + flag.replace("_", "-"),
                  *([] if value is None else value if isinstance(value, list) else [value]))
    same = [torch.equal(p, sae.get_parameter(n)) for n, p in base[variant][0].named_parameters()
            if p.shape == sae.get_parameter(n).shape]
    if flag in ONLY_LOGGED and variant not in TOPK:
        dead = lambda out: [json.loads(line)["dead"] for line in open(out / "metrics.jsonl")]
        assert all(same) and dead(base[variant][1]) != dead(tmp_path / "run")
    else:
        assert not all(same) or len(same) < len(list(sae.parameters()))

@each_variant
def test_log_every_and_its_keys(variant, base, tmp_path):
    toy_run(variant, tmp_path / "run", "--log-every", 1)
    lines = lambda out: (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines(base[variant][1])) == 3 and len(lines(tmp_path / "run")) == 30
    own = ["mse", "penalty", "aux", "l1", "gate_l0"] if variant == "gated" else \
        ["mse", "aux"] if variant in TOPK else ["mse", "penalty", "l1"] if variant in L1 else \
        ["mse", "target", "freq"]
    assert list(json.loads(lines(base[variant][1])[0])) == [
        "step", "tokens", "fvu", "l0", "dead", "tok_s", "loss", *own, "lr"]

def test_every_flag_is_tested():
    for variant in VARIANTS:
        assert flags_of(variant) <= set(CHANGES) | ELSEWHERE

@pytest.mark.parametrize("flag, value, word", [
    ("--p-end", "0", "at most 1"), ("--p-end", "1.5", "at most 1"), ("--p-end", "nan", "at most 1"),
    ("--l1", "-1", "at least 0"), ("--l1", "nan", "at least 0"), ("--target-l0", "0", "at least"),
    ("--target-l0", "201", "--d-sae"), ("--l1-warmup", "0", "at least 1"), ("--l1", "x", "x"),
    ("--l1", "0", "above 0")])
@pytest.mark.parametrize("variant", ["vanilla", "gated"])
def test_bad_values_of_the_penalty_flags(variant, flag, value, word, tmp_path, one_line):
    one_line(lambda: toy_run(variant, tmp_path / "run", flag, value), word)
    assert not (tmp_path / "run").exists()

@pytest.mark.parametrize("variant, flag, value, word", [
    ("matryoshka", "--widths", "20 10 200", "increase"), ("matryoshka", "--widths", "20 20 200", "increase"),
    ("matryoshka", "--widths", "20 100", "--d-sae"), ("matryoshka", "--widths", "0 200", "at least 1"),
    ("matryoshka", "--balance", "-0.1", "at least 0"), ("matryoshka", "--balance", "inf", "at least 0"),
    ("matryoshka", "--k", "0.001", "one a batch"), ("matryoshka", "--k", "201", "--d-sae"),
    ("matryoshka", "--k-start", "201", "--d-sae"), ("matryoshka", "--k", "nan", "at least"),
    ("matryoshka", "--widths", "200 --random-widths", "more than one"),
    ("matryoshka", "--balance", "0 --random-widths", "--balance above 0"),
    ("ordered", "--k", "201", "--d-sae"), ("ordered", "--k", "2.5", "whole"),
    ("ordered", "--k-start", "201", "--d-sae"), ("ordered", "--k-anneal", "0", "above 0"),
    ("ordered", "--full-share", "1.5", "at most 1"), ("ordered", "--full-share", "-1", "at least 0"),
    ("ordered", "--prefix-law", "pareto", "uniform"), ("ordered", "--sweep", "2", "at most 1")])
def test_bad_values_of_the_nested_flags(variant, flag, value, word, tmp_path, one_line):
    flag_named = "--random-widths" if "--random-widths" in value else flag
    one_line(lambda: toy_run(variant, tmp_path / "run", flag, *value.split()), flag_named, word)
    assert not (tmp_path / "run").exists()

def test_defaults_follow_their_rules():
    from topk_sae import default_lr, lr_at
    assert default_lr(2 ** 14, 10 ** 6) == 2e-4
    assert default_lr(2 ** 12, 10 ** 6) == pytest.approx(4e-4)
    assert default_lr(2 ** 14, 25_000) == pytest.approx(4e-4)
    assert default_lr(2 ** 14, 1000) == pytest.approx(1.2e-3)
    assert default_lr(32, 1000) == 0.01
    args = Namespace(lr=1.0, warmup=10, steps=100)
    lrs = [lr_at(s, args) for s in range(100)]
    assert lrs[0] == 0.1 and lrs[9] == lrs[50] == lrs[80] == 1 and lrs[90] == 0.5 and lrs[99] == 0.05
