r"""Chains of modular equations: evaluate d operations in a row, picked out of shuffled lines.

Variables :math:`x_0, \ldots, x_d` with :math:`x_0` a constant and, for :math:`i = 1 \ldots d`,

.. math:: x_i = x_{i-1} \circ c \quad\text{or}\quad x_{i-1} \circ x_k,\; x_k \circ x_{i-1}\ (k < i - 1),
          \qquad \circ \in \{+, -, \times\} \bmod m.

Every equation uses the one before, so all d operations are needed and none can be done earlier: the serial depth is the
difficulty d. Distractors are further equations on any two earlier variables (or one and a constant); nothing asked for
depends on them. All equations are shuffled and the variables' names are a random subset of the names.

A product would turn any chain into 0 for good once one factor is 0. Constants are therefore 1 to m - 1 in products, and
where :math:`x_k` is 0 the operation is + instead; with m prime every operation then maps :math:`x_{i-1}` one to one for
given :math:`x_k`, which keeps the answers close to uniform.

Layout::

    prompt   <bos> a = 5 ; b = a + 3 ; c = b × a ; ... ? c        equations in random order
    steps    b = 8 | c = 17 | ...                                 three tokens a step; d steps, in order
    answer   17

Two prompts are the same problem when the needed equations agree up to the variables' names, the order of lines, the
order of the operands of + and ×, and the distractors.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch, TaskLimits
from latentcot.tasks.base import Example, Latents, Rows, Task, TaskConfig, check_integer, left_align
from latentcot.tasks.counter import Draws, Integers, Words
from latentcot.tasks.vocabulary import Vocabulary

_OPERATIONS = ("+", "−", "×")
_PLUS, _MINUS, _TIMES = range(3)
_SYMBOLS = (*_OPERATIONS, "=", "?", ";")
_LINE = 6  # tokens of "x = a + b ;"


def variable_names(count: int) -> tuple[str, ...]:
    """``a`` to ``z``, then ``a1`` to ``z1``, and so on."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return tuple(letters[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(count))


@dataclass(frozen=True, kw_only=True)
class ChainConfig(TaskConfig):
    """Options of :class:`ChainTask`; the difficulty is the number of operations.

    Args:
        modulus: m, from 2 to 1000; answers are close to uniform for primes only.
        distractors: number of equations that nothing asked for depends on.
        variables: number of variable names; at least ``max_difficulty + 1 + distractors``.
    """

    min_difficulty: int = 1
    max_difficulty: int = 8
    modulus: int = 23
    distractors: int = 2
    variables: int = 26

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("modulus", self.modulus, 2, 1000)
        check_integer("distractors", self.distractors, 0, 1000)
        check_integer("variables", self.variables, 1, 26 * 26)
        needed = self.max_difficulty + 1 + self.distractors
        if self.variables < needed:
            raise ValueError(
                f"variables: {self.variables} names are too few for max_difficulty {self.max_difficulty} and "
                f"{self.distractors} distractors, which use {needed}"
            )


