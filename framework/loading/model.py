"""A loaded model on one rank: what the driver may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from framework.engine.cache import KVCache
from framework.engine.inbox import Inbox
from framework.engine.loop import Engine, Events
from framework.engine.request import Orders, Request
from framework.layers.experts import Router
from framework.layers.group import Group
from framework.layers.linear import ParallelLinear
from framework.models.decoder import Decoder
from framework.planning.plan import Plan
from framework.text.tokenizer import Tokenizer

Turn = tuple[str, int, str]  # layer, position, decision


class LoadedModel:
    """Decoder, cache and engine of one rank. Rank 0's answers are the model's; the others keep step."""

    def __init__(self, plan: Plan, model: Decoder, cache: KVCache, group: Group, held: int) -> None:
        self.plan, self.model, self.cache, self.group = plan, model, cache, group
        self._held = held
        self._inbox = Inbox()
        self._engine = self._make_engine(None)

    def set_tokenizer(self, tokenizer_json: str | None) -> None:
        """Give rank 0 the tokenizer that stop strings and streamed text need."""
        tokenizer = Tokenizer.from_json(tokenizer_json) if tokenizer_json and self.group.rank == 0 else None
        self._engine = self._make_engine(tokenizer)

    def _make_engine(self, tokenizer: Tokenizer | None) -> Engine:
        runtime = self.plan.runtime
        return Engine(
            self.model,
            self.cache,
            tokenizer,
            self.group,
            max_batch=runtime.max_batch,
            chunk_tokens=runtime.chunk_tokens,
            eos_ids=self.plan.spec.eos_ids,
            context=runtime.context,
        )

    def bytes_held(self) -> int:
        """Bytes of weights as the schemes hold them."""
        return self._held

    def generate(self, requests: list[Request]) -> Iterator[Events]:
        """Run requests as one continuously batched stream of events (empty lists on ranks but 0)."""
        yield from self._engine.generate(requests)

    def serve(self) -> Iterator[Events]:
        """Run what is posted, until `end`."""
        yield from self._engine.serve(self._inbox)
        self._inbox = Inbox()

    def post(self, orders: Orders) -> None:
        """Hand orders to `serve`, on rank 0; from any thread, before it runs or while it does."""
        self._inbox.put(orders)

    def end(self) -> None:
        """Let `serve` end on all ranks, on rank 0; from any thread."""
        self._inbox.close()

    def score(self, token_ids: list[int], turned: Sequence[Turn] = ()) -> np.ndarray[Any, Any] | None:
        """Return fp32 logits [T, vocab] of every position, on rank 0.

        `turned`: layers with experts, positions and the decision of the router that goes the other way there.
        """
        rows: dict[str, dict[int, str]] = {}
        for layer, position, decision in turned:
            rows.setdefault(layer, {})[position] = decision
        with self._at_routers(lambda name, router: _turner(router, rows[name]) if name in rows else None):
            logits = self._engine.score(token_ids)
        return logits.numpy() if self.group.rank == 0 else None

    def score_stepwise(self, token_ids: list[int]) -> np.ndarray[Any, Any] | None:
        """The same by decoding token after token through the cache."""
        logits = self._engine.score_stepwise(token_ids)
        return logits.numpy() if self.group.rank == 0 else None

    def router_margins(self, token_ids: list[int]) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """Return, by layer and decision, how close each position of one forward pass was to deciding otherwise [T]."""
        margins: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        with self._at_routers(lambda name, router: _margin_recorder(router, margins.setdefault(name, {}))):
            self._engine.score(token_ids)
        return margins

    @contextmanager
    def _at_routers(self, hook_of: Callable[[str, Router], Any]) -> Iterator[None]:
        """Hook the routers for which there is a hook, by the layer's name."""
        routers = {name.removesuffix(".router"): m for name, m in self.model.named_modules() if isinstance(m, Router)}
        hooks = [(router, hook_of(name, router)) for name, router in routers.items()]
        handles = [router.register_forward_hook(hook) for router, hook in hooks if hook is not None]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def trace(self, token_ids: list[int]) -> dict[str, np.ndarray[Any, Any]]:
        """Return the output [T, N of this rank] fp32 of every linear module of one forward pass."""
        outputs: dict[str, np.ndarray[Any, Any]] = {}
        hooks = [
            layer.register_forward_hook(_recorder(layer, outputs))
            for layer in self.model.modules()
            if isinstance(layer, ParallelLinear)
        ]
        try:
            self._engine.score(token_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs


def _margin_recorder(router: Router, margins: dict[str, np.ndarray[Any, Any]]) -> Any:  # noqa: ANN401
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        for decision, found in router.margins(router.gate(inputs[0]).float()).items():
            rows = found.cpu().numpy()
            margins[decision] = np.concatenate([margins[decision], rows]) if decision in margins else rows

    return record


def _turner(router: Router, decisions: Mapping[int, str]) -> Any:  # noqa: ANN401
    seen = 0

    def turn(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal seen
        scores, (weights, chosen) = router.gate(inputs[0]).float(), output
        for position, decision in decisions.items():
            if seen <= position < seen + len(scores):
                row = slice(position - seen, position - seen + 1)
                weights[row], chosen[row] = router.choose_otherwise(scores[row], decision)
        seen += len(scores)
        return weights, chosen

    return turn


def _recorder(layer: ParallelLinear, outputs: dict[str, np.ndarray[Any, Any]]) -> Any:  # noqa: ANN401
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        parts = output.float().split(layer.widths, dim=-1)
        for name, part in zip(layer.names, parts, strict=True):
            rows = part.cpu().numpy()
            outputs[name] = np.concatenate([outputs[name], rows]) if name in outputs else rows.copy()

    return record
