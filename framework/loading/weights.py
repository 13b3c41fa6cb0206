"""A rank's weights: rectangles of the plan, read, decoded, prepared by their schemes. Implements models.Weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from framework.checkpoint.index import Index
from framework.checkpoint.reader import Reader
from framework.formats.base import Decoder
from framework.geometry import Module, Rect, Split
from framework.layers.attention import ATB_TIERS
from framework.layers.group import Group
from framework.layers.linear import ParallelLinear, Part
from framework.loading.scales import check_values
from framework.planning.plan import Plan, PlannedModule
from framework.quantization.online import quantize
from framework.quantization.registry import SCHEMES
from framework.quantization.schemes.base import Experts
from framework.quantization.tensor import QuantTensor, concat, fusable

CORRECTION = "quant_bias"  # of w8a8_static: the float bias and the shift of the activations are inside
Progress = Callable[[int, int], None]  # bytes done, bytes in all


class RankWeights:
    """Reads what `plan` gives to `group.rank`; nothing is decided here.

    `prepared_bytes` counts what the schemes hold; `progress` hears of bytes read against this rank's share.
    """

    def __init__(
        self,
        plan: Plan,
        index: Index,
        reader: Reader,
        decoder: Decoder,
        group: Group,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.plan, self.index, self.reader, self.decoder, self.group = plan, index, reader, decoder, group
        self.device = device
        self.dtype = getattr(torch, plan.runtime.dtype)
        self.atb = plan.tier in ATB_TIERS
        self.planned = {m.module.name: m for m in plan.modules}
        self.progress = progress
        self.prepared_bytes = 0
        self._embeddings: dict[str, Tensor] = {}
        self._total = sum(m.shards[group.rank].size * m.linears_on(group.rank) for m in plan.modules)
        self._done = 0

    def linear(self, *names: str) -> ParallelLinear:
        """Return the layer of one module, or of several over one input: equal schemes fused to one matmul."""
        planned = [self.planned[name] for name in names]
        tied = self._tied(planned[0])
        if tied is not None:
            bias = self._bias(planned)
            parts = [self._prepare("float", QuantTensor(tied))]
        else:
            decoded = [(p.scheme, self._decode(p)) for p in planned]
            bias = self._bias(planned, [weight for _, weight in decoded])
            calls = _calls(decoded, {p.scheme: p.max_rows for p in planned})
            parts = [self._prepare(scheme, weight) for scheme, weight in calls]
        layer = ParallelLinear(
            parts,
            bias,
            planned[0].split,
            self.group,
            in_sizes=self._in_sizes(planned[0]),
            out_sizes=[sum(p.shards[r].shape[0] for p in planned) for r in range(self.group.size)],
            names=names,
            widths=[self._width(p) for p in planned],
        )
        self.prepared_bytes += layer.nbytes if tied is None else 0
        return layer

    def experts(self, *names: str) -> ParallelLinear:
        """Return the grouped layer of one projection of all experts, or of several over one input."""
        planned = [self.planned[name] for name in names]
        weights = [self._decode_experts(p) for p in planned]
        first = [next(of_one) for of_one in weights]
        # projections in activation order, which may differ from expert to expert, are not joined
        alike = len({p.scheme for p in planned}) == 1 and all(w.order is None and fusable(first[0], w) for w in first)
        count = len(self._held(planned[0]))
        # joined they are one group, of the first's scheme
        groups = [(first, weights)] if alike else [([f], [w]) for f, w in zip(first, weights, strict=True)]
        layer = ParallelLinear(
            [self._prepare_experts(p.scheme, _Joined(count, *g)) for p, g in zip(planned, groups, strict=False)],
            None,
            planned[0].split,
            self.group,
            in_sizes=self._in_sizes(planned[0]),
            out_sizes=[sum(p.shards[r].shape[0] for p in planned) for r in range(self.group.size)],
            names=names,
            widths=[self._width(p) for p in planned],
        )
        self.prepared_bytes += layer.nbytes
        return layer

    def _held(self, planned: PlannedModule) -> range:
        return planned.experts_on(self.group.rank)

    def expert_range(self, name: str) -> tuple[int, int]:
        """Return the half-open range of experts that this rank holds."""
        held = self._held(self.planned[name])
        return held.start, held.stop

    def matrix(self, name: str) -> Tensor:
        """Return this rank's part of a linear as a plain weight [N, K] in the model's dtype."""
        weight = self._decode(self.planned[name]).dequantize().to(self.dtype).to(self.device)
        self.prepared_bytes += weight.nbytes
        return weight

    def bias(self, name: str) -> Tensor:
        """Return the whole float bias of a linear in the model's dtype."""
        planned = self.planned[name]
        found = self.decoder.bias(planned.module, planned.module.full, self.index, self.reader)
        return found.to(self.dtype).to(self.device)

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias [H] of a norm in the model's dtype."""
        planned = self.planned[name]
        weight = self._decode(planned).codes.flatten().to(self.dtype).to(self.device)
        bias = self._bias([planned])
        self.prepared_bytes += weight.nbytes + (0 if bias is None else bias.nbytes)
        return weight, bias

    def parameter(self, name: str) -> Tensor:
        """Return the values of a parameter in fp32."""
        planned = self.planned[name]
        values = (
            self.decoder.decode(
                planned.module, planned.module.full, "float", self.index, self.reader, dtype=torch.float32
            )
            .codes.reshape(planned.module.dims)
            .to(self.device)
        )
        self.prepared_bytes += values.nbytes
        return values

    def embedding(self, name: str) -> tuple[Tensor, int]:
        """Return this rank's rows in the model's dtype, and the first row's index."""
        planned = self.planned[name]
        weight = self._decode(planned).codes.to(self.dtype).to(self.device)
        self.prepared_bytes += weight.nbytes
        self._embeddings[name] = weight
        return weight, planned.shards[self.group.rank].n0

    def rope_divisors(self) -> Tensor | None:
        """Return the rotary divisors that the file carries (GGUF llama 3)."""
        info = self.index.tensors.get("rope_freqs.weight") if self.plan.spec.rope.from_file else None
        if info is None:
            return None
        return torch.from_numpy(self.reader.read(info, 0, 1).reshape(-1).view("<f4").copy())

    def _decode(self, planned: PlannedModule) -> QuantTensor:
        rect = planned.shards[self.group.rank]
        if planned.mode == "online":
            weight = self._quantized(planned, planned.module, rect)
        else:
            weight = self.decoder.decode(
                planned.module, rect, planned.scheme, self.index, self.reader, dtype=self.dtype
            )
        return self._accepted(planned, planned.module, weight)

    def _decode_experts(self, planned: PlannedModule) -> Iterator[QuantTensor]:
        """Return the weights of this rank's experts, decoded as they are taken."""
        rect = planned.shards[self.group.rank]
        modules = [planned.module.expert(e) for e in self._held(planned)]
        if planned.mode == "online":
            weights = (self._quantized(planned, module, rect) for module in modules)
        else:
            scheme = planned.scheme
            weights = self.decoder.decode_experts(modules, rect, scheme, self.index, self.reader, dtype=self.dtype)
        return map(partial(self._accepted, planned), modules, weights)  # unlike a loop it holds no weight

    def _accepted(self, planned: PlannedModule, module: Module, weight: QuantTensor) -> QuantTensor:
        """Check what was decoded, and count it."""
        if module.quantizable:
            check_values(weight, module.name, self.plan.checkpoint, self.dtype)
        if CORRECTION in weight.rows and planned.split is Split.ROW and self.group.rank:
            # the correction of a row split is added once
            weight = replace(weight, rows={**weight.rows, CORRECTION: torch.zeros_like(weight.rows[CORRECTION])})
        self._done += planned.shards[self.group.rank].size
        self.progress(self._done, self._total)
        return weight

    def _quantized(self, planned: PlannedModule, module: Module, rect: Rect) -> QuantTensor:
        """Quantize whole rows, whose scales every rank then has alike, and cut this rank's columns."""
        rows = Rect(rect.n0, rect.n1, 0, module.shape[1])
        whole = self.decoder.decode(module, rows, "float", self.index, self.reader, dtype=torch.float32)
        return quantize(whole.codes, planned.scheme, planned.group).slice(0, rect.n1 - rect.n0, rect.k0, rect.k1)

    def _prepare(self, scheme_name: str, weight: QuantTensor) -> Part:
        scheme = SCHEMES[scheme_name]
        operands = scheme.prepare(weight, dtype=self.dtype, device=self.device)
        if scheme_name == "float":
            apply = partial(scheme.linear, operands=operands)
            return Part(apply, operands.nbytes, biased=True)
        return Part(lambda x, apply=scheme.linear, held=operands: apply(x, held), operands.nbytes)

    def _prepare_experts(self, scheme_name: str, weights: Experts) -> Part:
        scheme = SCHEMES[scheme_name]
        operands = scheme.prepare_experts(weights, dtype=self.dtype, device=self.device)
        return Part(lambda x, counts, apply=scheme.grouped, held=operands: apply(x, counts, held), operands.nbytes)

    def _tied(self, planned: PlannedModule) -> Tensor | None:
        if planned.module.tied_to and planned.scheme == "float":
            return self._embeddings[planned.module.tied_to]
        return None

    def _bias(self, planned: list[PlannedModule], weights: list[QuantTensor] | None = None) -> Tensor | None:
        """Return the float bias of modules over one input; none of those whose scheme has it in its correction."""
        inside = [CORRECTION in weight.rows for weight in weights or ()] or [False] * len(planned)
        if not any(p.module.bias and not within for p, within in zip(planned, inside, strict=True)):
            return None
        parts = []
        for p, within in zip(planned, inside, strict=True):
            rect = p.shards[self.group.rank] if p.split in (Split.COLUMN, Split.VOCAB) else p.module.full
            if p.module.bias and not within:
                parts.append(self.decoder.bias(p.module, rect, self.index, self.reader))
            else:
                parts.append(torch.zeros(rect.shape[0]))
        return torch.cat(parts).to(self.dtype).to(self.device)

    def _width(self, planned: PlannedModule) -> int:
        whole = planned.split in (Split.ROW, Split.ROWS_GATHER, Split.REPLICATED)
        return planned.module.shape[0] if whole else planned.shards[self.group.rank].shape[0]

    def _in_sizes(self, planned: PlannedModule) -> list[list[int]]:
        """Every rank's share of each range of the input features, as the layers before made them."""
        module = planned.module
        if planned.split is not Split.ROWS_GATHER:
            return [[module.shape[1]] * self.group.size]
        return [self._axis_sizes(axis, unit) for axis, unit in module.packed or ((module.axis, module.unit),)]

    def _axis_sizes(self, axis: str, unit: int) -> list[int]:
        peer = next(m for m in self.plan.modules if m.module.axis == axis and m.split in (Split.COLUMN, Split.VOCAB))
        return [rect.shape[0] // peer.module.unit * unit for rect in peer.shards]


@dataclass(frozen=True, slots=True)
class _Joined:
    """Each expert's projections joined; those of the first are decoded already."""

    count: int
    first: list[QuantTensor]
    others: list[Iterator[QuantTensor]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[QuantTensor]:
        yield concat(self.first)
        for _ in range(1, self.count):
            yield concat([next(of_one) for of_one in self.others])


def _calls(weights: list[tuple[str, QuantTensor]], max_rows: Mapping[str, int]) -> list[tuple[str, QuantTensor]]:
    """Join neighbours of one scheme and kind, deal the rows of what is too tall: as few matmuls as there can be."""
    made: list[tuple[str, list[QuantTensor]]] = []
    for scheme, weight in weights:
        if made and made[-1][0] == scheme and fusable(made[-1][1][0], weight):
            made[-1][1].append(weight)
        else:
            made.append((scheme, [weight]))
    return [(scheme, part) for scheme, group in made for part in _dealt(concat(group), max_rows[scheme])]


def _dealt(weight: QuantTensor, max_rows: int) -> list[QuantTensor]:
    n, k = weight.shape
    if not max_rows or n <= max_rows:
        return [weight]
    weight = replace(weight, stored=weight.codes)
    return [weight.slice(first, min(first + max_rows, n), 0, k) for first in range(0, n, max_rows)]
