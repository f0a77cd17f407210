"""TopK sparse autoencoder: every token keeps its k largest latents.

Gao et al. 2024, 'Scaling and evaluating sparse autoencoders', arXiv 2406.04093.

    pre   = (x - b_dec) @ W_enc + b_enc                   [B, F]: B tokens, F latents
    z     = relu(pre) where pre is among the k largest of its token, else 0
    x_hat = z @ W_dec + b_dec                             [B, D], rows of W_dec have norm 1
    loss  = mean_B |x - x_hat|^2 + auxk_alpha * D * aux   (sum over D, mean over B)
    aux   = mean_B |e - e_hat|^2 / mean_B |e - mean e|^2  with e = x - x_hat, without gradient
    e_hat = z_dead @ W_dec                  z_dead: relu of the auxk largest pre of dead latents

A latent is dead if it has been silent for long. AuxK, the second term, revives it: dead latents
learn to reconstruct the error that the others leave.

Departures from the paper, which we know from the authors' code and from notes by others, not from
its text (docs/topk.md has the reasons and the smaller ones):
  - x is centred and scaled by constants, which fold into the saved weights; theirs is normalised
    token by token. They divide the error by the variance of x, which is about D here: so D * aux.
  - Dead means silent for 1 % of the run's tokens, if that is less than the paper's 10M.
  - W_enc starts at min(1, 2 D / F) W_dec.T, a factor chosen here; theirs is fitted to random x.
  - Rows of W_dec get norm 1 after the step, not before it. Weights are not averaged.

    python topk_sae.py --layer 6                                  # a language model, 2 CPU cores
    python topk_sae.py --model toy --toy song --k 3 --d-sae 32    # data with known features
    python topk_sae.py --activations X.npy --k 5 --d-sae 256      # your own array [N, D]
    torchrun --nproc-per-node 8 topk_sae.py --layer 6 --tokens 1e8 --batch-size 16384
"""
import argparse
from pathlib import Path

import torch
from torch import nn

import data
import runs
import sparse

BETAS = 0.9, 0.999      # of Adam

# --- arguments ([shared: NAME] blocks are the same text in every script that has them) ------------

def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__)
    # [shared: flags]
    add = parser.add_argument_group("training").add_argument
    add("--d-sae", type=runs.count, help="F, the number of latents; default 8 D")
    add("--tokens", type=runs.count, default=2_000_000, help="training tokens; default 2e6")
    add("--batch-size", type=runs.count, default=2048, help="tokens a step, in all; default 2048")
    add("--lr", type=runs.at_least(1e-9, float), help="peak rate; default depends on F and steps")
    add("--warmup", type=runs.count, help="steps to the peak; default 1000, at most a tenth of all")
    add("--dead-after", type=runs.count, help="tokens without firing; 1 %% of all, at most 10e6")
    add("--seed", type=runs.at_least(0), default=0, help="for weights and data order; default 0")
    add("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bf16 matmuls; default where fast")
    add("--dense", action="store_true", help="train with the textbook loss; float32 by default")
    add("--compile", action="store_true", help="torch.compile the loss")
    add("--out", type=Path, help="run directory; default runs/VARIANT-MODEL-LAYER")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--save-every", type=runs.at_least(0, float), default=10, help="minutes between saves; 10")
    add("--log-every", type=runs.count, default=100, help="steps between log lines; default 100")
    # [/shared: flags]
    add = parser.add_argument_group("this variant").add_argument
    add("--k", type=runs.count, default=32, help="active latents per token; default 32")
    add("--auxk", type=runs.count, help="dead latents that AuxK uses per token; default D // 2")
    add("--auxk-alpha", type=runs.at_least(0, float), default=1 / 32, help="weight of AuxK; 1/32")
    return parser.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------

class TopKSAE(nn.Module):
    """W_enc [D, F], b_enc [F], W_dec [F, D] with unit rows, b_dec [D]."""
    unit_norm = True                                          # train_step keeps rows of W_dec so

    def __init__(self, d_in, d_sae, k):
        super().__init__()
        self.k = k
        W = nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(W)                          # (F, D)
        self.W_enc = nn.Parameter(W.T * min(1, 2 * d_in / d_sae))  # (D, F), F rows: see runs.rows
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def pre_acts(self, x):
        return nn.functional.linear(x - self.b_dec, self.W_enc.T, self.b_enc)        # (B, F)

    def activate(self, pre):
        vals, idx = pre.topk(self.k, sorted=False)                                   # (B, k)
        return torch.zeros_like(pre).scatter_(-1, idx, vals.relu())                  # (B, F)

    def encode(self, x):
        return self.activate(self.pre_acts(x))                                       # (B, F)

    def decode(self, z):
        return z @ self.W_dec + self.b_dec                                           # (B, D)

    def forward(self, x):
        return self.decode(self.encode(x))

