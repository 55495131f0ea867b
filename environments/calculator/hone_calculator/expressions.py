"""The value of an expression of integers, and nothing else that Python could evaluate."""

import ast
import operator
import re
from collections.abc import Callable

OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
MAX_CHARACTERS = 100
WRITTEN = re.compile(r"[0-9+\-*() ]+")


def evaluate(expression: str) -> int:
    """The value of integers joined by + - * and parentheses; `ValueError` for anything else."""
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(expression)} characters; {MAX_CHARACTERS} are allowed")
    if not WRITTEN.fullmatch(expression):
        raise ValueError("an expression is made of digits, + - * and parentheses")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"the expression cannot be read: {error.msg}") from error
    return _value(tree.body)


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=symbol, right=right) if type(symbol) in OPERATORS:
            return OPERATORS[type(symbol)](_value(left), _value(right))
    raise ValueError(f"{ast.unparse(node)} is not made of + - * alone")
