"""gba_sae.py: six claims on data with known features, each with its margin and control, on unseen seeds.

All were written down, with their bounds, before they ran on seeds 50 to 52 (for weights, samples and
features alike); defaults and settings were chosen on seeds 0 to 2. All held; then, for time, runs that serve as
controls were shortened, and TopK's rows of claim 1 and (k = 50, at most 10 %; it found none, unlike the
paper's) of claim 5 left to claim 6 and to benchmarks/bias.py, which sweeps targets, widths and updates.
FRR@t: share of the true features with a latent at a cosine above t.
"""
import itertools
from statistics import mean

import pytest
import torch
import torch.nn.functional as F

import gba_sae
import topk_sae
import vanilla_sae
from conftest import trained
from sources.toy import Toy

pytestmark = pytest.mark.claims
SEEDS = (50, 51, 52)
BA = "--groups", 1, "--high", 0.03                  # 1.28 times the frequency of a feature of 'gba', 3 / 128

def run(script, toy, seed, *flags, steps=2000):
    return trained(script, toy, seed, "--tokens", steps * 512, "--d-sae", 512, *flags)

def cosines(sae, toy):
    """[n features, F latents]"""
    return Toy.preset(toy).features @ F.normalize(decoder(sae), dim=1).T

def decoder(sae):
    return sae.tensors()["W_dec"] if isinstance(sae, gba_sae.GBASAE) else sae.W_dec.detach()

def frr(sae, toy, t):
    return (cosines(sae, toy).amax(1) > t).float().mean().item()

def report(label, seed, sae, results, toy):
    toy = toy if ":" in toy else f"{toy}:{seed}"
    scores = {t: frr(sae, toy, t) for t in (0.8, 0.9)}
    over = f", over target {max(g['over'] for g in results['groups']):.1%}" if "groups" in results else ""
    over += f", {int((sae.a < 0).sum())} a < 0" if over else ""
    print(f"{label}, seed {seed}: FRR@.8 {scores[0.8]:.3f}, @.9 {scores[0.9]:.3f}, l0 {results['l0']:.2f}, fvu "
          f"{results['fvu']:.4f}, dead {results['dead']:.1%}{over}")
    return scores

def untrained(seed):
    torch.manual_seed(seed)
    return gba_sae.GBASAE(42, 512)

@pytest.mark.parametrize("seed", SEEDS)
def test_bias_adaptation_finds_every_feature(seed, claim):
    """Claim 1: with one group and no term for sparsity, all 128 features of the uniform toy at a cosine
    above .8 and at least 95 % above .9 (paper: 'all monosemantic features'), for every seed. Control:
    untrained, at most 2 % at .8. (TopK and L1 find them all, too: claim 6 prints it.)"""
    scores = report("BA (paper: 1)", seed, *run(gba_sae, "gba", seed, *BA), "gba")
    assert scores[0.8] == 1 and scores[0.9] >= 0.95
    control = frr(untrained(seed), f"gba:{seed}", 0.8)
    assert control <= 0.02
    claim("gba", "bias adaptation, without a term for sparsity, finds every feature of similar frequency",
          "a theorem: cosine 1 - o(1) (its width condition holds on no toy)",
          "uniform toy: found at .8 {at_8:.2f}, at .9 {at_9:.2f}, untrained {untrained:.2f}", "reproduced", at_8=scores[0.8], at_9=scores[0.9], untrained=control)

@pytest.mark.parametrize("seed", SEEDS)
def test_the_lowest_loss_recovers_nothing(seed):
    """Claim 2: a target far above the band (.3, 13 times the frequency) and no ceiling at all (1) have at
    most a fifth of claim 1's error, each less than the one before, and at most 5 % of the features at .8."""
    fvu = [run(gba_sae, "gba", seed, *BA)[1]["fvu"]]
    for p in (0.3, 1):
        sae, results = run(gba_sae, "gba", seed, "--groups", 1, "--high", p, steps=1000)
        assert report(f"target {p}", seed, sae, results, "gba")[0.8] <= 0.05
        fvu.append(results["fvu"])
    assert fvu[0] >= 5 * fvu[1] and fvu[1] > fvu[2]

