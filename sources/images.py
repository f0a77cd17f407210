"""Vision transformers: images in, rows for --activations and evaluate.py --embeddings out.

    python sources/images.py PHOTOS --model openai/clip-vit-large-patch14 --layer 23 \\
        --embed facebook/dinov2-base --out harvest
    python topk_sae.py --activations harvest/acts.npy --context-ids harvest/images.npy
    python evaluate.py RUN --embeddings harvest/embeddings.npy

Models    CLIP, SigLIP, DINOv2 and their like in transformers: a directory or a name on the hub.
Layers    --layer L is the output of block L - 1, hidden_states[L] in transformers, 1 <= L <=
          n_layers, without the norm after the last block. Pach et al. 2025 (arXiv 2504.02821)
          seem to count blocks from 0: their 22 is 23 here. Later blocks do not run.
Rows      The CLS token of each image; with --patches its patches, row by row, instead (SigLIP has
          no CLS token; register tokens are left out). Images are the files under the folder, by
          path, as the model's own processor makes them. A few patches are attention sinks: train
          with --drop-norm.
--embed   Another model, whose embedding of an image, projected if the model has a projection, is
          what the monosemanticity score compares images by.

    acts.npy        fp16 [N, D]       images.npy  int64 [N]    the number of each row's image
    embeddings.npy  fp16 [N, P]       images.txt  their paths, a line each

Each file is renamed when it is complete; an interrupted harvest starts anew.
"""
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import runs
from sources.lm import Reached

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

def load(name, flag, device):
    """(model, image processor): safetensors weights, and transformers' own code only."""
    for package in ("transformers", "PIL"):
        if not find_spec(package):
            runs.fail(f"{flag} {name}: {package} is not installed; pip install transformers pillow")
    from transformers import AutoImageProcessor, AutoModel, logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        process = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        model = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True,
                                          trust_remote_code=False)
    except Exception as err:
        runs.fail(f"{flag} {name}: cannot be loaded as a model of images ({type(err).__name__}: "
                  f"{runs.first_line(err)}); give a directory of a CLIP, SigLIP or DINOv2 model "
                  "with safetensors weights, or its name on the HuggingFace hub")
    return model.to(device).eval(), process

def find_images(folder):
    """The image files under the folder, in the order of their paths."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        runs.fail(f"{folder}: no such folder, or none of {' '.join(sorted(SUFFIXES))} in it")
    return files

def outputs(files, process, compute, size, device, flag):
    """Yields compute(pixels [n, 3, H, W]) for `size` images at a time, as the processor makes
    them. Fails if the model has no room for them, or they differ in size even then."""
    from PIL import Image
    def read(path):
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
            runs.fail(f"{path}: no readable image ({runs.first_line(err)}); remove it")
    for i in range(0, len(files), size):
        images = [read(path) for path in files[i:i + size]]
        try:
            x = process(images=images, return_tensors="pt")["pixel_values"].to(device)
            out = compute(x)
        except (RuntimeError, ValueError) as err:
            runs.fail(f"{flag}: cannot take {len(images)} of these images at a time "
                      f"({runs.first_line(err)}); try a smaller --batch-size")
        yield out

def blocks_of(model, name):
    """The blocks of its vision transformer."""
    vision = getattr(model, "vision_model", model)
    n = getattr(vision.config, "num_hidden_layers", None)
    for module in vision.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n:
            return module
    runs.fail(f"--model {name}: no vision transformer, whose blocks are a list; harvest its "
              "activations yourself and give them with --activations")

@torch.inference_mode()
def tokens(model, block, x):
    """The output of `block`, [n, T, D], for pixels x [n, 3, H, W]. Later blocks do not run."""
    def take(module, inputs, out):
        take.out = out if torch.is_tensor(out) else out[0]
        raise Reached
    hook = block.register_forward_hook(take)
    try:
        getattr(model, "vision_model", model)(pixel_values=x)
    except Reached:
        return take.out
    finally:
        hook.remove()

def rows_of(model, block, name, patches):
    """A function from pixels to the rows of each image, [n, 1 or patches, D]."""
    size = getattr(model, "vision_model", model).config.patch_size
    def rows(x):
        out = tokens(model, block, x)
        n = (x.shape[2] // size) * (x.shape[3] // size)       # patches are the last tokens
        if not patches and n == out.shape[1]:
            runs.fail(f"--model {name}: has no CLS token; add --patches")
        return out[:, -n:] if patches else out[:, :1]
    return rows

@torch.inference_mode()
def embedding(model, x):
    """[n, P] of pixels x: projected, else the pooled output."""
    out = (model.get_image_features if hasattr(model, "get_image_features") else model)(
        pixel_values=x)
    return out if torch.is_tensor(out) else out.pooler_output

def save(path, parts, n, flag):
    """Write the parts, [m, P, D] of m images each, as fp16 rows of n images; returns P."""
    with runs.replacing(path, "--out") as tmp, open(tmp, "wb") as f, \
            runs.Bar(total=n, desc=path.stem, unit="image") as bar:
        for part in parts:
            m, P, D = part.shape
            if not f.tell():
                np.lib.format.write_array_header_1_0(
                    f, dict(descr="<f2", fortran_order=False, shape=(n * P, D)))
            half = part.half().cpu()
            if not half.isfinite().all():
                runs.fail(f"{flag}: gives NaN there, or more than fp16 can hold")
            f.write(half.numpy().tobytes())
            bar.update(m)
    return P

def harvest(args, device):
    """Write the files of the module's docstring to --out."""
    files = find_images(args.folder)
    model, process = load(args.model, "--model", device)
    blocks = blocks_of(model, args.model)
    if not 1 <= args.layer <= len(blocks):
        runs.fail(f"--layer {args.layer}: {args.model} has layers 1 to {len(blocks)}")
    rows = rows_of(model, blocks[args.layer - 1], args.model, args.patches)
    def write(name, process, compute, flag):
        parts = outputs(files, process, compute, args.batch_size, device, flag)
        return save(args.out / name, parts, len(files), flag)
    P = write("acts.npy", process, rows, f"--model {args.model}, --layer {args.layer}")
    with runs.replacing(args.out / "images.npy", "--out") as tmp, open(tmp, "wb") as f:
        np.save(f, np.arange(len(files)).repeat(P))
    with runs.replacing(args.out / "images.txt", "--out") as tmp:
        tmp.write_text("".join(f"{file}\n" for file in files), encoding="utf-8")
    if args.embed:
        model, process = load(args.embed, "--embed", device)
        write("embeddings.npy", process, lambda x: embedding(model, x)[:, None].expand(-1, P, -1),
              f"--embed {args.embed}")
    print(f"{len(files):,} images, {len(files) * P:,} rows: {args.out}")

def parse_args(argv=None):
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="images, also in folders of it")
    add("--model", required=True, help="a vision transformer: directory or name on the hub")
    add("--layer", type=int, required=True, help="output of block L - 1; 1 to n_layers")
    add("--patches", action="store_true", help="rows are the patches, not the CLS tokens")
    add("--embed", help="another model of images, for embeddings.npy")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--batch-size", type=runs.count, default=32, help="images at a time; default 32")
    add("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    return parser.parse_args(argv)

def main(argv=None):
    args = parse_args(argv)
    harvest(args, runs.open_device(args.device))

if __name__ == "__main__":
    with runs.one_line_errors():
        main()
