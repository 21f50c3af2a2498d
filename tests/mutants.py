"""Break a function in each of a few ways, one at a time, by changing its syntax tree.

The ways are: never and always (a condition), drop (an operand of `and` or `or`, an item of `with`), delete (a call, an
assignment to an attribute or a place, a bare `raise`), unhandled (an `except`), boundary (`<` for `<=`), opposite (`==`
for `!=`), arithmetic (`+` for `-`), constant (1 for 0), slice (`[:]` for `[1:]`), unwrap (`x` for `f(x)`) and return
(None for a value).
"""

import ast
import builtins
from collections.abc import Iterator
from typing import Any

Change = tuple[str, ast.AST, ast.AST]
"""The way, the part of the code that it is about, and what takes its place."""

SHOWN = ("say", "advance", "warn")
"""Calls for people: what they say may change, and only a missing warning counts."""

COPIES = ("clone", "copy", "detach", "float", "lower", "resolve")
"""Methods without whose call a program still runs."""

BUILTINS = dir(builtins)
"""Without a call of one of these any test fails."""

IDLE = ("strict", "stacklevel", "flush")  # keywords that make no difference where all is well

BOUNDARY = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
OPPOSITE = {ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn}
OPPOSITE |= {new: old for old, new in OPPOSITE.items()}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
ARITHMETIC |= {ast.Mod: ast.Mult, ast.FloorDiv: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}


def find_definition(tree: ast.AST, name: str) -> ast.AST | None:
    """Return the function, class or method of a dotted name in a module; None if it has none."""
    first, _, rest = name.partition(".")
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == first:
            return find_definition(node, rest) if rest else node
    return None


