"""What latents mean: where they are active, and which tokens their directions make likely."""
import textwrap

import numpy as np
import torch

import runs
from sources import lm

SHOWN, WINDOW = 10, (24, 12)        # contexts of a latent; tokens before and after its peak

def detects(row):
    """{latent: [(kind, class, precision, recall), ...]}, the best F1 first, of what the latents of
    a row detect when they fire: letters, and roles of tokens, if --probes has measured that."""
    kinds = {"letter": row.get("first_letter", {}).get("latents", {})}
    out = {}
    for kind, found in (kinds | row.get("probing", {}).get("latents", {})).items():
        for latent, (name, p, r) in found.items():
            out.setdefault(int(latent), []).append((kind, name, p, r))
    return {latent: sorted(found, key=f1, reverse=True) for latent, found in out.items()}

def f1(found):
    *_, p, r = found
    return 2 * p * r / max(p + r, 1e-9)

def chosen(sae, args, rate, total, known):
    """The latents to show: those of --features or, for the page, some of every firing rate, and of
    each class that any detects (known, as detects() has it) the best at that."""
    if args.features == "top":
        return total.topk(min(10, sae.d_sae)).indices.tolist()
    if args.features:
        if wrong := [i for i in args.features if not 0 <= i < sae.d_sae]:
            runs.fail(f"--features {wrong[0]}: {sae.path} has latents 0 to {sae.d_sae - 1}")
        return args.features
    alive = rate.argsort(descending=True)[:int((rate > 0).sum())].tolist()
    n, best = min(args.html_features, len(alive)) if args.html else 0, {}
    for latent, found in known.items() if n else ():
        for of in found:
            best[of[:2]] = max(best.get(of[:2], (0, -1)), (f1(of), latent))
    spaced = [alive[i * (len(alive) - 1) // max(1, n - 1)] for i in range(n)]
    return list(dict.fromkeys([*spaced, *(latent for _, latent in best.values())]))

@torch.no_grad()
def features(sae, x, latents, rate, source, model, tokenizer, blocks):
    """Yields, of each latent: firing rate, peak, the SHOWN tokens whose logits its direction raises
    and lowers most, the tokens around its largest activation in each of SHOWN held-out contexts.

    Logits are of the direction alone, through the final norm and the unembedding, less those of 0:
    the direct path, without the layers in between."""
    ids, where = lm.heldout_tokens(source)
    T, text = ids.shape[1], lambda i: tokenizer.decode([int(i)])
    context, place = where // T, where % T
    codes = torch.cat([sae.encode(part)[:, latents].cpu() for part in x.split(2048)])     # (M, n)
    norms = [m for parent in model.modules() if blocks in parent.children()
             for m in parent.children() if getattr(getattr(m, "weight", None), "ndim", 0) == 1]
    def logits(d):
        d = d.to(next(model.parameters()).dtype)
        return model.get_output_embeddings()(norms[-1](d) if norms else d).float()
    for latent, z in zip(latents, codes.T.numpy()):
        d = sae.t["W_dec"][latent]
        order = (logits(d) - logits(torch.zeros_like(d))).argsort(descending=True)
        contexts = {}                                         # the best place of each
        for row in np.argsort(-z, kind="stable"):
            if z[row] <= 0 or len(contexts) == SHOWN:
                break
            if (c := context[row]) not in contexts:
                values, near = np.zeros(T), context == c
                values[place[near]] = z[near]
                lo, hi = max(0, place[row] - WINDOW[0]), place[row] + WINDOW[1] + 1
                contexts[c] = dict(tokens=[text(i) for i in ids[c, lo:hi]], at=int(place[row] - lo),
                                   values=[round(float(v), 3) for v in values[lo:hi]])
        yield dict(latent=latent, rate=rate[latent].item(), peak=float(z.max()),
                   raises=[text(i) for i in order[:SHOWN]], contexts=list(contexts.values()),
                   lowers=[text(i) for i in order.flip(0)[:SHOWN]])

def print_features(sae, found):
    for f in found:
        print(f"\n{sae.path}, latent {f['latent']}: fires on {f['rate']:.3%} of the tokens, peak "
              f"{f['peak']:.2f}\n  raises {f['raises']}\n  lowers {f['lowers']}")
        for kind, name, p, r in f.get("detects", ()):
            print(f"  detects {kind}={name}: precision {p:.2f}, recall {r:.2f}")
        if "board" in f:
            print(textwrap.indent(f["board"], "  "))
            continue
        for c in f["contexts"]:
            tokens = [f"\u00ab{t}\u00bb" if i == c["at"] else t for i, t in enumerate(c["tokens"])]
            line = "".join(tokens).replace("\n", "\u23ce")
            line = "".join(char if char.isprintable() else " " for char in line)
            print(f"  {c['values'][c['at']]:8.2f}  {line}")
