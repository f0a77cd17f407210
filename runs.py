"""How a run starts, logs, stops and is saved: what is neither the data nor the method.

A run directory holds cfg.json and sae_weights.safetensors (the SAE, for raw activations, as SAELens
reads it), metrics.jsonl (the log), and state.pt (what --resume goes on from). Every file but the
log, to which lines are added, is written under a temporary name and then renamed, so what was there
before a failure is still there after it.
This file imports nothing of ours.
"""
import argparse, contextlib, ctypes, io, json, math, os, re, shutil, signal, sys, threading, time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from tqdm import tqdm

CHECK_EVERY = 10              # steps between the times when the host waits for the device
COMPILERS = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]       # torch.compile needs one

# --- errors ---------------------------------------------------------------------------------------

class BadInput(Exception):
    """Something that the user can mend; its text is one line that names the flag and the remedy."""

def fail(message, about=""):
    """Raise BadInput; `about`: what it is about, where the message alone does not say so."""
    raise BadInput(about + message)

@contextlib.contextmanager
def one_line_errors(stopped="stopped; what was saved before is intact"):
    """Around a whole command: a BadInput becomes one line on stderr and the exit code 2, Ctrl-C
    the line `stopped` and the exit code 130."""
    try:
        yield
    except BadInput as err:
        print_error(err)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if rank() == 0:
            print(stopped, file=sys.stderr)
        raise SystemExit(130) from None

def print_error(err):
    who = f", rank {rank()}" if world_size() > 1 else ""
    sys.stderr.write(f"{Path(sys.argv[0]).name}{who}: error: {err}\n")     # whole: ranks share it

def first_line(err): return (str(err).strip() or type(err).__name__).splitlines()[0][:160]

@contextlib.contextmanager
def replacing(path, flag):
    """Yields a temporary path that takes path's place at the end; failure leaves path as it was."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        os.replace(tmp, path)
    except (OSError, RuntimeError) as err:       # RuntimeError: what torch makes of a full disk
        fail(f"cannot write {path} ({first_line(err)}); free some space or choose another {flag}")
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink()

def lock(path, flag, wait=True):
    """An open file that holds the lock `path` until it is closed or the process ends. While another
    process holds it this waits, or returns None."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as err:
        fail(f"{flag} {path.parent}: {first_line(err)}; choose another")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return None
    except (ImportError, OSError):
        pass                                # Windows, or a file system that has no locks: no lock
    return file

# --- progress -------------------------------------------------------------------------------------

class Bar(tqdm):
    """A progress bar with the time left, of rank 0; a line of it every 30 s if stderr is no
    terminal."""
    def __init__(self, *args, **kw):
        self.plain = not sys.stderr.isatty()
        if self.plain:
            form = "{desc}: {percentage:.0f} % of {total_fmt}, {elapsed} gone, {remaining} left"
            kw |= dict(delay=30, mininterval=30, miniters=1, bar_format=form)
            kw["file"] = io.StringIO()                               # what tqdm itself writes
        if rank() > 0:
            kw["disable"] = True
        super().__init__(*args, **kw)

    def display(self, *args, **kw):
        super().display(*args, **kw)
        if self.plain:
            print(self, file=sys.stderr, flush=True)

# --- arguments ------------------------------------------------------------------------------------

def at_least(least, kind=int, most=1e18):
    """An argparse type: a number from `least` to `most`; whole ones may be written 2e6."""
    what = f"{'whole ' if kind is int else ''}number of at least {least}"
    what += f" and at most {most}" if most < 1e18 else ""
    def number(text):
        if not least <= float(text) <= most or kind is int and float(text) % 1:
            raise argparse.ArgumentTypeError(f"{text} is not a {what}")
        return kind(float(text))
    return number

count = at_least(1)

def share(text):
    """An argparse type: a number in (0, 1]."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and at most 1")
    return float(text)

class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are BadInput, and whose description is a docstring as it stands."""
    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        fail(f"{message} (--help lists the flags)")

# --- processes and devices ------------------------------------------------------------------------

def rank(): return int(os.environ.get("RANK", 0))
def world_size(): return int(os.environ.get("WORLD_SIZE", 1))

