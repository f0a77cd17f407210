"""Uses of a finished dictionary, one file each; see CONTRIBUTING.md for what they may import."""
