"""Which activations an SAE is trained on: the flags that choose them, and open_source.

    a language model's residual stream   --model NAME --layer L (default smollm2, layer 6)
                                         or othello: no download, the true features known;
                                         stored once for all runs, or with --stream never
    arrays on disk                       --activations X.npy, or a folder of shards
    a toy model with known features      --model toy --toy NAME

The sources themselves are in sources/: source.py says what all of them give (batches, held-out
rows, centring and scale); toy.py, arrays.py, lm.py and stream.py are one kind each.
"""
from pathlib import Path

import runs
from sources import arrays, lm, stream, toy

class ArgumentParser(runs.ArgumentParser):
    """A parser that has the flags that choose the data."""
    def __init__(self, doc):
        super().__init__(doc)
        add = self.add_argument_group("data", "Commands that read finished runs take what these "
                                      "record; the defaults are for training.").add_argument
        add("--model", help="smollm2 (default), othello, toy, a HuggingFace causal LM, or its "
                            "directory")
        add("--layer", type=int, help="residual stream entering this block; default 6")
        add("--text", help="a .txt, a .jsonl (field 'text'), a FASTA file, a folder of such files, "
                           "or a hub data set; default: the Python standard library's sources")
        add("--context", type=runs.count, help="tokens per context; default 128, othello 59")
        add("--last-token", action="store_true", default=None,
            help="only the last token of each context, which should be short then")
        add("--cache-tokens", type=runs.count, help="tokens to harvest; default 750,000, othello "
                                                    "1e6, or all if there are fewer")
        add("--cache-dir", type=Path, help="converted models, harvested activations, statistics of "
                                           "--activations; default ~/.cache/six-saes")
        add("--stream", action="store_true", default=None,
            help="train on activations as the model produces them; none are stored")
        add("--buffer", type=runs.count,
            help="rows in the ring of --stream; default 32 batches or 64 passes of the model, "
                 "whichever is more")
        add("--epochs", type=runs.count,
            help="passes over the text that --stream may make; default 1")
        add("--activations", type=Path, help="no model: [N, D] in a .npy or .safetensors file, or "
                                             "in a folder of such shards")
        add("--drop-norm", type=runs.at_least(1, float), help="drop rows of --activations with "
            "norms above so many times the median")
        add("--context-ids", type=Path, help=".npy [N] of integers: the context of each row of "
                                             "--activations; held-out contexts are whole")
        add("--toy", help="toy model: in sources/toy.py, NAME or NAME:SEED; default flat")

def open_source(args, device):
    """The source that the flags ask for; prints what it is. BadInput if the flags contradict each
    other, or the data cannot be had."""
    if args.activations and args.model:
        runs.fail("--activations and --model: give one of them")
    kind = "array" if args.activations else "toy" if args.model == "toy" else "model"
    unused = dict(model="toy drop_norm context_ids",
                  array="layer text context last_token cache_tokens stream toy",
                  toy="layer text context last_token cache_tokens cache_dir stream drop_norm "
                      "context_ids")[kind].split()
    unused += [] if args.stream else ["buffer", "epochs"]
    for flag in unused:
        if getattr(args, flag) is not None:
            where = "without --stream" if flag in ("buffer", "epochs") else "for this source"
            runs.fail(f"--{flag.replace('_', '-')}: has no meaning {where}; leave it out")
    if args.model == "toy":
        source, seen = toy.ToySource(args, device), "fresh samples"
    elif args.stream:
        source = stream.open_stream(args, device)
        seen = source.about()
    else:
        source = (arrays.open_array if args.activations else lm.open_cache)(args, device)
        seen = f"{source.n_train:,} training rows"
        if args.tokens:
            seen += f", {args.tokens / source.n_train:.1f} passes over them for --tokens"
    if runs.rank() == 0:
        print(f"data: {source.meta['model_name']}, D = {source.d_in}, {seen}; x' = (x - mean) * "
              f"{source.scale:.4g}", flush=True)
    return source
