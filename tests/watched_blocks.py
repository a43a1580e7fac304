"""Hooks that show whether blocks are what streaming needs: no weight of a block is used but during its own call."""

from __future__ import annotations

from collections.abc import Callable

from pack.offload.blocks import Block


class Watch:
    """Makes the weights of `blocks` NaN for as long as the block is not called, so that nobody can use them unseen.

    Attributes:
        calls: the blocks that were called, in order.
        nested: those called during another one's call.
        elsewhere: the layers of a block that were called outside of the block's own call.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self.calls: list[str] = []
        self.nested: list[str] = []
        self.elsewhere: set[str] = set()
        self._running: list[str] = []
        for block in blocks:
            self._hold_back(block)
            for name, layer in block.module.named_modules():
                if not layer._modules and list(layer.parameters()):
                    layer.register_forward_pre_hook(self._seen(block.name, f"{block.name}.{name}"))

    def _hold_back(self, block: Block) -> None:
        weights = [(weight, weight.clone()) for weight in block.module.parameters()]

        def enter(*_: object) -> None:
            if self._running:
                self.nested.append(block.name)
            self._running.append(block.name)
            self.calls.append(block.name)
            for weight, values in weights:
                weight.copy_(values)

        def leave(*_: object) -> None:
            if self._running:
                self._running.pop()
            for weight, _ in weights:
                weight.fill_(float("nan"))

        leave()
        block.module.register_forward_pre_hook(enter)
        block.module.register_forward_hook(leave)

    def _seen(self, block: str, layer: str) -> Callable[..., None]:
        def check(*_: object) -> None:
            if self._running[-1:] != [block]:
                self.elsewhere.add(layer)

        return check
