"""A Jinja sandbox with limits on steps and sizes; Jinja's own sandbox limits neither time nor memory."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.lexer import Token, TokenStream
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
"""The most steps of a rendering, about a second."""
MAX_TOKENS = 20_000
"""Tokens of a template's source, about 100 kB; compiling that many takes about two seconds."""
NODES_PER_STEP = 4
"""Syntax nodes of a loop body or a macro that count as one step."""
FILTER_STEPS = 4
"""Steps of a filter call, in addition to those of what it reads."""
MAX_SIZE = 16 << 20
"""The most characters of a string or items of a list."""
MAX_BITS = 4096
"""The most bits of a whole number."""
_WIDE = re.compile(r"\d{5,}|%[^a-zA-Z]*\*|:[^{}]*\{")
_PADDING = ("center", "ljust", "rjust", "zfill", "batch", "slice", "truncate")
_QUADRATIC = ("striptags", "urlize", "wordwrap")
MAX_QUADRATIC = 1 << 16
"""The most characters for filters whose time grows with the square of a text."""
_state = threading.local()


def reset() -> None:
    """Start the count of steps of a rendering on this thread."""
    _state.steps = 0


def _spend(steps: int = 1) -> None:
    _state.steps = getattr(_state, "steps", 0) + steps
    if _state.steps > MAX_STEPS:
        raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")


def _check(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"it makes a value of more than {MAX_SIZE:,} characters or items")


