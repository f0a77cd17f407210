"""Matryoshka sparse autoencoder: nested dictionaries, the first latents for what is most common.

Bussmann et al. 2025, 'Learning Multi-Level Features with Matryoshka Sparse Autoencoders', arXiv
2503.17547; --balance: Chanin et al. 2025, arXiv 2505.11756; with one level it is BatchTopK,
Bussmann et al. 2024, arXiv 2412.06410.

    pre     = (x - b_dec) @ W_enc + b_enc                 [B, F]
    z       = relu(pre) where pre is among the k B largest of the batch, else 0
    x_hat_g = z[:, :m_g] @ W_dec[:m_g] + b_dec            m_1 < ... < m_G = F: the levels' --widths
    loss    = sum_g balance^(G-g) mean_B |x - x_hat_g|^2 + auxk_alpha * D * aux
    aux     as in topk_sae.py, on the error of all latents, x - x_hat_G, detached
    trained:  z = relu(pre) where pre > threshold         about k of them per held-out token

Departures from the papers (of the first we read a text without formulas, of the second the code):
  - balance 1 is the listing's plain sum. The authors' repository takes the mean, with the prefix of
    no latents; dictionary_learning, which the paper says it used, weighs levels by 1 / G^2; SAELens
    chooses k latents anew in each level. Beside a sum of weights of 5, aux counts a fifth as much.
  - One aux, for all latents (Chanin et al.: one a level); rows of W_dec have norm 1 (theirs: free).
  - --widths default to the shares of the paper's main run. --random-widths draws the inner ones by
    Nabeshima's law (matryoshka-saes, 2024), without the L1 penalty and sorting of latents there.
  - The threshold is the exact quantile of every other held-out token, and results are of the rest;
    the authors' running mean of batch minima starts at 0, and is low where batches differ.
  - k may be annealed. Scaling, aux, initialisation, rate and clipping are those of topk_sae.py.

    python matryoshka_sae.py --layer 6                               # a language model, 2 CPU cores
    python matryoshka_sae.py --model toy --toy tree-24 --k 2 --d-sae 24 --widths 3 6 12 24
    python matryoshka_sae.py --activations X.npy --k 5 --d-sae 256 --balance 0      # BatchTopK
    torchrun --nproc-per-node 8 matryoshka_sae.py --layer 6 --tokens 1e8 --batch-size 16384
"""
import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data

CHECK_EVERY = 10        # steps between the times when the host looks at what the device has found
BETAS = 0.9, 0.999      # of Adam

# --- arguments ([shared: NAME] blocks are the same text in every variant's file) ------------------

def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__)
    # [shared: flags]
    add = parser.add_argument_group("training").add_argument
    add("--d-sae", type=data.count, help="F, the number of latents; default 8 D")
    add("--tokens", type=data.count, default=2_000_000, help="training tokens; default 2e6")
    add("--batch-size", type=data.count, default=2048, help="tokens a step, all processes; 2048")
    add("--lr", type=data.at_least(1e-9, float), help="peak rate; default falls with width, length")
    add("--warmup", type=data.count, help="steps of warm-up; default 1000, at most a tenth of all")
    add("--dead-after", type=data.count, help="silent tokens to be dead; 10e6, or 1 %% of all")
    add("--seed", type=data.at_least(0), default=0, help="of weights and data order; default 0")
    add("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bf16 matmuls; default where fast")
    add("--compile", action="store_true", help="torch.compile the loss")
    add("--out", type=Path, help="run directory; default runs/VARIANT-MODEL-LAYER")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--save-every", type=data.count, default=500, help="steps between saves; default 500")
    add("--log-every", type=data.count, default=100, help="steps between log lines; default 100")
    # [/shared: flags]
    add = parser.add_argument_group("this variant").add_argument
    add("--k", type=data.at_least(1e-3, float), default=32, help="active latents per token; 32")
    add("--widths", type=data.count, nargs="+", help="latents of the first level, of the second, "
                          "...; the last has all; default: 1/32, 3/32, 7/32, 15/32 and 1 of them")
    add("--random-widths", action="store_true", help="draw all but the last anew in every step")
    add("--balance", type=data.at_least(0, float, 100), default=1.0, help="weight of each level by "
                          "that of the next; 0: of the last alone, which is BatchTopK; default 1")
    add("--k-start", type=data.at_least(1e-3, float), help="k at the first step; default: --k")
    add("--k-anneal", type=data.share, default=0.2, help="share of the steps until k is --k; 0.2")
    add("--auxk", type=data.count, help="dead latents that AuxK uses per token; default D // 2")
    add("--auxk-alpha", type=data.at_least(0, float), default=1 / 32, help="weight of AuxK; 1/32")
    return parser.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------

