"""The two losses of each script agree; the textbook one works with torch alone; and each function of
sparse.py is the formula of its docstring."""
import ast
from argparse import Namespace

import pytest
import torch
from torch import nn

import gated_sae
import gba_sae
import matryoshka_sae
import ordered_sae
import runs
import sparse
import topk_sae
import vanilla_sae
from conftest import ROOT, mcc
from sources.toy import ToySource
from test_runs import VARIANTS

B, D, N, K = 20, 12, 40, 3                                    # N latents
WIDTHS = [1, 3, 8, 18, 40]

# --- the two losses -------------------------------------------------------------------------------

def case(cls, *rest, silent=False):
    """An SAE in the middle of training, in float64, and a batch. silent: no latent is active."""
    torch.manual_seed(0)
    sae = cls(D, N, *rest).double()
    with torch.no_grad():
        for name, p in [*sae.named_parameters(), *sae.named_buffers()]:
            if name != "W_dec":
                p += 0.3 * torch.randn_like(p)
        if silent:
            for name in {"b_enc", "b_gate"} & dict([*sae.named_parameters(), *sae.named_buffers()]).keys():
                getattr(sae, name).fill_(-1e3)
    return sae, torch.randn(B, D, dtype=torch.float64) * 3 + 1

def in_float64(state, **changes):
    tensors = {n: v.double() for n, v in state.items() if torch.is_tensor(v) and v.is_floating_point()}
    return state | tensors | changes

def compare(script, sae, x, state, args):
    """Equal values, terms, counts, and gradients of every parameter, to 1e-9."""
    found = []
    for loss in (script.dense_loss, script.sparse_loss):
        sae.zero_grad()
        total, terms, fired = loss(sae, x, state, args)
        total.backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in sae.named_parameters()}
        found.append((dict(terms, total=total), grads, fired))
    (terms, grads, fired), (terms_2, grads_2, fired_2) = found
    assert terms.keys() == terms_2.keys() and torch.equal(fired.double(), fired_2.double())
    for name, value in terms.items():
        assert torch.allclose(value.double(), terms_2[name].double(), rtol=1e-9, atol=1e-12), name
    for name, grad in grads.items():
        assert torch.allclose(grad, grads_2[name], rtol=1e-9, atol=1e-9 * grad.abs().max()), name
    return terms, grads

FORMS = {"dense": dict(sparse=False, room=0), "sparse": dict(sparse=True, room=0),
         "fixed": dict(sparse=True, room=B * N)}              # of the codes: sparse.encode
each_form = pytest.mark.parametrize("form", FORMS)
each_emptiness = pytest.mark.parametrize("silent", [False, True], ids=["", "silent"])
each_aux = pytest.mark.parametrize("dead", [0, 3, 25])        # of them AuxK uses at most 4

@each_emptiness
@each_form
@pytest.mark.parametrize("p", [1, 0.5, 0.2])
@pytest.mark.parametrize("script, rest", [(vanilla_sae, [False]), (vanilla_sae, [True]), (gated_sae, [])],
                         ids=["vanilla", "tied", "gated"])
def test_penalised_losses_agree(script, rest, p, form, silent):
    sae, x = case(script.VanillaSAE if script is vanilla_sae else script.GatedSAE, *rest, silent=silent)
    powers = dict(p=None, p_next=None) if p == 1 else dict(p=x.new_full((), p), p_next=x.new_full((), 0.9 * p))
    args = script.parse_args(["--d-sae", str(N)])
    state = in_float64(script.init_state(args, "cpu"), weight=x.new_full((), 0.7), **powers, **FORMS[form])
    terms, grads = compare(script, sae, x, state, args)
    assert (terms["l0"] == 0) == silent

@each_emptiness
@each_aux
def test_topk_losses_agree(dead, silent):
    sae, x = case(topk_sae.TopKSAE, K, silent=silent)
    args = topk_sae.parse_args(["--d-sae", str(N), "--auxk", "4", "--auxk-alpha", "0.7"])
    state = in_float64(topk_sae.init_state(args, "cpu"), dead=torch.randperm(N)[:dead])
    terms, _ = compare(topk_sae, sae, x, state, args)
    assert (terms["aux"] > 0) == (dead > 0)