def all_reduce(tensor, op="mean"):
    """Mean, sum or max over the processes of torchrun, in place. One process: nothing to do."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        if op == "mean":
            tensor /= world_size()
    return tensor

def rank_0_first(function, *args):
    """function(*args) in every process, in that of rank 0 before the others."""
    result = function(*args) if rank() == 0 else None
    if world_size() > 1:
        dist.barrier()
    return result if rank() == 0 else function(*args)

def setup(args):
    """Start this process: group, device, matmul precision. Sets args.bf16; returns the device."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = args.device if args.device != "auto" else "cuda" if gpus else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        fail(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if device.index >= gpus:
            fail(f"--device {name}: torch {torch.__version__} finds {gpus} CUDA GPUs here, and no "
                 f"number {device.index}; use --device cpu")
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: torch finds no Apple GPU here; use --device cpu")
    if device.type == "mps" and not args.dense:
        fail("--device mps: the sparse sums have no implementation there; add --dense")
    if args.compile and device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        fail("--compile: needs a C++ compiler on the CPU; install g++ or clang++, or leave it out")
    if args.dense and world_size() > 1:
        fail("--dense: is for one process; leave it out under torchrun")
    if args.batch_size % world_size():
        fail(f"--batch-size {args.batch_size}: not a multiple of the {world_size()} processes")
    if args.tokens < args.batch_size:
        fail(f"--tokens {args.tokens}: less than one batch of --batch-size {args.batch_size}")
    if args.out and not args.resume:
        check_free(args.out)                               # now, not after minutes of harvesting
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))          # a harvest may take long
    if device.type == "cpu":
        keep_freed_memory()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = float32_matmul(cpuinfo, torch.cpu._is_amx_tile_supported())
    torch.set_float32_matmul_precision(cpu if device.type == "cpu" else "high")
    if args.bf16 is None:                       # with --dense sums, too, would be in bf16
        args.bf16 = has_fast_bf16(device) and not args.dense
    return device

def float32_matmul(cpuinfo, amx):
    """On CPUs: 'medium' is oneDNN's float32, 'high' torch's default, MKL's. oneDNN's is faster on
    AMD, MKL's on Intel without bf16 (docs/decisions.md, 18); with AMX 'medium' would
    mean bf16. By vendor, not by timing: on one machine a run and its resume take the same."""
    old_intel = "GenuineIntel" in cpuinfo and "avx512_bf16" not in cpuinfo
    return "high" if amx or old_intel else "medium"

def keep_freed_memory():
    """Make glibc reuse freed buffers. By default it hands large ones back to the kernel, and every
    step pays page faults to get them again. For what that costs the peers see
    benchmarks/speed.py --own-allocator."""
    with contextlib.suppress(OSError, AttributeError):        # not glibc: nothing to do
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)    # M_MMAP_MAX, M_TRIM_THRESHOLD

def has_fast_bf16(device):
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

def open_device(name):
    """The device of that name, set up to measure: sums in float64, and no TF32."""
    device = setup(argparse.Namespace(device=name, compile=False, dense=True, bf16=False, out=None,
                                      batch_size=1, tokens=1, resume=False))
    if device.type == "mps":
        fail("--device mps: has no float64, in which sums are made; use --device cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
    return device

@contextlib.contextmanager
def stop_signal(device):
    """Ctrl-C and SIGTERM only ask for a stop, between steps; a second Ctrl-C is final. Yields a
    function that says whether any process has been asked; all of them call it together."""
    asked = []
    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
    main = threading.current_thread() is threading.main_thread()
    old = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield lambda: bool(all_reduce(torch.tensor(float(len(asked)), device=device), "max"))
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

# --- the optimiser --------------------------------------------------------------------------------

def rows(p):
    """A parameter or gradient as it lies in memory, contiguous: W_enc [D, F] is F rows of D."""
    return p if p.is_contiguous() else p.T

def adam(sae, lr, betas):
    """Fused Adam on views of the parameters, since it would copy, in and out, what is not
    contiguous. A view shares its memory with the parameter, so a step moves the parameter itself;
    gradients must be handed to the views."""
    opt = torch.optim.Adam([rows(p.data) for p in sae.parameters()], lr, betas, fused=True)
    if sae.W_dec.device.type == "mps":          # its kernel does not divide by grad_scale (as read)
        def divide(opt, *rest):
            torch._foreach_div_([p.grad for p in opt.param_groups[0]["params"]], opt.grad_scale)
            opt.grad_scale = torch.ones_like(opt.grad_scale)
        opt.register_step_pre_hook(divide)
    return opt

# --- a run while it trains ------------------------------------------------------------------------

LOCK = ".lock"                # in a run directory: held while a process is at work on it

def flags(args):
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}

