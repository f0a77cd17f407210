"""A small GPT that plays Othello, whose true features, the boards, are known (README.md)."""
