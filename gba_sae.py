"""Group Bias Adaptation: only biases keep latents from firing too often; the loss has no such term.

Chen et al. 2025, 'Taming Polysemanticity in LLMs: Provable Feature Recovery via Sparse
Autoencoders', arXiv 2506.14002; --groups 1 is the paper's Bias Adaptation.

    y     = (x - b_dec) @ W.T + b_enc                     [B, F], rows of W = W_dec have norm 1
    phi   = y - b_enc where y > 0, else 0                 JumpReLU; with --relu: relu(y)
    x_hat = (a * phi) @ W + b_dec                         [B, D], one scale a per latent
    loss  = mean_B |x - x_hat|^2                          no gradient for b_enc
    Of K groups, about F / K latents each, the k-th has the target frequency
        p = high (low / high)^((k - 1) / (K - 1))
    Every --bias-every steps, of all tokens since: q = how often y > 0, r = the largest y, or 0,
        b_enc <- b_enc - gamma_down * r                   where q > p (too often)
        b_enc <- min(b_enc + gamma_up * r_mean, 0)        where q < EPS (dead)
  r_mean is of those latents of the group that fired. p is a ceiling: a latent that fires less often
  is left alone, until it is dead; then the second line is all that revives it.

Departures from the paper (read: its project page with the algorithms, notes by others, reviews; not
the paper itself, nor its code):
  - As printed, the second line of the algorithm also ends in a maximum: a dead latent would jump
    to 0 or above. A reviewer, too, says that a minimum is meant. JumpReLU's form is inferred.
  - Inputs are normalised there, to norm 1 as we read it, and b_enc is kept at or above -1. Here x
    is centred and scaled by one number, which unlike a norm per token folds on save: b_enc is
    divided by it, rows and a stay. The rule works at any scale, as steps are in units of r. While
    b_dec is fixed it needs no floor: with gamma_down <= 1 no step down passes -max(y - b_enc), the
    largest projection, and so b_enc stays above -max|x - b_dec|.
  - b_dec stays at the mean of the data. There it is trained (--train-b-dec): its gradient can raise
    all y at once, and undo what the biases do. JumpReLU is as good with it; ReLU runs away from the
    data and finds few features (benchmarks/results/bias.md).
  - There: 50 steps of 512 tokens between updates, gamma 0.01 (from notes), for 100M tokens. Short
    runs have few such updates: our defaults depend on the length. Their eps is unknown to us.
  - Squares are not halved. Adam without weight decay (theirs: AdamW, values not found), rate and
    clipping to norm 1 as in topk_sae.py. W starts at random directions.

What we found (benchmarks/results/bias.md; share of the true features at a cosine above 0.9):
  - The paper's imbalanced toy: it has 100 % for the 'full range' of targets, 4 % for a 'wrong' one,
    98 % for TopK with k = 20, 23 % with k = 50. Ours: ten groups, .5 to .001 at most 10 %, .1 to
    .001 at most 91 %, .02 to .001 100 %, but at an L0 of 1.2 (true: 11.5) and an FVU of .48; .5 to
    .1 none. TopK 100 % with k = 10 (FVU .11), 2 % with 20, none with 50. Low ceilings find the
    features and leave most of the data out; high ones do the reverse.

    python gba_sae.py --layer 6                                      # a language model, 2 CPU cores
    python gba_sae.py --model toy --toy gba --groups 1 --high 0.03 --d-sae 512 --batch-size 512
    python gba_sae.py --activations X.npy --high 0.04                # your own array [N, D]
    torchrun --nproc-per-node 8 gba_sae.py --layer 6 --tokens 1e8 --batch-size 16384
"""
import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data

CHECK_EVERY = 10        # steps between the times when the host looks at what the device has found
BETAS = 0.9, 0.999      # of Adam
EPS = 1e-6              # a latent that fires less often is dead: in a million tokens, never

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
    add("--groups", type=data.count, default=10, help="1 is Bias Adaptation; default 10")
    add("--high", type=data.share, default=0.1, help="target frequency of the first group; 0.1")
    add("--low", type=data.share, default=1e-3, help="of the last, if there are several; 0.001")
    add("--bias-every", type=data.count, help="steps between updates of the biases; default: as "
                  "many as ten firings at the lowest target take, at most 1/100 of the run")
    add("--gamma-down", type=data.share, help="step of a bias, in peaks of its latent; default: 8 "
                                              "for all updates together, at least 0.01 each")
    add("--gamma-up", type=data.at_least(0, float, 1), help="step up, in mean peaks of its group; "
                                                      "default: the same; 0: nothing revives")
    add("--relu", action="store_true", help="ReLU in place of JumpReLU")
    add("--train-b-dec", action="store_true", help="by gradient; default: it stays at the mean")
    return parser.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------