def run_dir(args, variant):
    """Make the run directory args.out, or find it for --resume; without --out it is the first free
    runs/VARIANT-MODEL-LAYER, or the last. Rank 0 gets the file that locks it, for this process."""
    args.variant, named, held = variant, args.out, None         # from here on one of the flags
    if rank() == 0:
        while not held:
            args.out = named or default_dir(args)
            if args.resume and not (args.out / "state.pt").is_file():
                fail(f"--resume: {args.out} holds no state.pt to go on from; choose another --out")
            held = lock(args.out / LOCK, "--out", wait=False)
            if not held and (named or args.resume):             # else: the next free name
                fail(f"--out {args.out}: another process is at work there; choose another")
        if not args.resume:
            check_free(args.out)
    if world_size() > 1:
        dist.broadcast_object_list(out := [args.out])
        args.out = out[0]
    return held

def default_dir(args):
    name = (args.activations.stem if args.activations else f"toy-{args.toy.replace(':', '-')}"
            if args.model == "toy" else f"{Path(args.model).name}-L{args.layer}")
    n, path = 1, lambda n: Path("runs", f"{args.variant}-{name}" + (f"-{n}" if n > 1 else ""))
    while path(n).exists():
        n += 1
    return path(n - 1 if args.resume and n > 1 else n)

def check_free(out):
    there = {p.name for p in out.iterdir()} - {LOCK} if out.is_dir() else out.exists()
    if there and rank() == 0:
        fail(f"--out {out}: exists and is not empty; choose another, or --resume if it is a run")

FREE_TO_CHANGE = {"out", "resume", "save_every", "log_every", "device", "cache_dir", "compile",
                  "epochs"}

def save_state(args, source, sae, opt, state, step):
    """Write state.pt: all that a resumed run needs, with the flags and data it must agree with."""
    if rank() == 0:
        with replacing(args.out / "state.pt", "--out") as tmp:
            torch.save(dict(sae=sae.state_dict(), opt=opt.state_dict(), state=state, step=step,
                            flags=flags(args), mean=source.mean,
                            source=source.state(step < args.steps)), tmp)

def load_state(args, source, sae, opt, state):
    """Fill sae, opt and state with what save_state wrote; returns the steps done. Fails if a flag
    that matters, or the data, differs from that run's."""
    try:
        saved = torch.load(args.out / "state.pt", map_location=source.device, weights_only=True)
        old, mean = saved["flags"], saved["mean"]
    except Exception as err:
        fail(f"--resume: {args.out / 'state.pt'} is damaged ({first_line(err)})")
    now = flags(args)
    new = {name for name in now.keys() - old.keys() if now[name] is None}    # that version had none
    if set(old) != now.keys() - new or set(saved["sae"]) != set(sae.state_dict()):
        fail(f"--resume: {args.out} is a run of another script, or of another version of it; "
             "choose another --out")
    for name, value in now.items():
        if name not in FREE_TO_CHANGE and old.get(name) != value:
            flag = "--" + name.replace("_", "-")
            fail(f"--resume: {flag} was {old.get(name)} in that run and is {value} now; they must "
                 "agree, or choose another --out for a new run")
    source.restore(saved["source"])
    if (mean - source.mean).norm() * source.scale > 1e-3:
        fail(f"--resume: the data of {args.out} have changed since; choose another --out")
    sae.load_state_dict(saved["sae"])
    opt.load_state_dict(saved["opt"])
    state.update(saved["state"])
    return saved["step"]

