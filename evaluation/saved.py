"""Saved SAEs, and the data that they are measured on: what evaluate.py and its like start from."""
import argparse, datetime, json
from pathlib import Path

import torch

import data
import runs
from evaluation.probes import without_nan
from sources import lm

DATA_FLAGS = ("model", "layer", "text", "context", "last_token", "cache_tokens", "stream",
              "buffer", "activations", "drop_norm", "context_ids", "toy")
VECTORS = dict(standard=["b_enc"], topk=["b_enc"], jumprelu=["b_enc", "threshold"],
               gated=["b_gate", "b_mag", "r_mag"])            # of each architecture, [F]

# --- saved SAEs -----------------------------------------------------------------------------------

class SAE:
    """The SAE of a run directory, or of any SAELens 6 directory, for raw activations x [B, D]; its
    codes are those of SAELens in float32. Fails with one line if damaged, or of another kind."""
    def __init__(self, path):
        self.path, (self.cfg, t) = path, runs.load_sae(path)
        dicts = [self.cfg]                                    # and in it, perhaps:
        for name in ("metadata", "flags"):
            dicts.append(dicts[-1].get(name) or {} if isinstance(dicts[-1], dict) else None)
        if not all(isinstance(d, dict) for d in dicts):
            runs.fail(f"{path}: damaged: its cfg.json is none of ours and none of SAELens")
        _, self.meta, self.flags = dicts
        self.kind, self.k = self.cfg.get("architecture"), self.cfg.get("k")
        self.d_in, self.d_sae = D, N = self.cfg.get("d_in"), self.cfg.get("d_sae")
        self.norm = self.cfg.get("normalize_activations") or "none"
        if not isinstance(self.kind, str) or self.kind not in VECTORS:
            runs.fail(f"{path}: architecture {self.kind} is not one of {', '.join(VECTORS)}")
        shapes = dict(W_enc=(D, N), W_dec=(N, D), b_dec=(D,))
        shapes.update(dict.fromkeys(VECTORS[self.kind], (N,)))
        if wrong := [f"{n} is {tuple(t[n].shape) if n in t else 'missing'}, not {shape}"
                     for n, shape in shapes.items() if n not in t or tuple(t[n].shape) != shape]:
            runs.fail(f"{path}: damaged, or cfg.json of another run: {'; '.join(wrong)}")
        if extra := t.keys() - shapes.keys():
            runs.fail(f"{path}: {', '.join(sorted(extra))}: no tensor of architecture {self.kind}")
        if self.kind == "topk" and not (type(self.k) is int and 1 <= self.k <= N):
            runs.fail(f"{path}: damaged: cfg.json has k = {self.k} of {N} latents")
        if self.norm not in ("none", "layer_norm", "constant_norm_rescale") or \
                self.cfg.get("reshape_activations", "none") != "none":
            runs.fail(f"{path}: normalize_activations {self.norm}, reshape_activations "
                      f"{self.cfg.get('reshape_activations')}: not supported; save them folded in")
        self.t = {n: v.float() for n, v in t.items()}
        if self.cfg.get("rescale_acts_by_decoder_norm"):      # codes times |d_i|, rows of norm 1
            norm = self.t["W_dec"].norm(dim=1)
            self.t.update(W_enc=self.t["W_enc"] * norm, b_enc=self.t["b_enc"] * norm,
                          W_dec=self.t["W_dec"] / norm[:, None])
        if bad := [n for n, v in self.t.items() if not v.isfinite().all()]:
            runs.fail(f"{path}: damaged: NaN or inf in {', '.join(bad)}")

    @property
    def widths(self):
        """Of the prefixes that the run trained, if it says so: a Matryoshka SAE's levels. Or []."""
        w = self.flags.get("widths")
        good = isinstance(w, list) and len(w) > 1 and all(type(m) is int for m in w)
        return w if good and sorted({0, *w}) == [0, *w] and w[-1] == self.d_sae else []

    def to(self, device):
        self.t = {n: v.to(device) for n, v in self.t.items()}
        return self

    def normed(self, x):
        """x as the SAE wants it, and the function that undoes that for x_hat."""
        if self.norm == "constant_norm_rescale":
            scale = self.d_in ** 0.5 / x.norm(dim=-1, keepdim=True)
            return x * scale, lambda x_hat: x_hat / scale
        if self.norm == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = (x - mean).std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), lambda x_hat: x_hat * std + mean
        return x, lambda x_hat: x_hat

    def inputs(self, x):
        """What the encoder's matrix multiplies, for normed x."""
        return x - self.t["b_dec"] if self.cfg.get("apply_b_dec_to_input", True) else x

    def codes(self, x):
        t = self.t
        pre = self.inputs(x) @ t["W_enc"]                                    # (B, F)
        if self.kind == "gated":
            return (pre + t["b_gate"] > 0) * (pre * t["r_mag"].exp() + t["b_mag"]).relu()
        pre += t["b_enc"]
        if self.kind == "jumprelu":
            return pre.relu() * (pre > t["threshold"])
        if self.kind == "topk":
            vals, idx = pre.topk(self.k, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, idx, vals.relu())
        return pre.relu()

    def both(self, x):
        """Codes [B, F] and reconstructions [B, D]."""
        x, undo = self.normed(x)
        z = self.codes(x)
        return z, undo(z @ self.t["W_dec"] + self.t["b_dec"])

    def encode(self, x):
        return self.codes(self.normed(x)[0])

    def __call__(self, x):
        return self.both(x)[1]

