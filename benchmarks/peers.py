"""Drives each library's own training step on batches that we hand it, for speed.py and recovery.py.

    make(name, variant, d, F, k, lr, steps, seed, batch, bf16) -> object with      variant: one of VARIANTS
        step(x)         one training step of that library on x [B, D]
        decoder()       [F, D]
        encode(x)       [B, F], as at inference
        reconstruct(x)  [B, D]
        plant(W, bias)  W [F, D] becomes decoder and encoder, bias the encoder's (of the gate)
        batchwise       if set to True, encode of BatchTopK and Matryoshka takes the k B largest of x,
                        as in training, and no threshold

lr None means the library's own default. ours=True: our schedule, a warm-up of a tenth of the steps
and a linear decay over the last fifth (sparsify keeps its own decay). dead_after=n: latents silent
for n tokens are dead. dead=share: that share of the latents counts as dead at every step, so that
AuxK is at work. 'matryoshka' has the same five levels for all, our default.
Libraries that only have a training loop run that loop in a thread, which takes one batch per step.
Only one library per process: some need stand-ins for packages that they import and that their
training step does not use.
"""
import importlib.util, os, queue, sys, tempfile, threading
from pathlib import Path
from unittest.mock import MagicMock

os.environ.update(TQDM_DISABLE="1", WANDB_MODE="disabled", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

import runs

SHARES = 1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32   # of F in each level, as in Bussmann et al.'s main run
K_VARIANTS = "topk", "batchtopk", "matryoshka", "ordered"

def widths(F):
    return [max(1, F * n // 32) for n in (1, 3, 7, 15, 32)]

def stand_in(*names, even_of=()):
    """Of those packages that are not installed; of `even_of` if they are."""
    for name in (*names, *even_of):
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            found = None
        if not found or name in even_of:
            sys.modules[name] = MagicMock(name=name)

class Loop:
    """Runs target(iterator of batches) in a thread, one batch for each call of step."""
    def __init__(self, target):
        self.batches, self.ready, self.error = queue.Queue(), queue.Queue(), None
        def run():
            try:
                target(self)
            except BaseException as err:
                self.error = err
            self.ready.put(None)
        threading.Thread(target=run, daemon=True).start()
        self.wait()

    def __iter__(self):
        return self

    def __next__(self):
        self.ready.put(None)
        return self.batches.get()

    def wait(self):
        self.ready.get()
        if self.error:
            raise RuntimeError("the library's loop failed") from self.error

    def step(self, x):
        self.batches.put(x)
        self.wait()

class Peer:
    batchwise = False

    @torch.no_grad()
    def plant(self, W, bias):
        """Of the libraries with W_dec [F, D] and, unless it is tied, W_enc [D, F]."""
        if hasattr(self.sae, "W_enc"):
            self.sae.W_enc.copy_(W.T)
        self.sae.W_dec.copy_(W)
        getattr(self.sae, "b_enc" if hasattr(self.sae, "b_enc") else "b_gate").fill_(bias)

    @torch.no_grad()
    def reconstruct(self, x):
        return self.decode(self.encode(x))

class Ours(Peer):
    """The variant's script: its train_step, as its train() calls it."""
    def __init__(self, variant, d, F, k, lr, steps, seed, batch, bf16, dead=0.0, flags=()):
        script, cls = {"topk": ("topk_sae", "TopKSAE"), "vanilla": ("vanilla_sae", "VanillaSAE"),
                       "gated": ("gated_sae", "GatedSAE"), "ordered": ("ordered_sae", "OrderedSAE"),
                       "gba": ("gba_sae", "GBASAE")
                       }.get(variant, ("matryoshka_sae", "MatryoshkaSAE"))
        m = self.m = importlib.import_module(script)
        flags = ["--batch-size", batch, "--tokens", steps * batch, "--d-sae", F, *flags]
        flags += ["--k", k, "--auxk", d // 2] if variant in K_VARIANTS else []
        args = self.args = m.parse_args([*map(str, flags), "--bf16" if bf16 else "--no-bf16"])
        args.steps, args.lr = steps, lr or m.default_lr(F, steps)
        args.warmup = max(1, min(1000, steps // 10))
        args.dead_after = max(1, steps * batch // 100)
        torch.manual_seed(seed)
        self.sae = getattr(m, cls)(*([d, F, k] if variant in K_VARIANTS else [d, F]))
        if variant in K_VARIANTS:                                         # as in its train()
            args.k_start = getattr(args, "k_start", None) or (min(8 * k, F) if variant == "ordered" else k)
        if variant in ("batchtopk", "matryoshka"):
            args.widths = widths(F) if variant == "matryoshka" else [F]
        if variant == "gba":
            m.rule_defaults(args)
        elif variant not in K_VARIANTS:
            args.l1_warmup = args.l1_warmup or max(1, steps // 20)
        self.state = m.init_state(args, "cpu")
        self.opt, self.i, self.forced = runs.adam(self.sae, args.lr, m.BETAS), 0, dead > 0
        if dead:
            self.state["dead"] = torch.arange(F)[:: round(1 / dead)]

    def plant(self, W, bias):
        super().plant(W, bias)
        self.state["per_token"] = 0.0                 # as after ten steps of it: sparse from the start

    def step(self, x):
        self.m.train_step(self.sae, self.opt, x, self.state, self.i, self.args)
        self.i += 1
        if self.i % runs.CHECK_EVERY == 0 and not self.forced:
            since = self.state["tokens_since_fired"]
            self.state["dead"] = (since > self.args.dead_after).nonzero()[:, 0]

    def decoder(self):
        return self.sae.W_dec.detach()

    @torch.no_grad()
    def encode(self, x):
        return self.sae.encode(x)

    def decode(self, z):
        return self.sae.decode(z)

class DictionaryLearning(Peer):
    """dictionary-learning 0.1.0: the trainers' update; bf16 by an autocast of ours around it."""
    def __init__(self, variant, d, F, k, lr, steps, seed, batch, bf16, dead_after=None, dead=0.0,
                 l1=None, ours=False):
        stand_in("nnsight", "circuitsvis", "circuitsvis.activations", "umap", "zstandard")
        from dictionary_learning import trainers
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
        trainer = {"topk": trainers.TopKTrainer, "vanilla": trainers.StandardTrainer,
                   "gated": trainers.GatedSAETrainer, "batchtopk": trainers.BatchTopKTrainer,
                   "matryoshka": MatryoshkaBatchTopKTrainer}[variant]
        options = dict(k=k) if variant in K_VARIANTS else dict(
            sparsity_warmup_steps=min(2000, steps // 2), **({"l1_penalty": l1} if l1 else {}))
        self.trainer = trainer(
            steps=steps, activation_dim=d, dict_size=F, layer=0, lm_name="none", seed=seed,
            device="cpu", warmup_steps=min(1000, max(steps // (10 if ours else 3), 1)), **options,
            **(dict(decay_start=steps * 4 // 5) if ours else {}),
            **({"lr": lr} if lr else {}),
            **({"group_fractions": list(SHARES)} if variant == "matryoshka" else {}))
        if dead_after:
            self.trainer.dead_feature_threshold = dead_after
        self.i, self.bf16, self.dead = 0, bf16, dead

    def step(self, x):
        if self.dead:
            self.trainer.num_tokens_since_fired[::round(1 / self.dead)] = 10 ** 9
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            self.trainer.update(self.i, x)
        self.i += 1

    @torch.no_grad()
    def plant(self, W, bias):
        ae = self.trainer.ae
        ae.encoder.weight.copy_(W)
        ae.decoder.weight.copy_(W.T)
        (ae.gate_bias if hasattr(ae, "gate_bias") else ae.encoder.bias).fill_(bias)

    def decoder(self):
        ae = self.trainer.ae
        return (ae.W_dec if hasattr(ae, "W_dec") else ae.decoder.weight.T).detach()

    @torch.no_grad()
    def encode(self, x):
        ae = self.trainer.ae
        threshold = not self.batchwise and hasattr(ae, "threshold") and bool(ae.threshold >= 0)
        options = {"use_threshold": threshold} if hasattr(ae, "threshold") else {}
        return ae.encode(x, **options)

    def decode(self, z):
        return self.trainer.ae.decode(z)

class SAELens(Peer):
    """sae-lens 6.54: SAETrainer.fit with its training SAEs; bf16 is its own autocast."""
    def __init__(self, variant, d, F, k, lr, steps, seed, batch, bf16, dead_after=None, dead=0.0,
                 l1=None, ours=False):
        import sae_lens
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
        torch.manual_seed(seed)
        from sae_lens.saes import matryoshka_batchtopk_sae
        name = {"topk": "TopK", "vanilla": "Standard", "gated": "Gated", "batchtopk": "BatchTopK",
                "matryoshka": "MatryoshkaBatchTopK"}[variant]
        options = dict(k=k) if variant in K_VARIANTS else dict(l1_coefficient=l1) if l1 else {}
        options |= dict(matryoshka_widths=widths(F)) if variant == "matryoshka" else {}
        module = matryoshka_batchtopk_sae if variant == "matryoshka" else sae_lens
        self.jump = variant in ("batchtopk", "matryoshka")
        self.sae = getattr(module, f"{name}TrainingSAE")(
            getattr(module, f"{name}TrainingSAEConfig")(
                d_in=d, d_sae=F, device="cpu", dtype="float32", **options))
        cfg = SAETrainerConfig(
            total_training_samples=(steps + 1) * batch, train_batch_size_samples=batch,
            lr=lr or 3e-4, lr_end=lr or 3e-4, device="cpu", autocast=bf16,
            lr_warm_up_steps=steps // 10 if ours else 0, lr_decay_steps=steps // 5 if ours else 0,
            save_final_checkpoint=False,
            dead_feature_window=dead_after // batch if dead_after else 1000,
            logger=LoggingConfig(log_to_wandb=False))
        self.dead = dead
        def fit(batches):
            self.trainer = SAETrainer(cfg=cfg, sae=self.sae, data_provider=batches)
            self.trainer.fit()
        self.loop = Loop(fit)

    def step(self, x):
        if self.dead:
            self.trainer.n_forward_passes_since_fired[::round(1 / self.dead)] = 10 ** 9
        self.loop.step(x)

    def decoder(self):
        return self.sae.W_dec.detach()

    @torch.no_grad()
    def encode(self, x):
        self.sae.eval()
        if self.jump and not self.batchwise:                 # as the JumpReLU that it would save
            pre = self.sae.encode_with_hidden_pre(x)[1]
            return pre.relu() * (pre > self.sae.topk_threshold)
        z = self.sae.encode(x)
        return z.to_dense() if z.is_sparse else z

    def decode(self, z):
        return self.sae.decode(z)

class Sparsify(Peer):
    """eai-sparsify 1.3.3: Trainer.fit over a dummy model that emits our batch; Adam, bf16."""
    def __init__(self, variant, d, F, k, lr, steps, seed, batch, bf16, optimizer="adam", dead=0.0,
                 dead_after=None, ours=False):
        from sparsify import SparseCoderConfig, TrainConfig, Trainer
        peer = self
        class Layer(torch.nn.Module):
            def forward(self, x):
                return peer.x
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.p = Layer(), torch.nn.Parameter(torch.zeros(1))
            base_model = property(lambda self: self)
            device = property(lambda self: torch.device("cpu"))
            dummy_inputs = property(lambda self: dict(x=torch.zeros(1, 1)))
            def forward(self, x):
                return self.layer(x)
        class Batches:
            def __len__(self):
                return steps + 1
            def __getitem__(self, i):
                x = next(peer.loop)
                peer.x = x.unsqueeze(0)
                return dict(input_ids=torch.zeros(len(x), dtype=torch.long))
        self.x = torch.zeros(1, 1, d)
        cfg = TrainConfig(
            sae=SparseCoderConfig(activation="topk", num_latents=F, k=k), batch_size=1, lr=lr,
            optimizer=optimizer, hookpoints=["layer"], init_seeds=[seed], save_every=10 ** 9,
            log_to_wandb=False, save_dir=tempfile.mkdtemp(),
            auxk_alpha=1 / 32 if dead or dead_after else 0.0,
            dead_feature_threshold=dead_after or 10_000_000,
            lr_warmup_steps=min(1000, max(steps // (10 if ours else 3), 1)))
        self.trainer = Trainer(cfg, Batches(), Model())
        self.sae = self.trainer.saes["layer"]
        self.loop = Loop.__new__(Loop)
        self.loop.__init__(lambda batches: self.trainer.fit())
        self.dead = dead

    def step(self, x):
        if self.dead:
            self.trainer.num_tokens_since_fired["layer"][::round(1 / self.dead)] = 10 ** 9
        self.loop.step(x)

    def decoder(self):
        for opt in self.trainer.optimizers:                  # schedule-free ones average weights
            getattr(opt, "eval", lambda: None)()
        return self.sae.W_dec.detach()

    @torch.no_grad()
    def encode(self, x):
        vals, idx, _ = self.sae.encode(x)
        return torch.zeros(len(x), self.sae.num_latents).scatter_(-1, idx, vals.float())

    def decode(self, z):
        return z @ self.sae.W_dec + self.sae.b_dec

class Overcomplete(Peer):
    """overcomplete 0.3.0: train_sae or, for bf16, train_sae_amp; without its auxiliary loss."""
    def __init__(self, variant, d, F, k, lr, steps, seed, batch, bf16, l1=1.0):
        stand_in("PIL", "torchvision", "timm", "cv2", "skimage",          # it needs an older matplotlib
                 even_of=("matplotlib", "matplotlib.pyplot", "matplotlib.colors"))
        import overcomplete.sae
        from overcomplete.sae.losses import mse_l1
        from overcomplete.sae.train import train_sae, train_sae_amp
        torch.manual_seed(seed)
        if variant in K_VARIANTS:
            self.sae = overcomplete.sae.TopKSAE(d, F, top_k=k) if variant == "topk" else \
                overcomplete.sae.BatchTopKSAE(d, F, top_k=k * batch)
            loss = lambda x, x_hat, pre, z, D: (x - x_hat).square().mean()
        else:                   # its l1 sums over the batch, its error is a mean over D and batch
            self.sae = overcomplete.sae.SAE(d, F)
            loss = lambda *args: mse_l1(*args, penalty=l1 / d / batch)
        opt = torch.optim.Adam(self.sae.parameters(), lr=lr or 5e-4)
        train = train_sae_amp if bf16 else train_sae
        self.loop = Loop(lambda batches: train(self.sae, batches, loss, opt, nb_epochs=1,
                                               monitoring=0, device="cpu"))
        self.step = self.loop.step

    @torch.no_grad()
    def plant(self, W, bias):
        linear = next(m for m in self.sae.encoder.modules() if isinstance(m, torch.nn.Linear))
        linear.weight.copy_(W)
        linear.bias.fill_(bias)
        self.sae.dictionary._weights.copy_(W)

    def decoder(self):
        self.sae.eval()
        return self.sae.get_dictionary().detach()

    @torch.no_grad()
    def encode(self, x):
        self.sae.eval()
        return self.sae.encode(x)[1]

    def decode(self, z):
        return self.sae.decode(z)

LIBRARIES = {"ours": Ours, "dictionary-learning": DictionaryLearning, "sae-lens": SAELens,
             "sparsify": Sparsify, "overcomplete": Overcomplete}
VARIANTS = {"topk": list(LIBRARIES), "vanilla": ["ours", "sae-lens", "dictionary-learning", "overcomplete"],
            "gated": ["ours", "sae-lens", "dictionary-learning"],
            "batchtopk": ["ours", "sae-lens", "dictionary-learning", "overcomplete"],
            "matryoshka": ["ours", "sae-lens", "dictionary-learning"], "ordered": ["ours"],
            "gba": ["ours"]}

def make(name, *args, **kw):
    return LIBRARIES[name](*args, **kw)
