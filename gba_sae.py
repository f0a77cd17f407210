"""Group Bias Adaptation: only biases keep latents from firing too often; the loss has no such term.

Chen et al. 2025, 'Taming Polysemanticity in LLMs: Provable Feature Recovery via Sparse
Autoencoders', arXiv 2506.14002; --groups 1 is the paper's Bias Adaptation.

    y     = (x - b_dec) @ W.T + b_enc                     [B, F], rows of W = W_dec have norm 1
    phi   = y - b_enc where y > 0, else 0                 JumpReLU; with --relu: relu(y)
    x_hat = (a * phi) @ W + b_dec                         [B, D], one scale a per latent
    loss  = mean_B |x - x_hat|^2                          no gradient for b_enc
    Of K groups, about F / K latents each, the k-th has the target frequency
        p = high (low / high)^((k - 1) / (K - 1))
    Every --bias-every steps, from all tokens since: q = share with y > 0, r = max(0, largest y),
        b_enc <- b_enc - gamma_down * r                   where q > p (too often)
        b_enc <- min(b_enc + gamma_up * r_mean, 0)        where q < 1e-6 (dead: silent throughout)
  r_mean is of those latents of the group that fired. p is a ceiling: a latent that fires less often
  is left alone until it is dead; then the second line is all that revives it.
    --untied   y = (x - b_dec) @ W_enc + b_enc, where W_enc starts at W.T and is trained by itself

Departures from the paper; we read its project page with the algorithms, notes by others and
reviews, neither the paper itself nor its code (docs/gba.md has the reasons and the smaller ones):
  - As printed, the second line ends in a maximum: a dead latent would jump to 0 or above. A
    reviewer, too, says that a minimum is meant. JumpReLU's form is inferred.
  - x is centred and scaled by one number; theirs, as we read it, has norm 1. So their floor of -1
    for b_enc is left out. While b_dec is fixed and W tied, no step down passes -max|x - b_dec|.
  - b_dec stays at the mean of the data; there it is trained (--train-b-dec). --untied is ours.
  - --bias-every and the gammas depend on the run's length. Squares are not halved. Adam has no
    weight decay; rate and step are those of topk_sae.py. W starts at random directions.

    python gba_sae.py --layer 6                                      # a language model, 2 CPU cores
    python gba_sae.py --model toy --toy gba --groups 1 --high 0.03 --d-sae 512 --batch-size 512
    python gba_sae.py --activations X.npy --high 0.04                # your own array [N, D]
    torchrun --nproc-per-node 8 gba_sae.py --layer 6 --tokens 1e8 --batch-size 16384
"""
import argparse
import math
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
    add("--groups", type=runs.count, default=10, help="1 is Bias Adaptation; default 10")
    add("--high", type=runs.share, default=0.1, help="target frequency of the first group; 0.1")
    add("--low", type=runs.share, default=1e-3, help="of the last, if there are several; 0.001")
    add("--bias-every", type=runs.count, help="steps between updates of the biases; default: as "
                  "many as ten firings at the lowest target take, at most 1/100 of the run")
    add("--gamma-down", type=runs.share, help="step down of a bias, as a share of the latent's "
                        "peak; default 8 / the number of updates, at least 0.01")
    add("--gamma-up", type=runs.at_least(0, float, 1), help="step up, in mean peaks of its group; "
                                                      "default: the same; 0: nothing revives")
    add("--relu", action="store_true", help="ReLU in place of JumpReLU")
    add("--train-b-dec", action="store_true", help="by gradient; default: it stays at the mean")
    add("--untied", action="store_true", help="a W_enc of its own; default: W_dec.T")
    return parser.parse_args(argv)

# --- model ----------------------------------------------------------------------------------------

