"""The testbed's task: simplify an integer expression, one operation a line.

    10*5-2+10*10=            the prompt (always ends in "=" and a newline)
    so 10*10=100:10*5-2+100
    next 10*5=50:50-2+100
    here 50-2=48:48+100
    now 48+100=148:The answer is 148

Several orders are right, so trajectories differ; each line begins with one of eight meaningless connectors, so lines
that mean the same differ in text. Both favour semantic clustering by design. Labels are exact: see `step_is_right`.
"""

from __future__ import annotations

import ast
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
Operator = Literal["+", "-", "*"]

CONNECTORS = ("so", "now", "then", "next", "and", "thus", "hence", "here")
ANSWER_PREFIX = "The answer is "
NUM_INTEGERS = 11
LARGEST_INTEGER = 20
LARGEST_VALUE = 200

# The split is a property of the expression's text, so no expression can be in two splits, whatever the seeds.
_NUM_BUCKETS = 8
_SPLIT_OF_BUCKET: dict[int, Split] = {0: "test", 1: "validation"}

_EXPRESSION = re.compile(r"[0-9()*+-]+")
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")
_OPERATORS: dict[type, Operator] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
_STEP = re.compile(r"([a-z]+) (\d+)([-+*])(\d+)=(\d+):(.+)")


@dataclass(frozen=True)
class Operation:
    """An inner vertex of an expression: `left operator right`."""

    operator: Operator
    left: Expression
    right: Expression


Expression = int | Operation


@dataclass(frozen=True)
class Problem:
    """One expression to simplify and its value."""

    expression: str
    answer: int

    @property
    def prompt(self) -> str:
        return f"{self.expression}=\n"


def apply_operator(operator: str, left: int, right: int) -> int:
    """The value of `left operator right`."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    raise ValueError(f"operator must be one of + - *, got {operator!r}; write the expression with these three.")


def evaluate(expression: Expression) -> int:
    """The expression's integer value."""
    if isinstance(expression, int):
        return expression
    return apply_operator(expression.operator, evaluate(expression.left), evaluate(expression.right))


def render(expression: Expression) -> str:
    """The expression as text, with parentheses only where the reading order would change without them."""
    if isinstance(expression, int):
        return str(expression)
    left, right = render(expression.left), render(expression.right)
    if expression.operator == "*" and _is_sum(expression.left):
        left = f"({left})"
    if isinstance(expression.right, Operation) and (expression.operator == "*" or _is_sum(expression.right)):
        right = f"({right})"
    return f"{left}{expression.operator}{right}"


def _is_sum(expression: Expression) -> bool:
    return isinstance(expression, Operation) and expression.operator != "*"


def parse(text: str) -> Expression:
    """The inverse of `render`; also reads superfluous parentheses.

    Raises:
        ValueError: the text is no expression of integers, + - * and parentheses.
    """
    try:
        if not _EXPRESSION.fullmatch(text):
            raise SyntaxError
        return _from_python(ast.parse(_LEADING_ZEROS.sub("", text), mode="eval").body)
    except (SyntaxError, KeyError):
        raise ValueError(f"an expression must have integers, + - * and parentheses, got {text!r}; rewrite it") from None


def _from_python(node: ast.expr) -> Expression:
    match node:
        case ast.Constant(int(value)):
            return value
        case ast.BinOp(left, operator, right):
            return Operation(_OPERATORS[type(operator)], _from_python(left), _from_python(right))
    raise SyntaxError


def random_expression(rng: random.Random, num_integers: int = NUM_INTEGERS) -> Expression:
    """A random binary tree of integers in 1..20 whose every subtree has a value in 0..200."""
    if num_integers == 1:
        return rng.randint(1, LARGEST_INTEGER)
    while True:
        num_left = rng.randint(1, num_integers - 1)
        left = random_expression(rng, num_left)
        right = random_expression(rng, num_integers - num_left)
        operator: Operator = rng.choice(("+", "-", "*"))
        if 0 <= apply_operator(operator, evaluate(left), evaluate(right)) <= LARGEST_VALUE:
            return Operation(operator, left, right)


def split_of(expression: str) -> Split:
    """The one split this expression belongs to (train 6/8, validation 1/8, test 1/8)."""
    return _SPLIT_OF_BUCKET.get(zlib.crc32(expression.encode()) % _NUM_BUCKETS, "train")


def problems(split: Split, seed: int = 0, num_integers: int = NUM_INTEGERS) -> Iterator[Problem]:
    """An endless stream of problems of one split; the same arguments give the same stream.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}; name one of them.")
    rng = random.Random(f"{split}/{seed}")
    while True:
        expression = random_expression(rng, num_integers)
        text = render(expression)
        if split_of(text) == split:
            yield Problem(text, evaluate(expression))


def distinct_problems(split: Split, count: int, seed: int = 0) -> list[Problem]:
    """The first `count` problems of `problems`, repetitions left out."""
    by_expression: dict[str, Problem] = {}
    for problem in problems(split, seed):
        if len(by_expression) == count:
            break
        by_expression.setdefault(problem.expression, problem)
    return list(by_expression.values())


def solve(problem: Problem, rng: random.Random) -> list[str]:
    """One right solution as steps, reducible pairs taken in random order; every step but the last ends in a newline."""
    expression = parse(problem.expression)
    steps = []
    while isinstance(expression, Operation):
        pair = rng.choice(list(_reducible(expression)))
        expression = _replace(expression, pair, evaluate(pair))
        line = f"{rng.choice(CONNECTORS)} {render(pair)}={evaluate(pair)}:"
        is_last = isinstance(expression, int)
        steps.append(f"{line}{ANSWER_PREFIX}{expression}" if is_last else f"{line}{render(expression)}\n")
    return steps


def _reducible(expression: Expression) -> Iterator[Operation]:
    if isinstance(expression, Operation):
        if isinstance(expression.left, int) and isinstance(expression.right, int):
            yield expression
        yield from _reducible(expression.left)
        yield from _reducible(expression.right)


def _replace(expression: Expression, target: Operation, value: int) -> Expression:
    # Identity, not equality: two equal pairs at different places are different choices.
    if expression is target:
        return value
    if isinstance(expression, int):
        return expression
    left, right = (_replace(expression.left, target, value), _replace(expression.right, target, value))
    if left is expression.left and right is expression.right:
        return expression
    return Operation(expression.operator, left, right)


def step_is_right(problem: Problem, step: str) -> bool:
    """The exact label: well formed, a true equation, and what the step leaves still has the problem's value."""
    match = _STEP.fullmatch(step.removesuffix("\n"))
    if match is None or match[1] not in CONNECTORS:
        return False
    _, left, operator, right, result, rest = match.groups()
    if apply_operator(operator, int(left), int(right)) != int(result):
        return False
    if rest.startswith(ANSWER_PREFIX):
        return rest.removeprefix(ANSWER_PREFIX) == str(problem.answer)
    try:
        return evaluate(parse(rest)) == problem.answer
    except ValueError:
        return False


def answer_of(text: str) -> int | None:
    """The integer after the last "The answer is ", or None."""
    found = re.findall(rf"{ANSWER_PREFIX}(\d+)\s*\Z", text)
    return int(found[0]) if found else None


def split_steps(text: str) -> list[str]:
    """A solution's text as steps, each with its newline; joining them gives the text back."""
    return text.splitlines(keepends=True)
