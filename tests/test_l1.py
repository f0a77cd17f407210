"""vanilla_sae.py and gated_sae.py: their losses, and five claims about L1 on data with known features.

Each claim below was written down, with its margin and its control, before it was run on the seeds
here (10 to 12); the defaults of both scripts were chosen on seeds 0 to 2 and on smollm2. Changed
since, with the same bounds: p-annealing trains 2000 steps (at 1000, seed 10 had a gamma of .940,
just within its bound), the tied SAE 1200 (from 1500, for time).
"""
import importlib
import inspect
from argparse import Namespace
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA, FastICA

import gated_sae
import runs
import sparse
import vanilla_sae
from conftest import mcc, trained
from gated_sae import GatedSAE
from sources.toy import Toy
from vanilla_sae import VanillaSAE

# --- the losses -----------------------------------------------------------------------------------

def random_case(script, tied=False, dtype=torch.float64):
    torch.manual_seed(0)
    B, D, n = 20, 12, 40
    sae = (VanillaSAE(D, n, tied) if script is vanilla_sae else GatedSAE(D, n)).to(dtype)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name != "W_dec":
                p += 0.3 * torch.randn_like(p)
    return sae, torch.randn(B, D, dtype=dtype) * 3 + 1

def state_of(p, sparse, room=0, weight=0.7):
    t = lambda v: torch.tensor(v, dtype=torch.float64)
    powers = dict(p=None, p_next=None) if p == 1 else dict(p=t(p), p_next=t(0.9 * p))
    return dict(powers, sparse=sparse, room=room, weight=t(weight))

def weights_of(sae):
    """W_enc, W_dec, b_dec as the docstring of vanilla_sae.py defines them for --tied and without."""
    if hasattr(sae, "W_enc"):
        return sae.W_enc, sae.W_dec, sae.b_dec
    W = torch.stack([row / row.pow(2).sum().sqrt() for row in sae.W_dec])
    return W.T, W, torch.zeros(len(sae.b_dec), dtype=W.dtype)

def explicit_loss(script, sae, x, weight, p):
    """The docstring's loss, token by token and latent by latent. -> (loss, sum z^p, frozen parts)"""
    W_enc, W_dec, b_dec = weights_of(sae)
    losses, powers, eps = [], [], script.EPS * x.shape[1] ** 0.5
    for token in x:
        x_hat, aux_hat, penalty = b_dec, b_dec.detach(), 0.0
        for i in range(len(W_dec)):
            s = ((token - b_dec) * W_enc[:, i]).sum()
            if script is vanilla_sae:
                gate = mag = s + sae.b_enc[i]
            else:
                gate, mag = s + sae.b_gate[i], sae.r_mag[i].exp() * s + sae.b_mag[i]
            if gate > 0:
                x_hat = x_hat + (mag * W_dec[i] if mag > 0 else 0)
                aux_hat = aux_hat + gate * W_dec[i].detach()
                penalty = penalty + (gate if p == 1 else (gate + eps) ** p - eps ** p)
        losses.append((token - x_hat).pow(2).sum() + weight * penalty)
        if script is gated_sae:
            losses[-1] = losses[-1] + (token - aux_hat).pow(2).sum()
        powers.append(penalty)
    return sum(losses) / len(x), sum(powers) / len(x)

CASES = [(vanilla_sae, False), (vanilla_sae, True), (gated_sae, False)]
each_case = pytest.mark.parametrize("script, tied", CASES, ids=["vanilla", "tied", "gated"])

@each_case
@pytest.mark.parametrize("p", [1, 0.5, 0.2])
@pytest.mark.parametrize("sparse, room", [(False, 0), (True, 0), (True, 500)])
def test_loss_and_gradients_equal_an_explicit_loop(script, tied, p, sparse, room):
    """Dense, sparse, and sparse with a fixed number of entries (as on a GPU): value and the gradient
    of every parameter, in float64, p annealed or not."""
    sae, x = random_case(script, tied)
    loss, terms, fired = script.sparse_loss(sae, x, state_of(p, sparse, room), None)
    loss.backward()
    got = {n: q.grad.clone() for n, q in sae.named_parameters()}
    sae.zero_grad()
    expected, penalty = explicit_loss(script, sae, x, 0.7, p)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert torch.allclose(terms["penalty"], penalty, rtol=1e-12)
    following = explicit_loss(script, sae, x, 0.7, 0.9 * p if p < 1 else 1)[1]
    assert torch.allclose(terms["penalty_next"], following, rtol=1e-12)
    for n, q in sae.named_parameters():
        assert torch.allclose(got[n], q.grad, rtol=1e-9, atol=1e-12), n
    z = sae.encode(x)
    assert torch.equal(fired > 0, (z > 1e-3).any(0))
    assert torch.allclose(terms["l0"], (z > 0).sum() / len(x))