class GBASAE(nn.Module):
    """W_dec [F, D], whose unit rows the encoder shares, if it is tied, else W_enc [D, F]; scales
    a [F]; b_enc [F] <= 0, moved by adapt, never by a gradient; b_dec [D]. Where a < 0, z = |a| phi
    and the row decodes as -row."""
    unit_norm = True                                          # train_step keeps rows of W_dec so

    def __init__(self, d_in, d_sae, relu=False, train_b_dec=False, untied=False):
        super().__init__()
        self.relu, self.untied = relu, untied
        W = nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(W)                          # (F, D)
        if untied:
            self.W_enc = nn.Parameter(W.clone().T)            # (D, F), see runs.rows
        self.a = nn.Parameter(torch.ones(d_sae))
        self.b_enc = nn.Buffer(torch.zeros(d_sae))
        b_dec = torch.zeros(d_in)
        self.b_dec = nn.Parameter(b_dec) if train_b_dec else nn.Buffer(b_dec)

    def phi(self, y, b):
        """phi of pre-activations y with biases b, both [B, F], or entries of such."""
        return y.relu() if self.relu else y.relu() - b.to(y) * (y > 0)

    def encoder(self):
        return self.W_enc if self.untied else self.W_dec.T                           # (D, F)

    def pre_acts(self, x):
        return nn.functional.linear(x - self.b_dec, self.encoder().T, self.b_enc)    # (B, F)

    def encode(self, x):
        return self.a.abs() * self.phi(self.pre_acts(x), self.b_enc)                 # (B, F)

    def decode(self, z):
        return (z * self.a.sign()) @ self.W_dec + self.b_dec                         # (B, D)

    def forward(self, x):
        return self.decode(self.encode(x))

    def tensors(self):
        """Untied and with a in the encoder, as other tools read it: pre = (x - b_dec) @ W_enc +
        b_enc, z = relu(pre), where pre > threshold if there is one."""
        t = dict(W_enc=self.a.abs() * self.encoder(), b_enc=self.a.abs() * self.b_enc,
                 W_dec=self.a.sign()[:, None] * self.W_dec, b_dec=self.b_dec)
        if not self.relu:
            t.update(threshold=-t["b_enc"], b_enc=torch.zeros_like(self.b_enc))
        return {name: tensor.detach() for name, tensor in t.items()}

# --- loss -----------------------------------------------------------------------------------------

def loss(sae, x):
    """The textbook: plain autograd; b_enc, a buffer, gets no gradient: `adapt` moves it."""
    x_hat = sae.decode(sae.encode(x))                                                # (B, D)
    return (x - x_hat).pow(2).sum(1).mean()

def dense_loss(sae, x, state, args):
    """`loss`, with the arguments and results of sparse_loss: for --dense."""
    total = loss(sae, x)
    with torch.no_grad():
        y = sae.pre_acts(x)
        count, peak = (y > 0).float().sum(0), y.amax(0).relu()
    return total, dict(loss=total, mse=total, l0=count.sum() / len(x), max_y=peak), count

def sparse_loss(sae, x, state, args):
    """The value and gradients of `loss` from the active entries alone (see sparse.py). Returns the
    loss of a batch x [B, D], its terms, and how often each latent fired [F]."""
    y, active = sparse.encode(                                # (x - b_dec) @ encoder + b_enc
        x, sae.encoder(), sae.b_enc, sae.b_dec, state["sparse"], state["room"])
    a, b_enc = active.lookup(sae.a), active.lookup(sae.b_enc)     # as (n,), or (B, F) by expansion
    signed = a.to(y) * sae.phi(y, b_enc)                      # entries of encode(x) * a.sign()
    x_hat = active.decode(signed, sae.W_dec) + sae.b_dec      # decode(encode(x)): (B, D)
    mse = nn.functional.mse_loss(x_hat, x, reduction="sum") / len(x)
    count = active.t_sum((y > 0).float())                     # (Y > 0).sum(0): (F,)
    total = mse * active.complete                             # 0 where room was short
    terms = dict(loss=total, mse=mse, l0=count.sum() / len(x), max_y=active.t_max(y.detach()))
    return total, terms, count                                # max_y: Y.amax(0), or 0: (F,)

# --- bias adaptation ------------------------------------------------------------------------------

def adapt(b, q, r, p, group, args, eps=1e-6):
    """The paper's Algorithm 2: new biases [F] from biases b, frequencies q, peaks r of y (or 0) and
    targets p of all latents, each [F]; group [F] int64."""
    total, alive = b.new_zeros(2, args.groups).index_add(1, group, torch.stack([r, (r > 0).to(r)]))
    r_mean = (total / alive.clamp_min(1))[group]                       # of those that fired at all
    return torch.where(q > p, b - args.gamma_down * r,
                       torch.where(q < eps, (b + args.gamma_up * r_mean).clamp_max(0), b))

def track(sae, fired, peak, made, state, step, args):
    """Add the global batch to the statistics, if its step was made; adapt when it is time."""
    state["seen"] += made * args.batch_size
    state["count"] += torch.where(made, fired, 0)
    state["peak"] = torch.maximum(state["peak"], torch.where(made, peak, 0))
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

