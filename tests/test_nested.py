"""matryoshka_sae.py and ordered_sae.py: the nested losses are exact (claim 1; tests/test_nested_claims.py
has the others), and so are the selection over a batch, the threshold, annealing and sweeping."""
import importlib
import shutil
from argparse import Namespace

import pytest
import torch

import matryoshka_sae
import ordered_sae
import runs
import sparse
from matryoshka_sae import MatryoshkaSAE
from ordered_sae import OrderedSAE

B, D, N = 20, 12, 40

# --- the loss -------------------------------------------------------------------------------------

def random_case(cls, k, dtype=torch.float64):
    torch.manual_seed(0)
    sae = cls(D, N, k).to(dtype)
    with torch.no_grad():
        for p in (sae.b_enc, sae.b_dec, sae.W_enc):
            p += 0.3 * torch.randn_like(p)
    return sae, torch.randn(B, D, dtype=dtype) * 3 + 1

def naive_loss(sae, x, z, p):
    """sum_l p(l) mean_B |x - x_hat_l|^2 with one dense decode for every prefix, plain autograd."""
    loss = 0
    for l in range(1, N + 1):
        x_hat = z[:, :l] @ sae.W_dec[:l] + sae.b_dec
        loss = loss + p[l - 1] * (x - x_hat).pow(2).sum(1).mean()
    return loss

def compare(sae, loss, expected):
    """Equal values and equal gradients of every parameter."""
    assert torch.allclose(loss, expected, rtol=1e-12)
    grads = []
    for value in (loss, expected):
        sae.zero_grad()
        value.backward()
        grads.append([p.grad for p in sae.parameters()])
    for (name, _), a, b in zip(sae.named_parameters(), *grads):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name

def law(name, full_share=0.5):
    """p(l), l = 1 .. N, from its definition."""
    p = {"uniform": [1] * N, "zipf": [1 / l for l in range(1, N + 1)],
         "groups": [int(l in (1, 3, 8, 18, 40)) for l in range(1, N + 1)]}[name]
    p = torch.tensor(p, dtype=torch.float64)
    p = (1 - full_share) * p / p.sum()
    p[-1] += full_share
    return p

def ordered_state(prefix_law, full_share, k, dead=0):
    args = Namespace(d_sae=N, prefix_law=prefix_law, full_share=full_share, auxk=4, auxk_alpha=0.7)
    state = ordered_sae.init_state(args, "cpu")
    return dict(state, survival=survival(args), dead=torch.arange(dead)), args

def survival(args):
    return ordered_sae.prefix_law(args).flip(0).cumsum(0).flip(0)

@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize("prefix_law", ["uniform", "zipf", "groups"])
@pytest.mark.parametrize("full_share", [0, 0.5, 1])
def test_ordered_loss_equals_the_loop_over_all_prefixes(prefix_law, full_share, k, monkeypatch):
    """Claim 1. Values and gradients in float64; on several pieces of the batch as on one. With k = F
    many selected latents are at 0. full_share 1 is TopK."""
    sae, x = random_case(OrderedSAE, k)
    state, args = ordered_state(prefix_law, full_share, k)
    p = law(prefix_law, full_share)
    loss, terms, fired = ordered_sae.sparse_loss(sae, x, state, args)
    compare(sae, loss, naive_loss(sae, x, sae.encode(x), p))
    assert torch.allclose(terms["mse"], (x - sae(x)).pow(2).sum(1).mean())
    assert torch.equal(fired > 0, (sae.encode(x) > 1e-3).any(0))
    if full_share == 1:
        assert torch.allclose(loss, terms["mse"])
    monkeypatch.setattr(ordered_sae, "MEMORY", dict(cpu=0))   # the smallest pieces, 2 F D floats
    x = torch.cat([x, x + 1, 2 * x])[:50]                     # for k = 4: of 20, 20 and 10 tokens
    compare(sae, ordered_sae.sparse_loss(sae, x, state, args)[0], naive_loss(sae, x, sae.encode(x), p))

def matryoshka_state(widths, balance, n):
    G = len(widths)
    weights = torch.tensor([balance ** (G - 1 - g) for g in range(G)], dtype=torch.float64)
    return dict(widths=torch.tensor(widths), weights=weights, n=n, dead=torch.empty(0, dtype=int))

