"""Othello on bitboards: the rules for many games at once, and games of random legal moves.

A board is two uint64, the discs of the side to move (mine) and of the other side (yours); square
8 * row + column is bit 8 * row + column, and is also the token of a move there. Black (the first to
move) begins on (3, 4) and (4, 3), white on (3, 3) and (4, 4), so the four centre squares are never
played. A side without a legal move passes without a token; when neither has one, the game is over.

Rules and coding: Li et al. 2022, arXiv 2210.13382, and their code (othello_world, data/othello.py);
sides as in Nanda et al. 2023, arXiv 2309.00941, but of the side that really is to move: parity, as
in their code, mislabels all boards after a pass.
"""
import numpy as np

U = np.uint64
NOT_A, NOT_H, ALL = U(0xFEFEFEFEFEFEFEFE), U(0x7F7F7F7F7F7F7F7F), U(0xFFFFFFFFFFFFFFFF)
# Towards each of the eight neighbours: the shift, and the squares that can be arrived at.
STEPS = [(1, NOT_A), (7, NOT_H), (8, ALL), (9, NOT_A),
         (-1, NOT_H), (-7, NOT_A), (-8, ALL), (-9, NOT_H)]
START = U(1 << 28 | 1 << 35), U(1 << 27 | 1 << 36)          # mine (black), yours
MOVES = 60                                                  # of a game that fills the board

def shift(b, step, mask):
    return (b << U(step) if step > 0 else b >> U(-step)) & mask

def runs(b, yours, step, mask):
    """The unbroken runs of yours that begin next to b in one direction: at most six discs."""
    run = shift(b, step, mask) & yours
    for _ in range(5):
        run |= shift(run, step, mask) & yours
    return run

def legal(mine, yours):
    """Squares that the side to move may play: uint64 [n] for boards mine, yours uint64 [n]."""
    moves = np.zeros_like(mine)
    for step, mask in STEPS:
        moves |= shift(runs(mine, yours, step, mask), step, mask)
    return moves & ~(mine | yours)

def play(mine, yours, move):
    """The boards after the one-bit moves uint64 [n], from the same side's view: (mine, yours). A
    move of no bit changes nothing. Legality is not checked."""
    flips = np.zeros_like(mine)
    for step, mask in STEPS:
        run = runs(move, yours, step, mask)
        flips |= np.where(shift(run, step, mask) & mine, run, U(0))
    return mine | move | flips, yours & ~flips

def squares(b):
    """Bits as 0 or 1, uint8 [..., 64], of boards uint64 [...]."""
    return np.unpackbits(b[..., None].astype("<u8").view(np.uint8), axis=-1, bitorder="little")

def next_turn(mine, yours):
    """After a move: (mine, yours, legal moves) for the side that is really to move. If the other
    side must pass it is the same one again; if neither can move there are no legal moves."""
    moves, again = legal(yours, mine), legal(mine, yours)
    passes = (moves == 0) & (again != 0)
    pick = lambda a, b: np.where(passes, a, b)
    return pick(mine, yours), pick(yours, mine), pick(again, moves)

def games(n, rng):
    """n games of uniformly random legal moves: tokens int8 [n, 60], -1 after the end, and, after
    each move and for the side to move next, mine, yours and legal moves, uint64 [n, 60, 3]."""
    mine, yours = np.full(n, START[0]), np.full(n, START[1])
    moves = legal(mine, yours)
    tokens, boards = np.empty((n, MOVES), np.int8), np.empty((n, MOVES, 3), np.uint64)
    for i in range(MOVES):
        bits = squares(moves)                                            # (n, 64)
        count = bits.sum(1)
        pick = (rng.random(n) * count).astype(np.uint8)                  # the pick-th legal move
        square = (bits & (bits.cumsum(1, dtype=np.uint8) == pick[:, None] + 1)).argmax(1)
        over = count == 0
        tokens[:, i] = np.where(over, -1, square)
        mine, yours = play(mine, yours, np.where(over, U(0), U(1) << square.astype(np.uint64)))
        mine, yours, moves = next_turn(mine, yours)
        boards[:, i] = np.stack([mine, yours, moves], 1)
    return tokens, boards

def full_games(n, *key):
    """Tokens int8 [n, 60] of games that last 60 moves, as 99.0 % of random games do. The same for
    the same key, non-negative integers."""
    rng, found = np.random.default_rng(key), [np.empty((0, MOVES), np.int8)]
    while (missing := n - sum(map(len, found))) > 0:
        tokens, _ = games(min(10_000, missing + 100), rng)
        found.append(tokens[tokens[:, -1] >= 0])
    return np.concatenate(found)[:n]

def replay(tokens):
    """boards as games gives them, of given games int [n, T] (-1 after the end); ValueError names
    the first game with an illegal move."""
    mine, yours = np.full(len(tokens), START[0]), np.full(len(tokens), START[1])
    moves, boards = legal(mine, yours), []
    for i, square in enumerate(tokens.T):
        bit = np.where(square < 0, U(0), U(1) << (square & 63).astype(np.uint64))
        if (wrong := (bit & ~moves).nonzero()[0]).size:
            raise ValueError(f"game {wrong[0]}, move {i}: {name(square[wrong[0]])} is not legal")
        mine, yours, moves = next_turn(*play(mine, yours, bit))
        boards.append(np.stack([mine, yours, moves], 1))
    return np.stack(boards, 1)

def name(square):
    """'A1' to 'H8': the column's letter and the row's number."""
    return f"{'ABCDEFGH'[square % 8]}{square // 8 + 1}"

def grid(signs):
    """64 characters as a board: nine lines of text."""
    rows = [f"{r + 1} " + " ".join(signs[8 * r:8 * r + 8]) for r in range(8)]
    return "\n".join([*rows, "  A B C D E F G H"])

def drawing(mine, yours):
    """A board as text: X mine, O yours."""
    bits = squares(np.array([mine, yours]))
    return grid(np.where(bits[0], "X", np.where(bits[1], "O", ".")))