@each_case
def test_a_batch_that_outgrows_its_room_has_no_gradient(script, tied):
    sae, x = random_case(script, tied)
    loss, *_ = script.sparse_loss(sae, x, state_of(1, True, room=50), None)
    loss.backward()
    assert loss == 0 and all((q.grad == 0).all() for q in sae.parameters())

@each_case
def test_gradient_of_the_power_is_finite_at_zero(script, tied):
    """Codes that are exactly 0 (pre = 0, too) have no NaN and no infinite gradient; z^p alone has."""
    sae, x = random_case(script, tied)
    with torch.no_grad():
        for name, q in sae.named_parameters():
            if name != "W_dec":
                q.zero_()                       # pre and all codes are exactly 0 (tied: half are)
    for sparse in (False, True):
        sae.zero_grad()
        script.sparse_loss(sae, x, state_of(0.2, sparse), None)[0].backward()
        assert all(q.grad.isfinite().all() for q in sae.parameters())
    z = torch.zeros(3, requires_grad=True)
    (z * (z > 0)).pow(0.2).sum().backward()
    assert z.grad.isnan().all()

def test_gradients_of_the_gate():
    """From the main reconstruction alone b_gate gets none and W_enc does; W_dec gets none from the
    penalty and the auxiliary term, b_dec does."""
    sae, x = random_case(gated_sae)
    x_hat = gated_sae.sparse_loss(sae, x, state_of(1, True, weight=0.0), None)[1]["mse"]
    x_hat.backward()
    assert sae.b_gate.grad is None and sae.W_enc.grad.abs().max() > 0
    main = sae.W_dec.grad.clone()
    sae.zero_grad()
    gated_sae.sparse_loss(sae, x, state_of(1, True), None)[0].backward()
    assert torch.allclose(sae.W_dec.grad, main, rtol=1e-12)
    sae.zero_grad()
    _, terms, _ = gated_sae.sparse_loss(sae, x, state_of(1, True), None)
    (terms["aux"] + terms["penalty"]).backward()
    assert sae.W_dec.grad is None and sae.b_dec.grad.abs().max() > 0

def test_gradient_of_b_gate_in_bf16():
    """Dense, in bf16: not the difference of two large sums, so as exact as b_mag's (it had 1.7 times its error)."""
    torch.manual_seed(0)
    sae, x, grads = gated_sae.GatedSAE(64, 512), torch.randn(4096, 64), []
    sae.W_enc.data *= 3
    for bf16 in (False, True):
        sae.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            gated_sae.sparse_loss(sae, x, state_of(1, False, weight=1.0), None)[0].backward()
        grads.append(torch.stack([sae.b_gate.grad, sae.b_mag.grad]))
    gate, mag = (grads[0] - grads[1]).norm(dim=1) / grads[0].norm(dim=1)
    assert gate < 1.2 * mag

