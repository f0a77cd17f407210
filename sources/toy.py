"""Toy models: data whose true features are known, to test that an SAE finds them.

    x = sum_j codes_j * features_j + noise      features [n, D] unit rows, codes [B, n] >= 0, sparse

Toys differ in when a feature fires (how often, and together with which others) and how strongly.
PRESETS names one configuration per published toy model: `--model toy --toy NAME` trains on it, and
`--toy NAME:7` draws its features with seed 7. Samples are always fresh: where a paper drew a finite
set once (Song et al. 50,000; Wang et al. 100,000), ours is an infinite one.

    toy = Toy.preset("song");  x, codes = toy.sample(1024, torch.Generator().manual_seed(0))
"""
from dataclasses import dataclass, field

import numpy as np
import torch

import runs
from sources.source import Source

# --- magnitude laws: (shape, generator) -> tensor -------------------------------------------------

def uniform(lo, hi):
    return lambda shape, g: lo + (hi - lo) * torch.rand(shape, generator=g)

def half_normal(shape, g):
    return torch.randn(shape, generator=g).abs()

def near_one(std):
    """relu(1 + std N(0, 1)), the law of Chanin et al.; std may be [n], one value per feature."""
    return lambda shape, g: (1 + std * torch.randn(shape, generator=g)).relu()

ONE = near_one(0.0)

# --- the model ------------------------------------------------------------------------------------

@dataclass
class Toy:
    """A generator of sparse data with known features. `probs` [n] is read in one of four ways:

    default      feature j fires with probability probs[j], independently of the others
    corr [n, n]  Gaussian copula: j fires where g_j > Phi^-1(1 - probs[j]), g ~ N(0, corr)
    parents      {child: (parent, P(on | parent on), P(on | parent off))}, parents before children;
                 these replace probs[child]. exclusive: at most one child of a parent fires
    exactly (s,) s features fire in every sample, drawn without replacement in proportion to probs;
                 with several values (s1, s2) each sample uses one of them, equally often
    """
    d: int                                         # D, the dimension of x
    probs: torch.Tensor                            # [n]
    magnitude: callable = uniform(0.5, 1.5)        # how strongly a feature fires
    orthogonal: bool = False                       # orthonormal features (n <= D) or random ones
    corr: torch.Tensor = None
    parents: dict = field(default_factory=dict)
    exclusive: bool = False
    exactly: tuple = ()
    drift: bool = False                            # Sharkey et al.: see _drifting_rates
    noise: float = 0.0                             # std of isotropic Gaussian noise added to x
    unit_norm: bool = False                        # divide every x, and its codes, by |x|
    seed: int = 0                                  # of the features and all else that is drawn once

    def __post_init__(self):
        # Not the stream of torch.manual_seed(seed): an SAE with that seed would start at them.
        seed = int(np.random.SeedSequence((2026, self.seed)).generate_state(1)[0])
        self.n, g = len(self.probs), torch.Generator().manual_seed(seed)
        V = torch.randn(self.n, self.d, generator=g)
        if self.orthogonal:
            V = torch.linalg.qr(V.T).Q.T
        self.features = V / V.norm(dim=1, keepdim=True)                            # (n, D)
        if self.drift:                             # their matrix: symmetric, made positive definite
            U = torch.rand(self.n, self.n, generator=g)
            C = (U + U.T) / 2
            C += 1.001 * torch.linalg.eigvalsh(C)[0].clamp(max=0).abs() * torch.eye(self.n)
            self.corr = C
        self.root = None if self.corr is None else torch.linalg.cholesky(self.corr)

    @classmethod
    def preset(cls, name):
        """The toy 'NAME' or 'NAME:SEED'. Raises KeyError (name) or ValueError (seed)."""
        name, _, seed = name.partition(":")
        return cls(**PRESETS[name](), seed=int(seed or 0))

    def sample(self, n, generator=None):
        """n samples: x [n, D] and codes [n, n_features]; a pure function of the generator."""
        on = self._support(n, generator)
        codes = on * self.magnitude((n, self.n), generator)
        x = codes @ self.features
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=generator)
        if self.unit_norm:
            norm = x.norm(dim=1, keepdim=True)
            x, codes = x / norm, codes / norm
        return x, codes

    def _support(self, B, g):
        """Which features fire: bool [B, n]."""
        if self.exactly:                           # Gumbel top-k is sampling without replacement
            u = torch.rand(B, self.n, generator=g).clamp_min(1e-30)
            first = (self.probs.log() - (-u.log()).log()).topk(max(self.exactly)).indices
            s = torch.tensor(self.exactly)[torch.randint(len(self.exactly), (B, 1), generator=g)]
            return torch.zeros(B, self.n, dtype=bool).scatter_(
                1, first, torch.arange(first.shape[1]) < s)
        if self.root is not None:
            normal = torch.randn(B, self.n, generator=g) @ self.root.T
            if self.drift:
                return torch.rand(B, self.n, generator=g) < self._drifting_rates(normal)
            return normal > torch.special.ndtri(1 - self.probs)
        u = torch.rand(B, self.n, generator=g)
        on = u < self.probs
        first, used = {}, {}                       # exclusive siblings share one uniform draw
        for child, (parent, given, alone) in self.parents.items():
            key = parent if self.exclusive else child
            draw, lo = u[:, first.setdefault(key, child)], used.get(key, 0.0)
            used[key] = lo + given
            on[:, child] = torch.where(
                on[:, parent], (lo <= draw) & (draw < lo + given), draw < alone)
        return on

    def _drifting_rates(self, normal):
        """Rates [B, n] of Sharkey et al.'s correlated toy: Phi(g_i) probs_i, g ~ N(0, C), rescaled
        in every sample to sum(probs). Cunningham et al. draw g once a batch, so that a whole batch
        shares one rate vector, and give an all-zero sample one feature at 1; we do neither."""
        rates = torch.special.ndtr(normal) * self.probs
        return rates * (self.probs.sum() / rates.sum(1, keepdim=True))