@each_emptiness
@each_aux
@pytest.mark.parametrize("k", [0.3, 3, 40])
@pytest.mark.parametrize("widths, balance", [([N], 1), (WIDTHS, 1), (WIDTHS, 0.25), ([8, 39, N], 2), ([5, N], 0),
                                             ("random", 1)])
def test_matryoshka_losses_agree(widths, balance, k, dead, silent):
    """One level and balance 0 are BatchTopK; k is a mean over the batch; 'random': --random-widths."""
    sae, x = case(matryoshka_sae.MatryoshkaSAE, k, silent=silent)
    args = matryoshka_sae.parse_args(["--d-sae", str(N), "--auxk", "4", "--auxk-alpha", "0.7", "--balance",
                                      str(balance)])
    args.widths = WIDTHS if widths == "random" else widths
    state = in_float64(matryoshka_sae.init_state(args, "cpu"), dead=torch.randperm(N)[:dead], n=round(k * B))
    if widths == "random":
        state["widths"] = matryoshka_sae.random_widths(7, args)
        assert state["widths"].tolist() != WIDTHS
    compare(matryoshka_sae, sae, x, state, args)

@each_emptiness
@each_aux
@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("prefix_law", ["uniform", "zipf", "groups"])
@pytest.mark.parametrize("full_share", ["0", "0.5", "1"])
def test_ordered_losses_agree(prefix_law, full_share, k, dead, silent):
    sae, x = case(ordered_sae.OrderedSAE, k, silent=silent)
    args = ordered_sae.parse_args(["--d-sae", str(N), "--auxk", "4", "--auxk-alpha", "0.7", "--prefix-law",
                                   prefix_law, "--full-share", full_share])
    p = ordered_sae.prefix_law(args)
    state = dict(ordered_sae.init_state(args, "cpu"), dead=torch.randperm(N)[:dead], p=p,
                 survival=p.flip(0).cumsum(0).flip(0))
    compare(ordered_sae, sae, x, state, args)

@each_emptiness
@each_form
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("train_b_dec", [False, True], ids=["", "b_dec"])
@pytest.mark.parametrize("relu", [False, True], ids=["jumprelu", "relu"])
def test_gba_losses_agree(relu, train_b_dec, untied, form, silent):
    sae, x = case(gba_sae.GBASAE, relu, train_b_dec, untied, silent=silent)
    with torch.no_grad():
        sae.a[3] = -0.5
    args = gba_sae.parse_args(["--d-sae", str(N)])
    _, grads = compare(gba_sae, sae, x, in_float64(gba_sae.init_state(args, "cpu"), **FORMS[form]), args)
    assert ("b_dec" in grads) == train_b_dec and "b_enc" not in grads

# --- the textbook loss on its own -----------------------------------------------------------------

def textbook(script, *names):
    """The class and the functions of these names of a script, alone, in a module with torch and nn."""
    module = dict(torch=torch, nn=nn)
    text = (ROOT / script).read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) or getattr(node, "name", None) in ("loss", *names):
            exec(ast.get_source_segment(text, node), module)
    return Namespace(**module)

NONE = torch.empty(0, dtype=torch.int64)                      # no latent is dead
BARE = {         # script: class, its arguments, those of the loss (chosen on seed 0), batch size
    "topk_sae.py": ("TopKSAE", [5], [NONE, 32, 1 / 32], 512),
    "vanilla_sae.py": ("VanillaSAE", [], [2.0], 512),
    "gated_sae.py": ("GatedSAE", [], [4.0], 512),
    "matryoshka_sae.py": ("MatryoshkaSAE", [5], [[64, 256], [1, 1], NONE, 32, 1 / 32], 512),
    "ordered_sae.py": ("OrderedSAE", [5], [[0.5 / 255] * 255 + [0.5], NONE, 32, 1 / 32], 64),
    "gba_sae.py": ("GBASAE", [], [], 512)}