# --- loss -----------------------------------------------------------------------------------------

def loss(sae, x, dead, auxk, auxk_alpha):
    """The textbook: plain autograd, the equations above. dead: indices of the dead latents."""
    z = sae.encode(x)                                                                # (B, F)
    e = x - sae.decode(z)                                                            # (B, D)
    mse = e.pow(2).sum(1).mean()
    # [shared: aux]
    e, aux = e.detach(), torch.zeros_like(mse)
    if len(dead):
        pre = (x - sae.b_dec.detach()) @ sae.W_enc[:, dead] + sae.b_enc[dead]
        vals, idx = pre.topk(min(auxk, len(dead)))
        e_hat = torch.zeros_like(pre).scatter(1, idx, vals.relu()) @ sae.W_dec[dead]
        aux = (e - e_hat).pow(2).sum() / (e - e.mean(0)).pow(2).sum().clamp_min(1e-8 * len(e))
    # [/shared: aux]
    return mse + auxk_alpha * x.shape[1] * aux, dict(mse=mse, aux=aux), z

def dense_loss(sae, x, state, args):
    """`loss`, with the arguments and results of sparse_loss: for --dense."""
    dead = state["dead"] if args.auxk_alpha else state["dead"][:0]
    total, terms, z = loss(sae, x, dead, args.auxk, args.auxk_alpha)
    return total, dict(loss=total, **terms, l0=(z > 0).sum() / len(x)), (z > 1e-3).float().sum(0)

def sparse_loss(sae, x, state, args):
    """The value and gradients of `loss` from the active entries alone (see sparse.py). Returns the
    loss of a batch x [B, D], its terms, and how often each latent fired, z > 1e-3: [F]."""
    with torch.no_grad():
        vals, idx = sparse.top(sae.pre_acts(x), sae.k)        # pre.topk(k): (B, k), may be bf16
    row = torch.arange(len(x), device=x.device).repeat_interleave(sae.k)
    active = sparse.Active(row, idx.flatten(), len(x), len(sae.W_dec))
    dead = state["dead"] if args.auxk_alpha else state["dead"][:0]
    W_enc, rows_enc = sparse.Rows.apply(sae.W_enc.T, dead)    # rows_enc: W_enc[:, dead].T, (n, D)
    W_dec, rows_dec = sparse.Rows.apply(sae.W_dec, dead)
    pre = sparse.Encode.apply(vals.flatten(), active, x, W_enc.T, sae.b_enc, sae.b_dec)
    z = pre.relu()                                            # entries of Z = encode(x): (B k,)
    x_hat = active.decode(z, W_dec) + sae.b_dec               # Z @ W_dec + b_dec: (B, D)
    mse = nn.functional.mse_loss(x_hat, x, reduction="sum") / len(x)
    aux = torch.zeros_like(mse)
    if len(dead):
        aux = auxk_loss(sae, x, (x - x_hat).detach(), dead, rows_enc, rows_dec, args)
    total = mse + args.auxk_alpha * x.shape[1] * aux
    terms = dict(loss=total, mse=mse, aux=aux, l0=(z > 0).sum() / len(x))
    return total, terms, active.t_sum((z > 1e-3).float())     # (Z > 1e-3).sum(0)

# [shared: auxk]
def auxk_loss(sae, x, e, dead, rows_enc, rows_dec, args):
    """aux: how badly the n dead latents reconstruct the error e that the live ones leave. The live
    ones and b_dec get no gradient. e_hat has no b_dec, because e is without it already."""
    pre = nn.functional.linear(x - sae.b_dec.detach(), rows_enc, sae.b_enc[dead])    # (B, n)
    if len(dead) > args.auxk:
        vals, idx = pre.topk(args.auxk, sorted=False)
        pre = torch.zeros_like(pre).scatter_(1, idx, vals)
    e_hat = pre.relu() @ rows_dec
    mean = runs.all_reduce(e.mean(0))                                        # of the global batch
    variance = runs.all_reduce(e.pow(2).sum() / len(e)) - mean.pow(2).sum()
    return nn.functional.mse_loss(e_hat, e, reduction="sum") / len(e) / variance.clamp_min(1e-8)
# [/shared: auxk]

# --- training -------------------------------------------------------------------------------------

def init_state(args, device):
    """What steps and losses share beside weights and Adam's moments; --resume restores it."""
    return dict(
        # [shared: state]
        tokens_since_fired=torch.zeros(args.d_sae, dtype=torch.int64, device=device),
        dead=torch.empty(0, dtype=torch.int64, device=device),        # indices of the dead latents
        # [/shared: state]
    )

