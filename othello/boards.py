"""What a dictionary knows of the board: coverage, reconstruction, and what to hold them to.

Karvonen et al. 2024, 'Measuring Progress in Dictionary Learning for Language Model Interpretability
with Board Game Models', arXiv 2408.00113 (of which we had notes and the code SAE_BoardGameEval).

A property is 'square s holds a disc of mine' or '... of yours' of the side to move, 64 times 2. A
classifier is latent i above t times its maximum, z_i > t max z_i, t = 0, .1 ... .9.

    coverage        mean over properties of the best F1 of any classifier (the paper's Eq. 3: t may
                    differ between properties), and with one t for all, as their code has it. Theirs
                    divide the sum by 192, counting empty squares which they mask: times 2/3 to
                    compare with their published figures.
    reconstruction  on one half of the games a classifier stands for a property where its precision
                    is at least .95 and it has at least 10 true positives (their code); on the other
                    half a square is what any classifier for it says. F1, counts pooled over boards
                    and squares, at the t best there (their code; Eq. 5 has a mean over boards).
    legal           share of positions where the likeliest move is legal, x_hat spliced in

Beside each SAE, on the same positions: a linear probe, the ceiling; the neurons of the MLP that
wrote last to the residual stream; the model as it is. For an SAE of the same model before training,
train one with --model othello-untrained.

    python evaluate.py RUN               # all of this, for runs on --model othello
    python othello/boards.py             # the model: legal moves in 2,000 new games, probe accuracy
    python othello/boards.py --model DIR --layer 4               # of your own weights (train.py)
"""
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import runs
from othello import game, train
from sources import lm

THRESHOLDS = [t / 10 for t in range(10)]
PRECISION, TRUE_POSITIVES = 0.95, 10

def properties(boards):
    """bool [..., 128] of boards uint64 [..., 2 or 3]: mine on squares 0 to 63, yours on them."""
    return torch.from_numpy(game.squares(boards[..., :2])).bool().flatten(-2)

def one_hot(truth):
    """float [M, 192] of properties bool [M, 128]: mine, yours or empty on each square."""
    return torch.cat([truth, ~(truth[:, :64] | truth[:, 64:])], 1).float()

def property_name(i):
    return f"{game.name(i % 64)} is {'mine' if i < 64 else 'yours'}"

def measure(z, truth, first):
    """z [M, F] codes; truth bool [M, 128]; first bool [M]: rows of the half on which classifiers
    are chosen. -> coverage, coverage_one_t, reconstruction, its t, latents that stand for one;
    and on that half the best classifier of each property, t, f1, precision, recall [128] and its
    latent, and the best of each latent [F], with its property (silent ones: f1 0).
    Coverage, too, is of the first half. Latents silent there are no classifiers."""
    peak = z[first].amax(0)
    z = z / peak.clamp_min(1e-30)                             # a classifier is z > t now
    a, b, g = z[first], z[~first], truth[first].float()
    tables, rebuilt, stands = [], [], []
    for t in THRESHOLDS:
        on = (a > t).float()
        tp, n = on.T @ g, on.sum(0)[:, None]                                     # (F, 128), (F, 1)
        f1 = 2 * tp / (n + g.sum(0)).clamp_min(1)
        tables.append(torch.stack([f1, tp / n.clamp_min(1), tp / g.sum(0).clamp_min(1)]))
        good = (tp >= PRECISION * n) & (tp >= TRUE_POSITIVES)
        said = (b > t).float() @ good.float() > 0                                # (M / 2, 128)
        both = said.sum() + truth[~first].sum()
        rebuilt.append((2 * (said & truth[~first]).sum() / both).item())
        stands.append(good.any(1).sum().item())
    tables = torch.stack(tables)                                             # (t, 3, F, 128)
    def best(dim, name):
        """Of each property (dim 1) or latent (dim 2): the best t and partner."""
        f1, partner = tables[:, 0].max(dim)                                  # (t, 128) or (t, F)
        k = f1.argmax(0)
        partner = partner.gather(0, k[None])[0]
        i = torch.arange(len(k), device=k.device)
        at = (k, slice(None), *((partner, i) if dim == 1 else (i, partner)))
        f1, precision, recall = tables[at].T
        return {name: partner, "t": torch.tensor(THRESHOLDS, device=k.device)[k], "f1": f1,
                "precision": precision, "recall": recall}
    of_property, of_latent = best(1, "latent"), best(2, "property")
    one_t = tables[:, 0].amax(1).mean(1).max().item()
    top = max(range(len(THRESHOLDS)), key=rebuilt.__getitem__)
    return dict(coverage=of_property["f1"].mean().item(), coverage_one_t=one_t,
                reconstruction=rebuilt[top], t=THRESHOLDS[top], latents=stands[top]
                ), of_property, of_latent

