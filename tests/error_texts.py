"""The texts of the errors that a user can meet, read from the pack's syntax trees: the documentation must know each.

A text is what stands in the code, with `…` where a value goes. Errors of the arithmetic inside (loaders/quant) tell of
mistakes of this pack, not of the user's or of a file's, and are left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from layers import Source

HOLE = "…"
# Class -> which of its arguments is the text; the others are a path and what to do.
USERS = {
    **dict.fromkeys(("GGUFError", "LoraError", "SourceError"), 1),
    **dict.fromkeys(("ValueError", "FileNotFoundError", "StreamError", "NoRoomError", "MemoryError"), 0),
    **dict.fromkeys(("MalformedError", "UnknownTypeError", "UnrepresentableError", "RuntimeError"), 0),
    **dict.fromkeys(("BudgetTooSmallError", "error"), 0),  # the second: `Cursor.error`, which knows the place
}
INTERNAL = ("loaders/quant/", "lora/keys.py")
# Elsewhere, what only a mistake of this pack can cause.
OUR_MISTAKES = (
    *("unified memory needs a model of the classic kind", "a weight is either in a file or in memory"),
    *("a weight in memory is given as its bytes", "block …: its compute time is", "…: the link's rate must be"),
    *("the copies of a plan must be", "block … has two tensors in one place", "the ring has … bytes"),
)


@dataclass(frozen=True)
class ErrorText:
    """One way in which one `raise` may begin its message."""

    place: str  # file:line
    kind: str
    text: str


def error_texts(source: Source) -> Iterator[ErrorText]:
    """Of every `raise` in a file, and of every error that is made to be raised elsewhere."""
    if source.path.startswith(INTERNAL):
        return
    functions = [node for node in ast.walk(source.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for call in source.nodes(ast.Call):
        kind = getattr(call.func, "id", None) or getattr(call.func, "attr", "")
        if kind not in USERS or (kind == "error" and not call.args):
            continue
        around = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
        scopes: list[ast.AST] = [*sorted(around, key=lambda f: -f.lineno), source.tree]
        for text in _texts(_argument(call, USERS[kind]), scopes):
            if not text.startswith(OUR_MISTAKES):
                yield ErrorText(f"{source.path}:{call.lineno}", kind, " ".join(text.split()))


def _argument(call: ast.Call, index: int) -> ast.expr | None:
    for place, argument in enumerate(call.args):
        if place == index or isinstance(argument, ast.Starred):
            return argument
    return None


def _texts(node: ast.AST | None, scopes: list[ast.AST]) -> Iterator[str]:
    """The texts that an expression may give, looking names up in `scopes`, the innermost first.

    What cannot be known here, such as another error's text, gives none.
    """
    parts: list[ast.expr] = []
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=values):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in values)
        case ast.BinOp(left=left, right=right):
            yield from (before + after for before in _texts(left, scopes) for after in _texts(right, scopes))
        case ast.IfExp(body=body, orelse=orelse):
            parts = [body, orelse]
        case ast.Starred(value=value) | ast.Subscript(value=value):
            parts = [value]
        case ast.Tuple(elts=[problem, *_]):  # of a problem and what to do
            parts = [problem]
        case ast.Dict(values=parts):
            pass
        case ast.Call(func=ast.Attribute(value=value), args=arguments):  # table.get(key, default), "...".join(...)
            parts = [value, *arguments]
        case ast.Call(func=ast.Name(id=name)):  # a function of this file
            for function in ast.walk(scopes[-1]):
                if isinstance(function, ast.FunctionDef) and function.name == name:
                    returns = [line for line in ast.walk(function) if isinstance(line, ast.Return)]
                    yield from (text for line in returns for text in _texts(line.value, [function, *scopes]))
        case ast.Name(id=name):
            found = ([value for known, value in _assigned(scope) if known == name] for scope in scopes)
            parts = next(filter(None, found), [])
    for part in parts:
        yield from _texts(part, scopes)


def _assigned(scope: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Every name of a scope with what it is set to."""
    for node in ast.walk(scope):
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    yield from _unpacked(target, value)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
            case ast.NamedExpr(target=ast.Name(id=name), value=value):
                yield name, value


def _unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    match target, value:
        case ast.Name(id=name), _:
            yield name, value
        case ast.Tuple(), ast.IfExp(body=body, orelse=orelse):
            yield from _unpacked(target, body)
            yield from _unpacked(target, orelse)
        case ast.Tuple(elts=targets), ast.Tuple(elts=values):
            for one, given in zip(targets, values, strict=False):
                yield from _unpacked(one, given)
        case ast.Tuple(elts=[ast.Name(id=name), *_]), _:  # (problem, remedy) from a table or a function
            yield name, value


def warnings(source: Source) -> Iterator[ErrorText]:
    """The texts of every `log.warning` of a file."""
    for call in source.nodes(ast.Call):
        if ast.unparse(call.func) == "log.warning":
            for text in _texts(call.args[0], [source.tree]):
                yield ErrorText(f"{source.path}:{call.lineno}", "warning", re.sub(r"%[.\d]*[srdxgf]", HOLE, text))
