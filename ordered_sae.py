"""Ordered sparse autoencoder: every prefix of the latents is a dictionary, so they have an order.

Wang et al. 2025, 'Enforcing Orderedness to Improve Feature Consistency', arXiv 2512.02194.

    pre     = (x - b_dec) @ W_enc + b_enc                 [B, F]: B tokens, F latents
    z       = relu(pre) where pre is among the k largest of its token, else 0
    x_hat_l = z[:, :l] @ W_dec[:l] + b_dec                l = 1 .. F
    loss    = sum_l p(l) mean_B |x - x_hat_l|^2 + auxk_alpha * D * aux
    p       = (1 - full_share) * the --prefix-law, + full_share at l = F
    aux     as in topk_sae.py, on the error of all latents, x - x_hat_F, without gradient

Of the F prefixes of a token only k + 1 differ, so the sum over all l is exact at a cost of k D a
token. Early latents are in more prefixes, so they learn what explains most.

Departures from the paper, of which no code was found (docs/ordered.md has the reasons, the smaller
ones, and a critique of the paper's theorem):
  - It keeps the k largest |z|, we the k largest pre. l = 1 .. F is its text's and proof's; its
    section 2.6 has k for F. It gives p in numbers for one toy alone, Zipf; ours is --prefix-law.
  - k falls from 8 k to k over a fifth of the run; in the paper from F, over a time not given.
  - --sweep freezes W_enc, b_enc and W_dec latent after latent, evenly to the end; in the paper one
    every T epochs. Frozen latents still count in the norm of gradients.
  - AuxK, scaling, initialisation, rate and step are those of topk_sae.py.

    python ordered_sae.py --layer 6                                  # a language model, 2 CPU cores
    python ordered_sae.py --model toy --toy zipf --k 5 --d-sae 100   # data with known features
    python ordered_sae.py --activations X.npy --k 5 --d-sae 256      # your own array [N, D]
    torchrun --nproc-per-node 8 ordered_sae.py --layer 6 --tokens 1e8 --batch-size 16384
"""
import argparse
from pathlib import Path

import torch
from torch import nn

import data
import runs
import sparse

BETAS = 0.9, 0.999      # of Adam
MEMORY = dict(cpu=2 ** 24, cuda=2 ** 28)      # floats of prefixes held at a time, or 2 F D if more
DENSE_MOST = 1024       # latents with --dense, which decodes every prefix

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
    add("--prefix-law", choices=["uniform", "zipf", "groups"], default="uniform", help="p(l): equal"
        ", as 1 / l, or at the five default --widths of matryoshka_sae.py alone; default uniform")
    add("--full-share", type=runs.at_least(0, float, 1), default=0.5, help="share of p that is at "
        "l = F; 1 is TopK; default 0.5")
    add("--sweep", type=runs.share, help="freeze latent after latent after this share of the steps")
    add("--k-start", type=runs.count, help="k at the first step; default 8 k, or F if that is less")
    add("--k-anneal", type=runs.share, default=0.2, help="share of the steps until k is --k; 0.2")
    add("--auxk", type=runs.count, help="dead latents that AuxK uses per token; default D // 2")
    add("--auxk-alpha", type=runs.at_least(0, float), default=1 / 32, help="weight of AuxK; 1/32")
    return parser.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------

class OrderedSAE(nn.Module):
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

