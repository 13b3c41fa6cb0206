"""The headers that LLM-Compressor would save: what `model.assume` checks and plans with."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import translate
from typing import Any

from framework.errors import InputError, Problem, nearest
from framework.formats.base import Assumed
from framework.formats.compressed_tensors.groups import CODES, PACKED, Declared, Group, parse
from framework.formats.compressed_tensors.tensors import tensors
from framework.formats.plain.layout import assumed_float
from framework.geometry import Module, Role

GROUP_SIZE = 128
_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
# scheme: bits, activations, format, by group unless asked otherwise; what the tool's presets of these names say
MADE: dict[str, tuple[int, dict[str, Any] | None, str, bool]] = {
    "w4a16": (4, None, PACKED, True),
    "w8a16": (8, None, PACKED, True),
    "w4a8_dynamic": (4, _TOKEN, CODES, True),
    "w8a8_dynamic": (8, _TOKEN, CODES, False),
    "w8a8_static": (8, _STATIC, CODES, False),
}


def assume(modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
    """Return the stand-in of CompressedTensorsLayout.stand_in."""
    rules = [(_regex(str(rule["pattern"])), str(rule["scheme"])) for rule in options.get("layers", ())]
    given = [*rules, ("Linear", scheme)]
    groups = {f"group_{i}": {"targets": [target], **_made(asked, options)} for i, (target, asked) in enumerate(given)}
    formats = {group["format"] for group in groups.values() if group.get("weights")}
    config = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "config_groups": groups,
        "ignore": [module.name for module in modules if module.role is not Role.NONE and module.quantizable],
        "quantization_status": "compressed",
    }
    parsed = parse(config)
    made = [entry for module in modules for entry in _assumed(module, parsed)]
    return Assumed(tuple(made), {}, {"quantization_config": config})


def _assumed(module: Module, parsed: Declared) -> list[tuple[str, str, tuple[int, ...]]]:
    names = module.names()
    group: Group | None = parsed.find((names[0],))[0] if module.quantizable and not module.role else None
    if group is None or group.weights is None:
        return assumed_float(module)
    found = (spec for name in names for spec in tensors(module, name, group, packed=group.format == PACKED))
    return [(spec.name, spec.dtypes[0], spec.shape) for spec in found]


def _made(scheme: str, options: dict[str, Any]) -> dict[str, Any]:
    if scheme == "float":
        return {"weights": None, "input_activations": None, "format": "dense"}
    if scheme not in MADE:
        near = nearest(scheme, MADE)
        raise InputError(
            Problem(
                "quant-type-unknown",
                f"no compressed-tensors checkpoint of scheme {scheme} is written by its tools",
                "model.assume",
                f"schemes: float, {', '.join(MADE)}",
                f"model.assume.scheme={near[0] if near else 'w8a8_dynamic'}",
            )
        )
    bits, inputs, form, grouped = MADE[scheme]
    size = options.get("group_size", GROUP_SIZE) if grouped else -1
    weights = {"num_bits": bits, "type": "int", "symmetric": inputs is not None or options.get("symmetric", True)}
    by_group = {"strategy": "group", "group_size": size} if size > 0 else {"strategy": "channel", "group_size": None}
    return {"weights": weights | by_group, "input_activations": inputs, "format": form}


def _regex(pattern: str) -> str:
    """A glob over whole names, or `re:` and an expression, as a target, which need not match to the end."""
    return f"re:(?:{pattern[3:]})\\Z" if pattern.startswith("re:") else f"re:{translate(pattern)}"
