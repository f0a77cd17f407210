"""ReLU sparse autoencoder with an L1 penalty: the baseline, which the other files are read against.

Bricken et al. 2023, 'Towards Monosemanticity', Transformer Circuits; --tied: Cunningham et al.
2023, arXiv 2309.08600; --p-end: Karvonen et al. 2024, arXiv 2408.00113, section 4.3.

    z     = relu((x - b_dec) @ W_enc + b_enc)             [B, F]
    x_hat = z @ W_dec + b_dec                             [B, D], rows of W_dec have norm 1
    loss  = mean_B |x - x_hat|^2 + l1 * mean_B sum_F z    (the square is a sum over D)
    --tied         W_dec = W / |W| by rows, W_enc = W_dec.T, b_dec = 0; W and b_enc are trained
    --p-end P      sum_F z^p in place of sum_F z: p falls from 1 to P, and whenever it does
                   l1 <- l1 * sum z^p_old / sum z^p_new, so that the penalty stays what it was
    --target-l0 L  l1 <- l1 * (l0 / L)^(40 / steps) * l0 / l0_before (bounded), from 30 to 80 %

Departures from the papers (of Bricken et al. we read a translation):
  - Input is centred and scaled, and so b_dec starts at the mean, not the geometric median. The
    error is summed over D: l1 is D * scale (printed at the start) times the coefficient of the
    first two. Karvonen et al. do not square the error; we do, as everywhere here.
  - Dead latents are not resampled: hardly any die (README), with centred data, W_enc starting along
    W_dec.T and a linear warm-up of l1, the last two as in Anthropic's update of April 2024. W_enc
    starts at min(1, 2 D / F) W_dec.T: half of the latents fire at first, and x_hat is x on average.
  - The rate follows default_lr, warms up and decays; gradients are clipped to norm 1. (With --tied,
    Cunningham et al.: 1e-3 throughout, no warm-up of l1, no clipping.)
  - p moves at every step from 40 to 70 % of the run and ends at P (theirs in jumps from 27 % to the
    end, of which the last never comes); l1 is re-matched on the batch at hand (theirs on the last
    ten); z^p is (z + EPS)^p - EPS^p: its gradient at 0 is infinite. --target-l0 is ours.

    python vanilla_sae.py --layer 6                                  # a language model, 2 CPU cores
    python vanilla_sae.py --model toy --toy flat --d-sae 256         # data with known features
    python vanilla_sae.py --activations X.npy --target-l0 5          # your own array [N, D]
    torchrun --nproc-per-node 8 vanilla_sae.py --layer 6 --tokens 1e8 --batch-size 16384
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data

CHECK_EVERY = 10        # steps between the times when the host looks at what the device has found
BETAS = 0.9, 0.999      # of Adam
EPS = 1e-4              # in z^p

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
    add("--l1", type=data.at_least(0, float), default=1.0, help="weight of the penalty; default 1")
    # [shared: penalty_flags]
    add("--l1-warmup", type=data.count, help="steps of its warm-up; default a twentieth of all")
    add("--target-l0", type=data.at_least(1e-3, float), help="adapt the weight until L0 is this")
    add("--p-end", type=data.share, default=1.0, help="exponent at the end, 0 < p <= 1; default 1")
    # [/shared: penalty_flags]
    add("--tied", action="store_true", help="one matrix and no b_dec (Cunningham et al.)")
    return parser.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------

class VanillaSAE(nn.Module):
    """W_enc [D, F], b_enc [F], W_dec [F, D] with unit rows, b_dec [D]. Tied: no W_enc, rows of any
    norm that are divided by it where they are used, and b_dec is not trained."""

    def __init__(self, d_in, d_sae, tied=False):
        super().__init__()
        self.unit_norm = not tied                             # train_step keeps rows of W_dec so
        W = F.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(W)                          # (F, D)
        if tied:
            nn.init.xavier_uniform_(self.W_dec)               # as Cunningham et al.
        else:
            self.W_enc = nn.Parameter(W.T * min(1, 2 * d_in / d_sae))  # (D, F), stored as F rows
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        b_dec = torch.zeros(d_in)
        self.b_dec = nn.Buffer(b_dec) if tied else nn.Parameter(b_dec)

    def weights(self):
        if self.unit_norm:
            return self.W_enc, self.W_dec
        W = F.normalize(self.W_dec, dim=1, eps=1e-8)          # gradients pass through the division
        return W.T, W

    def encode(self, x):
        return F.linear(x - self.b_dec, self.weights()[0].T, self.b_enc).relu()      # (B, F)

    def decode(self, z):
        return z @ self.weights()[1] + self.b_dec                                    # (B, D)

    def forward(self, x):
        return self.decode(self.encode(x))

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
    W_enc, W_dec = sae.weights()
    pre, active, fits = positive(sae, x, W_enc, sae.b_enc, state)
    z = pre.relu()                                            # (n,) or (B, F)
    x_hat = decode(z, active, W_dec) + sae.b_dec              # (B, D)
    mse = F.mse_loss(x_hat, x, reduction="sum") / len(x)
    penalty, rematch = penalties(z, x, state)
    loss = (mse + state["weight"] * penalty) * fits
    terms = dict(loss=loss, mse=mse, penalty=penalty, l1=state["weight"], l0=(z > 0).sum() / len(x))
    return loss, dict(terms, rematch=rematch), fired(z, active)

# [shared: penalty]
def penalties(z, x, state):
    """mean_B sum_F z^p for the p of this step and for that of the next."""
    if state["p"] is None:                                    # both are 1
        return 2 * (z.sum(dtype=x.dtype) / len(x),)
    return [((z.to(x.dtype) + EPS) ** p - EPS ** p).sum() / len(x) for p in state["p"]]

def p_at(step, args):
    """1 for 40 % of the steps, then linearly falling, --p-end from 70 % on."""
    t = min(1, max(0, (step - 0.4 * args.steps) / (0.3 * args.steps)))
    return 1 - t + t * args.p_end
# [/shared: penalty]

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
    # [shared: before]
    p_now, p_next = p_at(step, args), p_at(step + 1, args)
    state["p"] = None if p_next == 1 else (x.new_full((), p_now), x.new_full((), p_next))
    state["weight"] = state["l1"] * min(1, (step + 1) / args.l1_warmup)
    # [/shared: before]
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
    # [shared: after]
    now, then, l0 = data.all_reduce(torch.stack(
        [terms["penalty"], terms.pop("rematch"), terms["l0"]])).clamp_min(EPS)
    l1 = state["l1"] * now / then
    if args.target_l0 and 0.3 * args.steps <= step < 0.8 * args.steps:
        steer = (l0 / args.target_l0).clamp(0.5, 2) ** (40 / args.steps) * l0 / state["last_l0"]
        l1 *= steer.clamp(0.8, 1.25)
    new = dict(l1=l1, last_l0=l0, active=terms.get("gate_l0", terms["l0"]))
    for name in new:                                               # but not from a bad batch
        state[name] = torch.where(opt.found_inf > 0, state.get(name, new[name]), new[name])
    # [/shared: after]
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
    args.l1_warmup = args.l1_warmup or max(1, args.steps // 20)
    if args.target_l0 and (args.target_l0 > args.d_sae or not args.l1):
        data.fail(f"--target-l0: needs to be at most --d-sae {args.d_sae}, and --l1 above 0")
    sae = VanillaSAE(D, args.d_sae, args.tied).to(device)
    data.run_dir(args, "tied" if args.tied else "p-annealed" if args.p_end < 1 else "vanilla")
    state = dict(l1=torch.tensor(args.l1, device=device), active=torch.inf)
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
    W_enc, sae.W_dec.data = (W.detach() for W in sae.weights())
    data.save_sae(args, "standard", dict(sae.state_dict(), W_enc=W_enc), source, log, metrics)
    return sae

def load(path):
    """The SAE of a run directory; it takes raw activations."""
    cfg, tensors = data.load_sae(path)
    sae = VanillaSAE(cfg["d_in"], cfg["d_sae"])
    sae.load_state_dict(tensors)
    return sae

if __name__ == "__main__":
    train(parse_args())