@pytest.mark.parametrize("seed", SEEDS)
def test_ceilings_hold(seed, claim):
    """Claim 3a: held out, at most one of 512 latents is over its target by more than three standard errors,
    in ten groups (toy 'flat', defaults) and in one ('gba'). Control: biases that hardly move, where at
    least 90 % are over."""
    shares = {True: [], False: []}
    for toy, flags in (("flat", ()), ("gba", BA)):
        for still in ((), ("--gamma-down", 1e-6)):
            sae, results = run(gba_sae, toy, seed, *flags, *still, steps=200 if still else 2000)
            report(f"{toy} {still}", seed, sae, results, toy)
            over = 512 * mean(g["over"] for g in results["groups"])
            print(f"  mean frequency over target: {[round(g['freq'] / g['target'], 2) for g in results['groups']]}")
            assert over >= 0.9 * 512 if still else over <= 1.1
            shares[bool(still)].append(over / 512)
    claim("gba", "biases alone keep each latent's frequency at or below its target", "the rule's aim, no figure",
          "two toys, held out, latents over target: {over:.1%}; biases kept still {still:.0%}", "reproduced",
          over=shares[False], still=shares[True])

@pytest.mark.parametrize("seed", SEEDS)
def test_the_bias_rule_revives(seed, claim):
    """Claim 3b: with a target a fifth of the frequency latents die; the rule revives them: at most 1 % are
    silent on 65,536 held-out samples, without its second line (--gamma-up 0) at least 5 %."""
    dead = {}
    for up in ((), ("--gamma-up", 0)):
        sae, results = run(gba_sae, "gba", seed, "--groups", 1, "--high", 0.005, *up)
        report(f"target .005 {up}", seed, sae, results, "gba")
        dead[up] = results["dead"]
    assert dead[()] <= 0.01 and dead["--gamma-up", 0] >= 0.05
    claim("gba", "the rule's second line is enough to revive dead latents", ".970 alive, Gemma-2-2B (secondary)",
          "uniform toy, low target, dead: {dead:.1%}, without that line {without:.0%}", "reproduced",
          tol=dict(dead=0.01),
          dead=dead[()], without=dead["--gamma-up", 0])

@pytest.mark.parametrize("seed", SEEDS)
def test_groups_sort_features_by_frequency(seed, claim):
    """Claim 4: of 128 features, half with frequency .04 and half with .004, in four groups with targets .05,
    .017, .0058 and .002, at least 95 % of the frequent ones find their best latent in the first group and at
    least 90 % of the rare ones in the others, whose targets are closer; at least 98 % are found at .8.
    Control: the same target for all groups, .05, which also find them (95 % at .8), either half 5 to 45 % in
    the first."""
    shares = []
    for low in (0.002, 0.05):
        sae, results = run(gba_sae, "two-rates", seed, "--groups", 4, "--high", 0.05, "--low", low, "--d-sae", 256,
                           steps=3000)
        found = report(f"targets .05 to {low}", seed, sae, results, "two-rates")
        group = cosines(sae, f"two-rates:{seed}").argmax(1) * 4 // 256
        shares.append([(group[half] == 0).float().mean().item() for half in (slice(64), slice(64, 128))])
        print(f"  best latent by group: frequent {group[:64].bincount(minlength=4).tolist()}, rare "
              f"{group[64:].bincount(minlength=4).tolist()}")
        assert found[0.8] >= 0.98 if low < 0.05 else found[0.8] >= 0.95
    assert shares[0][0] >= 0.95 and shares[0][1] <= 0.1
    assert all(0.05 <= share <= 0.45 for share in shares[1])
    claim("gba", "groups with different targets take features of different frequency",
          "its reason for groups, no figure", "toy with two frequencies, of the features with their best latent in "
          "the first of four groups: {frequent:.2f} of the frequent, {rare:.2f} of the rare; equal targets "
          "{frequent_equal:.2f}, {rare_equal:.2f}", "reproduced",
          tol=dict(frequent_equal=0.15, rare_equal=0.15),   # three standard deviations of a share of 64
          frequent=shares[0][0], rare=shares[0][1], frequent_equal=shares[1][0], rare_equal=shares[1][1])