def mutants(module: ast.Module, definition: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield each change to a definition as text, such as "never: x < 0", and the module with that change."""
    for owner, field, index, node in list(_places(definition)):
        for way, part, new in _changes(owner, field, node):
            label = f"{way}: {ast.unparse(part).strip().splitlines()[0]}"
            _put(owner, field, index, new)
            yield label, ast.unparse(ast.fix_missing_locations(module))
            _put(owner, field, index, node)


def _put(owner: Any, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(owner, field, node)
    else:
        getattr(owner, field)[index] = node


def _places(owner: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Walk over what a definition does, and not over docstrings, annotations, defaults, decorators and messages."""
    for field, value in ast.iter_fields(owner):
        if field in ("decorator_list", "annotation", "returns") or isinstance(value, ast.arguments):
            continue
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(node, ast.AST) and not isinstance(node, ast.JoinedStr):
                yield owner, field, index, node
                if not (isinstance(node, ast.Raise) or _called(node) in SHOWN):
                    yield from _places(node)


def _called(node: ast.AST) -> str | None:
    return getattr(node.func, "attr", getattr(node.func, "id", None)) if isinstance(node, ast.Call) else None


def _changes(owner: ast.AST, field: str, node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.stmt):
        yield from _changed_statement(owner, node)
    elif isinstance(node, ast.ExceptHandler) and not isinstance(node.body[0], ast.Raise | ast.Pass):
        yield "unhandled", node, ast.ExceptHandler(node.type, node.name, [ast.Raise()])
    elif isinstance(node, ast.expr):
        if field in ("test", "ifs") or (isinstance(owner, ast.Return) and _is_condition(node)):
            yield "never", node, _decided(node, value=False)
            if not isinstance(owner, ast.While) and not (isinstance(owner, ast.If) and _is_guard(owner)):
                yield "always", node, _decided(node, value=True)
        elif not isinstance(owner, ast.BoolOp):
            yield from _changed_condition(node)
        yield from _changed_expression(owner, node)


def _is_condition(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    return isinstance(node, ast.Compare | ast.BoolOp) or _called(node) in ("bool", "isinstance", "any", "all")


def _is_guard(node: ast.If) -> bool:
    return isinstance(node.body[0], ast.Raise) and node.body[0].exc is not None


def _decided(node: ast.expr, *, value: bool) -> ast.expr:
    """Return True or False; a condition that assigns a name is still computed."""
    if not any(isinstance(part, ast.NamedExpr) for part in ast.walk(node)):
        return ast.Constant(value)
    return ast.BoolOp(ast.Or() if value else ast.And(), [node, ast.Constant(value)])


def _changed_statement(owner: ast.AST, node: ast.stmt) -> Iterator[Change]:
    alone = isinstance(owner, ast.If) and len(owner.body) == 1  # the same as a condition that is never true
    match node:
        case ast.Expr(value=ast.Call() as call) if not alone and _called(call) not in ("say", "advance"):
            yield "delete", node, ast.Pass()
        case ast.Assign(targets=[ast.Attribute(attr=name)], value=ast.Name(id=same)) if name == same:
            pass  # __init__ stores its arguments
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign() if not alone:
            yield "delete", node, ast.Pass()
        case ast.Assign(targets=[ast.Tuple(elts=parts)]) if not any(isinstance(part, ast.Name) for part in parts):
            yield "delete", node, ast.Pass()
        case ast.Raise(exc=None) | ast.Delete() if not alone:
            yield "delete", node, ast.Pass()
        case ast.Return(value=ast.Name() | ast.Attribute() | ast.Subscript() | ast.IfExp() | ast.Dict()):
            yield "return", node, ast.Return(ast.Constant(None))
        case ast.With(items=items):
            for item in items:
                rest = [other for other in items if other is not item]
                if item.optional_vars is None:
                    yield "drop", item, ast.With(rest, node.body) if rest else ast.If(ast.Constant(True), node.body, [])


def _changed_condition(node: ast.expr) -> Iterator[Change]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in OPPOSITE:
            yield "opposite", node, ast.Compare(node.left, [OPPOSITE[type(op)]()], node.comparators)
        case ast.UnaryOp(op=ast.Not()):
            yield "opposite", node, node.operand


def _changed_expression(owner: ast.AST, node: ast.expr) -> Iterator[Change]:
    keyword = owner.arg if isinstance(owner, ast.keyword) else None
    match node:
        case ast.BoolOp(op=op, values=values):
            for dropped in values:
                rest = [value for value in values if value is not dropped]
                yield "drop", dropped, ast.BoolOp(op, rest) if len(rest) > 1 else rest[0]
        case ast.Compare(ops=[op]) if type(op) in BOUNDARY:
            yield "boundary", node, ast.Compare(node.left, [BOUNDARY[type(op)]()], node.comparators)
        case ast.BinOp(op=op) if type(op) in ARITHMETIC and not (_is_text(node.left) or _is_text(node.right)):
            yield "arithmetic", node, ast.BinOp(node.left, ARITHMETIC[type(op)](), node.right)
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            yield "arithmetic", node, operand
        case ast.Constant(value=bool() as value) if keyword not in IDLE:
            yield "constant", owner, ast.Constant(not value)
        case ast.Constant(value=int() | float() as value) if keyword not in IDLE:
            yield "constant", owner, ast.Constant(value + 1 if isinstance(value, int) else 2 * value)
        case ast.Slice(lower=lower, upper=upper, step=step):
            yield from (("slice", owner, ast.Slice(None, upper, step)),) if lower is not None else ()
            yield from (("slice", owner, ast.Slice(lower, None, step)),) if upper is not None else ()
        case ast.Call() if not isinstance(owner, ast.Expr | ast.withitem | ast.For | ast.comprehension):
            yield from _unwrapped(node)


def _unwrapped(node: ast.Call) -> Iterator[Change]:
    match node:
        case ast.Call(func=ast.Attribute(value=receiver, attr=name), args=[]) if name in COPIES:
            yield "unwrap", node, receiver
        case ast.Call(func=ast.Name(id="min" | "max"), args=values):
            yield from (("unwrap", node, value) for value in values)
        case ast.Call(func=ast.Name(id="derive_seed" | "sorted"), args=[value, *_]):
            yield "unwrap", node, value
        case ast.Call(func=ast.Name(id=name), args=[value], keywords=[]) if name.islower() and name not in BUILTINS:
            yield "unwrap", node, value
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch" | "copy" | "ImageOps")), args=[value]):
            yield "unwrap", node, value


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr | ast.List) or isinstance(getattr(node, "value", None), str)