class Run:
    """A run from its first step to its saved SAE: run directory, --resume, log, saves, Ctrl-C.

        with Run(args, variant, source, sae, opt, state) as run:
            for step in run.steps:                          # from step 0, or where it was stopped
                ...
                run.end_step(step, x, terms, lr)            # logs, saves and stops when it is time
        run.save_sae(architecture, tensors, metrics)

    `state` is a dict of what the steps keep besides weights and moments; --resume restores it. It
    holds tokens_since_fired and dead. Ctrl-C or SIGTERM ends the run after a step, saved, with exit
    code 130. A loss or gradient that is not finite, where opt.bad is 2, ends it with BadInput; such
    steps were left out, as fused Adam leaves a step out where opt.found_inf is 1."""
    def __init__(self, args, variant, source, sae, opt, state):
        Run.lock = None                                   # of this process's run before, if any
        Run.lock = run_dir(args, variant)
        self.args, self.path = args, args.out / "metrics.jsonl"
        self.saved = source, sae, opt, state
        first = load_state(args, source, sae, opt, state) if args.resume else 0
        self.began = self.saved_at = time.perf_counter()
        self.mark, self.bad = (first, self.began), torch.zeros((), device=source.device)
        self.steps = Bar(range(first, args.steps), initial=first, total=args.steps, desc="train")
        if rank() == 0 and self.path.exists():           # resumed: drop what came after `first`
            lines = [l for l in self.path.read_text().splitlines(True) if l.endswith("}\n")]
            with replacing(self.path, "--out") as tmp:
                tmp.write_text("".join(l for l in lines if json.loads(l)["step"] <= first))

    def __enter__(self):
        self.exit = contextlib.ExitStack()
        self.stop = self.exit.enter_context(stop_signal(self.bad.device))
        self.exit.enter_context(self.steps)
        return self

    def __exit__(self, *error):
        Run.lock = Run.lock if error[0] is None else None      # else save_sae gives it back
        return self.exit.__exit__(*error)

    def end_step(self, step, x, terms, lr):
        """After step `step`, counted from 0, on the batch x [B, D]. The host waits for the device
        only every CHECK_EVERY steps, and where it logs or saves."""
        args, (_, _, opt, state) = self.args, self.saved
        self.bad += opt.bad == 2
        done, last = step + 1, step + 1 == args.steps
        halt = due = False
        if done % CHECK_EVERY == 0 or last:
            halt = self.bad.item() > 0 or self.stop() and not last
            due = time.perf_counter() - self.saved_at >= 60 * args.save_every
        if done % args.log_every == 0 or last:
            self.log(done, x, terms, lr, len(state["dead"]) / args.d_sae)
        if due or last or halt:                 # each process by its own clock: rank 0 alone writes
            save_state(args, *self.saved, done)
            self.saved_at = time.perf_counter()
        if halt:
            self.halt(done)

    def log(self, step, x, terms, lr, dead):
        """A line on the terminal and in metrics.jsonl, under the same keys: step, tokens; fvu = sum
        |e|^2 / sum |x|^2 of the batch (the training mean of x is 0), l0, share of dead latents,
        tokens a second; the terms (a vector as a list) averaged over processes; learning rate."""
        terms = dict(terms, power=x.pow(2).sum(1).mean())
        values = all_reduce(torch.cat([term.flatten() for term in terms.values()]))
        values = values.split([term.numel() for term in terms.values()])
        (before, then), self.mark = self.mark, (step, time.perf_counter())
        terms = {n: v.view_as(term).tolist() for (n, term), v in zip(terms.items(), values)}
        l0, batch = terms.pop("l0"), self.args.batch_size
        fvu = terms["mse"] / (terms.pop("power") or math.nan)
        record = dict(step=step, tokens=step * batch, fvu=fvu, l0=l0, dead=dead,
                      tok_s=(step - before) * batch / (self.mark[1] - then), **terms, lr=lr)
        if rank() > 0:
            return
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps({k: v if np.isfinite(v).all() else None
                                    for k, v in record.items()}) + "\n")
        except OSError as err:
            fail(f"--out: cannot write {self.path} ({err.strerror}); what was saved is intact")
        form = dict(step="{:5d}", fvu="{:.4f}", l0="{:.1f}", dead="{:.2%}", lr="{:.1e}",
                    tokens="{:,}", tok_s="{:,.0f}")
        say = print if self.steps.plain else self.steps.write
        say(" | ".join(f"{k} " + (form.get(k, "{:.4g}").format(v) if np.ndim(v) == 0
                                               else " ".join(f"{u:.2g}" for u in v))
                                    for k, v in record.items()))

    def halt(self, step):
        """End the run before its last step, its state being saved."""
        self.steps.close()
        if self.bad.item() > 0:
            fail(f"the loss was not finite at or before step {step}; those updates were left out, "
                 f"the last good state is in {self.args.out}; start again with a smaller --lr")
        if rank() == 0:
            print(f"stopped at step {step} of {self.args.steps}, saved in {self.args.out}; to go "
                  f"on: the same command with --resume --out {self.args.out}", flush=True)
        raise SystemExit(130)

    def save_sae(self, architecture, tensors, metrics, **cfg):
        """Write cfg.json and sae_weights.safetensors as SAELens 6 reads them; print the results."""
        if dist.is_initialized():
            dist.destroy_process_group()
        if rank() > 0:
            return
        args, source = self.args, self.saved[0]
        metrics["seconds"] = seconds = time.perf_counter() - self.began
        meta = dict(sae_lens_version="6.54.12", sae_lens_training_version=None, hook_name=None,
                    hook_head_index=None, context_size=None, prepend_bos=False, dataset_path=None)
        cfg = dict(cfg, architecture=architecture, d_in=source.d_in, d_sae=args.d_sae,
                   dtype="float32", device="cpu", apply_b_dec_to_input=True,
                   normalize_activations="none", reshape_activations="none",
                   metadata=dict(meta, **source.meta, training_architecture=args.variant,
                                 float32_matmul=torch.get_float32_matmul_precision(),
                                 scale=source.scale, flags=flags(args), results={
                                     k: None if v != v else v for k, v in metrics.items()}))
        with replacing(args.out / "sae_weights.safetensors", "--out") as tmp:
            tmp.write_bytes(save({n: t.contiguous().cpu() for n, t in tensors.items()}))
        with replacing(args.out / "cfg.json", "--out") as tmp:
            tmp.write_text(json.dumps(cfg, indent=1))
        print(f"held out ({metrics['heldout_tokens']:,} tokens): l0 {metrics['l0']:.2f} | fvu "
              f"{metrics['fvu']:.4f} | dead {metrics['dead']:.2%} | {seconds:.0f} s in this "
              f"session\nrun directory: {args.out}", flush=True)
        Run.lock = None