def prefix_law(args):
    """p(l): [F], float64, the weight of the prefix of the first l latents, l = 1 .. F."""
    l = torch.arange(1, args.d_sae + 1, dtype=torch.float64)
    p = torch.ones_like(l) if args.prefix_law == "uniform" else 1 / l
    if args.prefix_law == "groups":
        p = sum(l == max(1, args.d_sae * i // 32) for i in (1, 3, 7, 15, 32)).clamp(max=1).double()
    p = (1 - args.full_share) * p / p.sum()
    p[-1] += args.full_share
    return p

def loss(sae, x, p, dead, auxk, auxk_alpha):
    """The textbook: plain autograd, the equations above. dead: indices of the dead latents."""
    z, total = sae.encode(x), 0.0                                                    # (B, F)
    for l, weight in enumerate(p, 1):                                                # all prefixes
        e = x - (z[:, :l] @ sae.W_dec[:l] + sae.b_dec)        # the last: x - sae.decode(z)
        mse = e.pow(2).sum(1).mean()
        total = total + weight * mse
    # [shared: aux]
    e, aux = e.detach(), torch.zeros_like(mse)
    if len(dead):
        pre = (x - sae.b_dec.detach()) @ sae.W_enc[:, dead] + sae.b_enc[dead]
        vals, idx = pre.topk(min(auxk, len(dead)))
        e_hat = torch.zeros_like(pre).scatter(1, idx, vals.relu()) @ sae.W_dec[dead]
        aux = (e - e_hat).pow(2).sum() / (e - e.mean(0)).pow(2).sum().clamp_min(1e-8 * len(e))
    # [/shared: aux]
    return total + auxk_alpha * x.shape[1] * aux, dict(mse=mse, aux=aux), z

def dense_loss(sae, x, state, args):
    """`loss`, with the arguments and results of sparse_loss: for --dense."""
    dead = state["dead"] if args.auxk_alpha else state["dead"][:0]
    total, terms, z = loss(sae, x, state["p"].tolist(), dead, args.auxk, args.auxk_alpha)
    return total, dict(loss=total, **terms, l0=(z > 0).sum() / len(x)), (z > 1e-3).float().sum(0)

def sparse_loss(sae, x, state, args):
    """The value and gradients of `loss` from the active entries alone (see sparse.py). Returns the
    loss of a batch x [B, D], its terms, and how often each latent fired, z > 1e-3: [F]."""
    (B, D), d_sae, k = x.shape, len(sae.W_dec), sae.k
    with torch.no_grad():
        vals, idx = sparse.top(sae.pre_acts(x), k)            # pre.topk(k): (B, k), may be bf16
        idx, order = idx.sort(1)                              # by index: so each prefix adds one
        row = torch.arange(B * k, device=x.device)
        active = sparse.Active(row // k, idx.flatten(), B, d_sae)
        S = nn.functional.pad(state["survival"][idx], (1, 0), value=1.0)     # (B, k + 1)
        w = S - nn.functional.pad(S[:, 1:], (0, 1))           # P(the prefix holds t of the k)
        some = max(1, max(MEMORY[x.device.type], 2 * d_sae * D) // (k * D))  # tokens a piece
        pieces = [sparse.Active(row[:part.numel()], part.flatten(), part.numel(), d_sae)
                  for part in idx.split(some)]                # a row for each entry: for Nested
    dead = state["dead"] if args.auxk_alpha else state["dead"][:0]
    W_enc, rows_enc = sparse.Rows.apply(sae.W_enc.T, dead)    # rows_enc: W_enc[:, dead].T, (n, D)
    W_dec, rows_dec = sparse.Rows.apply(sae.W_dec, dead)
    pre = sparse.Encode.apply(vals.gather(1, order).flatten(), active, x, W_enc.T, sae.b_enc,
                              sae.b_dec)
    z = pre.relu()                                            # entries of Z = encode(x): (B k,)
    e = (x - sae.b_dec - active.matmul(z, W_dec)).detach()    # x - (Z @ W_dec + b_dec)
    total = sparse.Nested.apply(z, W_dec, sae.b_dec, e, w, pieces) / B   # sum_l p mean |e_l|^2
    mse = e.pow(2).sum() / B
    aux = torch.zeros_like(mse)
    if len(dead):
        aux = auxk_loss(sae, x, e, dead, rows_enc, rows_dec, args)
    total = total + args.auxk_alpha * D * aux
    terms = dict(loss=total, mse=mse, aux=aux, l0=(z > 0).sum() / B)
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
    p = prefix_law(args)
    survival = p.flip(0).cumsum(0).flip(0)                    # the share of the loss with latent j
    return dict(
        # [shared: state]
        tokens_since_fired=torch.zeros(args.d_sae, dtype=torch.int64, device=device),
        dead=torch.empty(0, dtype=torch.int64, device=device),        # indices of the dead latents
        # [/shared: state]
        p=p.float().to(device),                               # p(l): [F]
        survival=survival.float().to(device),                 # P(l > j) of latents j = 0 .. F - 1
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

# [shared: anneal]
def k_at(step, args):
    """--k-start at first, then linearly to --k, which holds from the share --k-anneal of all on."""
    left = max(0, 1 - step / (args.k_anneal * args.steps))
    return args.k + left * (args.k_start - args.k)
# [/shared: anneal]

def train_step(sae, opt, x, state, step, args, loss_fn=sparse_loss):
    """One whole optimisation step on a batch x [B, D]. Returns the terms of the loss."""
    sae.k = round(k_at(step, args))
    if args.compile:                                          # a graph for one k, the last
        torch.compiler.set_stance("default" if sae.k == args.k else "force_eager")
    burn_in, frozen = (args.sweep or 1) * args.steps, 0       # latents below `frozen` stay put
    if step > burn_in:
        frozen = int((step - burn_in) * args.d_sae / (args.steps - burn_in))
    parts = [runs.rows(p.data)[:frozen] for p in (sae.W_enc, sae.b_enc, sae.W_dec)]
    before = [part.clone() for part in parts]
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
    for part, old in zip(parts, before):
        part.copy_(old)
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
    args.auxk, args.k_start = args.auxk or D // 2, args.k_start or min(8 * args.k, args.d_sae)
    if max(args.k, args.k_start) > args.d_sae:
        runs.fail(f"--k {args.k}, --k-start {args.k_start}: larger than --d-sae {args.d_sae}")
    if args.dense and args.d_sae > DENSE_MOST:
        runs.fail(f"--dense: decodes each of the {args.d_sae} prefixes; use a --d-sae of at most "
                  f"{DENSE_MOST}, or leave --dense out")
    sae, variant = OrderedSAE(D, args.d_sae, args.k).to(device), "ordered"
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
    sae.k = args.k
    metrics = runs.heldout_metrics(sae, source.heldout())
    sae.load_state_dict(runs.fold(sae.state_dict(), source))            # takes raw x from here on
    run.save_sae("topk", sae.state_dict(), metrics, k=args.k, rescale_acts_by_decoder_norm=False)
    return sae

def load(path):
    """The SAE of a run directory; it takes raw activations."""
    cfg, tensors = runs.load_sae(path)
    sae = OrderedSAE(cfg["d_in"], cfg["d_sae"], cfg["k"])
    sae.load_state_dict(tensors)
    return sae

if __name__ == "__main__":
    with runs.one_line_errors():
        train(parse_args())