# [shared: schedule]
def default_lr(d_sae, steps):
    """2e-4 sqrt(2^14 / F), the rule of dictionary_learning and sparsify after Gao et al.; times
    sqrt(100,000 / steps) in [1, 6], ours (benchmarks/recovery.py --sweep); at most 0.01."""
    return min(0.01, 2e-4 * (2 ** 14 / d_sae) ** 0.5 * min(6, max(1, (1e5 / steps) ** 0.5)))

def lr_at(step, args):
    """Linear warm-up, then constant, then linear decay to 0 over the last 20 % of the steps."""
    return args.lr * min(1, (step + 1) / args.warmup, (args.steps - step) / (0.2 * args.steps))
# [/shared: schedule]

def train_step(sae, opt, x, state, step, args, loss_fn=sparse_loss):
    """One whole optimisation step on a batch x [B, D]. Returns the terms of the loss."""
    # [shared: step]
    total, terms, fired = sparse.backward(loss_fn, sae, x, state, args)
    with torch.no_grad():
        views, W = opt.param_groups[0]["params"], sae.W_dec        # Adam holds views: runs.adam
        for param, view in zip(sae.parameters(), views):           # Adam sees what W.grad becomes,
            view.grad = runs.all_reduce(runs.rows(param.grad))     # since its memory is view.grad's
        if sae.unit_norm:                                          # move along the sphere
            W.grad.addcmul_(torch.linalg.vecdot(W.grad, W)[:, None], W, value=-1)
        # Fused Adam reads two private attributes of GradScaler: it divides gradients by grad_scale,
        # here their norm, and changes nothing where found_inf is 1.
        norm = nn.utils.get_total_norm([view.grad for view in views])
        opt.grad_scale = norm.clamp_min(1e-30)
        bad = torch.where((norm + total).isfinite(), (total == 0).float(), 2)
        opt.bad = runs.all_reduce(bad, "max")                      # 1: had no room, 2: nan or inf
        opt.found_inf = opt.bad.clamp(max=1)
        opt.param_groups[0]["lr"] = lr_at(step, args)
        opt.step()
        opt.zero_grad()
        sae.zero_grad()
        made = opt.bad == 0                                        # else nothing may change
        if sae.unit_norm:
            W /= torch.where(made, torch.linalg.vector_norm(W, dim=1, keepdim=True), 1)
        state["tokens_since_fired"] += made * args.batch_size
        state["tokens_since_fired"].masked_fill_(made & (runs.all_reduce(fired, "sum") > 0), 0)
    # [/shared: step]
    return terms

def train(args):
    """Train as parse_args says, write the run directory; returns the SAE, for raw activations."""
    # [shared: start]
    device = runs.setup(args)
    source = data.open_source(args, device)
    D, args.steps = source.d_in, args.tokens // args.batch_size
    args.d_sae = args.d_sae or 8 * D
    args.warmup = args.warmup or max(1, min(1000, args.steps // 10))
    args.dead_after = args.dead_after or min(10_000_000, max(1, args.tokens // 100))
    args.lr = args.lr or default_lr(args.d_sae, args.steps)
    torch.manual_seed(args.seed)
    # [/shared: start]
    args.auxk = args.auxk or D // 2
    if args.k > args.d_sae:
        runs.fail(f"--k {args.k}: larger than --d-sae {args.d_sae}")
    sae, variant = TopKSAE(D, args.d_sae, args.k).to(device), "topk"
    # [shared: loop]
    opt, state = runs.adam(sae, args.lr, BETAS), init_state(args, device)
    loss_fn = dense_loss if args.dense else sparse_loss
    loss_fn = torch.compile(loss_fn) if args.compile else loss_fn
    with runs.Run(args, variant, source, sae, opt, state) as run:
        for step in run.steps:                                # from 0, or where --resume goes on
            x = source.batch(step)
            terms = train_step(sae, opt, x, state, step, args, loss_fn)
            if (step + 1) % runs.CHECK_EVERY == 0 or step + 1 == args.steps:  # nonzero: host waits
                state["dead"] = (state["tokens_since_fired"] > args.dead_after).nonzero()[:, 0]
            run.end_step(step, x, terms, lr_at(step, args))   # logs, saves, stops at Ctrl-C
    # [/shared: loop]
    metrics = runs.heldout_metrics(sae, source.heldout())
    sae.load_state_dict(runs.fold(sae.state_dict(), source))            # takes raw x from here on
    run.save_sae("topk", sae.state_dict(), metrics, k=args.k, rescale_acts_by_decoder_norm=False)
    return sae

def load(path):
    """The SAE of a run directory; it takes raw activations."""
    cfg, tensors = runs.load_sae(path)
    sae = TopKSAE(cfg["d_in"], cfg["d_sae"], cfg["k"])
    sae.load_state_dict(tensors)
    return sae

if __name__ == "__main__":
    with runs.one_line_errors():
        train(parse_args())