def _spend_size(size: int, characters: bool = False) -> None:
    """Count the copying or reading of a value as steps."""
    _spend(size // (512 if characters else 64))


def _weighed(value: Any) -> Any:
    """Count reading a value, including everything in a container, and return it."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            _spend_size(len(part), characters=True)
        elif isinstance(part, (list, tuple, set, frozenset)):
            _spend(len(part))
            pending.extend(part)
        elif isinstance(part, dict):
            _spend(len(part))
            pending.extend(part.values())
    return value


def _counted(value: Iterable[Any]) -> Iterator[Any]:
    for item in value:
        _spend()
        yield item


def _sliced(value: Any) -> Any:
    """Count copying a value, and return it."""
    if isinstance(value, (str, list, tuple)):
        _spend_size(len(value), isinstance(value, str))
    return value


def _joined(pieces: Iterable[Any]) -> str:
    strings, size = [], 0
    for piece in pieces:
        _spend()
        strings.append(piece if isinstance(piece, str) else str(_weighed(piece)))
        size += len(strings[-1])
        _spend_size(len(strings[-1]), characters=True)
        _check(size)
    return "".join(strings)


def _check_call(name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a filter or string method whose result would be too large."""
    given = [*args, *kwargs.values()]
    largest = max((abs(each) for each in given if isinstance(each, int)), default=0)
    if name in _PADDING:
        _check(largest)
    elif name in ("indent", "expandtabs"):
        text = str(value)
        unit = max([largest, 8, *(len(each) for each in given if isinstance(each, str))])
        _check(len(text) + (text.count("\n") + text.count("\t") + 1) * unit)
    elif name in ("tojson", "string", "pprint", "join"):
        _weighed(value)
        _check(largest * 2**10)
    elif name == "replace" and len(given) >= 2:
        text, old, new = str(value), str(given[0]), str(given[1])
        _check(len(text) + text.count(old) * len(new))
    elif name in ("format", "format_map") and _WIDE.search(str(value)):
        raise SecurityError("a format of such a width is not allowed")
    elif name == "sum" and any(hasattr(each, "__len__") and not isinstance(each, str) for each in given):
        raise SecurityError("a sum of lists is not allowed")  # each addition copies what was added before
    elif name in _QUADRATIC and len(str(value)) > MAX_QUADRATIC:
        raise SecurityError(f"{name} of more than {MAX_QUADRATIC:,} characters is not allowed")
    elif name in ("sort", "unique", "groupby", "dictsort", "min", "max") and hasattr(value, "__len__"):
        _spend(8 * len(value))
    elif name == "translate":
        raise SecurityError("translate is not allowed")


def bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts steps and refuses results that are too large."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _spend(FILTER_STEPS)
        value = args[at] if len(args) > at else None
        if isinstance(value, Iterator):
            value = _counted(value)
        elif isinstance(value, (str, list, tuple, dict, range)):
            _spend(1 + (len(value) // 64 if isinstance(value, str) else len(value)))
        if name == "join" and isinstance(value, (Iterator, list, tuple)):
            value = list(value)
            between = str(args[at + 1]) if len(args) > at + 1 else str(kwargs.get("d", ""))
            _check(sum(len(each) for each in value if isinstance(each, str)) + len(between) * len(value))
        _check_call(name, value, args[at + 1 :], kwargs)
        result = function(*args[:at], value, *args[at + 1 :], **kwargs) if len(args) > at else function(*args, **kwargs)
        if isinstance(result, (str, list)):
            _check(len(result))
        return result

    return bounded


_WEIGHED = (nodes.For, nodes.Macro, nodes.CallBlock)


def _at_most(limit: int, tokens: Iterable[Token]) -> Iterator[Token]:
    for number, token in enumerate(tokens):
        if number == limit:
            raise SecurityError(f"its source has more than {limit:,} tokens")
        yield token


def _nodes_in(body: Iterable[nodes.Node]) -> int:
    """Count syntax nodes, without those of inner bodies, which are weighed on their own."""
    pending, count = list(body), 0
    while pending:
        node = pending.pop()
        count += 1
        pending += node.iter_child_nodes(exclude=("body",) if isinstance(node, _WEIGHED) else ())
    return count


@pass_context
def _spend_body(context: Any, steps: int) -> str:
    """Count the run of a body. It takes the context so that Jinja does not run it once, at compile time."""
    _spend(steps)
    return ""


class _Count(NodeTransformer):
    """Insert the counting of steps, and check the size of what `~` joins."""

    def _weigh(self, node: Any) -> nodes.Node:
        steps = _nodes_in(node.body) // NODES_PER_STEP
        self.generic_visit(node)
        if steps:
            call = nodes.Filter(nodes.Const(steps), "spend_body_", [], [], None, None, lineno=node.lineno)
            node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node.iter = nodes.Filter(node.iter, "counted_", [], [], None, None, lineno=node.lineno)
        return self._weigh(node)

    visit_Macro = visit_CallBlock = _weigh

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        for each in sides:
            each.expr = nodes.Filter(each.expr, "weighed_", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = nodes.Filter(node.node, "sliced_", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, "joined_", [], [], None, None, lineno=node.lineno)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that raises SecurityError if a template takes too many steps or makes too large a value."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_weighed, **options)
        self.filters = {name: bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"counted_": _counted, "joined_": _joined, "weighed_": _weighed, "sliced_": _sliced}
        self.filters["spend_body_"] = _spend_body
        self.globals.pop("lipsum", None)

    def _tokenize(
        self, source: str, name: str | None, filename: str | None = None, state: str | None = None
    ) -> TokenStream:
        tokens = super()._tokenize(source, name, filename, state)
        return TokenStream(_at_most(MAX_TOKENS, tokens), name, filename)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Count().visit(tree)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what a template or a macro writes."""
        return _joined(pieces)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` if the result is small enough."""
        _spend()
        if operator == "%" and isinstance(left, str):
            _check_call("format", left, (), {})
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise SecurityError("a number of so many digits is not allowed")
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(items, "__len__"):
                    _check(len(items) * times)
                    _spend_size(len(items) * max(0, times), isinstance(items, str))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _spend((len(left) + len(right)) // 64)
            _check(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as Jinja's
        """Call a macro, a method or a function, and count a step."""
        _spend()
        if isinstance(__obj, LoopContext) and args:  # a recursive loop
            args = (_counted(args[0]), *args[1:])
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _spend(len(owner) // 64)
            name = method.__name__
            _check_call(name, owner, args, kwargs)
            if name == "join" and args:
                items = list(_counted(args[0]))
                _check(sum(len(each) for each in items if isinstance(each, str)) + len(owner) * len(items))
                args = (items,)
        return super().call(__context, __obj, *args, **kwargs)