# --- the SAE of a run -----------------------------------------------------------------------------

def fold(tensors, source):
    """Weights trained on x' = (x - mean) * scale -> the same SAE for raw x; codes come out / scale.

    Exact for every variant here, since all are positively homogeneous and encode x - b_dec:
    b_dec -> b_dec / scale + mean, other biases and thresholds -> / scale, directions and a stay.
    """
    return {n: t if n in ("W_enc", "W_dec", "r_mag", "a") else t / source.scale +
            (source.mean if n == "b_dec" else 0) for n, t in tensors.items()}

@torch.no_grad()
def heldout_metrics(sae, x, count=None):
    """l0, fvu = sum |x - x_hat|^2 / sum |x - mean(x)|^2, and dead: the share of latents that never
    fire, on held-out x [M, D]. Sums first, one division (SAELens issues 443 and 665); fvu is NaN if
    all rows are equal. To count [F], if there is one, it adds how often each latent fired."""
    error, total, l0, fired, mean = 0.0, 0.0, 0.0, 0.0, x.mean(0)
    for part in x.split(2048):
        z = sae.encode(part)
        error += (part - sae.decode(z)).pow(2).sum().item()
        total += (part - mean).pow(2).sum().item()
        l0 += (z != 0).sum()
        fired += (z > 0).sum(0)
    if count is not None:
        count += fired
    differ = bool((x.amax(0) > x.amin(0)).any())             # if not, total is 0 or rounding
    return dict(l0=l0.item() / len(x), fvu=error / total if differ else math.nan,
                heldout_tokens=len(x), dead=(fired == 0).float().mean().item())

def load_sae(path):
    """(cfg, tensors) of a run directory. Fails if it is none, or damaged."""
    try:
        return (json.loads((Path(path) / "cfg.json").read_text()),
                load_file(Path(path) / "sae_weights.safetensors"))
    except Exception as err:
        fail(f"{path}: no saved SAE, or a damaged one ({first_line(err)})")
