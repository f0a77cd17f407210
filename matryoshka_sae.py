"""Matryoshka sparse autoencoder: nested dictionaries, the first latents for what is most common.

Bussmann et al. 2025, 'Learning Multi-Level Features with Matryoshka Sparse Autoencoders', arXiv
2503.17547; --balance: Chanin et al. 2025, arXiv 2505.11756; with one level it is BatchTopK,
Bussmann et al. 2024, arXiv 2412.06410.

    pre     = (x - b_dec) @ W_enc + b_enc                 [B, F]: B tokens, F latents
    z       = relu(pre) where pre is among the k B largest of the batch, else 0
    x_hat_g = z[:, :m_g] @ W_dec[:m_g] + b_dec            m_1 < ... < m_G = F: the levels' --widths
    loss    = sum_g balance^(G-g) mean_B |x - x_hat_g|^2 + auxk_alpha * D * aux
    aux     as in topk_sae.py, on the error of all latents, x - x_hat_G, without gradient
    trained:  z = pre where pre > threshold               about k of them per held-out token

A level must reconstruct x alone, so the first ones learn what is common; later ones add detail.

Departures from the papers, of the first of which we read a text without formulas, of the second
the code (docs/matryoshka.md has the reasons and the smaller ones):
  - balance 1 is the plain sum over levels. The authors' repository takes the mean, and counts the
    empty prefix; dictionary_learning weighs by 1 / G^2; SAELens chooses k latents in each level.
  - There is one aux, for all latents, where Chanin et al. have one a level.
  - --widths default to the shares of the paper's main run. --random-widths draws the inner ones by
    Nabeshima's law (matryoshka-saes, 2024), without the L1 penalty and the sorting there.
  - The threshold is the exact quantile of held-out tokens, not a running mean of batch minima.
  - k may be annealed. Scaling, aux, initialisation, rate and step are those of topk_sae.py.

    python matryoshka_sae.py --layer 6                               # a language model, 2 CPU cores
    python matryoshka_sae.py --model toy --toy tree-24 --k 2 --d-sae 24 --widths 3 6 12 24
    python matryoshka_sae.py --activations X.npy --k 5 --d-sae 256 --balance 0      # BatchTopK
    torchrun --nproc-per-node 8 matryoshka_sae.py --layer 6 --tokens 1e8 --batch-size 16384
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
    add("--k", type=runs.at_least(1e-3, float), default=32, help="active latents per token; 32")
    add("--widths", type=runs.count, nargs="+", help="latents of the first level, of the second, "
                          "...; the last has all; default: 1/32, 3/32, 7/32, 15/32 and 1 of them")
    add("--random-widths", action="store_true", help="draw all but the last anew in every step")
    add("--balance", type=runs.at_least(0, float, 100), default=1.0, help="weight of a level, "
            "divided by that of the next wider one; 0: the last level alone, BatchTopK; default 1")
    add("--k-start", type=runs.at_least(1e-3, float), help="k at the first step; default: --k")
    add("--k-anneal", type=runs.share, default=0.2, help="share of the steps until k is --k; 0.2")
    add("--auxk", type=runs.count, help="dead latents that AuxK uses per token; default D // 2")
    add("--auxk-alpha", type=runs.at_least(0, float), default=1 / 32, help="weight of AuxK; 1/32")
    return parser.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------

class MatryoshkaSAE(nn.Module):
    """W_enc [D, F], b_enc [F], W_dec [F, D] with unit rows, b_dec [D], threshold [F].

    encode() does two different things: in training mode, as the SAE is made, the k B largest codes
    of the batch x [B, D] stay, so that a token's codes depend on the others; after .eval(), which
    load() and set_threshold() call, those above the threshold, for each token by itself."""
    unit_norm = True                                          # train_step keeps rows of W_dec so

    def __init__(self, d_in, d_sae, k):
        super().__init__()
        self.k = k
        W = nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(W)                          # (F, D)
        self.W_enc = nn.Parameter(W.T * min(1, 2 * d_in / d_sae))  # (D, F), F rows: see runs.rows
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.threshold = nn.Buffer(torch.zeros(d_sae))        # all equal; SAELens wants F

    def pre_acts(self, x):
        return nn.functional.linear(x - self.b_dec, self.W_enc.T, self.b_enc)            # (B, F)

    def activate(self, pre):
        if self.training:
            vals, flat = pre.flatten().topk(round(self.k * len(pre)), sorted=False)
            return torch.zeros_like(pre).put_(flat, vals.relu())             # (B, F)
        return pre * (pre > self.threshold)                                  # the threshold is >= 0

    def encode(self, x):
        return self.activate(self.pre_acts(x))                               # (B, F)

    def decode(self, z):
        return z @ self.W_dec + self.b_dec                                   # (B, D)

    def forward(self, x):
        return self.decode(self.encode(x))

    @torch.no_grad()
    def set_threshold(self, x):
        """Put the threshold where L0 is k on x [M, D]. Also switches the SAE to eval mode."""
        n, best = round(self.k * len(x)), x.new_zeros(1)      # 0 is no activation
        for part in x.split(2048):
            pre = self.pre_acts(part)
            best = torch.cat([best, pre[pre > best.min()]])
            best = best.topk(min(n + 1, len(best))).values    # descending
        self.threshold.fill_(best[n - 1:].mean() if len(best) > n else 0)
        return self.eval()

# --- loss -----------------------------------------------------------------------------------------

def loss(sae, x, widths, weights, dead, auxk, auxk_alpha):
    """The textbook: plain autograd, the equations above. dead: indices of the dead latents."""
    z, total = sae.encode(x), 0.0                                                    # (B, F)
    for m, weight in zip(widths, weights):                                           # the levels
        e = x - (z[:, :m] @ sae.W_dec[:m] + sae.b_dec)        # the last: x - sae.decode(z)
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
    total, terms, z = loss(sae, x, state["widths"].tolist(), state["weights"].tolist(),
                           dead, args.auxk, args.auxk_alpha)
    return total, dict(loss=total, **terms, l0=(z > 0).sum() / len(x)), (z > 1e-3).float().sum(0)

def sparse_loss(sae, x, state, args):
    """The value and gradients of `loss` from the active entries alone (see sparse.py). Returns the
    loss of a batch x [B, D], its terms, and how often each latent fired, z > 1e-3: [F]."""
    (B, D), d_sae, G = x.shape, len(sae.W_dec), len(state["widths"])
    with torch.no_grad():
        vals, flat = batch_top(sae.pre_acts(x).flatten(), state["n"])        # may be bf16
        active = sparse.Active(flat // d_sae, flat % d_sae, B, d_sae)
        level = torch.searchsorted(state["widths"], active.col, right=True)  # of an entry, from 0
        levels = active.in_rows(active.row * G + level, B * G)               # for Nested
        w = nn.functional.pad(state["weights"], (1, 0)).expand(B, G + 1)     # empty prefix: 0
    dead = state["dead"] if args.auxk_alpha else state["dead"][:0]
    W_enc, rows_enc = sparse.Rows.apply(sae.W_enc.T, dead)    # rows_enc: W_enc[:, dead].T, (n, D)
    W_dec, rows_dec = sparse.Rows.apply(sae.W_dec, dead)
    pre = sparse.Encode.apply(vals, active, x, W_enc.T, sae.b_enc, sae.b_dec)
    z = pre.relu()                                            # entries of Z = encode(x): (n,)
    e = (x - sae.b_dec - active.matmul(z, W_dec)).detach()    # x - (Z @ W_dec + b_dec)
    total = sparse.Nested.apply(z, W_dec, sae.b_dec, e, w, [levels]) / B      # sum_g w mean |e_g|^2
    mse = e.pow(2).sum() / B
    aux = torch.zeros_like(mse)
    if len(dead):
        aux = auxk_loss(sae, x, e, dead, rows_enc, rows_dec, args)
    total = total + args.auxk_alpha * D * aux
    terms = dict(loss=total, mse=mse, aux=aux, l0=(z > 0).sum() / B)
    return total, terms, active.t_sum((z > 1e-3).float())     # (Z > 1e-3).sum(0)

def batch_top(pre, n):
    """The n largest of pre [N] over all processes: values, and where they are. Each process offers
    a bit more than twice its share of n; of its offers those that are not among the n become 0. So
    it is exact for two processes, and for more unless one holds over twice its share of the n."""
    world = runs.world_size()
    flat = sparse.flat_top(pre, min(n, len(pre), 2 * n // world + 64))       # pre.topk(n).indices
    vals = pre[flat]
    if world > 1:
        offers = torch.zeros(world, len(flat), device=pre.device)
        offers[runs.rank()] = vals
        best = runs.all_reduce(offers, "sum").flatten().topk(n, sorted=False).indices
        vals *= torch.zeros_like(offers).put_(best, offers.new_ones(n))[runs.rank()]
    return vals, flat

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
    weights = [args.balance ** g for g in reversed(range(len(args.widths)))]
    return dict(
        # [shared: state]
        tokens_since_fired=torch.zeros(args.d_sae, dtype=torch.int64, device=device),
        dead=torch.empty(0, dtype=torch.int64, device=device),        # indices of the dead latents
        # [/shared: state]
        widths=torch.tensor(args.widths, device=device),      # of the levels, [G]
        weights=torch.tensor(weights, device=device),         # of their errors in the loss, [G]
        n=None,                                               # k B, all processes, of this step
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

def random_widths(step, args):
    """Without replacement, P(m) = sqrt(m / F) - sqrt((m - 1) / F); in order, and then F."""
    p = torch.arange(args.d_sae, dtype=torch.float64).sqrt().diff()
    g = torch.Generator().manual_seed((args.seed * 10 ** 9 + step) % 2 ** 63)
    inner = torch.multinomial(p, len(args.widths) - 1, generator=g) + 1
    return torch.tensor([*inner.sort().values, args.d_sae])

def train_step(sae, opt, x, state, step, args, loss_fn=sparse_loss):
    """One whole optimisation step on a batch x [B, D]. Returns the terms of the loss."""
    sae.k = k_at(step, args)
    state["n"] = round(sae.k * args.batch_size)
    if args.random_widths:
        state["widths"] = random_widths(step, args).to(x.device, non_blocking=True)
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
    args.auxk, args.k_start, n = args.auxk or D // 2, args.k_start or args.k, args.d_sae
    args.widths = args.widths or sorted({max(1, n * i // 32) for i in (1, 3, 7, 15, 32)})
    if max(args.k, args.k_start) > n or min(args.k, args.k_start) * args.batch_size < 1:
        runs.fail(f"--k {args.k:g}, --k-start {args.k_start:g}: need to be at least one a batch, "
                  f"1 / --batch-size, and at most --d-sae, {n}")
    if args.widths != sorted(set(args.widths)) or args.widths[-1] != n:
        runs.fail(f"--widths {args.widths}: need to increase, and to end with --d-sae, {n}")
    args.widths = args.widths if args.balance else [n]
    if args.random_widths and len(args.widths) == 1:
        runs.fail("--random-widths: needs more than one level, and --balance above 0")
    if runs.rank() == 0:
        weights = [args.balance ** g for g in reversed(range(len(args.widths)))]
        print(f"levels: widths {args.widths}, weights {weights}, whose sum is {sum(weights):g}")
    variant = "matryoshka" if len(args.widths) > 1 else "batchtopk"
    sae = MatryoshkaSAE(D, n, args.k).to(device)
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
    sae.k, x = args.k, source.heldout()
    metrics = runs.heldout_metrics(sae.set_threshold(x[::2]), x[1::2])
    sae.load_state_dict(runs.fold(sae.state_dict(), source))            # takes raw x from here on
    run.save_sae("jumprelu", sae.state_dict(), metrics)
    return sae

def load(path):
    """The SAE of a run directory; it takes raw activations, and is in .eval()."""
    cfg, tensors = runs.load_sae(path)
    sae = MatryoshkaSAE(cfg["d_in"], cfg["d_sae"], cfg["metadata"]["flags"]["k"])
    sae.load_state_dict(tensors)
    return sae.eval()

if __name__ == "__main__":
    with runs.one_line_errors():
        train(parse_args())
