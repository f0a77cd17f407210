"""Does SAELens read a run directory and agree with our class? Prints the largest differences.

    python benchmarks/saelens_check.py runs/topk-smollm2-L6       # where sae-lens is installed

The inputs are raw held-out activations of the run's own source.
"""
import argparse, datetime, importlib.metadata, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from sae_lens import SAE

import data
import gated_sae, gba_sae, matryoshka_sae, ordered_sae, topk_sae, vanilla_sae

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", type=Path)
run = parser.parse_args().run
cfg = data.load_sae(run)[0]
flags = cfg["metadata"]["flags"]
script = ordered_sae if "prefix_law" in flags else gba_sae if "gamma_up" in flags else {
    "topk": topk_sae, "standard": vanilla_sae, "gated": gated_sae, "jumprelu": matryoshka_sae
    }[cfg["architecture"]]
args = argparse.Namespace(**{k: Path(v) if k in ("cache_dir", "activations") and v else v
                             for k, v in flags.items()})
source = data.open_source(args, torch.device("cpu"))
x = source.heldout()[:4096] / source.scale + source.mean
ours, theirs = script.load(run), SAE.load_from_disk(run)
with torch.no_grad():
    z, z_theirs = ours.encode(x), theirs.encode(x)
    x_hat, x_theirs = ours.decode(z), theirs.decode(z_theirs)
version = importlib.metadata.version("sae-lens")
print(f"sae-lens {version}, torch {torch.__version__}, {datetime.date.today()}, {run}: {len(x)} "
      f"raw activations, mean norm {x.norm(dim=1).mean():.1f}")
print(f"active latents that differ: {((z > 0) != (z_theirs > 0)).sum()} of {(z > 0).sum()}")
for name, a, b in (("codes", z, z_theirs), ("reconstructions", x_hat, x_theirs)):
    print(f"{name}: largest difference {(a - b).abs().max():.1e}, largest value "
          f"{a.abs().max():.1f}, relative {(a - b).norm() / a.norm():.1e}")