def rule_defaults(args):
    """The defaults of the rule that depend on the length of the run."""
    tokens = 10 / targets(args)[-1].item()                    # ten firings at the lowest target
    most = max(1, args.steps // 100)                          # at least 100 updates
    args.bias_every = args.bias_every or min(most, math.ceil(tokens / args.batch_size))
    gamma = min(1, max(0.01, 8 * args.bias_every / args.steps))
    args.gamma_down = args.gamma_down or gamma
    args.gamma_up = gamma if args.gamma_up is None else args.gamma_up

def targets(args):
    """p of each group: [K]"""
    share = torch.arange(args.groups) / max(1, args.groups - 1)
    return args.high * (args.low / args.high) ** share

def init_state(args, device):
    """What steps and losses share beside weights and Adam's moments; --resume restores it."""
    group = torch.arange(args.d_sae, device=device) * args.groups // args.d_sae
    return dict(
        # [shared: state]
        tokens_since_fired=torch.zeros(args.d_sae, dtype=torch.int64, device=device),
        dead=torch.empty(0, dtype=torch.int64, device=device),        # indices of the dead latents
        # [/shared: state]
        # [shared: form_state]
        per_token=torch.inf,                          # active entries, in the step before
        sparse=False, room=0, blocks=1,               # form of the codes: sparse.encode, .backward
        # [/shared: form_state]
        target=targets(args).to(device),              # p of each group: [K]
        group=group, size=group.bincount(),           # of each latent: [F]; latents in each: [K]
        seen=torch.zeros((), device=device),          # tokens since the last update of the biases
        count=torch.zeros(args.d_sae, device=device),         # how often y > 0 in them
        peak=torch.zeros(args.d_sae, device=device),          # the largest y in them, or 0
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
    # [shared: form]
    if step % runs.CHECK_EVERY == 0:                   # float() waits for the device, so not always
        active = float(state["per_token"])
        state["sparse"] = active < args.d_sae / 20                 # about where it gets faster
        state["room"] = int((1.5 * active + 1) * len(x)) if state["sparse"] and x.is_cuda else 0
        most = min(8, len(x) // 512, len(x) * args.d_sae >> 23)      # blocks of 512 tokens or more
        state["blocks"] = 1 if state["sparse"] and not args.dense else max(1, most)
    # [/shared: form]
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
    # From here on `fired` counts the global batch, since the step above has summed it in place. All
    # statistics are of the forward pass above, before Adam's step.
    with torch.no_grad():
        active, peak = fired.sum() / args.batch_size, runs.all_reduce(terms.pop("max_y"), "max")
        state["per_token"] = torch.where(opt.bad < 2, active, state["per_token"])
        track(sae, fired, peak, made, state, step, args)
        group_sum = torch.zeros_like(state["target"]).index_add_(0, state["group"], fired)
    terms.update(target=state["target"], freq=group_sum / state["size"] / args.batch_size)
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
    if args.groups > 1 and args.low > args.high:
        runs.fail(f"--low {args.low:g}: needs to be at most --high, {args.high:g}")
    if args.groups > args.d_sae:
        runs.fail(f"--groups {args.groups}: needs to be at most --d-sae, {args.d_sae}")
    rule_defaults(args)
    if args.bias_every > args.steps:
        runs.fail(f"--bias-every {args.bias_every}: more than the {args.steps} steps of --tokens")
    sae, variant = GBASAE(D, args.d_sae, args.relu, args.train_b_dec, args.untied), "gba"
    sae.to(device)
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
    x, count = source.heldout(), torch.zeros(args.d_sae, device=device)
    metrics = runs.heldout_metrics(sae, x, count)
    metrics["groups"] = heldout_groups(count / len(x), len(x), state)
    sae.load_state_dict(runs.fold(sae.state_dict(), source))            # takes raw x from here on
    run.save_sae("standard" if args.relu else "jumprelu", sae.tensors(), metrics)
    return sae

def load(path):
    """The SAE of a run directory; it takes raw activations."""
    cfg, t = runs.load_sae(path)
    untied = cfg["metadata"]["flags"].get("untied", False)
    sae = GBASAE(cfg["d_in"], cfg["d_sae"], relu="threshold" not in t, untied=untied)
    a = torch.ones_like(t["b_enc"]) if untied else (t["W_enc"].T * t["W_dec"]).sum(1)
    sae.load_state_dict(dict(a=a, W_dec=a.sign()[:, None] * t["W_dec"], b_dec=t["b_dec"],
                             b_enc=(t["b_enc"] - t.get("threshold", 0)) / a.abs().clamp_min(1e-30),
                             **({"W_enc": t["W_enc"]} if untied else {})))
    return sae

if __name__ == "__main__":
    with runs.one_line_errors():
        train(parse_args())