class GBASAE(nn.Module):
    """W_dec [F, D], whose unit rows the encoder shares; scales a [F]; b_enc [F] <= 0, moved by
    adapt, never by a gradient; b_dec [D]. Where a < 0, z = |a| phi and the row decodes as -row."""
    unit_norm = True                                          # train_step keeps rows of W_dec so

    def __init__(self, d_in, d_sae, relu=False, train_b_dec=False):
        super().__init__()
        self.relu = relu
        self.W_dec = nn.Parameter(F.normalize(torch.randn(d_sae, d_in), dim=1))      # (F, D)
        self.a = nn.Parameter(torch.ones(d_sae))
        self.b_enc = nn.Buffer(torch.zeros(d_sae))
        b_dec = torch.zeros(d_in)
        self.b_dec = nn.Parameter(b_dec) if train_b_dec else nn.Buffer(b_dec)

    def phi(self, y, b):
        return y.relu() if self.relu else y.relu() - b.to(y) * (y > 0)

    def encode(self, x):
        y = F.linear(x - self.b_dec, self.W_dec, self.b_enc)
        return self.a.abs() * self.phi(y, self.b_enc)                                # (B, F)

    def decode(self, z):
        return (z * self.a.sign()) @ self.W_dec + self.b_dec                         # (B, D)

    def forward(self, x):
        return self.decode(self.encode(x))

    def tensors(self):
        """Untied and with a in the encoder, as other tools read it: pre = (x - b_dec) @ W_enc +
        b_enc, z = relu(pre), where pre > threshold if there is one."""
        t = dict(W_enc=(self.a.abs()[:, None] * self.W_dec).T, b_enc=self.a.abs() * self.b_enc,
                 W_dec=self.a.sign()[:, None] * self.W_dec, b_dec=self.b_dec)
        if not self.relu:
            t.update(threshold=-t["b_enc"], b_enc=torch.zeros_like(self.b_enc))
        return {name: tensor.detach() for name, tensor in t.items()}

# --- sparse codes ---------------------------------------------------------------------------------

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

