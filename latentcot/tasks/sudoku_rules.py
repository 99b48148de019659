r"""Sudoku of several sizes: rules, a solver that counts its guesses, uniqueness, and canonical forms.

A grid of size n has n rows, n columns and n boxes of ``height x width`` cells, ``height * width = n``; every one of them
holds each digit 1 ... n once. Grids are tuples of ``n * n`` digits, row by row; 0 is a blank.

Symmetries: relabelling the digits, permuting bands and the rows inside a band, permuting stacks and the columns inside a
stack, and, where boxes are square, transposing.
"""

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np

from latentcot.tasks.counter import Integers

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Size -> (height, width) of a box."""

Grid = tuple[int, ...]


class Rules:
    """Index tables of one size. Use :func:`rules`, which keeps one object a size.

    ``units``: the rows, columns and boxes as tuples of cells; ``row``, ``column``, ``box``: of each cell.
    """

    def __init__(self, size: int):
        if size not in BOXES:
            raise ValueError(f"size: expected one of {', '.join(map(str, BOXES))}, got {size!r}")
        self.size = size
        self.height, self.width = BOXES[size]
        self.cells = size * size
        self.row = tuple(cell // size for cell in range(self.cells))
        self.column = tuple(cell % size for cell in range(self.cells))
        stacks = size // self.width
        self.box = tuple(self.row[c] // self.height * stacks + self.column[c] // self.width for c in range(self.cells))
        self.all_digits = (1 << size) - 1
        self.units = tuple(
            tuple(cell for cell in range(self.cells) if of[cell] == number)
            for of in (self.row, self.column, self.box)
            for number in range(size)
        )
        self.square_boxes = self.height == self.width
        self.column_orders = line_orders(size, self.width)
        self.row_orders = line_orders(size, self.height)


@cache
def rules(size: int) -> Rules:
    """The :class:`Rules` of ``size`` (4, 6 or 9); ``ValueError`` otherwise."""
    return Rules(size)


def line_orders(size: int, group: int) -> Integers:
    """Every order of ``size`` lines that permutes groups of ``group`` neighbours and lines inside groups: ``[K, size]``."""
    inside = list(itertools.permutations(range(group)))
    found = []
    for order in itertools.permutations(range(size // group)):
        for within in itertools.product(inside, repeat=size // group):
            found.append([g * group + line for g, lines in zip(order, within, strict=True) for line in lines])
    return np.array(found)


class _Board:
    """Masks of the digits used in each row, column and box while a search places digits."""

    def __init__(self, cells: Sequence[int], game: Rules):
        self.game = game
        self.rows, self.columns, self.boxes = ([0] * game.size for _ in range(3))
        self.cells = list(cells)
        self.empty: list[int] = []
        self.sound = True
        for cell, digit in enumerate(cells):
            if not digit:
                self.empty.append(cell)
            elif self.free(cell) >> (digit - 1) & 1:
                self.place(cell, digit)
            else:
                self.sound = False

    def free(self, cell: int) -> int:
        """Mask of the digits that no peer of ``cell`` holds."""
        game = self.game
        used = self.rows[game.row[cell]] | self.columns[game.column[cell]] | self.boxes[game.box[cell]]
        return game.all_digits & ~used

    def place(self, cell: int, digit: int) -> None:
        self._mark(cell, 1 << (digit - 1))
        self.cells[cell] = digit

    def clear(self, cell: int) -> None:
        self._mark(cell, 1 << (self.cells[cell] - 1))
        self.cells[cell] = 0

    def _mark(self, cell: int, bit: int) -> None:
        game = self.game
        self.rows[game.row[cell]] ^= bit
        self.columns[game.column[cell]] ^= bit
        self.boxes[game.box[cell]] ^= bit

    def narrowest(self) -> tuple[int, int]:
        """Place in ``empty`` of the first cell with the fewest free digits, and their mask."""
        best, mask, fewest = -1, 0, self.game.size + 1
        for place, cell in enumerate(self.empty):
            free = self.free(cell)
            count = free.bit_count()
            if count < fewest:
                best, mask, fewest = place, free, count
                if count < 2:
                    break
        return best, mask

    def count(self, limit: int) -> int:
        """Solutions from here, counted up to ``limit``; the board is left as it was."""
        if not self.empty:
            return 1
        place, mask = self.narrowest()
        cell = self.empty.pop(place)
        found = 0
        for digit in _digits(mask):
            self.place(cell, digit)
            found += self.count(limit - found)
            self.clear(cell)
            if found >= limit:
                break
        self.empty.insert(place, cell)
        return found

    def fill(self, preference: Sequence[Sequence[int]]) -> bool:
        """Complete the board, trying the digits of each cell in its order of preference."""
        if not self.empty:
            return True
        place, mask = self.narrowest()
        cell = self.empty.pop(place)
        for digit in preference[cell]:
            if mask >> (digit - 1) & 1:
                self.place(cell, digit)
                if self.fill(preference):
                    return True
                self.clear(cell)
        self.empty.insert(place, cell)
        return False


def _digits(mask: int) -> list[int]:
    return [digit for digit in range(1, mask.bit_length() + 1) if mask >> (digit - 1) & 1]


def count_solutions(cells: Sequence[int], size: int, limit: int = 2) -> int:
    """Solutions of a puzzle, counted up to ``limit`` (most constrained cell first)."""
    board = _Board(cells, rules(size))
    return board.count(limit) if board.sound else 0


def random_grid(preference: Integers, size: int) -> Grid:
    """A full grid by backtracking, most constrained cell first; ``preference [cells, size]``: each cell's order of digits 1 ... size."""
    board = _Board([0] * (size * size), rules(size))
    board.fill(preference.tolist())
    return tuple(board.cells)


