"""Ordered sparse autoencoder: every prefix of the latents is a dictionary, so they have an order.

Wang et al. 2025, 'Enforcing Orderedness to Improve Feature Consistency', arXiv 2512.02194.

    pre     = (x - b_dec) @ W_enc + b_enc                 [B, F]
    z       = relu(pre) where pre is among the k largest of its token, else 0
    x_hat_l = z[:, :l] @ W_dec[:l] + b_dec                l = 1 .. F
    loss    = sum_l p(l) mean_B |x - x_hat_l|^2 + auxk_alpha * D * aux
    p       = (1 - full_share) * the --prefix-law, + full_share at l = F
    aux     as in topk_sae.py, on the error of all latents, x - x_hat_F, detached

A token has k + 1 different prefixes, so the sum over all l is exact at a cost of k D a token.

Departures from the paper (of which no code was found):
  - It keeps the k largest |z|, we the k largest pre. l = 1 .. F is its text's and proof's; its
    section 2.6 has k for F. p: Zipf on one toy, elsewhere not given in numbers; ours see below.
  - k falls from 8 k (paper: from F, over a time not given) to k over a fifth of the run. --sweep
    freezes W_enc, b_enc and W_dec latent after latent, evenly to the end (paper: one every T
    epochs); frozen latents still count when gradients are clipped.
  - AuxK, scaling, initialisation, rate and clipping are those of topk_sae.py; of these it states a
    rate, for one toy.

The critique, and what we found on its toy A (benchmarks/results/order.md: ten seeds, machine,
date). Its theorem says that the true features minimise this loss. They do not: where codes occur
together, turning an early feature towards a later one lowers the error of short prefixes at first
order and raises that of the full width at second, so every prefix hedges. Stability with the truth
is no higher (.974) than that of TopK with the same annealing of k (.972); both beat its .814, and
all beat its baselines' .50. The order is real, .76 (its .734; TopK 0). Five levels as in Matryoshka
order, too (.75; its .12), the first ten latents better (.70 against .39); but at about equal weight
on the full width all prefixes order more, at less error: .84 against .75, FVU .013 against .022
(weights .25 and .2). Without annealing order is .50, over half of the run .83, but on a language
model annealing costs error (README); with no extra weight on the full width it is .88, at less
stability (.941). Sweeping adds error and nothing else. Of the laws uniform orders most (.76; zipf,
groups .64), though not the first ten (.39; .68, .63), at the least error: hence the default.

    python ordered_sae.py --layer 6                                  # a language model, 2 CPU cores
    python ordered_sae.py --model toy --toy zipf --k 5 --d-sae 100   # data with known features
    python ordered_sae.py --activations X.npy --k 5 --d-sae 256      # your own array [N, D]
    torchrun --nproc-per-node 8 ordered_sae.py --layer 6 --tokens 1e8 --batch-size 16384
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data

CHECK_EVERY = 10        # steps between the times when the host looks at what the device has found
BETAS = 0.9, 0.999      # of Adam
MEMORY = 2 ** 24        # floats of prefixes held at a time, or 2 F D if that is more

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
    add("--k", type=data.count, default=32, help="active latents per token; default 32")
    add("--prefix-law", choices=["uniform", "zipf", "groups"], default="uniform", help="p(l): equal"
        ", as 1 / l, or at the five default --widths of matryoshka_sae.py alone; default uniform")
    add("--full-share", type=data.at_least(0, float, 1), default=0.5, help="share of p that is at "
        "l = F; 1 is TopK; default 0.5")
    add("--sweep", type=data.share, help="freeze latent after latent after this share of the steps")
    add("--k-start", type=data.count, help="k at the first step; default 8 k, or F if that is less")
    add("--k-anneal", type=data.share, default=0.2, help="share of the steps until k is --k; 0.2")
    add("--auxk", type=data.count, help="dead latents that AuxK uses per token; default D // 2")
    add("--auxk-alpha", type=data.at_least(0, float), default=1 / 32, help="weight of AuxK; 1/32")
    return parser.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------

class OrderedSAE(nn.Module):
    """W_enc [D, F], b_enc [F], W_dec [F, D] with unit rows, b_dec [D]."""
    unit_norm = True                                          # train_step keeps rows of W_dec so

    def __init__(self, d_in, d_sae, k):
        super().__init__()
        self.k = k
        W = F.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(W)                          # (F, D)
        self.W_enc = nn.Parameter(W.T * min(1, 2 * d_in / d_sae))  # (D, F), in memory F rows of D
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def pre_acts(self, x):
        return F.linear(x - self.b_dec, self.W_enc.T, self.b_enc)            # (B, F)

    def activate(self, pre):
        vals, idx = pre.topk(self.k, sorted=False)                           # (B, k)
        return torch.zeros_like(pre).scatter_(-1, idx, vals.relu())          # (B, F)

    def encode(self, x):
        return self.activate(self.pre_acts(x))                               # (B, F)

    def decode(self, z):
        return z @ self.W_dec + self.b_dec                                   # (B, D)

    def forward(self, x):
        return self.decode(self.encode(x))

# --- sparse codes ---------------------------------------------------------------------------------

# [shared: top]
def top(pre, k):
    """pre.topk(k), exactly but faster: the k largest of a row lie in the k chunks with the largest
    maxima, chunk j being the columns j, j + n, j + 2 n, j + 3 n."""
    n, rest = divmod(pre.shape[1], 4)                                        # n chunks
    if rest or n < 2 * k:
        return pre.topk(k, sorted=False)
    _, chunks = top(pre.unflatten(1, (4, n)).amax(1), k)                     # (B, k)
    cols = torch.cat([chunks + i * n for i in range(4)], dim=1)              # (B, 4 k)
    vals, which = pre.gather(1, cols).topk(k, sorted=False)
    return vals, cols.gather(1, which)
# [/shared: top]

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

def survival(args):
    """P(l > j) [F] for latents j = 0 .. F - 1: the share of the loss that latent j is part of."""
    l = torch.arange(1, args.d_sae + 1, dtype=torch.float64)
    p = torch.ones_like(l) if args.prefix_law == "uniform" else 1 / l
    if args.prefix_law == "groups":
        p = sum(l == max(1, args.d_sae * i // 32) for i in (1, 3, 7, 15, 32)).clamp(max=1).double()
    p = (1 - args.full_share) * p / p.sum()
    p[-1] += args.full_share
    return p.flip(0).cumsum(0).flip(0)

def loss_fn(sae, x, state, args):
    """Loss of a batch x [B, D], its terms, how often each latent fired [F]."""
    (B, D), d_sae, k = x.shape, len(sae.W_dec), state["k"]
    with torch.no_grad():
        vals, idx = top(sae.pre_acts(x), k)                   # (B, k), rounded to bf16 by autocast
        idx, order = idx.sort(1)                              # by index: the prefixes
        row = torch.arange(B * k, device=x.device)
        active = Active(row // k, idx.flatten(), B, d_sae)
        S = F.pad(state["survival"][idx], (1, 0), value=1.0)                 # (B, k + 1)
        w = S - F.pad(S[:, 1:], (0, 1))                       # P(the prefix holds t of the k)
        pieces = [Active(row[:some.numel()], some.flatten(), some.numel(), d_sae)
                  for some in idx.split(max(1, max(MEMORY, 2 * d_sae * D) // (k * D)))]
    vals = vals.gather(1, order).flatten()
    z = Encode.apply(vals, active, x, sae.W_enc, sae.b_enc, sae.b_dec).relu()
    e = (x - sae.b_dec - active.matmul(z, sae.W_dec)).detach()               # (B, D)
    loss = Nested.apply(z, sae.W_dec, sae.b_dec, e, w, pieces) / B
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

def train_step(sae, opt, x, state, step, args, loss_fn=loss_fn):
    """One whole optimisation step on a batch x [B, D]; the terms of the loss. No host sync."""
    state["k"] = round(k_at(step, args))
    if args.compile:                                          # a graph for one k, the last
        torch.compiler.set_stance("default" if state["k"] == args.k else "force_eager")
    burn_in, frozen = (args.sweep or 1) * args.steps, 0       # latents below `frozen` stay put
    if step > burn_in:
        frozen = int((step - burn_in) * args.d_sae / (args.steps - burn_in))
    parts = [data.rows(p.data)[:frozen] for p in (sae.W_enc, sae.b_enc, sae.W_dec)]
    before = [part.clone() for part in parts]
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
    for part, old in zip(parts, before):
        part.copy_(old)
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
    args.auxk, args.k_start = args.auxk or D // 2, args.k_start or min(8 * args.k, args.d_sae)
    if max(args.k, args.k_start) > args.d_sae:
        data.fail(f"--k {args.k}, --k-start {args.k_start}: larger than --d-sae {args.d_sae}")
    sae, state = OrderedSAE(D, args.d_sae, args.k).to(device), {}
    state["survival"] = survival(args).to(device, torch.float32)
    data.run_dir(args, "ordered")
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
    metrics = data.heldout_metrics(sae, source.heldout())
    sae.load_state_dict(data.fold(sae.state_dict(), source))            # takes raw x from here on
    data.save_sae(args, "topk", sae.state_dict(), source, log, metrics, k=args.k,
                  rescale_acts_by_decoder_norm=False)
    return sae

def load(path):
    """The SAE of a run directory; it takes raw activations."""
    cfg, tensors = data.load_sae(path)
    sae = OrderedSAE(cfg["d_in"], cfg["d_sae"], cfg["k"])
    sae.load_state_dict(tensors)
    return sae

if __name__ == "__main__":
    train(parse_args())