@pytest.mark.parametrize("script, seed", [
    pytest.param(script, seed, marks=[pytest.mark.claims] if seed > 10 or script == "ordered_sae.py" else [])
    for script in BARE for seed in (10, 11, 12)])             # quick: one seed, and not the slowest
def test_the_textbook_alone_finds_features(script, seed):
    """Claim: the class and its textbook loss, cut out of the file (of gba_sae.py the rule for the biases,
    too), find the features of the toy 'flat' in 300 steps of plain Adam, after each of which the rows of
    W_dec get norm 1: MCC above .6, for every seed. Control: untrained, below .4."""
    bare = textbook(script, "adapt")
    name, rest, loss_args, batch = BARE[script]
    source = ToySource(Namespace(toy=f"flat:{seed}", seed=seed, batch_size=batch), torch.device("cpu"))
    truth = source.truth.features
    torch.manual_seed(seed)
    sae = getattr(bare, name)(64, 256, *rest)
    control = mcc(truth, sae.W_dec)
    opt = torch.optim.Adam(sae.parameters(), 1e-2)
    rule = Namespace(groups=1, gamma_down=0.2, gamma_up=0.2)
    for step in range(300):
        x = source.batch(step)
        result = bare.loss(sae, x, *loss_args)
        (result if torch.is_tensor(result) else result[0]).backward()
        opt.step()
        opt.zero_grad()
        sae.W_dec.data.copy_(nn.functional.normalize(sae.W_dec.data, dim=1))
        if script == "gba_sae.py":
            with torch.no_grad():
                y = sae.pre_acts(x)
                q, r, p = (y > 0).float().mean(0), y.amax(0).relu(), torch.full((256,), 0.03)
                sae.b_enc.copy_(bare.adapt(sae.b_enc, q, r, p, torch.zeros(256, dtype=torch.int64), rule))
    print(f"{script}: MCC {mcc(truth, sae.W_dec):.3f}, untrained {control:.3f}")
    assert mcc(truth, sae.W_dec) > 0.6 and control < 0.4

@pytest.mark.parametrize("script", BARE)
def test_the_textbook_is_short(script):
    """At most 15 lines, and no name of ours in it."""
    text = (ROOT / script).read_text()
    (loss,) = (node for node in ast.parse(text).body if getattr(node, "name", None) == "loss")
    lines = [line for line in ast.get_source_segment(text, loss).splitlines() if "shared:" not in line]
    assert len(lines) <= 15, len(lines)
    assert not {"runs", "sparse", "data"} & {getattr(n, "id", None) for n in ast.walk(loss)}

# --- --dense --------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_training_agrees(variant, tmp_path):
    """Twenty steps with either loss, in float32: the same weights but for rounding, the same log."""
    script, _, _, flags = VARIANTS[variant]
    saes = []
    for how in ([], ["--dense"]):
        m = __import__(script)
        argv = ["--model", "toy", "--toy", "song", "--d-sae", 90, "--batch-size", 64, "--tokens", 64 * 20, "--no-bf16",
                "--dead-after", 64 * 3, "--log-every", 10, *flags, "--out", tmp_path / f"r{len(saes)}"]
        argv += ["--p-end", 0.9] if "--p-end" in flags else []
        saes.append(m.train(m.parse_args([str(a) for a in [*argv, "--lr", 1e-3, *how]])))
    for (name, a), b in zip(saes[0].named_parameters(), saes[1].parameters()):
        assert torch.allclose(a, b, atol=1e-4), (name, (a - b).abs().max())

def test_dense_has_its_limits(tmp_path, one_line, monkeypatch):
    flags = ["--model", "toy", "--tokens", "4096", "--dense", "--out", str(tmp_path / "run")]
    one_line(lambda: ordered_sae.train(ordered_sae.parse_args([*flags, "--d-sae", "2000"])), "--dense", "--d-sae")
    with monkeypatch.context() as m:
        m.setenv("WORLD_SIZE", "2")
        one_line(lambda: topk_sae.train(topk_sae.parse_args(flags)), "--dense", "torchrun")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    args = topk_sae.parse_args(flags)
    runs.setup(args)
    assert args.bf16 is False                                 # by default
    args = topk_sae.parse_args(["--model", "toy", "--device", "mps", "--out", str(tmp_path / "run")])
    one_line(lambda: runs.setup(args), "--device mps", "--dense")