@pytest.mark.parametrize("k", [0.3, 4, 40])
@pytest.mark.parametrize("widths, balance", [([40], 1), ([1, 3, 8, 18, 40], 1), ([5, 40], 0),
                                             ([3, 8, 40], 0.25), ([8, 39, 40], 2)])
def test_matryoshka_loss_equals_the_loop_over_its_levels(widths, balance, k):
    """Claim 1. As above; k is a mean over the batch, of any size, so that some tokens have no latent
    and others many. balance 0, and one level, are BatchTopK."""
    sae, x = random_case(MatryoshkaSAE, k)
    p = torch.zeros(N, dtype=torch.float64)
    for g, width in enumerate(widths):
        p[width - 1] = balance ** (len(widths) - 1 - g)
    loss, terms, fired = matryoshka_sae.sparse_loss(sae, x, matryoshka_state(widths, balance, round(k * B)),
                                                Namespace(auxk_alpha=0))
    z = sae.encode(x)
    assert (z != 0).sum() <= round(k * B) and (k == 40 or len(set((z != 0).sum(1).tolist())) > 1)
    compare(sae, loss, naive_loss(sae, x, z, p))
    assert torch.allclose(terms["mse"], (x - sae(x)).pow(2).sum(1).mean())
    assert torch.allclose(terms["l0"], (z > 0).sum() / B) and torch.equal(fired > 0, (z > 1e-3).any(0))
    if len(widths) == 1 or balance == 0:
        assert torch.allclose(loss, terms["mse"])

@pytest.mark.claims
def test_one_law_two_files(claim):
    """With a law of five groups and all entries positive, the ordered loss is the mean of
    Matryoshka's levels: the two files' losses agree on the same codes (k = F)."""
    sae, x = random_case(OrderedSAE, N)
    other = MatryoshkaSAE(D, N, N).double()
    other.load_state_dict(dict(sae.state_dict(), threshold=torch.zeros(N)))
    ordered = ordered_sae.sparse_loss(sae, x, *ordered_state("groups", 0, N))[0]
    levels = matryoshka_sae.sparse_loss(other, x, matryoshka_state([1, 3, 8, 18, 40], 1, N * B),
                                    Namespace(auxk_alpha=0))[0]
    assert torch.allclose(ordered, levels / 5, rtol=1e-12)
    claim("ordered", "Matryoshka's loss is the ordered one with a law on a few prefixes", "by definition",
          "equal to twelve digits, on equal codes", "reproduced")

@pytest.mark.parametrize("cls", [OrderedSAE, MatryoshkaSAE])
def test_auxk_reconstructs_the_error_of_all_latents(cls):
    """The loss with dead latents is the loss without, plus alpha D times the aux of topk_sae.py on the
    error of the full width, which reaches dead latents only."""
    from topk_sae import auxk_loss
    sae, x = random_case(cls, 4)
    if cls is OrderedSAE:
        script, (state, args) = ordered_sae, ordered_state("uniform", 0.5, 4, dead=9)
    else:
        script, state = matryoshka_sae, matryoshka_state([8, 40], 1, 4 * B)
        args = Namespace(auxk=4, auxk_alpha=0.7)
    state["dead"] = torch.arange(0, 40, 5)
    dead = state["dead"]
    aux = auxk_loss(sae, x, (x - sae(x)).detach(), dead, sae.W_enc.T[dead], sae.W_dec[dead], args)
    with_dead = script.sparse_loss(sae, x, state, args)[0]
    without = script.sparse_loss(sae, x, dict(state, dead=state["dead"][:0]), args)[0]
    compare(sae, with_dead, without + 0.7 * D * aux)

