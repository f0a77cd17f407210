"""TopK sparse autoencoder: every token keeps its k largest latents.

Gao et al. 2024, 'Scaling and evaluating sparse autoencoders', arXiv 2406.04093.

    pre   = (x - b_dec) @ W_enc + b_enc                   [B, F]
    z     = relu(pre) where pre is among the k largest of its token, else 0
    x_hat = z @ W_dec + b_dec                             [B, D]
    loss  = mean_B |x - x_hat|^2 + auxk_alpha * D * aux   (sum over D, mean over B)
    aux   = mean_B |e - e_hat|^2 / mean_B |e - mean e|^2  with e = x - x_hat, detached
    e_hat = z_dead @ W_dec                  z_dead: relu of the auxk largest pre of dead latents

Departures from the paper (we had the authors' code and notes on the paper, not its text):
  - They divide the error by the variance of x, which data.py makes about D: so here aux times D.
  - Input is centred and scaled by constants, which fold into the weights on saving; the authors'
    per-token LayerNorm does not. So b_dec starts at the mean, not at the geometric median.
  - Dead is what is silent for 1 % of the run's tokens, if that is less than the paper's 10M, on a
    list renewed every CHECK_EVERY steps; auxk is D // 2. W_enc starts at min(1, 2 D / F) W_dec.T;
    rows of W_dec get norm 1 after the step, not before. The rate follows default_lr, warms up and
    decays; Adam's eps is 1e-8; gradients are clipped to norm 1; weights are not averaged.

    python topk_sae.py --layer 6                                  # a language model, 2 CPU cores
    python topk_sae.py --model toy --toy song --k 3 --d-sae 32    # data with known features
    python topk_sae.py --activations X.npy --k 5 --d-sae 256      # your own array [N, D]
    torchrun --nproc-per-node 8 topk_sae.py --layer 6 --tokens 1e8 --batch-size 16384
"""
import argparse
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
    add("--k", type=data.count, default=32, help="active latents per token; default 32")
    add("--auxk", type=data.count, help="dead latents that AuxK uses per token; default D // 2")
    add("--auxk-alpha", type=data.at_least(0, float), default=1 / 32, help="weight of AuxK; 1/32")
    return parser.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------

class TopKSAE(nn.Module):
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

# [shared: decode]
class Decode(torch.autograd.Function):
    """Z @ W_dec: [B, D], from the entries z [n] of Z."""
    @staticmethod
    def forward(ctx, z, active, W_dec):
        ctx.active = active
        ctx.save_for_backward(z, W_dec)
        return active.matmul(z, W_dec)

    @staticmethod
    def backward(ctx, grad):
        z, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_W = ctx.active.t_matmul(z, grad) if ctx.needs_input_grad[2] else None
        return ctx.active.entries(grad, W_dec), None, grad_W
# [/shared: decode]

# --- loss -----------------------------------------------------------------------------------------

def loss_fn(sae, x, state, args):
    """Loss of a batch x [B, D], its terms, how often each latent fired [F]."""
    with torch.no_grad():
        vals, idx = top(sae.pre_acts(x), sae.k)               # (B, k), rounded to bf16 by autocast
    row = torch.arange(len(x), device=x.device).repeat_interleave(sae.k)
    active = Active(row, idx.flatten(), len(x), len(sae.W_dec))
    z = Encode.apply(vals.flatten(), active, x, sae.W_enc, sae.b_enc, sae.b_dec).relu()
    x_hat = Decode.apply(z, active, sae.W_dec) + sae.b_dec                   # (B, D)
    mse = F.mse_loss(x_hat, x, reduction="sum") / len(x)
    dead, aux = state["dead"], torch.zeros_like(mse)
    if len(dead) and args.auxk_alpha:
        aux = auxk_loss(sae, x, (x - x_hat).detach(), dead, args)
    loss = mse + args.auxk_alpha * x.shape[1] * aux
    terms = dict(loss=loss, mse=mse, aux=aux, l0=(z > 0).sum() / len(x))
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

def train_step(sae, opt, x, state, step, args, loss_fn=loss_fn):
    """One whole optimisation step on a batch x [B, D]; the terms of the loss. No host sync."""
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
    args.auxk = args.auxk or D // 2
    if args.k > args.d_sae:
        data.fail(f"--k {args.k}: larger than --d-sae {args.d_sae}")
    sae, state = TopKSAE(D, args.d_sae, args.k).to(device), {}
    data.run_dir(args, "topk")
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
    sae = TopKSAE(cfg["d_in"], cfg["d_sae"], cfg["k"])
    sae.load_state_dict(tensors)
    return sae

if __name__ == "__main__":
    train(parse_args())
