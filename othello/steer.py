"""Flip one disc in the model's mind: are the moves it thinks legal then those of the edited board?

    python othello/steer.py RUN [RUN ...]             # runs of --model othello
    python othello/steer.py RUN --several 1 2 4 8     # is a disc spread over several latents?

In each held-out game, at a position of PLACES, a random disc changes sides such that other moves
become legal. Then x, the residual stream of that position at the SAE's layer, is changed, and the
n likeliest moves are compared with the n legal ones of the edited board: errors are those wrongly
among the n and those missing (Li et al. 2022, arXiv 2210.13382); 'all right' has none. Ways:

    none             x as it is: the model plays on the board without the edit
    SAE latent       the latent that best detects the old owner of the square goes to 0, that of the
                     new one to its mean where it fires rightly; strength times that change
    random latents   the same changes of z, of two random live latents
    probe            strength times the standard deviation along the linear probe's direction from
                     the old owner to the new (Nanda et al. 2023, arXiv 2309.00941, who do so in
                     many layers; here at one)
    n latents        --several: the same along the nearest sum of n live latents' rows, of weights
                     of either sign, by orthogonal matching pursuit of the probe's direction
    n untrained      the same with as many random directions in the place of the rows: many rows fit
                     any direction a little

Latents, their means and the strength (the least errors of STRENGTHS) are of the first half of the
held-out games, figures of the other half; the probe is trained on training games. Squares for which
one and the same latent is best for both owners, or none is, are left out.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import runs
from evaluation.saved import SAE, data_flags, fits, open_data
from evaluation.tables import print_table
from othello import game
from othello.boards import HeldOut, Probe, codes, measure
from sources import lm

STRENGTHS = 0.25, 0.5, 1, 2, 4, 8, 16
PLACES = 8, 54                                # positions where a board is edited: from, and below

def cases(held, rng):
    """One edit a game: place int [n], square int [n], mine_before bool [n], and the legal moves on
    the edited board, bool [n, 64]. A game without a disc whose flip changes the moves: place -1."""
    n = len(held.ids)
    place, square = np.full(n, -1), np.zeros(n, int)
    was_mine, wanted = np.zeros(n, bool), np.zeros((n, 64), bool)
    for i in range(n):
        at = rng.integers(*PLACES)
        mine, yours, moves = held.after[i, at]
        discs = game.squares(np.array(mine | yours)).nonzero()[0]
        bits = np.uint64(1) << discs.astype(np.uint64)
        legal = game.legal(mine ^ bits, yours ^ bits)                        # of each possible edit
        good = ((legal != moves) & (legal != 0)).nonzero()[0]
        if len(good):
            j = rng.choice(good)
            place[i], square[i], was_mine[i] = at, discs[j], bool(mine & bits[j])
            wanted[i] = game.squares(legal[j])
    return place, square, was_mine, wanted

def errors(logits, wanted):
    """Of the n likeliest moves, n the number of wanted ones [m, 64]: wrong and missing, [m]."""
    n = wanted.sum(1, keepdim=True)
    rank = logits.argsort(1, descending=True).argsort(1)
    return 2 * ((rank < n) & ~wanted).sum(1)

def pursuit(R, W, most):
    """The nearest sums of 1 ... most rows of W [F, D] to each of R [n, D], rows of norm 1:
    [most, n, D]. Each round adds the row with the largest product, of either sign, with what is
    left, and solves least squares anew on all that it has."""
    left, found, chosen = R.double(), [], []
    for _ in range(most):
        chosen.append((left @ W.double().T).abs().argmax(1))
        A = W.double()[torch.stack(chosen, 1)]                               # (n, rounds, D)
        gram = A @ A.mT + 1e-9 * torch.eye(A.shape[1], device=A.device)      # a row may come twice
        weight = torch.linalg.solve(gram, A @ R.double()[..., None])
        found.append((A.mT @ weight)[..., 0])
        left = R.double() - found[-1]
    return torch.stack(found).float()

@torch.no_grad()
def steer(sae, source, model, layer, several=()):
    """{way: dict(strength, errors, fewer (than with no change) and its standard error fewer_se,
    right, right_se)}, and the number of cases."""
    held, x = HeldOut(source), source.heldout_raw()
    z, device = codes(sae, x), x.device
    _, best, _ = measure(z, held.truth, held.first)
    place, square, was_mine, wanted = cases(held, np.random.default_rng(0))
    old, new = square + 64 * ~was_mine, square + 64 * was_mine               # properties
    a, b, f1 = best["latent"][old], best["latent"][new], best["f1"]
    known = (a != b) & (f1[old] > 0) & (f1[new] > 0)
    game_of = ((place >= 0) & known.cpu().numpy()).nonzero()[0]
    first = torch.from_numpy(game_of < len(held.ids) // 2).to(device)
    if min(first.sum(), (~first).sum()) < 2:
        runs.fail(f"{sae.path}: in too few held-out games is there a board to edit; train with "
                  "more --cache-tokens")
    new, a, b = new[game_of], a[game_of], b[game_of]
    # What b has where its property holds, and it fires, on the first half.
    on = held.truth[:, new] & (z[:, b] > 0) & held.first[:, None]            # (M, m)
    goal = (z[:, b] * on).sum(0) / on.sum(0).clamp_min(1)
    stream = lm.residual_stream(model, model.blocks[layer], held.ids[game_of])
    i, at = torch.arange(len(game_of), device=device), torch.from_numpy(place[game_of]).to(device)
    here = sae.encode(stream[i, at])                                         # (m, F)
    off, up = here[i, a][:, None], (goal - here[i, b])[:, None]
    W, alive = sae.t["W_dec"], (z[held.first] > 0).any(0).nonzero()[:, 0]
    c, d = alive[torch.randint(len(alive), (2, len(i)), device="cpu",
                               generator=torch.Generator().manual_seed(0)).to(device)]
    probe = Probe(source)
    towards = torch.stack([probe.direction(s) * (1 if m else -1) for s, m in zip(
        square[game_of], was_mine[game_of])])
    spread = (x[held.first] @ towards.T).std(0)[:, None]
    ways = {"none": torch.zeros_like(towards), "random latents": up * W[d] - off * W[c],
            "SAE latent": up * W[b] - off * W[a], "probe": spread * towards}
    if several:
        g, unit = torch.Generator().manual_seed(0), torch.nn.functional.normalize
        for name, rows in (("latents", W[alive]), ("untrained", torch.randn(
                len(alive), W.shape[1], generator=g).to(W))):
            sums = pursuit(towards, unit(rows, dim=1), max(several))
            ways |= {f"{n} {name}": spread * sums[n - 1] for n in several}
    wanted = torch.from_numpy(wanted[game_of]).to(device)
    def wrong(change):
        y = stream.clone()
        y[i, at] += change
        for block in model.blocks[layer:]:
            y = block(y)
        return errors(model.unembed(model.norm(y[i, at])), wanted).double()
    results = {}
    for way, change in ways.items():
        tried = {s: wrong(s * change) for s in (STRENGTHS if way != "none" else (1,))}
        s = min(tried, key=lambda s: tried[s][first].mean().item())
        e = tried[s][~first]
        if way == "none":
            unchanged = e
        se = lambda v: (v.std() / len(v) ** 0.5).item()
        right, fewer = (e == 0).double(), unchanged - e                      # paired
        results[way] = dict(strength=s, errors=e.mean().item(), fewer=fewer.mean().item(),
                            fewer_se=se(fewer), right=right.mean().item(), right_se=se(right))
    return results, int((~first).sum())

def table(results):
    """(title, note, header, rows) of {run: what steer gives}, as tables.print_table takes it."""
    pm = lambda r, k, form: f"{r[k]:{form}} ± {r[k + '_se']:{form}}"
    cells = [[run, str(n), way, f"{r['strength']:g}", f"{r['errors']:.2f}",
              pm(r, "fewer", ".2f"), pm(r, "right", ".1%")]
             for run, (ways, n) in results.items() for way, r in ways.items()]
    return ("Steering", "edited boards, one a game; plus or minus a standard error",
            "run boards change strength errors fewer right".split(), cells)

def load(path, args):
    """(sae, source, model, layer) of a run of --model othello."""
    sae = SAE(path)
    key = data_flags(sae, args, None)
    name, layer = json.loads(key)["model"], json.loads(key)["layer"]
    if not lm.is_othello(name) or json.loads(key)["activations"]:
        runs.fail(f"{path}: a run on other data; steering needs one of --model othello")
    source = open_data(key, [sae], args)
    if not fits(sae, source) or sae.norm != "none":
        runs.fail(f"{path}: trained on another model or layer than {name}, layer {layer}, or takes "
                  "normalised inputs; name what it was trained on")
    if source.meta["context_size"] < PLACES[1]:
        runs.fail(f"{path}: trained with --context {source.meta['context_size']}; steering needs "
                  f"at least {PLACES[1]}")
    model, _, _ = lm.load(lm.model_dir(name, source.flags.cache_dir), name, source.device,
                          torch.float32)
    return sae.to(source.device), source, model, layer

def parse_args(argv=None):
    parser = data.ArgumentParser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--several", type=runs.count, nargs="+", default=(), metavar="N",
                        help="also steer with sums of so many latents, as in 1 2 4 8")
    parser.add_argument("--device", default="auto", help="auto (cuda if there is one, else cpu)")
    args = parser.parse_args(argv)
    args.torch_device = runs.open_device(args.device)
    return args

def main(argv=None):
    args = parse_args(argv)
    loaded = {str(path): load(path, args) for path in args.runs}             # refuses all at once
    for path, (sae, *_) in loaded.items():
        if max(args.several, default=0) > min(sae.d_in, sae.d_sae):
            runs.fail(f"--several {max(args.several)}: {path} has {sae.d_sae} latents in "
                      f"{sae.d_in} dimensions; use fewer")
    results = {path: steer(*what, args.several) for path, what in loaded.items()}
    print_table(*table(results))

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
