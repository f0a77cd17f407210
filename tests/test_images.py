"""sources/images.py on tiny random vision transformers and generated PNGs: rows, order, embeddings, the way to a score,
bad input."""
import json

import numpy as np
import pytest
import torch

import evaluate
from conftest import random_lm, run_script
from sources import images
from test_runs import run

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
N, SIZE = 24, 32                                               # images, their pixels: 16 patches of 8 x 8

def vision_model(kind, folder):
    """A random model with 3 blocks of width 32 for images of 32 pixels, and its processor, saved to a directory."""
    tf, size = transformers, dict(height=SIZE, width=SIZE)
    vision = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=8)
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50,
                bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    if kind == "clip":
        model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision | dict(intermediate_size=64), projection_dim=16))
        process = tf.CLIPImageProcessor(size=dict(shortest_edge=SIZE), crop_size=size)
    elif kind == "siglip":
        model = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=vision | dict(intermediate_size=64)))
        process = tf.SiglipImageProcessor(size=size)
    else:
        name = dict(dinov2="Dinov2Model", registers="Dinov2WithRegistersModel")[kind]
        model = getattr(tf, name)(getattr(tf, name).config_class(**vision))
        process = tf.BitImageProcessor(size=dict(shortest_edge=SIZE), crop_size=size)
    for p in model.parameters():                               # images must make a difference
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder / kind)
    process.save_pretrained(folder / kind)
    return folder / kind

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: vision_model(kind, folder) for kind in ("clip", "siglip", "dinov2", "registers")}

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """PNGs in two folders, some grey, some with transparency, some larger; in the order of their paths."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(N):
        channels = [(3,), (), (4,)][i % 3]
        side = SIZE * (1 + i % 2)
        pixels = rng.integers(0, 256, (4, 4, *channels)).repeat(side // 4, 0).repeat(side // 4, 1).astype(np.uint8)
        path = folder / "ab"[i >= N // 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "notes.txt").write_text("no image")
    return folder

def harvest(*argv):
    images.main([str(a) for a in (*argv, "--device", "cpu")])

@pytest.mark.parametrize("kind, layer, patches", [("clip", 2, False), ("clip", 1, True), ("siglip", 2, True),
                                                  ("dinov2", 2, False), ("registers", 1, True), ("registers", 2, False)])
def test_rows_are_hidden_states(models, photos, tmp_path, kind, layer, patches):
    """acts.npy is hidden_states[L] of the model on its processor's images, in the order of the paths: the CLS token, or
    the patches, the last 16 tokens; in batches that do not divide the images."""
    harvest(photos, "--model", models[kind], "--layer", layer, "--out", tmp_path, "--batch-size", 7,
            *["--patches"] * patches)
    model, process = images.load(models[kind], "--model", "cpu")
    files = sorted(photos.glob("*/*.png"))
    assert (tmp_path / "images.txt").read_text().split() == [str(f) for f in files] and len(files) == N
    x = process(images=[Image.open(f).convert("RGB") for f in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        h = getattr(model, "vision_model", model)(pixel_values=x, output_hidden_states=True).hidden_states[layer]
    want = h[:, -16:].flatten(0, 1) if patches else h[:, 0]
    got = np.load(tmp_path / "acts.npy")
    assert got.dtype == np.float16 and got.shape == want.shape
    assert np.abs(got - want.numpy()).max() < 2e-3 * want.abs().max() and want.std(0).min() > 0
    assert (np.load(tmp_path / "images.npy") == np.arange(N).repeat(len(want) // N)).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["acts.npy", "images.npy", "images.txt"]

@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_embeddings(models, photos, tmp_path, kind):
    """A row for each row of acts.npy: the projection of CLIP, the pooled output of SigLIP and DINOv2."""
    harvest(photos, "--model", models["dinov2"], "--layer", 3, "--patches", "--embed", models[kind], "--out", tmp_path)
    model, process = images.load(models[kind], "--embed", "cpu")
    x = torch.cat(list(images.outputs(images.find_images(photos), process, lambda x: x, 5, "cpu", "")))
    with torch.no_grad():
        want = getattr(model, "vision_model", model)(pixel_values=x).pooler_output
        want = model.visual_projection(want) if kind == "clip" else want
    got = np.load(tmp_path / "embeddings.npy").reshape(N, 16, -1)
    assert (got == got[:, :1]).all() and np.abs(got[:, 0] - want.numpy()).max() < 2e-3 * want.abs().max()

def test_from_images_to_a_score(models, photos, tmp_path, capsys):
    """The commands of the docstring, one after the other; the images held out are whole."""
    harvest(photos, "--model", models["dinov2"], "--layer", 2, "--patches", "--embed", models["clip"], "--out", tmp_path / "h")
    assert f"{N} images, {16 * N} rows" in capsys.readouterr().out
    run("topk", "--activations", tmp_path / "h/acts.npy", "--context-ids", tmp_path / "h/images.npy", "--d-sae", 64, "--k", 4,
        "--tokens", 3200, "--batch-size", 64, "--out", tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path / "run"), "--embeddings", str(tmp_path / "h/embeddings.npy")])
    row = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert stop.value.code == 0 and row["tokens"] == 16 * round(0.05 * N)
    assert -1 <= row["monosemanticity"]["worst"] <= row["monosemanticity"]["best"] <= 1 + 1e-9

def test_it_is_a_command(tmp_path):
    done = run_script("sources/images.py", tmp_path, "--model", "x", "--layer", 1, "--out", tmp_path / "h")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "no such folder, or none of" in done.stderr

@pytest.mark.parametrize("kind, flags, words", [
    ("siglip", ["--layer", 1], ["has no CLS token; add --patches"]),
    ("clip", ["--layer", 0], ["--layer 0", "layers 1 to 3"]),
    ("clip", ["--layer", 4], ["--layer 4", "layers 1 to 3"]),
    ("clip", ["--layer", 1, "--embed", "/nowhere"], ["--embed /nowhere", "cannot be loaded"])])
def test_bad_flags(models, photos, tmp_path, one_line, kind, flags, words):
    one_line(lambda: harvest(photos, "--model", models[kind], "--out", tmp_path / "h", *flags), *words)

def test_bad_images_and_models(models, photos, tmp_path, text, one_line, monkeypatch):
    """One line for each; nothing half written stays."""
    flags = "--layer", 1, "--out", tmp_path / "h"
    one_line(lambda: harvest(tmp_path / "none", "--model", models["clip"], *flags), "none", "no such folder")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(next(photos.glob("a/*.png")).read_bytes())
    (tmp_path / "bad/b.png").write_bytes(b"not an image")
    one_line(lambda: harvest(tmp_path / "bad", "--model", models["clip"], *flags, "--batch-size", 1), "b.png", "remove it")
    assert not list((tmp_path / "h").iterdir())
    one_line(lambda: harvest(photos, "--model", random_lm("gpt2", tmp_path, text), *flags), "cannot be loaded as a model of images")
    def no_room(*args):
        raise RuntimeError("out of memory")
    with monkeypatch.context() as patched:
        patched.setattr(images, "tokens", no_room)
        one_line(lambda: harvest(photos, "--model", models["clip"], *flags), "24 of these images", "out of memory", "--batch-size")
    real = images.find_spec
    monkeypatch.setattr(images, "find_spec", lambda name: name != "PIL" and real(name))
    one_line(lambda: harvest(photos, "--model", models["clip"], *flags), "PIL is not installed", "pillow")