class ChainTask(Task):
    """Modular equation chains; see the module for the rules and the layout."""

    name = "chain"
    config_type = ChainConfig
    config: ChainConfig

    @property
    def domain(self) -> str:
        return f"chain/{self.config.modulus}"

    def _make_vocabulary(self) -> Vocabulary:
        residues = tuple(map(str, range(self.config.modulus)))
        names = variable_names(self.config.variables)
        vocabulary = Vocabulary((*residues, *names, *_SYMBOLS))
        self._first_residue = vocabulary.id("0")
        self._first_name = vocabulary.id(names[0])
        self._first_operation = vocabulary.id(_OPERATIONS[0])
        self._equals, self._ask, self._end = vocabulary.encode("= ? ;")
        return vocabulary

    def _make_limits(self) -> TaskLimits:
        c = self.config
        return TaskLimits(
            vocab_size=len(self.vocabulary),
            prompt_tokens=1 + 4 + _LINE * (c.max_difficulty + c.distractors) + 2,
            steps=c.max_difficulty,
            step_tokens=3,
            answer_tokens=1,
        )

    # Latents: column i of ``operation``, ``left``, ``right`` [n, E] defines x_i; E = max_difficulty + 1 + distractors.
    # An operand is the number of a variable, or -1 - c for the constant c; equation 0 has only ``left``.

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        c, m = self.config, self.config.modulus
        equations = c.max_difficulty + 1 + c.distractors
        rows = np.arange(len(draws))
        d = lowest + draws.integers(1, highest - lowest + 1)[:, 0]
        kind = draws.integers(equations, 2)  # 0: with a constant, 1: with a second variable
        wanted = draws.integers(equations, 3)
        swap = draws.integers(equations, 2).astype(bool)
        constant = draws.integers(equations, m)
        unit = 1 + draws.integers(equations, m - 1)
        # x_1 has no second variable; x_i of the chain takes x_k with k < i - 1, a distractor any two earlier ones.
        number = np.arange(equations)
        second = draws.integers(equations, np.maximum(number - 1, 1))
        first = draws.integers(equations, np.maximum(number, 1))
        needed = number[None] <= d[:, None]
        first = np.where(needed, number - 1, first)
        second += second >= first  # never the same variable twice; for the chain first = i - 1 stays out of reach
        binary = (kind == 1) & (number >= 2)

        value = np.zeros((len(draws), equations), dtype=np.int64)
        operation = np.full((len(draws), equations), _PLUS)
        left, right = np.zeros_like(value), np.zeros_like(value)
        value[:, 0] = constant[:, 0]
        left[:, 0] = -1 - constant[:, 0]
        for i in range(1, equations):
            is_binary, op = binary[:, i], wanted[:, i].copy()
            a, b = value[rows, first[:, i]], value[rows, second[:, i]]
            op[is_binary & (op == _TIMES) & (b == 0)] = _PLUS
            number_used = np.where(op == _TIMES, unit[:, i], constant[:, i])
            b = np.where(is_binary, b, number_used)
            other = np.where(is_binary, second[:, i], -1 - number_used)
            swapped = is_binary & swap[:, i]
            left[:, i] = np.where(swapped, other, first[:, i])
            right[:, i] = np.where(swapped, first[:, i], other)
            a, b = np.where(swapped, b, a), np.where(swapped, a, b)
            operation[:, i] = op
            value[:, i] = np.select([op == _PLUS, op == _MINUS], [a + b, a - b], a * b) % m
        total = d + 1 + c.distractors
        return {
            "difficulty": d,
            "operation": operation,
            "left": left,
            "right": right,
            "value": value,
            "order": draws.permutation(equations, total),
            "variable": draws.permutation(c.variables)[:, :equations],
        }

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        m, d = self.config.modulus, latents["difficulty"]
        longest = self.config.max_difficulty + 1
        op, left, right = (latents[name][:, :longest] for name in ("operation", "left", "right"))
        commutes = op != _MINUS
        lower, upper = np.minimum(left, right), np.maximum(left, right)
        left, right = np.where(commutes, lower, left), np.where(commutes, upper, right)
        left[:, 0], right[:, 0] = latents["left"][:, 0], 0
        words = np.stack((op, left + m, right + m), axis=-1).reshape(len(d), 3 * longest)
        return words.astype(np.uint64), 3 * (d + 1)

    def _write(self, latents: Latents) -> Rows:
        d, order, variable = latents["difficulty"], latents["order"], latents["variable"]
        n, equations = order.shape
        names = self._first_name + variable

        def operand(numbers: Integers) -> Integers:
            named = np.take_along_axis(names, np.maximum(numbers, 0), axis=1)
            return np.where(numbers >= 0, named, self._first_residue - 1 - numbers)

        lines = np.empty((n, equations, _LINE), dtype=np.int64)
        lines[:, :, 0] = names
        lines[:, :, 1] = self._equals
        lines[:, :, 2] = operand(latents["left"])
        lines[:, :, 3] = self._first_operation + latents["operation"]
        lines[:, :, 4] = operand(latents["right"])
        lines[:, :, 5] = self._end
        lines[:, 0, 3:5] = -1
        lines = np.take_along_axis(lines, order[:, :, None], axis=1)
        lines[np.arange(equations) >= (d + 1 + self.config.distractors)[:, None]] = -1
        asked = names[np.arange(n), d]
        start, ask = np.full((n, 1), SPECIAL.bos), np.full((n, 1), self._ask)
        prompt = np.concatenate((start, lines.reshape(n, -1), ask, asked[:, None]), axis=1)

        longest = self.config.max_difficulty
        steps = np.empty((n, longest, 3), dtype=np.int64)
        steps[:, :, 0] = names[:, 1 : longest + 1]
        steps[:, :, 1] = self._equals
        steps[:, :, 2] = self._first_residue + latents["value"][:, 1 : longest + 1]
        steps[np.arange(longest) >= d[:, None]] = -1
        answer = self._first_residue + latents["value"][np.arange(n), d]
        return Rows(prompt=left_align(prompt), steps=steps, answer=answer[:, None])

    def _equations(self, example: Example) -> tuple[dict[str, list[str]], str]:
        """Right-hand sides by variable, and the variable asked for, read from the prompt's symbols."""
        *lines, question = " ".join(self.vocabulary.decode(example.prompt_ids[1:])).split(" ; ")
        sides = {line.split(" = ")[0]: line.split(" = ")[1].split() for line in lines}
        return sides, question.split()[1]

    def oracle(self, example: Example) -> tuple[int, ...]:
        """Evaluate the asked variable by recursion on the equations as written."""
        sides, asked = self._equations(example)
        known: dict[str, int] = {}

        def value(symbol: str) -> int:
            if symbol.isdigit():
                return int(symbol)
            if symbol not in known:
                terms = sides[symbol]
                a, b = value(terms[0]), value(terms[2]) if len(terms) == 3 else 0
                symbols = {"+": a + b, "−": a - b, "×": a * b}
                known[symbol] = symbols[terms[1]] % self.config.modulus if len(terms) == 3 else a
            return known[symbol]

        return self.vocabulary.encode([str(value(asked))])

    def canonical(self, example: Example) -> tuple[int, ...]:
        """(operation, left, right) of the needed equations in order of evaluation, names replaced by positions."""
        sides, asked = self._equations(example)
        needed, frontier = {asked}, [asked]
        while frontier:
            fresh = [s for s in sides[frontier.pop()] if s in sides and s not in needed]
            needed.update(fresh)
            frontier.extend(fresh)
        place: dict[str, int] = {}
        out: list[int] = []
        m = self.config.modulus
        while len(place) < len(needed):
            # Exactly one equation can be evaluated next: each uses the one before.
            (name,) = [v for v in needed - place.keys() if all(s in place for s in sides[v] if s in sides)]
            terms = sides[name]
            operands = [place[s] if s in place else -1 - int(s) for s in terms[::2]]
            op = _OPERATIONS.index(terms[1]) if len(terms) == 3 else _PLUS
            if len(terms) == 1:
                operands.append(0)
            elif op != _MINUS:
                operands.sort()
            out += [op, operands[0] + m, operands[1] + m]
            place[name] = len(place)
        return tuple(out)

    def chance(self, batch: TaskBatch) -> Tensor:
        return torch.full((len(batch),), 1.0 / self.config.modulus, dtype=torch.float64)

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """``last_constant``: the last number in the prompt; ``given_constant``: the value of the variable that is
        given."""
        ids = batch.prompts.ids
        is_number = (ids >= self._first_residue) & (ids < self._first_residue + self.config.modulus)
        last = torch.where(is_number, torch.arange(ids.shape[1]), -1).amax(1, keepdim=True)
        given = is_number.clone()
        given[:, 1:] &= ids[:, :-1] == self._equals
        given[:, :-1] &= ids[:, 1:] == self._end
        place = given.long().argmax(1, keepdim=True)
        return {"last_constant": ids.gather(1, last), "given_constant": ids.gather(1, place)}