# --- their data -----------------------------------------------------------------------------------

def data_flags(sae, args, default):
    """Which data an SAE is measured on, as JSON: what its run records, or what the first run that
    records any does, but for the flags given; with --model or --activations these alone."""
    given = {k: getattr(args, k) for k in DATA_FLAGS if getattr(args, k) is not None}
    recorded = {} if given.keys() & {"model", "activations"} else sae.flags or default or {}
    flags = {k: (recorded | given).get(k) for k in DATA_FLAGS}
    if not any(flags[k] for k in ("model", "layer", "activations")):
        runs.fail(f"{sae.path}: records no data of ours; name them with --model and --layer, with "
                  "--activations, or with --model toy and --toy")
    kinds = dict.fromkeys(("layer", "context", "cache_tokens", "buffer"), int)
    kinds |= dict(stream=bool, last_token=bool, drop_norm=(int, float))
    if wrong := [k for k, v in flags.items()
                 if v is not None and not isinstance(v, kinds.get(k, (str, Path)))]:
        runs.fail(f"{sae.path}: damaged: its cfg.json has {wrong[0]} = {flags[wrong[0]]}")
    if not flags["activations"] and flags["model"] != "toy":          # the defaults, spelled out
        defaults = dict(model="smollm2", layer=6, context=lm.default_context(flags["model"]))
        flags |= {k: v for k, v in defaults.items() if flags[k] is None}
    return json.dumps(flags, default=str)

def open_data(key, saes, args):
    """The source behind data_flags; its flags as an attribute."""
    flags = argparse.Namespace(**json.loads(key), seed=0, batch_size=1, tokens=0, epochs=None)
    flags.activations = flags.activations and Path(flags.activations)
    flags.context_ids = flags.context_ids and Path(flags.context_ids)
    cache = args.cache_dir or saes[0].flags.get("cache_dir")
    if cache and not args.cache_dir and not Path(str(cache)).is_dir():
        print(f"note: {saes[0].path}: its --cache-dir {cache} is gone; the default is used")
        cache = None
    flags.cache_dir = None if flags.model == "toy" else cache and Path(cache)
    names = [str(sae.path) for sae in saes[:3]] + ["..."] * (len(saes) > 3)
    try:
        source = data.open_source(flags, args.torch_device)
    except runs.BadInput as err:
        runs.fail(str(err), about=", ".join(names) + ": ")
    source.flags = flags
    return source

def fits(sae, source):
    """Does an SAE take the rows of a source? By D and, where both record them, model and layer."""
    known = [(sae.meta.get(k), source.meta.get(k)) for k in ("model_hash", "hook_name")]
    return sae.d_in == source.d_in and all(a == b for a, b in known if a and b)

def open_language_run(path, args):
    """(sae, source, model, tokenizer, block) of one run on a language model that writes text: for
    applications/. Fails on a run on anything else."""
    sae = SAE(path)
    key = data_flags(sae, args, None)
    flags = json.loads(key)
    if flags["activations"] or flags["model"] == "toy":
        runs.fail(f"{path}: a run on {'arrays' if flags['activations'] else 'a toy'}, which has no "
                  "text; give a run on a language model, or name that with --model and --layer")
    if lm.is_othello(flags["model"]):
        runs.fail(f"{path}: a run on --model {flags['model']}, on games; othello/steer.py is for "
                  "these")
    source = open_data(key, [sae], args)
    if not fits(sae, source):
        runs.fail(f"{path}: trained on another model or layer than {flags['model']}, layer "
                  f"{flags['layer']}; give the --model and --layer that it was trained on")
    model, tokenizer, blocks = lm.load(lm.model_dir(flags["model"], source.flags.cache_dir),
                                       flags["model"], source.device,
                                       getattr(torch, source.meta["dtype"]))
    head = model.get_output_embeddings()
    if head is None or any(model.get_parameter(name) is head.weight for name in model.made_up):
        runs.fail(f"--model {flags['model']}: its files have no head that gives the next token, so "
                  "it cannot write; use the causal language model that it is a part of")
    return sae.to(source.device), source, model, tokenizer, blocks[flags["layer"]]

# --- what was measured ----------------------------------------------------------------------------

def write(path, text, flag):
    """Write a file as a whole or not at all; flag: what an error says of its path."""
    with runs.replacing(path, flag) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return path

def write_result(path, result, source, args=None, flag="run directory"):
    """Write a dict as JSON, with the data, the date and torch's version, and the flags of args."""
    result.update(data=source.meta, evaluated=str(datetime.date.today()), torch=torch.__version__)
    if args:
        given = runs.flags(args)
        result["flags"] = {k: given[k] for k in given.keys() - {"torch_device", "runs"}}
    return write(path, json.dumps(without_nan(result), indent=1, allow_nan=False), flag)

def page_path(text):
    """The argparse type of --html."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: a folder; name a file")
    return Path(text)

def write_page(path, text):
    write(path, text, "--html")
    print(f"\npage: {path}")