# --- sparse.py ------------------------------------------------------------------------------------

def test_active_is_its_formulas():
    """With rows and latents that have no entry, and some that have many."""
    g = torch.Generator().manual_seed(0)
    Z = torch.rand(B, N, generator=g, dtype=torch.float64) * (torch.rand(B, N, generator=g) < 0.2)
    Z[4], Z[:, 7], Z[9] = 0, 0, 1.5
    row, col = Z.nonzero().T
    z, active = Z[row, col].requires_grad_(), sparse.Active(row, col, B, N)
    W = torch.randn(N, D, generator=g, dtype=torch.float64, requires_grad=True)
    X, b = torch.randn(B, D, generator=g, dtype=torch.float64), torch.randn(N, generator=g, dtype=torch.float64)
    close = lambda a, b: torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert close(active.matmul(z, W), Z @ W) and close(active.t_matmul(z, X), Z.T @ X)
    assert close(active.t_sum(z), Z.sum(0)) and close(active.t_max(z), Z.amax(0))
    assert close(active.lookup(b), b.expand(B, N)[row, col]) and close(active.entries(X, W), (X @ W.T)[row, col])
    half = active.in_rows(row // 2, B // 2)
    assert close(half.matmul(z, W), (Z[::2] + Z[1::2]) @ W)
    (active.decode(z, W) * X).sum().backward()
    assert close(z.grad, (X @ W.T)[row, col]) and close(W.grad, Z.T @ X)
    everything = sparse.Dense()
    assert close(everything.decode(Z, W), Z @ W) and close(everything.t_sum(Z), Z.sum(0))
    assert close(everything.t_max(Z - 1).double(), (Z - 1).amax(0).relu()) and everything.lookup(b) is b

def test_rows_adds_its_gradient_in_place():
    """Of the rows' gradient no other [F, D] is made: it goes into the one that W gets anyway."""
    torch.manual_seed(0)
    W, rows = torch.randn(N, D, requires_grad=True), torch.randperm(N)[:7]
    same, some = sparse.Rows.apply(W, rows)
    assert torch.equal(same, W) and torch.equal(some, W[rows])
    grad, grad_rows = torch.randn(N, D), torch.randn(7, D)
    expected = grad.index_add(0, rows, grad_rows)
    torch.autograd.backward([same, some], [grad, grad_rows])
    assert torch.equal(W.grad, expected) and torch.equal(grad, expected)

@pytest.mark.parametrize("bias", [0.0, -1e3], ids=["", "silent"])
def test_the_three_forms_of_encode_are_their_formulas(bias):
    torch.manual_seed(0)
    x, W, b, b_dec = (torch.randn(*s, dtype=torch.float64) for s in ((B, D), (N, D), (N,), (D,)))
    b += bias
    pre = (x - b_dec) @ W.T + b
    values, where = sparse.encode(x, W.T, b, b_dec, False, 0)
    assert torch.allclose(values, pre) and isinstance(where, sparse.Dense)
    values, where = sparse.encode(x, W.T, b, b_dec, True, 0)
    assert torch.allclose(values, pre[pre > 0]) and where.complete == 1
    assert torch.equal(torch.stack([where.row, where.col]), (pre > 0).nonzero().T)
    for room in (B * N, int((pre > 0).sum()), 50):
        values, where = sparse.encode(x, W.T, b, b_dec, True, max(1, room))
        n = min(int((pre > 0).sum()), room)
        assert len(values) == max(1, room) and (values[n:] == 0).all()
        assert torch.allclose(values[:n], pre[pre > 0][:n]) and bool(where.complete) == (n == (pre > 0).sum())
