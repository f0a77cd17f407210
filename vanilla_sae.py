"""ReLU sparse autoencoder with an L1 penalty: the baseline, which the other files are read against.

Bricken et al. 2023, 'Towards Monosemanticity', Transformer Circuits; --tied: Cunningham et al.
2023, arXiv 2309.08600; --p-end: Karvonen et al. 2024, arXiv 2408.00113, section 4.3.

    z     = relu((x - b_dec) @ W_enc + b_enc)             [B, F]: B tokens, F latents
    x_hat = z @ W_dec + b_dec                             [B, D], rows of W_dec have norm 1
    loss  = mean_B |x - x_hat|^2 + l1 * mean_B sum_F z    (the square is a sum over D)
    --tied         W_dec = W / |W| by rows, W_enc = W_dec.T, b_dec = 0; W and b_enc are trained
    --p-end P      sum_F z^p in place of sum_F z: p falls from 1 to P, and whenever it does
                   l1 <- l1 * sum z^p_old / sum z^p_new, so that the penalty stays what it was
    --target-l0 L  l1 <- l1 * (l0 / L)^(40 / steps) * l0 / l0_before (bounded), from 30 to 80 %

Departures from the papers; of the first we read a translation, of the third notes by others and the
code, not the text (docs/vanilla.md has the reasons and the smaller ones):
  - x is centred and scaled, so b_dec starts at the mean, not at the geometric median. The error is
    a sum over D: l1 is D * scale (printed at the start) times the coefficient of the first two.
    Karvonen et al. do not square the error; we do, as everywhere here.
  - Dead latents are not resampled: few die. W_enc starts at min(1, 2 D / F) W_dec.T, l1 at 0.
  - p moves at every step from 40 to 70 % of the run; theirs jumps. z^p is (z + eps)^p - eps^p with
    eps = EPS sqrt(D), as its gradient at 0 is infinite. --target-l0 is ours.

    python vanilla_sae.py --layer 6                                  # a language model, 2 CPU cores
    python vanilla_sae.py --model toy --toy flat --d-sae 256         # data with known features
    python vanilla_sae.py --activations X.npy --target-l0 5          # your own array [N, D]
    torchrun --nproc-per-node 8 vanilla_sae.py --layer 6 --tokens 1e8 --batch-size 16384
"""
import argparse
from pathlib import Path

import torch
from torch import nn

import data
import runs
import sparse

BETAS = 0.9, 0.999      # of Adam
EPS = 1e-3              # in z^p, times sqrt(D); also the least penalty and L0 that are divided by

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
    add("--l1", type=runs.at_least(0, float), default=1.0, help="weight of the penalty; default 1")
    # [shared: penalty_flags]
    add("--l1-warmup", type=runs.count, help="steps of its warm-up; default a twentieth of all")
    add("--target-l0", type=runs.at_least(1e-3, float), help="adapt the weight until L0 is this")
    add("--p-end", type=runs.share, default=1.0, help="exponent at the end, 0 < p <= 1; default 1")
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
        W = nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(W)                          # (F, D)
        if tied:
            nn.init.xavier_uniform_(self.W_dec)               # as Cunningham et al.
        else:
            self.W_enc = nn.Parameter(W.T * min(1, 2 * d_in / d_sae))  # (D, F), see runs.rows
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        b_dec = torch.zeros(d_in)
        self.b_dec = nn.Buffer(b_dec) if tied else nn.Parameter(b_dec)

    def weights(self):
        """W_enc [D, F] and W_dec [F, D] as they act."""
        if self.unit_norm:
            return self.W_enc, self.W_dec
        W = nn.functional.normalize(self.W_dec, dim=1, eps=1e-8)     # gradients pass through it
        return W.T, W

    def encode(self, x):
        W_enc, _ = self.weights()
        return nn.functional.linear(x - self.b_dec, W_enc.T, self.b_enc).relu()      # (B, F)

    def decode(self, z):
        _, W_dec = self.weights()
        return z @ W_dec + self.b_dec                                                # (B, D)

    def forward(self, x):
        return self.decode(self.encode(x))

# --- loss -----------------------------------------------------------------------------------------

def loss(sae, x, l1, p=1, eps=0.0):
    """The textbook: plain autograd, the equations above; p < 1, of --p-end, needs an eps."""
    z = sae.encode(x)                                                                # (B, F)
    mse = (x - sae.decode(z)).pow(2).sum(1).mean()
    penalty = (z if p == 1 else (z + eps) ** p - eps ** p).sum(1).mean()
    return mse + l1 * penalty, dict(mse=mse, penalty=penalty), z

def dense_loss(sae, x, state, args):
    """`loss`, with the arguments and results of sparse_loss: for --dense."""
    p = 1 if state["p"] is None else state["p"]
    total, terms, z = loss(sae, x, state["weight"], p, EPS * x.shape[1] ** 0.5)
    terms.update(l1=state["weight"], l0=(z > 0).sum() / len(x),
                 penalty_next=sum_of_powers(z.detach(), state["p_next"], x))
    return total, dict(loss=total, **terms), (z > 1e-3).float().sum(0)