@pytest.mark.parametrize("cls", [OrderedSAE, MatryoshkaSAE])
def test_in_bf16_the_loss_is_still_a_float32_sum(cls):
    """Under autocast, with the full width alone, loss and mse are the same number."""
    sae, x = random_case(cls, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        if cls is OrderedSAE:
            state, args = ordered_state("uniform", 1, 4)
            _, terms, _ = ordered_sae.sparse_loss(sae, x, dict(state, survival=state["survival"].float()), args)
        else:
            state = matryoshka_state([40], 1, 4 * B)
            state["weights"] = state["weights"].float()
            _, terms, _ = matryoshka_sae.sparse_loss(sae, x, state, Namespace(auxk_alpha=0))
    assert terms["loss"].dtype == torch.float32
    assert torch.allclose(terms["loss"], terms["mse"], rtol=1e-5)

def test_groups_law_is_that_of_matryoshka_for_any_width():
    """Each different default width weighs the same, however few latents there are."""
    for n in (1, 2, 10, 16, 40):
        args = Namespace(d_sae=n, prefix_law="groups", full_share=0)
        widths = sorted({max(1, n * i // 32) for i in (1, 3, 7, 15, 32)})
        p = ordered_sae.prefix_law(args)
        assert torch.allclose(p[[w - 1 for w in widths]], torch.tensor(1 / len(widths)).double())

@pytest.mark.claims
def test_compiles_only_the_last_k(tmp_path):
    """With --compile the loss is compiled for the k that stays, not for each k on the way."""
    if not any(map(shutil.which, runs.COMPILERS)):
        return                                                # tests/test_runs.py: it refuses then
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ordered_sae.train(ordered_sae.parse_args([
        "--model", "toy", "--toy", "song", "--d-sae", "64", "--k", "3", "--batch-size", "64",
        "--tokens", "6400", "--compile", "--out", str(tmp_path / "run")]))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2

# --- the selection over a batch -------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(10, 7), (64, 200), (300, 1000), (512, 4096)])
def test_selection_is_exact(shape):
    """top() finds the values that torch.topk finds, with ties, in bf16, when most entries are 0, when
    columns differ a lot, and when the sample misleads: then it takes the long way."""
    pre = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    rare = torch.zeros(pre.numel())
    rare[torch.arange(1, pre.numel(), 61)] = 1.0                          # what the sample never sees
    for x in (pre, pre.bfloat16(), pre.round(), pre.relu(), pre * torch.arange(shape[1]), rare,
              1 - rare, -pre.relu()):
        x = x.flatten()
        for n in {1, shape[0] // 3 + 1, 5 * shape[0], x.numel()}:
            at = sparse.flat_top(x, n)
            assert len(at) == n and (at.diff() > 0).all()
            assert torch.equal(x[at].sort().values, x.topk(n).values.sort().values)

def test_selection_is_among_few(monkeypatch):
    """Of a real batch's size, top() passes no more than 1.5 n entries to the selection."""
    x, sizes, real = torch.randn(512 * 4096), [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda t, *a, **kw: sizes.append(len(t)) or real(t, *a, **kw))
    sparse.flat_top(x, 32 * 512)
    assert len(sizes) == 2 and sizes[0] == -(-len(x) // 61) and 32 * 512 <= sizes[1] <= 1.5 * 32 * 512

@pytest.mark.parametrize("world, n", [(2, 1), (2, 24), (2, 60), (2, 480), (4, 1), (4, 100), (8, 3),
                                      (8, 300), (8, 1900)])
def test_selection_over_processes(world, n, monkeypatch):
    """Processes choose, together, the n largest of all, ties included, though one has more than the
    others."""
    torch.manual_seed(0)
    pre = torch.randn(world, 240).round(decimals=1)
    pre[1] += 0.3
    offers, chosen = {}, {}
    def gather(tensor, op):
        offers[runs.rank()] = tensor.clone()
        return sum(offers.values())
    monkeypatch.setattr(runs, "world_size", lambda: world)
    monkeypatch.setattr(runs, "all_reduce", gather)
    for rank in [*range(world), *range(world)]:             # in the second round each sees all offers
        monkeypatch.setattr(runs, "rank", lambda: rank)
        vals, at = matryoshka_sae.batch_top(pre[rank], n)
        assert len(at) == min(n, 240, 2 * n // world + 64)
        chosen[rank] = vals[vals != 0]
    best = pre.flatten().topk(n).values
    assert torch.equal(torch.cat(list(chosen.values())).sort().values, best[best != 0].sort().values)

@pytest.mark.parametrize("k", [0.37, 3, 12.5, 39])
def test_threshold_makes_l0_k(k):
    """On the tokens that it was set with L0 is k, to one entry, or all that is positive if that is
    less; strictly above, as SAELens' jumprelu."""
    sae, _ = random_case(MatryoshkaSAE, k, torch.float32)
    x = torch.randn(5000, D, generator=torch.Generator().manual_seed(5)) * 3 + 1
    sae.set_threshold(x)
    z = sae.encode(x)
    positive = (sae.pre_acts(x) > 0).sum().item()
    assert not sae.training and abs((z > 0).sum().item() - min(round(k * 5000), positive)) <= 1
    assert torch.equal(z, sae.pre_acts(x) * (sae.pre_acts(x) > sae.threshold))
    assert (sae.threshold == sae.threshold[0]).all()

def test_random_widths():
    """Distinct, increasing, ending with F; a function of seed and step; P(m <= q F) = sqrt(q)."""
    args = Namespace(d_sae=100, widths=[1, 2, 3, 4, 100], seed=3)
    draws = [matryoshka_sae.random_widths(step, args).tolist() for step in range(300)]
    assert all(d == sorted(set(d)) and d[-1] == 100 and d[0] >= 1 and len(d) == 5 for d in draws)
    assert draws[7] == matryoshka_sae.random_widths(7, args).tolist() != draws[8]
    args.widths = [1, 100]
    inner = torch.tensor([matryoshka_sae.random_widths(step, args)[0] for step in range(2000)])
    for m in (4, 25, 64):
        expected = (m / 99) ** 0.5
        assert abs((inner <= m).float().mean() - expected) < 3 * (expected * (1 - expected) / 2000) ** 0.5

# --- the order of training ------------------------------------------------------------------------

def test_k_anneals_and_stays():
    for script in (matryoshka_sae, ordered_sae):
        args = Namespace(k=4, k_start=20, k_anneal=0.5, steps=100)
        ks = [script.k_at(step, args) for step in range(100)]
        assert ks[0] == 20 and ks[25] == 12 and set(ks[50:]) == {4} and ks == sorted(ks, reverse=True)

def test_sweep_freezes_latents_in_order():
    """From the share --sweep of the steps on latent after latent stops moving, the first one first,
    encoder, bias and decoder; the others go on."""
    sae, x = random_case(OrderedSAE, 4, torch.float32)
    args = ordered_sae.parse_args(["--sweep", "0.5", "--no-bf16", "--lr", "0.01", "--batch-size", str(B)])
    args.steps, args.warmup, args.d_sae, args.auxk, args.k, args.k_start = 80, 1, N, 4, 4, 4
    opt = runs.adam(sae, 0.01, ordered_sae.BETAS)
    state = dict(tokens_since_fired=torch.zeros(N, dtype=torch.int64), dead=torch.arange(N),
                 survival=survival(args).float())
    for step in range(80):
        before = {n: p.detach().clone() for n, p in sae.named_parameters()}
        ordered_sae.train_step(sae, opt, x, state, step, args)
        frozen = max(0, step - 40)                                        # one a step from step 40
        for name in ("W_enc", "b_enc", "W_dec"):
            old, new = before[name], sae.get_parameter(name)
            same = (old == new).all(0 if name == "W_enc" else 1) if old.dim() > 1 else old == new
            assert same[:frozen].all(), (step, name)
            assert step == 79 or (~same[frozen:]).sum() >= (N - frozen) / 2

# --- benchmarks/hedging.py ------------------------------------------------------------------------

def test_hedging_trains_control_and_widened_alike(monkeypatch):
    """The SAE to begin with, the control, that of the null and the widened one train at one rate, whatever their widths; and
    the latter start as the control does."""
    hedging, trained = importlib.import_module("benchmarks.hedging"), []
    toy = hedging.data.open_source(matryoshka_sae.parse_args(["--model", "toy"]), torch.device("cpu"))
    monkeypatch.setattr(hedging.data, "open_source", lambda args, device: toy)
    monkeypatch.setattr(hedging, "TOKENS", 2 * 2048)
    adam = runs.adam
    monkeypatch.setattr(runs, "adam", lambda sae, lr, betas: trained.append((lr, sae.W_dec.detach().clone())) or adam(
        sae, lr, betas))
    found = hedging.measure("topk", 8, 0)                       # at 2 D the rate of this toy is the largest allowed
    (rate, _), (lr, W), (null_lr, null), (wide_lr, wide) = trained
    assert rate == lr == null_lr == wide_lr and len(wide) == len(W) + hedging.NEW
    assert torch.equal(W, wide[:len(W)]) and torch.equal(W, null)
    assert 0 <= found["h"] <= 1 and 0 <= found["null"] <= 1