# --- presets: parameters as published unless a comment says otherwise -----------------------------

def _decay(n, active, rate):
    p = rate ** torch.arange(n)
    return p * active / p.sum()                    # rescaled: `active` features fire on average

def _children(*given, alone=0.0):                  # P(child | f0) of each, and P(child | not f0)
    return dict(d=50, probs=torch.tensor([0.25] + [0] * len(given)), orthogonal=True, magnitude=ONE,
                parents={i + 1: (0, p, alone) for i, p in enumerate(given)})

def _absorb(parents, first_std=0.0):
    return dict(d=50, probs=torch.tensor([0.25, 0.05, 0.05, 0.05]), parents=parents,
                orthogonal=True, magnitude=near_one(torch.tensor([first_std, 0, 0, 0])))

def _tree(d, n_parents, p_parent):                 # 3 exclusive children a parent, then 8 singles
    n = n_parents * 4 + 8
    probs = torch.where(torch.arange(n) < n_parents, p_parent, 0.05)
    parents = {n_parents + c: (c // 3, 0.2, 0.0) for c in range(3 * n_parents)}
    return dict(d=d, probs=probs, parents=parents, exclusive=True, orthogonal=True,
                magnitude=near_one(0.05))

def _star(rho):                                    # feature 0 correlates with each of the others
    C = torch.eye(5)
    C[0, 1:] = C[1:, 0] = rho
    return dict(d=20, probs=torch.full((5,), 0.4), corr=C, orthogonal=True,
                magnitude=near_one(0.15))

def _wrong(d):
    g, n = torch.Generator().manual_seed(42), 50
    rho = (0.3 + 0.6 * torch.rand(n, n, generator=g)) * (torch.rand(n, n, generator=g) < 0.7)
    C = torch.where(torch.rand(n, n, generator=g) < 0.5, rho, -rho).triu(1)
    lam, Q = torch.linalg.eigh(C + C.T + torch.eye(n))
    C = Q @ torch.diag(lam.clamp_min(1e-6)) @ Q.T
    C = C / C.diag().outer(C.diag()).sqrt() + 1e-6 * torch.eye(n)    # for the Cholesky root
    return dict(d=d, probs=0.345 * (49 - torch.arange(n)) / 50 + 0.05, corr=C, orthogonal=d >= n,
                magnitude=near_one(0.15))          # p_0 = .388 as in their code; the text has .345

PRESETS = {
    # ours, the benchmark of benchmarks/recovery.py: 5 of 256 features active on average
    "flat": lambda: dict(d=64, probs=torch.full((256,), 5 / 256)),
    # Sharkey et al. 2022 in the replication of Cunningham et al. 2023; 5 active, exactly rescaled
    "sharkey": lambda: dict(d=256, probs=_decay(512, 5, 0.99), drift=True, magnitude=uniform(0, 1)),
    "sharkey-independent": lambda: dict(d=256, probs=_decay(512, 5, 0.99), magnitude=uniform(0, 1)),
    # Song et al. 2025: 32 features in 16 dimensions, 3 active
    "song": lambda: dict(d=16, probs=torch.ones(32), exactly=(3,), magnitude=half_normal),
    # Wang et al. 2025 (2512.02194): toy A; toy B at exponent 1; and a three-atom check of ours
    "zipf": lambda: dict(d=80, probs=torch.arange(1, 101) ** -1.2, exactly=(5,),
                         magnitude=half_normal),
    "song-zipf": lambda: dict(d=16, probs=torch.arange(1, 33) ** -1.0, exactly=(3,),
                              magnitude=half_normal),
    "three-atoms": lambda: dict(d=3, probs=torch.tensor([0.5, 0.3, 0.2]), orthogonal=True,
                                magnitude=half_normal),
    # Chen et al. 2025 (2506.14002); their law of the coefficients is unverified, |N(0, 1)| is ours
    "gba": lambda: dict(d=42, probs=torch.ones(128), exactly=(3,), magnitude=half_normal,
                        unit_norm=True),
    "gba-imbalanced": lambda: dict(d=42, probs=torch.ones(128), exactly=(3, 20),
                                   magnitude=half_normal, unit_norm=True),
    # ours, for groups of latents: half of the features fire ten times as often as the others
    "two-rates": lambda: dict(d=42, probs=torch.tensor([0.04, 0.004]).repeat_interleave(64)),
    # Chanin et al. 2025 (2505.11756), feature hedging; 'balanced' is our reading: .15 given f0
    "hedging-independent": lambda: _children(0.2, alone=0.2),
    "hedging-hierarchical": lambda: _children(0.2, alone=0.0),
    "hedging-correlated": lambda: _children(0.2, alone=0.1),
    "hedging-anticorrelated": lambda: _children(0.1, alone=0.2),
    "balanced": lambda: _children(0.15, 0.15, 0.15),
    "balanced-uneven": lambda: _children(0.02, 0.15, 0.5),
    # Chanin et al. 2024 (2409.14507), feature absorption: a control, then ways to nest f1 in f0
    "absorption-independent": lambda: _absorb({}),
    "absorption": lambda: _absorb({1: (0, 0.2, 0.0)}),
    "absorption-partial": lambda: _absorb({1: (0, 0.2, 0.0)}, first_std=0.1),
    "absorption-leaky": lambda: _absorb({1: (0, 0.95 * 0.05 / 0.25, 0.05 * 0.05 / 0.75)}),
    "absorption-12": lambda: dict(d=50, probs=torch.tensor([0.4] + [0.15] * 11), orthogonal=True,
                                  parents={1: (0, 0.6, 0.0)}, magnitude=ONE),
    # Nabeshima 2024 (there the norm of a feature varies, here of each firing); a larger one of ours
    "tree": lambda: _tree(20, 3, 0.15),
    "tree-24": lambda: _tree(50, 4, 0.25),
    # Chanin and Garriga-Alonso 2025 (2508.16560), sparse but wrong
    "wrong-small": lambda: _star(0.4),
    "wrong-small-negative": lambda: _star(-0.4),
    "wrong": lambda: _wrong(100),
    "wrong-superposed": lambda: _wrong(40),
}

# --- the source -----------------------------------------------------------------------------------

ROWS = 65536                       # samples that give mean and scale, and others that are held out

class ToySource(Source):
    """Fresh samples of a toy model; `truth` is the Toy, whose `features` [n, D] are the answer."""
    def __init__(self, args, device):
        args.toy = "flat" if args.toy is None else args.toy
        try:
            self.truth = Toy.preset(args.toy)
        except (KeyError, ValueError):
            runs.fail(f"--toy {args.toy}: use NAME or NAME:SEED, NAME one of {', '.join(PRESETS)}")
        x = self._sample(ROWS, 1)
        mean = x.mean(0)
        super().__init__(args, device, self.truth.d, mean, (x - mean).norm(dim=1).mean().item(),
                         {"model_name": f"toy:{args.toy}"})

    def _sample(self, n, *key):
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
        return self.truth.sample(n, torch.Generator().manual_seed(seed))[0]

    def _load(self, step):
        return self._sample(self.batch_size, 3, self.seed, step)[self.slice]

    def _heldout(self):
        return self._sample(ROWS, 2)
