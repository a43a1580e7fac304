"""Ways to come by a layer's dense weight, and streams to make it on: what dequantise_ahead.py compares."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from _flux_chain import Dense, Weights
from _q8_0_forms import CUDA, Form
from pack.loaders.quant.kernels import launch

Work = Callable[[], Any]


class SideStream:
    """On a stream of its own, after what came before `compute`; `delay`: cycles that it waits besides."""

    def __init__(self, priority: int = 0, delay: int = 0) -> None:
        self.stream, self.delay = torch.cuda.Stream(priority=priority), delay

    def around(self, works: list[Work], compute: Work) -> tuple[Any, list[Any]]:
        """`compute()`, with `works` beside it, and what to `wait` for until each of them is done."""
        ready = torch.cuda.Event()
        ready.record()
        result, done = compute(), []
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            if self.delay:
                torch.cuda._sleep(self.delay)
            for work in works:
                work()
                done.append(torch.cuda.Event())
                done[-1].record()
        return result, done

    def wait(self, done: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(done)


class Early:
    """Without a GPU: as early as events allow."""

    def around(self, works: list[Work], compute: Work) -> tuple[Any, list[Any]]:
        for work in works:
            work()
        return compute(), works

    def wait(self, done: Work) -> None:
        pass


class Late:
    """Without a GPU: as late as events allow."""

    def around(self, works: list[Work], compute: Work) -> tuple[Any, list[Any]]:
        return compute(), works

    def wait(self, done: Work) -> None:
        done()


class Present(Dense):
    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        assert weights.kind is not None
        self.calls = [
            launch.bind(data, weights.kind, dense.shape, torch.bfloat16)
            for data, dense in zip(weights.data, weights.dense, strict=True)
        ]

    def weight(self, i: int) -> torch.Tensor:
        return self.calls[i]()


class Scratch(Dense):
    def __init__(self, weights: Weights, form: Form, buffers: list[torch.Tensor]) -> None:
        super().__init__(weights)
        self.out = [buffers[i % 2][: w.numel()].view(w.shape) for i, w in enumerate(weights.dense)]
        self.calls = [form.bind(data, out) for data, out in zip(weights.data, self.out, strict=True)]

    def weight(self, i: int) -> torch.Tensor:
        self.calls[i]()
        return self.out[i]


@dataclass(frozen=True)
class Release:
    """When a weight may be made: with the product before its own, and how many together with attention. Those that
    come behind attention wait for it where it releases any; what nothing releases is made on the product's stream."""

    product: bool = True
    attention: int = 0


class Ahead(Scratch):
    """The first pass learns the order, in which a weight's buffer is free once the product before last was made."""

    def __init__(
        self,
        weights: Weights,
        form: Form,
        buffers: list[torch.Tensor],
        release: Release,
        side: Any,
        under: bool,
    ) -> None:
        super().__init__(weights, form, buffers)
        self.release, self.side = release, side
        self.own = torch.cuda.Stream(priority=-1) if under and CUDA else None
        self.seen: list[int | None] = []  # products, and None for attention
        self.plan: dict[int, list[int]] = {}
        self.at, self.done = 0, dict[int, Any]()

    def stream(self) -> Any:
        return torch.cuda.stream(self.own) if self.own else nullcontext()

    def begin(self) -> None:
        assert not self.done
        self.plan, self.seen, self.at = self._planned(), [], 0

    def _planned(self) -> dict[int, list[int]]:
        plan, released, product = dict[int, list[int]](), 0, -1
        products = sum(p is not None for p in self.seen)
        for at, what in enumerate(self.seen):
            if what is None:
                last = product + self.release.attention
            else:
                product = what
                waits = self.release.attention and self.seen[at + 1 : at + 2] == [None]
                last = product + (self.release.product and not waits)
            plan[at] = list(range(max(released, product) + 1, min(last + 1, products)))
            released = max(released, last)
        return plan

    def _around(self, what: int | None, compute: Work) -> Any:
        self.seen.append(what)
        layers = self.plan.get(self.at, [])
        self.at += 1
        if not layers:
            return compute()
        result, done = self.side.around([self.calls[j] for j in layers], compute)
        self.done.update(zip(layers, done, strict=True))
        return result

    def weight(self, i: int) -> torch.Tensor:
        if i not in self.done:
            return super().weight(i)
        self.side.wait(self.done.pop(i))
        return self.out[i]

    def linear(self, i: int, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight(i)
        return self._around(i, lambda: F.linear(x, weight, self.weights.bias[i]))

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._around(None, lambda: Dense.attention(self, q, k, v))