# [shared: positive]
def positive(sae, x, W_enc, bias, state):
    """pre = (x - b_dec) @ W_enc + bias where it is positive: entries [n], their Active, and 1,
    or 0 if CUDA has no room for so many before the next check. While they are too many to gain from
    it: all of pre [B, F], None, and 1."""
    if not state["sparse"]:
        zero = (sae.b_dec.detach() - sae.b_dec) @ W_enc.detach()    # its gradient is b_dec's
        return F.linear(x - sae.b_dec.detach(), W_enc.T, bias + zero), None, 1
    with torch.no_grad():
        pre = F.linear(x - sae.b_dec, W_enc.T, bias).flatten()                # may be bf16
        on, fits = pre > 0, 1
        if not state["room"]:
            at = on.nonzero()[:, 0]
            vals = pre[at]
        else:          # CUDA: n entries whatever the data, lest the host wait for their number. The
            room = torch.arange(state["room"], device=x.device)          # last ones fill up with 0.
            at = torch.nonzero_static(on, size=len(room), fill_value=len(pre) - 1)[:, 0]
            vals, fits = pre[at] * (room < on.sum()), on.sum() <= len(room)
        active = Active(at // len(bias), at % len(bias), len(x), len(bias))
    return Encode.apply(vals, active, x, W_enc, bias, sae.b_dec), active, fits

def decode(z, active, W_dec):
    return z @ W_dec if active is None else Decode.apply(z, active, W_dec)   # (B, D)

def fired(z, active):
    on = (z > 1e-3).float()
    return on.sum(0) if active is None else active.t_sum(on)                 # (F,)
# [/shared: positive]

# --- loss -----------------------------------------------------------------------------------------

def loss_fn(sae, x, state, args):
    """Loss of a batch x [B, D], its terms, how often each latent fired [F]."""
    y, active, fits = positive(sae, x, sae.W_dec.T, sae.b_enc, state)        # (n,) or (B, F)
    a, b = (v if active is None else v.index_select(0, active.col) for v in (sae.a, sae.b_enc))
    z = a.to(y) * sae.phi(y, b)                               # dense and perhaps bf16, or float32
    x_hat = decode(z, active, sae.W_dec) + sae.b_dec          # (B, D)
    mse = F.mse_loss(x_hat, x, reduction="sum") / len(x)
    on = (y > 0).float()
    count = on.sum(0) if active is None else active.t_sum(on)                # (F,)
    terms = dict(loss=mse, mse=mse, l0=count.sum() / len(x))
    terms.update(peak=peaks(y.detach(), active), fits=torch.ones_like(mse) * fits)
    return mse * fits, terms, count

def peaks(y, active):
    """The largest y of each latent, or 0: [F]."""
    if active is None:
        return y.amax(0).relu().float()
    return y.new_zeros(active.d_sae).scatter_reduce(0, active.col, y, "amax")

# --- bias adaptation ------------------------------------------------------------------------------

def start(args, device):
    """Set the defaults that follow the run's length; returns target [K], group [F], statistics."""
    K, n = args.groups, args.d_sae
    group = torch.arange(n) * K // n
    target = args.high * (args.low / args.high) ** (torch.arange(K) / max(1, K - 1))
    tokens, most = 10 / target[-1].item(), max(1, args.steps // 100)    # at least 100 updates
    args.bias_every = args.bias_every or min(most, math.ceil(tokens / args.batch_size))
    gamma = min(1, max(0.01, 8 * args.bias_every / args.steps))
    args.gamma_down = args.gamma_down or gamma
    args.gamma_up = gamma if args.gamma_up is None else args.gamma_up
    state = dict(target=target, group=group, size=group.bincount(), count=torch.zeros(n),
                 peak=torch.zeros(n), seen=torch.zeros(()))
    return {name: tensor.to(device) for name, tensor in state.items()} | dict(active=torch.inf)

def adapt(b, q, r, p, group, args):
    """Algorithm 2: new biases [F] from biases b, frequencies q, peaks r of y (or 0), targets p."""
    total, alive = b.new_zeros(2, args.groups).index_add(1, group, torch.stack([r, (r > 0).to(r)]))
    r_mean = (total / alive.clamp_min(1))[group]                       # of those that fired at all
    return torch.where(q > p, b - args.gamma_down * r,
                       torch.where(q < EPS, (b + args.gamma_up * r_mean).clamp_max(0), b))

def track(sae, fired, peak, good, state, step, args):
    """Add the global batch to the statistics, if good is 1 and not 0; adapt when it is time."""
    state["seen"] += good * args.batch_size
    state["count"] += torch.where(good > 0, fired, 0)
    state["peak"] = torch.maximum(state["peak"], torch.where(good > 0, peak, 0))
    if (step + 1) % args.bias_every == 0:
        q, p = state["count"] / state["seen"].clamp_min(1), state["target"][state["group"]]
        sae.b_enc.copy_(adapt(sae.b_enc, q, state["peak"], p, state["group"], args))
        for name in ("seen", "count", "peak"):
            state[name].zero_()

def heldout_groups(q, tokens, state):
    """Of each group: target, mean frequency q on held-out tokens, and the share of latents over the
    target by more than three standard errors, as if tokens were independent."""
    p = state["target"][state["group"]]
    values = dict(target=p, freq=q, over=(q > p + 3 * (p * (1 - p) / tokens).sqrt()).float())
    return [{name: v[state["group"] == k].mean().item() for name, v in values.items()}
            for k in range(len(state["target"]))]

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
    # [shared: switch]
    if step % CHECK_EVERY == 0:                                          # but here
        active = float(state["active"])                                  # per token
        state["sparse"] = active < args.d_sae / 20           # about where it gets faster
        state["room"] = int((1.5 * active + 1) * len(x)) if state["sparse"] and x.is_cuda else 0
    # [/shared: switch]
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
    with torch.no_grad():                            # with the statistics of the same forward pass
        peak, good = data.all_reduce(terms.pop("peak"), "max"), 1 - opt.found_inf
        state["active"] = torch.where(good > 0, fired.sum() / args.batch_size, state["active"])
        good *= (data.all_reduce(terms.pop("fits")) == 1)
        track(sae, fired, peak, good, state, step, args)
        group_sum = torch.zeros_like(state["target"]).index_add_(0, state["group"], fired)
    terms.update(target=state["target"], freq=group_sum / state["size"] / args.batch_size)
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
    if args.groups > 1 and args.low > args.high:
        data.fail(f"--low {args.low:g}: needs to be at most --high, {args.high:g}")
    if args.groups > args.d_sae:
        data.fail(f"--groups {args.groups}: needs to be at most --d-sae, {args.d_sae}")
    state = start(args, device)
    if args.bias_every > args.steps:
        data.fail(f"--bias-every {args.bias_every}: more than the {args.steps} steps of --tokens")
    sae = GBASAE(D, args.d_sae, args.relu, args.train_b_dec).to(device)
    data.run_dir(args, "gba")
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
    x, count = source.heldout(), torch.zeros(args.d_sae, device=device)
    metrics = data.heldout_metrics(sae, x, count)
    metrics["groups"] = heldout_groups(count / len(x), len(x), state)
    sae.load_state_dict(data.fold(sae.state_dict(), source))            # takes raw x from here on
    architecture = "standard" if args.relu else "jumprelu"
    data.save_sae(args, architecture, sae.tensors(), source, log, metrics)
    return sae

def load(path):
    """The SAE of a run directory; it takes raw activations."""
    cfg, t = data.load_sae(path)
    sae = GBASAE(cfg["d_in"], cfg["d_sae"], relu="threshold" not in t)
    a = (t["W_enc"].T * t["W_dec"]).sum(1)
    sae.load_state_dict(dict(a=a, W_dec=a.sign()[:, None] * t["W_dec"], b_dec=t["b_dec"],
                             b_enc=(t["b_enc"] - t.get("threshold", 0)) / a.abs().clamp_min(1e-30)))
    return sae

if __name__ == "__main__":
    train(parse_args())
