"""Where activations come from: toy models, arrays on disk, language models. Behind data.py."""