# --- held-out positions ---------------------------------------------------------------------------

class HeldOut:
    """The held-out rows of a source of --model othello: of each its game, board, properties, and
    whether it is in the first half of the games; and the games' tokens and legal moves."""
    def __init__(self, source):
        ids, where = lm.heldout_tokens(source)
        boards, T = np.load(source.folder / "boards.npy"), ids.shape[1]
        games, self.game = np.unique(where // T, return_inverse=True)
        if len(games) < 2:
            runs.fail(f"--cache-tokens: {len(games)} held-out games, too few to choose classifiers "
                      f"on one half and judge them on the other; use at least {100 * T}")
        self.place, self.ids, self.after = where % T, ids[games], boards[games]
        self.boards = self.after[self.game, self.place]                      # uint64 [M, 3]
        self.truth = properties(self.boards).to(source.device)
        self.first = torch.from_numpy(self.game < len(games) // 2).to(source.device)
        self.legal = torch.from_numpy(game.squares(self.after[..., 2])).bool().to(source.device)

class Probe:
    """Linear map from x to mine, yours or empty for each of the 64 squares: multinomial logistic
    regression on training rows (Nanda et al. 2023, but with a bias, and Adam for few steps)."""
    @torch.enable_grad()
    def __init__(self, source, n=300_000, steps=600, batch=4096):
        n = min(n, source.meta["n_train_rows"])
        where = np.concatenate([np.load(p) for p in sorted(source.folder.glob("where-*.npy"))])[:n]
        boards = np.load(source.folder / "boards.npy")
        label = self.label(properties(boards.reshape(-1, 3)[where])).to(source.device)
        x = source.scaled(source.shards.read(np.arange(n)))
        self.source, generator = source, torch.Generator().manual_seed(0)
        self.W = torch.zeros(x.shape[1], 192, device=x.device, requires_grad=True)
        self.b = torch.zeros(192, device=x.device, requires_grad=True)
        opt = torch.optim.Adam([self.W, self.b], 0.02)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 1e-3, steps)
        for _ in range(steps):
            rows = torch.randint(n, (batch,), generator=generator).to(x.device)
            loss = cross_entropy(self.logits(x[rows]).flatten(0, 1), label[rows].flatten())
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        self.W, self.b = self.W.detach(), self.b.detach()

    @staticmethod
    def label(truth):
        """int64 [M, 64] of properties bool [M, 128]: 0 mine, 1 yours, 2 empty."""
        mine, yours = truth[:, :64], truth[:, 64:]
        return torch.where(mine, 0, torch.where(yours, 1, 2))

    def logits(self, x):
        """[M, 64, 3] for scaled x [M, D]."""
        return (x @ self.W + self.b).unflatten(1, (64, 3))

    def __call__(self, x):
        """Probabilities [M, 64, 3] for raw x [M, D]."""
        return self.logits(self.source.scaled(x)).softmax(-1)

    def direction(self, square):
        """Unit vector [D] from mine to yours on a square."""
        W = self.W.unflatten(1, (64, 3))[:, square]
        return normalize(W[:, 1] - W[:, 0], dim=0)

def directions(probe, held, x):
    """{kind: [n, D]} of directions of 'square s is mine', '... yours' and '... empty', without the
    squares that never are: the probe's weights, less their mean over the three, to which softmax
    is blind; and the mean of x [M, D], raw, where it is so, less the mean of all."""
    on = one_hot(held.truth).to(x)
    seen = on.any(0)
    W = probe.W.unflatten(1, (64, 3)).mT                                     # (D, 3, 64)
    W = (W - W.mean(1, keepdim=True)).flatten(1).T[seen]
    means = (on.T @ (x - x.mean(0)))[seen] / on.sum(0)[seen, None]
    return {"board probes": W, "board means": means}

def accuracy(p, held, rows=slice(None)):
    """Share of squares of which a probe's p [M, 64, 3] says rightly mine, yours or empty."""
    return (p.argmax(-1) == Probe.label(held.truth))[rows].double().mean().item()

@torch.inference_mode()
def neurons(model, block, below, ids, per_pass=100):
    """float32 [n, T, 4 D]: the neurons of the MLP of `below`, the block before `block`."""
    found = []
    hook = below.up.register_forward_hook(lambda module, inputs, out: found.append(
        below.neurons(out)))
    try:
        for i in range(0, len(ids), per_pass):
            lm.residual_stream(model, block, ids[i:i + per_pass])
    finally:
        hook.remove()
    return torch.cat(found).float()

def legal_rate(model, block, cut, held, replace, per_pass=100):
    """Share of predictions after positions 1 to T - 1 whose likeliest move is legal, with
    replace(x) in the place of x (lm.spliced)."""
    right = 0
    for i in range(0, len(held.ids), per_pass):
        logits = lm.spliced(model, block, held.ids[i:i + per_pass], cut, replace)[:, 1:]
        right += held.legal[i:i + per_pass, 1:].gather(
            -1, logits.argmax(-1, keepdim=True)).sum().item()
    return right / held.legal[:, 1:, 0].numel()

@torch.no_grad()
def codes(sae, x, latents=slice(None)):
    return torch.cat([sae.encode(part)[:, latents] for part in x.split(2048)])

def report(saes, x, source, model, blocks, layer):
    """Board metrics of each SAE on held-out x [M, D], raw, and the F1 of each of its latents [F]
    for the property that it detects best: a list. The metrics of the baselines; the probe."""
    held, block, cut, results = HeldOut(source), blocks[layer], source.meta["norm_cut"], []
    for sae in runs.Bar(saes, desc="boards", unit="run"):
        result, _, best = measure(codes(sae, x), held.truth, held.first)
        results.append((dict(result, legal=legal_rate(model, block, cut, held, sae)), best["f1"]))
    probe = Probe(source)
    p = probe(x)                                                             # (M, 64, 3)
    by_probe, _, _ = measure(p[..., :2].mT.flatten(1), held.truth, held.first)
    base = {"linear probe": by_probe | dict(accuracy=accuracy(p, held)),
            "model as it is": dict(legal=legal_rate(model, block, cut, held, lambda x: x))}
    if layer > 0:
        h = neurons(model, block, blocks[layer - 1], held.ids)[held.game, held.place]
        base[f"{h.shape[1]} neurons of block {layer - 1}"], _, _ = measure(
            h, held.truth, held.first)
    return results, dict(base, games=len(held.ids), positions=len(x)), probe

# --- what latents mean ----------------------------------------------------------------------------

def usual(boards):
    """A board as text: what at least 70 % of boards uint64 [n, 2 or 3] have on a square, x mine, o
    yours, . nothing; X and O where 90 % do; else -."""
    mine, yours = (game.squares(boards[:, i]).mean(0) for i in (0, 1))
    return game.grid(np.select([mine >= 0.9, yours >= 0.9, mine >= 0.7, yours >= 0.7,
                                mine + yours <= 0.3], list("XOxo."), "-"))

def describe(sae, x, latents, source):
    """For each latent a text: the property that it detects best, how well, what the boards where it
    does have in common, and the board where it is strongest."""
    held, z = HeldOut(source), codes(sae, x, latents)
    _, _, best = measure(z, held.truth, held.first)
    peak, texts = z[held.first].amax(0), []
    for i in range(len(latents)):
        t, f1, precision, recall = (best[k][i].item() for k in ("t", "f1", "precision", "recall"))
        if f1 == 0:
            texts.append("stands for no property: silent on the first half of the games")
            continue
        on = (z[:, i] > t * peak[i]).cpu().numpy()
        row = z[:, i].argmax().item()
        moves = held.ids[held.game[row], :held.place[row] + 1]
        left, right = usual(held.boards[on]), game.drawing(*held.boards[row, :2])
        head = f"most of its {on.sum():,} boards"
        texts.append("\n".join([
            f"{property_name(best['property'][i].item())} where z > {t:.1f} of its peak: precision "
            f"{precision:.3f}, recall {recall:.3f}",
            f"{head:34}strongest, after {len(moves)} moves, the last {game.name(moves[-1])}",
            *(f"{a:34}{b}" for a, b in zip(left.splitlines(), right.splitlines()))]))
    return texts

def main(argv=None):
    args = data.ArgumentParser(__doc__).parse_args(argv)
    args.model = args.model or "othello"
    if not lm.is_othello(args.model) or args.activations:
        runs.fail("--model: use othello, othello-untrained or a folder that othello/train.py "
                  "wrote; without --activations")
    device = runs.open_device("cpu")
    args.batch_size, args.seed, args.tokens = 1, 0, 0
    source = data.open_source(args, device)
    model, _, _ = lm.load(lm.model_dir(args.model, args.cache_dir), args.model, device,
                          torch.float32)
    rate, ce, least = train.measure(model, 2000, 10 ** 12 + 1)
    p, held = Probe(source)(source.heldout_raw()), HeldOut(source)
    middle = (held.place >= 5) & (held.place <= 53)           # where Nanda et al.'s code scores
    print(f"2,000 new games: legal {rate:.3%}, cross-entropy {ce:.4f} (least {least:.4f}); linear "
          f"probe at layer {args.layer}: {accuracy(p, held):.2%} of squares right, positions 5 to "
          f"53: {accuracy(p, held, middle):.2%}")

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
