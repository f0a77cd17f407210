"""SAELens and ours on the same directory: do they agree? (Where sae-lens is installed.)

    python benchmarks/saelens_check.py RUN [RUN ...]                # largest differences, held-out activations
    python benchmarks/saelens_check.py --fixtures tests/saelens     # what tests/test_evaluate.py reads

--fixtures trains small SAEs with SAELens on samples of the toy 'song' (X.npy), saves them as SAELens does, and
writes the L0 and explained variance that SAELens itself computes on the held-out rows, by the lines of its
trainer's log. Two of them are not trained: they are there for the normalisation of their inputs.
"""
import argparse, datetime, importlib.metadata, json, sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import numpy as np
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig

import data, peers
from evaluation import saved
from sources.toy import Toy

def check(path):
    ours, theirs = saved.SAE(path), SAE.load_from_disk(path)
    flags = data.ArgumentParser("").parse_args([])
    flags.torch_device = torch.device("cpu")
    x = saved.open_data(saved.data_flags(ours, flags, None), [ours], flags).heldout_raw()[:4096]
    with torch.no_grad():
        z, x_hat = ours.both(x)
        z_theirs = theirs.encode(x)
        x_theirs = theirs.decode(z_theirs)
    version = importlib.metadata.version("sae-lens")
    lines = [f"sae-lens {version}, torch {torch.__version__}, {datetime.date.today()}, {path}: {len(x)} "
             f"raw activations, mean norm {x.norm(dim=1).mean():.1f}",
             f"active latents that differ: {((z > 0) != (z_theirs > 0)).sum()} of {(z > 0).sum()}"]
    for name, a, b in (("codes", z, z_theirs), ("reconstructions", x_hat, x_theirs)):
        lines.append(f"{name}: largest difference {(a - b).abs().max():.1e}, largest value "
                     f"{a.abs().max():.1f}, relative {(a - b).norm() / a.norm():.1e}")
    print("\n".join([*lines, ""]), flush=True)
    return "\n".join([*lines, ""])

@torch.no_grad()
def scores(path, x):
    """L0 and explained variance as sae_lens.training.sae_trainer computes them for its log."""
    sae = SAE.load_from_disk(path)
    z = sae.encode(x)
    z = z.to_dense() if z.is_sparse else z
    error, total = (sae(x) - x).pow(2).sum(-1), (x - x.mean(0)).pow(2).sum(-1)
    return dict(l0=z.bool().float().sum(-1).mean().item(), fvu=(error.mean() / total.mean()).item())

def fixtures(out):
    out.mkdir(parents=True, exist_ok=True)
    toy = Toy.preset("song")
    X = toy.sample(2000, torch.Generator().manual_seed(0))[0].half() + 1
    np.save(out / "X.npy", X.numpy())
    args = data.ArgumentParser("").parse_args(["--activations", str(out / "X.npy")])
    vars(args).update(seed=0, batch_size=256, tokens=1)
    source = data.open_source(args, torch.device("cpu"))
    heldout = source.heldout() / source.scale + source.mean
    expected = {}
    for variant in ("topk", "vanilla", "gated", "batchtopk"):
        peer = peers.make("sae-lens", variant, 16, 32, 3, 3e-3, 400, 0, 256, False, **(
            dict(l1=0.3) if variant in ("vanilla", "gated") else {}))
        for step in range(400):
            peer.step(toy.sample(256, torch.Generator().manual_seed(step + 1))[0] + 1)
        peer.sae.save_inference_model(out / variant)
    for norm in ("layer_norm", "constant_norm_rescale"):
        torch.manual_seed(0)
        sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=32, device="cpu", dtype="float32",
                                            normalize_activations=norm))
        for p in sae.parameters():
            p.data = torch.randn_like(p) / 4
        sae.save_model(out / norm)
    for path in sorted(p for p in out.iterdir() if p.is_dir()):
        expected[path.name] = scores(path, heldout)
    expected["sae-lens"] = importlib.metadata.version("sae-lens")
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(json.dumps(expected, indent=1))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
parser.add_argument("--fixtures", type=Path)
parser.add_argument("--out", type=Path, help="also write the differences there")
args = parser.parse_args()
if not args.runs and not args.fixtures:
    parser.error("name a run, or --fixtures DIR")
if args.fixtures:
    fixtures(args.fixtures)
text = "\n".join(map(check, args.runs))
if args.out:
    args.out.write_text(text)