def sparse_loss(sae, x, state, args):
    """The value and gradients of `loss` from the active entries alone (see sparse.py). Returns the
    loss of a batch x [B, D], its terms, and how often each latent fired, z > 1e-3: [F]."""
    W_enc, W_dec = sae.weights()
    pre, active = sparse.encode(                              # (x - b_dec) @ W_enc + b_enc
        x, W_enc, sae.b_enc, sae.b_dec, state["sparse"], state["room"])
    z = pre.relu()                                            # entries of Z: (n,), or all: (B, F)
    x_hat = active.decode(z, W_dec) + sae.b_dec               # Z @ W_dec + b_dec: (B, D)
    mse = nn.functional.mse_loss(x_hat, x, reduction="sum") / len(x)
    penalty = sum_of_powers(z, state["p"], x)
    penalty_next = penalty if state["p"] is None else sum_of_powers(z, state["p_next"], x)
    total = (mse + state["weight"] * penalty) * active.complete      # 0 if room was short
    terms = dict(loss=total, mse=mse, penalty=penalty, l1=state["weight"],
                 penalty_next=penalty_next, l0=(z > 0).sum() / len(x))
    return total, terms, active.t_sum((z > 1e-3).float())     # (Z > 1e-3).sum(0)

# [shared: penalty]
def sum_of_powers(z, p, x):
    """mean_B sum_F z^p of the codes z of x, as entries [n] or as [B, F]; p None is 1."""
    if p is None:
        return z.sum(dtype=x.dtype) / len(x)
    eps = EPS * x.shape[1] ** 0.5
    return ((z.to(x.dtype) + eps) ** p - eps ** p).sum() / len(x)

def p_at(step, args):
    """1 for 40 % of the steps, then linearly falling, --p-end from 70 % on."""
    t = min(1, max(0, (step - 0.4 * args.steps) / (0.3 * args.steps)))
    return 1 - t + t * args.p_end
# [/shared: penalty]

# --- training -------------------------------------------------------------------------------------

def init_state(args, device):
    """What steps and losses share beside weights and Adam's moments; --resume restores it."""
    return dict(
        # [shared: state]
        tokens_since_fired=torch.zeros(args.d_sae, dtype=torch.int64, device=device),
        dead=torch.empty(0, dtype=torch.int64, device=device),        # indices of the dead latents
        # [/shared: state]
        # [shared: penalty_state]
        l1=torch.tensor(args.l1, device=device),      # weight of the penalty, when it is warmed up
        weight=None,                                  # of this step
        p=None, p_next=None,                          # exponents, now and next; None: 1, no power
        last_l0=torch.ones((), device=device),        # of the step before
        # [/shared: penalty_state]
        # [shared: form_state]
        per_token=torch.inf,                          # active entries, in the step before
        sparse=False, room=0, blocks=1,               # form of the codes: sparse.encode, .backward
        # [/shared: form_state]
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
    # [shared: before]
    p_now, p_next = p_at(step, args), p_at(step + 1, args)
    state["p"], state["p_next"] = (None, None) if p_next == 1 else (
        x.new_full((), p_now), x.new_full((), p_next))
    state["weight"] = state["l1"] * min(1, (step + 1) / args.l1_warmup)
    # [/shared: before]
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
    # [shared: after]
    active = terms.get("gate_l0", terms["l0"])                     # entries of a token
    now, with_next_p, l0, active = runs.all_reduce(torch.stack(    # penalties of the same codes
        [terms["penalty"], terms.pop("penalty_next"), terms["l0"], active])).clamp_min(EPS)
    l1 = state["l1"] * now / with_next_p                           # their product stays what it was
    if args.target_l0 and 0.3 * args.steps <= step < 0.8 * args.steps:
        # The first factor pulls L0 towards its target, the second resists its changes.
        steer = (l0 / args.target_l0).clamp(0.5, 2) ** (40 / args.steps) * l0 / state["last_l0"]
        l1 *= steer.clamp(0.8, 1.25)
    for name, new in dict(l1=l1, last_l0=l0).items():              # a step left out changes nothing
        state[name] = torch.where(made, new, state[name])
    state["per_token"] = torch.where(opt.bad < 2, active, state["per_token"])
    # [/shared: after]
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
    args.l1_warmup = args.l1_warmup or max(1, args.steps // 20)
    if args.target_l0 and (args.target_l0 > args.d_sae or not args.l1):
        runs.fail(f"--target-l0: needs to be at most --d-sae {args.d_sae}, and --l1 above 0")
    variant = "tied" if args.tied else "p-annealed" if args.p_end < 1 else "vanilla"
    sae = VanillaSAE(D, args.d_sae, args.tied).to(device)
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
    W_enc, W_dec = sae.weights()                              # where tied, W_dec with unit rows
    sae.W_dec.data = W_dec.detach()
    run.save_sae("standard", dict(sae.state_dict(), W_enc=W_enc.detach()), metrics)
    return sae

def load(path):
    """The SAE of a run directory; it takes raw activations."""
    cfg, tensors = runs.load_sae(path)
    sae = VanillaSAE(cfg["d_in"], cfg["d_sae"])
    sae.load_state_dict(tensors)
    return sae

if __name__ == "__main__":
    with runs.one_line_errors():
        train(parse_args())