class MatryoshkaSAE(nn.Module):
    """W_enc [D, F], b_enc [F], W_dec [F, D] with unit rows, b_dec [D], threshold [F]. In training
    mode the k B largest codes of x [B, D] stay, in .eval() those above the threshold."""
    unit_norm = True                                          # train_step keeps rows of W_dec so

    def __init__(self, d_in, d_sae, k):
        super().__init__()
        self.k = k
        W = F.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(W)                          # (F, D)
        self.W_enc = nn.Parameter(W.T * min(1, 2 * d_in / d_sae))  # (D, F), in memory F rows of D
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.threshold = nn.Buffer(torch.zeros(d_sae))        # one number, F times

    def pre_acts(self, x):
        return F.linear(x - self.b_dec, self.W_enc.T, self.b_enc)            # (B, F)

    def activate(self, pre):
        if self.training:
            vals, at = pre.flatten().topk(round(self.k * len(pre)), sorted=False)
            return torch.zeros_like(pre).put_(at, vals.relu())               # (B, F)
        return pre * (pre > self.threshold)                                  # which is >= 0

    def encode(self, x):
        return self.activate(self.pre_acts(x))                               # (B, F)

    def decode(self, z):
        return z @ self.W_dec + self.b_dec                                   # (B, D)

    def forward(self, x):
        return self.decode(self.encode(x))

    @torch.no_grad()
    def set_threshold(self, x):
        """Put the threshold where L0 is k on x [M, D], between two activations. Ends training."""
        n, best = round(self.k * len(x)), x.new_zeros(1)      # 0 is no activation
        for part in x.split(2048):
            pre = self.pre_acts(part)
            best = torch.cat([best, pre[pre > best.min()]])
            best = best.topk(min(n + 1, len(best))).values    # descending
        self.threshold.fill_(best[n - 1:].mean() if len(best) > n else 0)
        return self.eval()

# --- sparse codes ---------------------------------------------------------------------------------

def top(pre, n):
    """Where the n largest entries of pre [N] are, ascending; exactly. They are sought above a
    threshold that a sample sets; among all entries on CUDA, and where the sample misleads."""
    sample, at = pre[::61], pre.new_empty(0)                  # a prime meets all latents, mostly
    rank = int(n / 61 + 4 * (n / 61) ** 0.5) + 4              # 4 standard deviations to be safe
    if rank < len(sample) and not pre.is_cuda:
        at = (pre > sample.topk(rank, sorted=False).values.min()).nonzero()[:, 0]
    if len(at) < n:
        return pre.topk(n, sorted=False).indices.sort().values
    return at[pre[at].topk(n, sorted=False).indices].sort().values