@pytest.mark.parametrize("seed", SEEDS)
def test_imbalanced_toy(seed, claim):
    """Claim 5: half of the samples with 3 features, half with 20 (f = .09). Ten groups with targets from .02
    to .001 and 256 latents find every feature at .8 and at least 95 % at .9 (paper: 100 and 100 %, 'full
    range'); from .5 to .1, at most 10 % at .8 (paper: 38.3 and 3.9 %, 'wrong range')."""
    found, l0, fvu = {}, {}, {}
    for high, low, steps, paper in ((0.02, 0.001, 3000, "1, 1"), (0.5, 0.1, 1500, ".383, .039")):
        sae, results = run(gba_sae, "gba-imbalanced", seed, "--high", high, "--low", low, "--d-sae", 256, steps=steps)
        scores = report(f"targets {high} to {low} (paper: {paper})", seed, sae, results, "gba-imbalanced")
        assert scores[0.8] == 1 and scores[0.9] >= 0.95 if high == 0.02 else scores[0.8] <= 0.1
        found[high], l0[high], fvu[high] = scores, results["l0"], results["fvu"]
    claim("gba", "with suitable targets GBA recovers an imbalanced toy, with a wrong range it does not",
          "at .8 and .9: 1.00, 1.00; .383, .039 (secondary)",
          "targets .02 to .001: {at_8:.2f}, {at_9:.2f}, but an L0 of {l0:.1f} (true 11.5) and an FVU of {fvu:.2f}; .5 "
          "to .1: {wrong_8:.2f}, {wrong_9:.2f}", "partly", at_8=found[0.02][0.8], at_9=found[0.02][0.9], l0=l0[0.02],
          fvu=fvu[0.02], wrong_8=found[0.5][0.8], wrong_9=found[0.5][0.9])

def alike(a, b, t, x):
    """Of the quarter of a's live latents with the largest activations on x, the share with one of b's at a
    cosine above t."""
    with torch.no_grad():
        peak = a.encode(x).amax(0)
        best = decoder(a)[peak.topk(max(1, int((peak > 0).sum()) // 4)).indices]
        return ((best @ decoder(b).T).amax(1) > t).float().mean().item()

def test_agreement_between_seeds(claim):
    """Claim 6: on the uniform toy, the quarter of the latents with the largest activations is at least 95 %
    the same for another seed (cosine above .8; the paper's measure, there of the top .3 % in a language
    model, read by eye: GBA ~34 %, TopK 24 %, L1 ~55 % above .9). But not the paper's order: TopK and L1 at
    about the same L0 agree as well, within .02 at .9. Control: untrained, at most 5 %."""
    toy = "gba:50"
    x = Toy.preset(toy).sample(16384, torch.Generator().manual_seed(1))[0]
    runs = {"untrained": [untrained(seed) for seed in SEEDS]}
    for label, script, flags in (("BA", gba_sae, BA), ("GBA", gba_sae, ()), ("TopK", topk_sae, ("--k", 7)),
                                 ("L1", vanilla_sae, ("--target-l0", 7))):
        pairs = [run(script, toy, seed, *flags) for seed in SEEDS]
        for seed, pair in zip(SEEDS, pairs):
            report(f"{label} {flags}", seed, *pair, toy)
        runs[label] = [sae for sae, _ in pairs]
    score = {label: [mean(alike(a, b, t, x) for a, b in itertools.permutations(saes, 2)) for t in (0.8, 0.9)]
             for label, saes in runs.items()}
    print(f"of the top quarter, alike at .8 and .9: {score} (paper, of the top .3 % of a language model's at .9: "
          "GBA .34, TopK .24, L1 .55)")
    assert min(score[label][0] for label in ("BA", "GBA", "TopK", "L1")) >= 0.95 and max(score["untrained"]) <= 0.05
    assert min(score["TopK"][1], score["L1"][1]) >= max(score["BA"][1], score["GBA"][1]) - 0.02
    claim("gba", "seeds agree on GBA's latents with the largest activations, and more than on TopK's",
          "top .3 %, at .9: GBA ~.34, L1 ~.55 (by eye), TopK .24 (Qwen2.5-1.5B)",
          "uniform toy, top quarter, at .9: they agree, but no more: GBA {gba:.2f}, one group {ba:.2f}, TopK "
          "{topk:.2f}, L1 {l1:.2f}; untrained {untrained:.2f}", "partly", gba=score["GBA"][1], ba=score["BA"][1],
          topk=score["TopK"][1], l1=score["L1"][1], untrained=score["untrained"][1])
