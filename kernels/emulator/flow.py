"""The control flow of a function: the edges between its blocks, and its loops."""

import re

from . import ir


class Flow:
    """The edges between the blocks of a function, by their index in it."""

    def __init__(self, function: ir.Function) -> None:
        labels = {block.label: n for n, block in enumerate(function.blocks)}
        self.successors: list[list[int]] = []
        for block in function.blocks:
            found = re.findall(r"label %(\"[^\"]*\"|[\w$.-]+)", block.instructions[-1].text)
            self.successors.append(sorted({labels[label] for label in found}))
        self.predecessors: list[list[int]] = [[] for _ in function.blocks]
        for n, targets in enumerate(self.successors):
            for target in targets:
                self.predecessors[target].append(n)
        self.labels = labels

    def block(self, label: str) -> int:
        """The index of a block by its label; the first block may have none of its own."""
        return self.labels.get(label, 0)

    def innermost_loops(self) -> list[set[int]]:
        """The blocks of each loop that contains no other."""
        bodies: dict[int, set[int]] = {}
        for tail, head in self._back_edges():
            body, todo = bodies.setdefault(head, {head}), [tail]
            while todo:
                n = todo.pop()
                if n not in body:
                    body.add(n)
                    todo += self.predecessors[n]
        return [
            body for head, body in bodies.items() if not any(h in body for h in bodies if h != head)
        ]

    def _back_edges(self) -> list[tuple[int, int]]:
        """The edges to a block on the way to them, from a walk in depth."""
        found, seen, path = [], {0}, [(0, iter(self.successors[0]))]
        while path:
            n, rest = path[-1]
            target = next(rest, None)
            if target is None:
                path.pop()
            elif any(target == on for on, _ in path):
                found.append((n, target))
            elif target not in seen:
                seen.add(target)
                path.append((target, iter(self.successors[target])))
        return found