@pytest.mark.parametrize("name", ["vanilla", "gated", "gba"])
def test_blocks_of_the_batch_add_up(name):
    """The dense form in blocks of tokens, as in large batches: same loss, terms, gradients, counts, peaks."""
    torch.manual_seed(0)
    script = importlib.import_module(f"{name}_sae")
    args = script.parse_args(["--d-sae", "40", "--no-bf16"])
    sae = next(v for n, v in vars(script).items() if n.lower() == f"{name}sae")(12, 40).double()
    x, results = torch.randn(20, 12).double(), []
    for blocks in (1, 3):
        sae.zero_grad()
        state = dict(script.init_state(args, torch.device("cpu")), weight=torch.tensor(0.7), blocks=blocks)
        total, terms, fired = sparse.backward(script.sparse_loss, sae, x, state, args)
        results.append([total, fired, *terms.values(), *(p.grad.clone() for p in sae.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*results, strict=True))

def test_tied_decoder_rows_feel_the_normalisation():
    """The gradient of a tied row is orthogonal to it, and scaling rows changes nothing."""
    sae, x = random_case(vanilla_sae, tied=True)
    loss = vanilla_sae.sparse_loss(sae, x, state_of(1, True), None)[0]
    loss.backward()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-12
    with torch.no_grad():
        sae.W_dec *= torch.rand(40, 1, dtype=torch.float64) + 0.5
    assert torch.allclose(vanilla_sae.sparse_loss(sae, x, state_of(1, True), None)[0], loss, rtol=1e-12)

def test_p_ends_exactly_and_l1_is_rematched():
    """p is 1 until 40 % and exactly --p-end from 70 % on; a change of p leaves l1 sum z^p as it was."""
    args = Namespace(steps=1000, p_end=0.2)
    p = [vanilla_sae.p_at(s, args) for s in range(1001)]
    assert p[0] == p[400] == 1 and p[550] == pytest.approx(0.6) and set(p[700:]) == {0.2}
    assert p == sorted(p, reverse=True)
    assert {vanilla_sae.p_at(s, Namespace(steps=977, p_end=1.0)) for s in range(978)} == {1}
    torch.manual_seed(0)
    sae, x = VanillaSAE(12, 40), torch.randn(20, 12)
    args = vanilla_sae.parse_args(["--p-end", "0.2", "--batch-size", "20", "--no-bf16", "--lr", "1e-9"])
    args.d_sae, args.steps, args.warmup, args.l1_warmup = 40, 100, 1, 1
    opt = runs.adam(sae, args.lr, vanilla_sae.BETAS)
    state = dict(vanilla_sae.init_state(args, "cpu"), l1=torch.tensor(2.0))
    values = []
    for step in range(100):
        terms = vanilla_sae.train_step(sae, opt, x, state, step, args)
        values.append((terms["l1"] * terms["penalty"]).item())
    assert max(values) / min(values) < 1.001                 # nothing else moves at this rate
    assert abs(state["l1"] - 2) > 0.05                       # for which l1 had to change

# --- claims ---------------------------------------------------------------------------------------

SEEDS = (10, 11, 12)
def mmcs(truth, learned):
    """Mean max cosine similarity, signed: (of each true feature, of each learned one)."""
    cosine = F.normalize(truth, dim=1) @ F.normalize(learned.detach(), dim=1).T
    return cosine.amax(1).mean().item(), cosine.amax(0).mean().item()

def gamma(sae, toy):
    """Relative reconstruction bias E|x_hat|^2 / E<x_hat, x> of centred samples (Gated paper, Eq. 10):
    1 is unbiased, less is shrinkage."""
    x = Toy.preset(toy).sample(20_000, torch.Generator().manual_seed(99))[0]
    x_hat, x = sae(x).detach() - x.mean(0), x - x.mean(0)
    return (x_hat.pow(2).sum() / (x_hat * x).sum()).item()

def report(label, seed, sae, results, toy):
    print(f"{label}, seed {seed}: l0 {results['l0']:.2f}, fvu {results['fvu']:.4f}, gamma "
          f"{gamma(sae, toy):.3f}, MCC {mcc(Toy.preset(toy).features, sae.W_dec):.3f}, dead "
          f"{results['dead']:.1%}")

@pytest.mark.claims
@pytest.mark.parametrize("seed", SEEDS)
def test_recovery_has_a_band(seed, claim):
    """Claim: on 'flat' L1 finds the features at --l1 1, MMCS (truth to learned) at least .95, and
    not at .03 (dense codes) nor at 30 (no codes), at most .6. Controls: principal components,
    independent components and random directions, at most .6."""
    truth = Toy.preset(f"flat:{seed}")
    x = truth.sample(20_000, torch.Generator().manual_seed(seed))[0]
    score = {}
    for l1 in (0.03, 1.0, 30.0):
        sae, results = trained(vanilla_sae, "flat", seed, "--l1", l1)
        score[l1] = mmcs(truth.features, sae.W_dec)[0]
        report(f"--l1 {l1}, MMCS {score[l1]:.3f}", seed, sae, results, f"flat:{seed}")
    both = lambda W: torch.cat([W, -W])
    others = {"PCA": both(torch.tensor(PCA().fit(x.numpy()).components_)),
              "ICA": both(torch.tensor(FastICA(random_state=0, max_iter=100).fit(x.numpy()).mixing_.T)),
              "random": torch.randn(256, 64, generator=torch.Generator().manual_seed(seed))}
    others = {name: mmcs(truth.features, W.float())[0] for name, W in others.items()}
    print(f"MMCS of the controls, seed {seed}: {others}")
    assert score[1.0] >= 0.95 and max(score[0.03], score[30.0], *others.values()) <= 0.6
    claim("bricken", "ReLU codes with an L1 penalty find features in superposition, in a band of coefficients "
          "(Sharkey et al. 2022)", "MMCS about 1 in the band (2501.17727, tied codes; the first values unverified)",
          "toy 'flat', MMCS {inside:.2f} at --l1 1, {low:.2f} at .03, {high:.2f} at 30", "reproduced",
          inside=score[1.0], low=score[0.03], high=score[30.0])
    claim("cunningham", "an SAE's features are better than ICA's, PCA's and random directions",
          "in early layers, by automatic interpretation, Pythia-70M (figures only)",
          "toy 'flat', by MMCS with the truth (no tied codes): {sae:.2f}; ICA {ica:.2f}, PCA {pca:.2f}, random "
          "{random:.2f}", "partly", sae=score[1.0], ica=others["ICA"], pca=others["PCA"], random=others["random"])

@pytest.mark.claims
@pytest.mark.parametrize("target", [5, 7, 10])
def test_shrinkage_and_its_cure(target, claim):
    """Claim: at L0 matched within 5 %, the L1 SAE shrinks (gamma below .9) and the gated one does not
    (within .02 of 1) and has the lower FVU, at each of three L0s and for every seed."""
    for seed in SEEDS:
        runs = {m: trained(m, "flat", seed, "--target-l0", target) for m in (vanilla_sae, gated_sae)}
        (vanilla, a), (gated, b) = runs.values()
        for m, (sae, results) in runs.items():
            report(m.__name__, seed, sae, results, f"flat:{seed}")
        assert abs(a["l0"] / b["l0"] - 1) < 0.05
        assert gamma(vanilla, f"flat:{seed}") < 0.9 and abs(gamma(gated, f"flat:{seed}") - 1) < 0.02
        assert b["fvu"] < a["fvu"]
        claim("gated", "L1 shrinks reconstructions, gating does not (gamma: 1 is none)",
              "gamma .72 to .90 for most of L1 (some above, to .98), about 1 gated",
              "toy 'flat', three L0s: {l1:.2f} for L1, {gated:.2f} gated", "reproduced",
              l1=gamma(vanilla, f"flat:{seed}"), gated=gamma(gated, f"flat:{seed}"))
        claim("gated", "a gated SAE has a lower error than L1 at equal L0",
              "Pareto better at nearly all sites (loss recovered)", "toy 'flat', three L0s: FVU {fvu:.2f} of that of "
              "L1", "reproduced", fvu=b["fvu"] / a["fvu"])

@pytest.mark.claims
def test_p_annealing(claim):
    """Claim: with p annealed to .2, FVU is lower than that of plain L1 at an L0 that is no higher,
    and gamma, below .8 there, is within .06 of 1. For every seed."""
    longer = "--target-l0", 7, "--tokens", 2 * 1000 * 512
    for seed in SEEDS:
        plain, a = trained(vanilla_sae, "flat", seed, *longer)
        annealed, b = trained(vanilla_sae, "flat", seed, *longer, "--p-end", 0.2)
        report("plain", seed, plain, a, f"flat:{seed}")
        report("p to 0.2", seed, annealed, b, f"flat:{seed}")
        assert b["l0"] <= 1.01 * a["l0"] and b["fvu"] < a["fvu"]
        assert gamma(plain, f"flat:{seed}") < 0.8 and abs(gamma(annealed, f"flat:{seed}") - 1) < 0.06
        claim("karvonen", "annealing p to .2 cures shrinkage, and lowers the error at equal L0",
              "gamma about 1 against .80 (Othello; chess about .98 for all); reconstruction level with gated, both "
              "better than L1",
              "toy 'flat': gamma {annealed:.2f} against {plain:.2f}, FVU {fvu:.2f} against {fvu_plain:.2f} (not "
              "compared with gated), dead {dead:.1%}", "reproduced", tol=dict(dead=0.02), annealed=gamma(annealed, f"flat:{seed}"),
              plain=gamma(plain, f"flat:{seed}"), fvu=b["fvu"], fvu_plain=a["fvu"], dead=b["dead"])

@pytest.mark.claims
def test_freezing_the_decoder_in_the_auxiliary_loss(monkeypatch, claim):
    """Claim (the paper's ablation): with twice as many latents as there are features, and at an L0
    that is no lower, an auxiliary loss that also trains W_dec and b_dec has an FVU at least 2 %
    higher. For every seed. We chose twice as many after finding the opposite with exactly as many, on
    seeds 0 to 2: freezing left 4 % of them dead and the FVU higher, .169 against .162 (with Adam's beta1
    0, and W_enc starting at W_dec.T)."""
    frozen = [trained(gated_sae, "flat", s, "--target-l0", 7, "--d-sae", 512) for s in SEEDS]
    source = inspect.getsource(gated_sae.sparse_loss)
    assert source.count("sae.W_dec.detach()") == source.count("sae.b_dec.detach()") == 1
    unfrozen = {**vars(gated_sae)}
    exec(source.replace("_dec.detach()", "_dec"), unfrozen)
    monkeypatch.setattr(gated_sae, "sparse_loss", unfrozen["sparse_loss"])
    for seed, (sae, a) in zip(SEEDS, frozen):
        other, b = trained.__wrapped__(gated_sae, "flat", seed, "--target-l0", 7, "--d-sae", 512)
        report("frozen", seed, sae, a, f"flat:{seed}")
        report("unfrozen", seed, other, b, f"flat:{seed}")
        assert a["l0"] <= 1.01 * b["l0"] and b["fvu"] >= 1.02 * a["fvu"]
        claim("gated", "training the decoder in the auxiliary loss, too, hurts", "yes (GELU-1L, a figure)",
              "toy 'flat': error {ratio:.3f} times as high with twice as many latents as features (with as many, in "
              "one-off runs, the opposite)", "partly", ratio=b["fvu"] / a["fvu"])

@pytest.mark.claims
def test_tied_sae_recovers_the_toy_of_sharkey(claim):
    """Claim: --tied --l1 1 finds the features of 'sharkey' (512 in 256 dimensions, frequencies that
    fall 140-fold): mean MMCS at least .93 both from truth to learned and from learned to truth.
    Control: untrained, at most .25 both ways."""
    scores, controls = [], []
    for seed in SEEDS:
        features = Toy.preset(f"sharkey:{seed}").features
        torch.manual_seed(seed)
        controls.append(mmcs(features, VanillaSAE(256, 512, tied=True).W_dec))
        sae, results = trained(vanilla_sae, "sharkey", seed, "--tied", "--l1", 1, "--batch-size", 1024,
                               "--tokens", 1200 * 1024)
        scores.append(mmcs(features, sae.W_dec))
        report(f"tied, MMCS {scores[-1]}, untrained {controls[-1]}", seed, sae, results, f"sharkey:{seed}")
    assert min(map(mean, zip(*scores))) >= 0.93 and max(map(max, controls)) <= 0.25
    recall, precision = zip(*scores)
    claim("cunningham", "a tied SAE finds the features of Sharkey et al.'s toy (512 in 256 dimensions)",
          "MMCS about 1 (2501.17727, another form of this toy; the first values unverified)",
          "MMCS {recall:.3f} from truth to learned, {precision:.3f} back, untrained {untrained:.2f}", "partly",
          recall=recall, precision=precision, untrained=[value for pair in controls for value in pair])