def batch_top(pre, n):
    """The n largest of pre [N] over all processes: values, where they are. Each process offers a
    bit more than twice its share, of which what is not among the n becomes 0; so it is exact for
    two processes, and for more unless one holds over twice its share of the n."""
    world = data.world_size()
    at = top(pre, min(n, len(pre), 2 * n // world + 64))
    vals = pre[at]
    if world > 1:
        offers = torch.zeros(world, len(at), device=pre.device)
        offers[data.rank()] = vals
        best = data.all_reduce(offers, "sum").flatten().topk(n, sorted=False).indices
        vals *= torch.zeros_like(offers).put_(best, offers.new_ones(n))[data.rank()]
    return vals, at

# [shared: sparse]
class Active:
    """Where codes Z [B, F] may be non-zero: entry j is token row[j], latent col[j]; row ascends.

    Z itself is never built. Each method's docstring is the dense formula that it equals, at a cost
    of n D for n entries instead of B F D; z [n] holds the entries of Z."""
    def __init__(self, row, col, batch, d_sae):
        self.row, self.col, self.d_sae = row, col, d_sae
        self.row_starts = torch.searchsorted(row, torch.arange(batch, device=row.device))
        ascending, self.by_col = col.sort()
        self.col_starts = torch.searchsorted(ascending, torch.arange(d_sae, device=row.device))

    def matmul(self, z, W):
        """Z @ W: [B, D]"""
        return F.embedding_bag(self.col, W, self.row_starts, mode="sum", per_sample_weights=z)

    def t_matmul(self, z, X):
        """Z.T @ X: [F, D]"""
        return F.embedding_bag(self.row[self.by_col], X, self.col_starts, mode="sum",
                               per_sample_weights=z[self.by_col])

    def t_sum(self, z):
        """Z.sum(0): [F]"""
        return torch.zeros(self.d_sae, dtype=z.dtype, device=z.device).index_add_(0, self.col, z)

    def entries(self, X, W):
        """(X @ W.T)[row, col]: [n], by the private gradient of embedding_bag with respect to z"""
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            X, W, self.col, self.row_starts, self.row, 0)

class Encode(torch.autograd.Function):
    """((x - b_dec) @ W_enc + b_enc)[row, col], known already as `pre` [n]; x gets no gradient."""
    @staticmethod
    def forward(ctx, pre, active, x, W_enc, b_enc, b_dec):
        ctx.active = active
        ctx.save_for_backward(x, W_enc, b_dec)
        return pre.to(W_enc.dtype, copy=True)

    @staticmethod
    def backward(ctx, grad):
        x, W_enc, b_dec = ctx.saved_tensors
        grad_b = ctx.active.t_sum(grad)
        grad_W = ctx.active.t_matmul(grad, x - b_dec).T
        return None, None, None, grad_W, grad_b, -(W_enc @ grad_b)
# [/shared: sparse]

# [shared: nested]
class Nested(torch.autograd.Function):
    """sum_b sum_t w_bt |r_bt|^2 over the T + 1 different prefixes of a token, t = 0 .. T, exactly.

    r_0 = x - b_dec and r_t = r_{t-1} - P_t, where P_t is the sum of z d over the entries z that the
    t-th prefix adds and their rows d of W_dec; the last, r_T = e, is given. Going back from it with
    R_t = sum_{s >= t} w_s r_s gives the gradients, -2 <d, R_t> for z, -2 z R_t for d, -2 R_0 for
    b_dec, and the value, <r_0, R_0> - sum z <d, R_t>. The batch comes in `pieces`, each the Active
    of some tokens with rows token * T + t - 1: all P_t, T D floats a token, exist for one piece at
    a time, and only the gradients are kept for backward."""
    @staticmethod
    def forward(ctx, z, W_dec, b_dec, e, w, pieces):
        T, value, grad_z, grad_W, grad_b = w.shape[1] - 1, 0, [], 0, 0
        entries = z.split([len(active.col) for active in pieces])
        tokens = [len(active.row_starts) // T for active in pieces]
        for active, v, r, weight in zip(pieces, entries, e.clone().split(tokens), w.split(tokens)):
            P = active.matmul(v, W_dec)                                      # (tokens T, D)
            R, P_t = torch.zeros_like(r), P.unflatten(0, (-1, T)).unbind(1)
            for t in range(T, 0, -1):
                R.addcmul_(r, weight[:, t, None])                            # R_t
                r += P_t[t - 1]                                              # r_{t-1}
                P_t[t - 1].copy_(R)                                          # P_t has served
            R.addcmul_(r, weight[:, :1])                                     # R_0
            grad_z.append(active.entries(P, W_dec))
            grad_W, grad_b = active.t_matmul(v, P).add_(grad_W), R.sum(0) + grad_b
            value = (r * R).sum() - (v * grad_z[-1]).sum() + value
        ctx.save_for_backward(torch.cat(grad_z), grad_W, grad_b)
        return value

    @staticmethod
    def backward(ctx, grad):
        return *(-2 * grad * known for known in ctx.saved_tensors), None, None, None
# [/shared: nested]

# --- loss -----------------------------------------------------------------------------------------

def loss_fn(sae, x, state, args):
    """Loss of a batch x [B, D], its terms, how often each latent fired [F]."""
    (B, D), d_sae, G = x.shape, len(sae.W_dec), len(state["widths"])
    with torch.no_grad():
        vals, at = batch_top(sae.pre_acts(x).flatten(), state["n"])          # (n,), may be bf16
        active = Active(at // d_sae, at % d_sae, B, d_sae)
        levels = copy.copy(active)             # the same entries, in rows token * G + level - 1
        levels.row = active.row * G + torch.searchsorted(state["widths"], active.col, right=True)
        levels.row_starts = torch.searchsorted(levels.row, torch.arange(B * G, device=x.device))
    z = Encode.apply(vals, active, x, sae.W_enc, sae.b_enc, sae.b_dec).relu()
    e = (x - sae.b_dec - active.matmul(z, sae.W_dec)).detach()               # (B, D)
    w = state["weights"].expand(B, G + 1)
    loss = Nested.apply(z, sae.W_dec, sae.b_dec, e, w, [levels]) / B
    mse, dead = e.pow(2).sum() / B, state["dead"]
    aux = torch.zeros_like(mse)
    if len(dead) and args.auxk_alpha:
        aux = auxk_loss(sae, x, e, dead, args)
    loss = loss + args.auxk_alpha * D * aux
    terms = dict(loss=loss, mse=mse, aux=aux, l0=(z > 0).sum() / B)
    return loss, terms, active.t_sum((z > 1e-3).float())

# [shared: auxk]
def auxk_loss(sae, x, e, dead, args):
    """The dead latents reconstruct the error e of the live ones: no gradient to live ones or b_dec.
    Dense, over the dead latents alone. No b_dec in e_hat: e already excludes it."""
    W_enc, W_dec = F.embedding(dead, sae.W_enc.T), F.embedding(dead, sae.W_dec)      # (n, D)
    pre = F.linear(x - sae.b_dec.detach(), W_enc, sae.b_enc[dead])                   # (B, n)
    if len(dead) > args.auxk:
        vals, idx = pre.topk(args.auxk, sorted=False)
        pre = torch.zeros_like(pre).scatter_(1, idx, vals)
    e_hat = pre.relu() @ W_dec
    mean = data.all_reduce(e.mean(0))                                        # of the global batch
    variance = data.all_reduce(e.pow(2).sum() / len(e)) - mean.pow(2).sum()
    return F.mse_loss(e_hat, e, reduction="sum") / len(e) / variance.clamp_min(1e-8)
# [/shared: auxk]

# --- training -------------------------------------------------------------------------------------

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

def train_step(sae, opt, x, state, step, args, loss_fn=loss_fn):
    """One whole optimisation step on a batch x [B, D]; the terms of the loss. No host sync."""
    state["n"] = round(k_at(step, args) * args.batch_size)
    if args.random_widths:
        state["widths"] = random_widths(step, args).to(x.device, non_blocking=True)
    # [shared: step]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
        loss, terms, fired = loss_fn(sae, x, state, args)
    loss.backward()
    with torch.no_grad():
        group, W = opt.param_groups[0], sae.W_dec
        for p, view in zip(sae.parameters(), group["params"]):
            view.grad = data.all_reduce(data.rows(p.grad))
        if sae.unit_norm:                                              # move along the sphere
            W.grad.addcmul_(torch.linalg.vecdot(W.grad, W)[:, None], W, value=-1)
        norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
        opt.found_inf = data.all_reduce((~(norm + loss).isfinite()).float(), "max")   # 1: no update
        group["lr"] = lr_at(step, args)
        opt.step()
        opt.zero_grad()
        sae.zero_grad()
        if sae.unit_norm:
            W /= torch.linalg.vector_norm(W, dim=1, keepdim=True)
        state["tokens_since_fired"] += args.batch_size
        state["tokens_since_fired"].masked_fill_(data.all_reduce(fired, "sum") > 0, 0)
    terms = {name: term.detach() for name, term in terms.items()}
    # [/shared: step]
    return terms

def train(args):
    """Train as parse_args says, write the run directory; returns the SAE, for raw activations."""
    # [shared: start]
    device = data.setup(args)
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
        data.fail(f"--k {args.k:g}, --k-start {args.k_start:g}: need to be at least one a batch, "
                  f"1 / --batch-size, and at most --d-sae, {n}")
    if args.widths != sorted(set(args.widths)) or args.widths[-1] != n:
        data.fail(f"--widths {args.widths}: need to increase, and to end with --d-sae, {n}")
    args.widths = args.widths if args.balance else [n]
    if args.random_widths and len(args.widths) == 1:
        data.fail("--random-widths: needs more than one level, and --balance above 0")
    weights = [args.balance ** g for g in reversed(range(len(args.widths)))]
    if data.rank() == 0:
        print(f"levels: widths {args.widths}, weights {weights}, whose sum is {sum(weights):g}")
    sae = MatryoshkaSAE(D, n, args.k).to(device)
    state = dict(widths=torch.tensor(args.widths, device=device),
                 weights=torch.tensor([0.0, *weights], device=device))
    data.run_dir(args, "matryoshka" if len(args.widths) > 1 else "batchtopk")
    # [shared: loop]
    opt, first = data.adam(sae, args.lr, BETAS), 0
    state["tokens_since_fired"] = torch.zeros(args.d_sae, dtype=torch.int64, device=device)
    state["dead"] = torch.empty(0, dtype=torch.int64, device=device)         # indices
    if args.resume:
        first = data.load_state(args, source, sae, opt, state)
    loss = torch.compile(loss_fn) if args.compile else loss_fn
    log, bad = data.Log(args, first), torch.zeros((), device=device)
    with data.stop_signal(device) as stop, log.bar:
        for step in log.bar:
            x = source.batch(step)
            terms = train_step(sae, opt, x, state, step, args, loss)
            bad, done, halt = bad + opt.found_inf, step + 1, False
            if done % CHECK_EVERY == 0 or done == args.steps:           # the host waits here
                state["dead"] = (state["tokens_since_fired"] > args.dead_after).nonzero()[:, 0]
                halt = bad.item() > 0 or stop() and done < args.steps
            if done % args.log_every == 0 or done == args.steps:        # and here
                log(done, x, terms, lr_at(step, args), len(state["dead"]) / args.d_sae)
            if done % args.save_every == 0 or done == args.steps or halt:
                data.save_state(args, source, sae, opt, state, done)
            if halt:
                log.halt(done, finite=bad.item() == 0)
    # [/shared: loop]
    x = source.heldout()
    metrics = data.heldout_metrics(sae.set_threshold(x[::2]), x[1::2])
    sae.load_state_dict(data.fold(sae.state_dict(), source))            # takes raw x from here on
    data.save_sae(args, "jumprelu", sae.state_dict(), source, log, metrics)
    return sae

def load(path):
    """The SAE of a run directory; it takes raw activations."""
    cfg, tensors = data.load_sae(path)
    sae = MatryoshkaSAE(cfg["d_in"], cfg["d_sae"], cfg["metadata"]["flags"]["k"])
    sae.load_state_dict(tensors)
    return sae.eval()

if __name__ == "__main__":
    train(parse_args())