def dig(solution: Grid, order: Sequence[int], blanks: int, size: int) -> Grid | None:
    """Take clues away in ``order``, each only if the solution stays the only one, until ``blanks`` are gone.

    ``None`` when fewer can be taken away in this order: the puzzle that is left is minimal.
    """
    board = _Board(solution, rules(size))
    for cell in order:
        if len(board.empty) == blanks:
            break
        digit = board.cells[cell]
        board.clear(cell)
        others = board.free(cell) & ~(1 << (digit - 1))
        unique = True
        for other in _digits(others):  # a second solution has another digit here
            board.place(cell, other)
            unique = not board.count(1)
            board.clear(cell)
            if not unique:
                break
        if unique:
            board.empty.append(cell)
        else:
            board.place(cell, digit)
    return tuple(board.cells) if len(board.empty) == blanks else None


def solve(cells: Sequence[int], size: int) -> tuple[Grid | None, int]:
    """Solve by a fixed procedure and count its guesses: ``(solution or None, guesses)``.

    Naked singles (a cell with one candidate) and hidden singles (a digit with one cell in a unit) until neither is left; then every
    candidate of the first cell with the fewest is tried in ascending order, one guess each, until one leads to a solution.
    0 guesses: singles are enough.
    """
    game = rules(size)
    board = _Board(cells, game)
    if not board.sound:
        return None, 0
    candidates = [1 << (d - 1) if d else board.free(cell) for cell, d in enumerate(board.cells)]
    return _solve_candidates(list(board.cells), candidates, game)


