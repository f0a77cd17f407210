"""Train the GPT of model.py from scratch on games of random legal moves; write its weights.

    python othello/train.py --minutes 2 --out DIR       # from scratch; stopped, the same goes on
    python othello/train.py --games 1.6e6 --compile --out DIR     # the weights in this folder

All legal moves of such a game are equally likely, so the target at a position is 1 / n on each of
its n legal moves: the next-move cross-entropy of Li et al. 2022 (arXiv 2210.13382), averaged over
the moves that could have come next. Its gradient is the same on average, with less noise (ours).
Muon (torch.optim) moves the matrices of the blocks, AdamW all else; their rates warm up, and fall
linearly to 0. Batch i is a function of --seed, --batch-size and i, and every game is new.
"""
import argparse
import functools
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import runs
from othello import game
from othello.model import CONTEXT, GPT, load

MUON_LR, MUON_DECAY, ADAM_LR = 0.02, 0.01, 3e-3

@functools.lru_cache(1)
def new_games(n, *key):
    """n new games: tokens int64 [n, 59], and the legal moves after each, bool [n, 59, 64], of which
    there are none after the end. The same for the same key, non-negative integers."""
    tokens, boards = game.games(n, np.random.default_rng(key))
    legal = game.squares(boards[:, :CONTEXT, 2])
    return torch.from_numpy(tokens[:, :CONTEXT].clip(0)).long(), torch.from_numpy(legal).bool()

def batch(n, seed, step):
    """Batch `step` of n games, as new_games gives them; played about 1024 at a time, which is
    faster than a batch at a time."""
    per_block = max(1, 1024 // n)
    rows = slice(step % per_block * n, (step % per_block + 1) * n)
    return [t[rows] for t in new_games(n * per_block, seed, step // per_block)]

def loss_fn(logits, legal):
    """Mean cross-entropy in nats of logits [n, T, 64], at positions that have a legal move."""
    n = legal.sum(-1)                                                        # (n, T)
    at_legal = (logits.float().log_softmax(-1) * legal).sum(-1) / n.clamp_min(1)
    return -at_legal.sum() / (n > 0).sum()

@torch.no_grad()
def measure(model, games, *key):
    """On new games: share of positions whose likeliest move is legal; cross-entropy in nats, and
    the least possible, that of knowing the legal moves."""
    right = total = ce = least = 0
    for i in range(0, games, 100):
        tokens, legal = new_games(min(100, games - i), *key, i)
        logits, n = model(tokens).logits, legal.sum(-1)
        here = n > 0
        right += legal.gather(-1, logits.argmax(-1, keepdim=True)).sum().item()
        total += here.sum().item()
        ce += loss_fn(logits, legal).item() * here.sum().item()
        least += n[here].log().sum().item()
    return right / total, ce / total, least / total

def train(args):
    """Train, or go on from --out/state.pt: the model, and whether it is finished (not stopped)."""
    if args.games < args.batch_size:
        runs.fail(f"--games {args.games}: fewer than one --batch-size, {args.batch_size}")
    if not hasattr(torch.optim, "Muon"):
        runs.fail(f"torch {torch.__version__} has no torch.optim.Muon; install 2.9 or newer")
    if args.compile and not any(map(shutil.which, runs.COMPILERS)):
        runs.fail("--compile: needs a C++ compiler; install g++ or clang++, or leave it out")
    torch.manual_seed(args.seed)
    model = GPT()
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "blocks." not in name]
    opts = {torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=MUON_DECAY): MUON_LR,
            torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0): ADAM_LR}
    if args.compile:
        for block in model.blocks:
            block.compile()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        runs.fail(f"--out {args.out}: {err.strerror}; choose another")
    step, spent, state = 0, 0.0, args.out / "state.pt"
    if state.exists():
        try:
            saved = torch.load(state, weights_only=True)
            if saved["run"] != [args.seed, args.batch_size]:
                raise ValueError("of another --seed or --batch-size")
            step, spent = saved["step"], saved["seconds"]
            model.load_state_dict(saved["model"])
            for opt, old in zip(opts, saved["opts"]):
                opt.load_state_dict(old)
        except Exception as err:
            runs.fail(f"--out: cannot go on from {state} ({runs.first_line(err)}); delete it, or "
                      "choose another --out")
        print(f"goes on after {step * args.batch_size:,} games, {spent / 60:.1f} min", flush=True)
    steps, began = args.games // args.batch_size, time.perf_counter() - spent
    def save_state():
        with runs.replacing(state, "--out") as tmp:
            torch.save(dict(model=model.state_dict(), opts=[o.state_dict() for o in opts],
                            step=step, run=[args.seed, args.batch_size],
                            seconds=time.perf_counter() - began), tmp)
    with runs.stop_signal(torch.device("cpu")) as stop:
        bar, saved_at = tqdm(initial=step, total=steps, desc="train", disable=None), spent
        while True:
            spent = time.perf_counter() - began
            done = max(step / steps, spent / 60 / args.minutes if args.minutes else 0)
            if done >= 1 or stop():
                break
            for opt, lr in opts.items():
                opt.param_groups[0]["lr"] = lr * min(1 - done, (step + 1) / 50)
            tokens, legal = batch(args.batch_size, args.seed, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                logits = model(tokens).logits
            loss = loss_fn(logits, legal)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad()
            step += 1
            bar.update()
            if step % max(1, 12_800 // args.batch_size) == 0:
                rate, ce, least = measure(model, 100, args.seed, 10 ** 9)
                print(f"games {step * args.batch_size:,} | {spent / 60:.1f} min | cross-entropy "
                      f"{ce:.4f} (least {least:.4f}) | legal {rate:.2%}", flush=True)
            if spent - saved_at > 60:
                save_state()
                saved_at = spent
    save_state()
    return model, done >= 1

def parse_args(argv=None):
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--games", type=runs.count, default=1_600_000, help="to train on; default 1.6e6")
    add("--minutes", type=runs.at_least(0.01, float), help="stop then, if --games take longer")
    add("--batch-size", type=runs.count, default=64, help="games a step; default 64")
    add("--seed", type=runs.at_least(0), default=0, help="of weights and games; default 0")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 matmuls; default")
    add("--compile", action="store_true", help="torch.compile the blocks; needs a C++ compiler")
    add("--out", type=Path, required=True, help="folder of weights.safetensors and state.pt")
    return parser.parse_args(argv)

def main(argv=None):
    args = parse_args(argv)
    model, finished = train(args)
    if not finished:
        print(f"stopped; the same command goes on from {args.out / 'state.pt'}", flush=True)
        raise SystemExit(130)
    with runs.replacing(args.out / "weights.safetensors", "--out") as tmp:
        tmp.write_bytes(save({name: t.half() for name, t in model.state_dict().items()}))
    model = load(args.out)                                                   # what was saved
    rate, ce, least = measure(model, 2000, args.seed, 10 ** 9 + 1)
    print(f"2,000 new games: legal {rate:.3%}, cross-entropy {ce:.4f} (least {least:.4f})")

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