def _solve_candidates(cells: list[int], candidates: list[int], game: Rules) -> tuple[Grid | None, int]:
    while True:
        placed = False
        for cell in range(game.cells):
            if not cells[cell]:
                mask = candidates[cell]
                if not mask:
                    return None, 0
                if mask & (mask - 1) == 0:
                    _fix(cell, mask, cells, candidates, game)
                    placed = True
        for unit in game.units:
            once, more = 0, 0
            for cell in unit:
                more |= once & candidates[cell]
                once |= candidates[cell]
            if once != game.all_digits:
                return None, 0
            single = once & ~more
            for cell in unit:
                mask = candidates[cell] & single
                if mask and not cells[cell]:
                    if mask & (mask - 1):  # two digits have this cell alone
                        return None, 0
                    _fix(cell, mask, cells, candidates, game)
                    placed = True
        if not placed:
            break
    open_cells = [cell for cell in range(game.cells) if not cells[cell]]
    if not open_cells:
        sound = all(sum(1 << cells[c] for c in unit) == 2 * game.all_digits for unit in game.units)
        return (tuple(cells) if sound else None), 0
    cell = min(open_cells, key=lambda c: candidates[c].bit_count())
    guesses = 0
    for digit in _digits(candidates[cell]):
        guesses += 1
        tried, narrowed = list(cells), list(candidates)
        _fix(cell, 1 << (digit - 1), tried, narrowed, game)
        solution, more_guesses = _solve_candidates(tried, narrowed, game)
        guesses += more_guesses
        if solution is not None:
            return solution, guesses
    return None, guesses


@cache
def peers(size: int) -> tuple[tuple[int, ...], ...]:
    """For each cell the others of its row, column and box."""
    game = rules(size)
    return tuple(tuple({c for unit in game.units if cell in unit for c in unit} - {cell}) for cell in range(game.cells))


def _fix(cell: int, mask: int, cells: list[int], candidates: list[int], game: Rules) -> None:
    cells[cell] = mask.bit_length()
    candidates[cell] = mask
    for peer in peers(game.size)[cell]:
        candidates[peer] &= ~mask


def relabelled(cells: Sequence[int]) -> Grid:
    """The same cells with digits renamed 1, 2, ... by first appearance; equal for two grids iff they differ in names only."""
    names: dict[int, int] = {0: 0}
    return tuple(names.setdefault(digit, len(names)) for digit in cells)


def canonical_grid(grid: Sequence[int], size: int) -> Grid:
    """The lexicographically smallest full grid among all symmetric ones: equal iff two grids are symmetric.

    Once the first row and the order of the columns are chosen, everything else follows: the first row reads 1 2 ... n, and the
    remaining rows and bands are sorted by their first entries. So n (2n for square boxes) times the orders of columns are compared,
    first by the first band alone.
    """
    game = rules(size)
    square = np.array(grid).reshape(size, size)
    best: int | None = None
    ties: list[tuple[Integers, int]] = []  # rows and columns in place, digits relabelled; the first row's number
    weights = (size + 1) ** np.arange((game.height - 1) * size)[::-1]
    for turned in (square, square.T) if game.square_boxes else (square,):
        columns = turned[:, game.column_orders].transpose(1, 0, 2)  # [K, n, n]
        every = np.arange(len(columns))[:, None]
        for first in range(size):
            names = np.empty((len(columns), size + 1), dtype=np.int64)
            names[every, columns[:, first]] = np.arange(1, size + 1)
            band = first // game.height * game.height
            others = [row for row in range(band, band + game.height) if row != first]
            rest = names[every[..., None], columns[:, others]]
            rest = np.take_along_axis(rest, np.argsort(rest[:, :, 0], axis=1)[..., None], axis=1)
            keys = rest.reshape(len(columns), -1) @ weights
            smallest = int(keys.min())
            if best is None or smallest < best:
                best, ties = smallest, []
            if smallest == best:
                for k in np.flatnonzero(keys == smallest):
                    ties.append((names[k][columns[k]], first))
    return min(_sorted_rows(rows, first, game) for rows, first in ties)


def _sorted_rows(rows: Integers, first: int, game: Rules) -> Grid:
    bands = [sorted(rows[start : start + game.height].tolist()) for start in range(0, game.size, game.height)]
    head = bands.pop(first // game.height)
    return tuple(digit for band in (head, *sorted(bands)) for row in band for digit in row)
