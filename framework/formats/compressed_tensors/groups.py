"""What quantization_config of compressed-tensors declares, and for which modules.

Fields, defaults and presets: compressed-tensors 0.20, QuantizationArgs and QuantizationScheme. Unknown keys are let
through: Ascend's converters add some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem, nearest
from framework.formats.declared import settings
from framework.formats.names import stem
from framework.geometry import Module

FORMAT = "compressed_tensors"
PACKED, CODES = "pack-quantized", "int-quantized"
READ = (PACKED, CODES, "naive-quantized", "dense")
# known to the library, run by nobody here
REFUSED = (
    "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized",
    "sparse-bitmask", "sparse-24-bitmask", "marlin-24",
)  # fmt: skip
STRATEGIES = ("tensor", "channel", "group")
OTHER_STRATEGIES = ("block", "token", "tensor_group", "attn_head")
ORDERS = {"weight": False, "static": False, "group": True, "dynamic": True, True: True, False: False, None: False}
EXPERT_CLASSES = ("moegmm", "fusedmoe", "linear")

_EXPERT = re.compile(r"\.experts\.\d+\.")
_PRESET = re.compile(r"W([2-8])A(4|8|16)(_ASYM)?$")
_FIELDS: dict[str, tuple[type, ...]] = {
    "num_bits": (int,), "type": (str,), "symmetric": (bool,), "strategy": (str,), "group_size": (int,),
    "dynamic": (bool, str), "actorder": (str, bool),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Args:
    """How weights or activations are quantized. `group` is set with strategy group, `gathered`: groups by g_idx."""

    bits: int = 8
    kind: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group: int = 0
    dynamic: bool | str = False
    gathered: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a group cannot be run: a problem's code and the words for it."""

    code: str
    why: str


@dataclass(frozen=True, slots=True)
class Group:
    """One of config_groups. Without `weights` its modules are float; with `faults` nobody can run it."""

    name: str
    targets: tuple[str, ...]
    format: str = ""
    weights: Args | None = None
    inputs: Args | None = None
    clip: bool = False
    faults: tuple[Fault, ...] = ()

    @property
    def scheme(self) -> str:
        """The framework's word."""
        if self.weights is None:
            return "float"
        if self.inputs is None:
            return f"w{self.weights.bits}a16"
        return f"w{self.weights.bits}a8_{'dynamic' if self.inputs.dynamic else 'static'}"

    @property
    def label(self) -> str:
        """The same in words: codes, what shares a scale, activations."""
        weights, inputs = self.weights, self.inputs
        if weights is None:
            return "float"
        shared = f"groups of {weights.group}" if weights.group else f"one scale a {weights.strategy}"
        parts = [f"int{weights.bits} weights, {shared}"]
        parts += [] if weights.symmetric else ["with zero points"]
        parts += ["groups by g_idx"] if weights.gathered else []
        if inputs is not None:
            parts.append(f"int{inputs.bits} activations {'per token' if inputs.dynamic else 'of a static scale'}")
            if inputs.dynamic and not inputs.symmetric:
                parts.append("declared asymmetric, run symmetric")
        parts += ["activation clip"] if self.clip else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Declared:
    """A parsed quantization_config: groups in order, what is ignored, what is wrong with the whole."""

    groups: tuple[Group, ...]
    ignored: frozenset[str]
    ignored_patterns: tuple[re.Pattern[str], ...]
    patterns: Mapping[str, re.Pattern[str]]  # of `re:` targets
    problems: tuple[Problem, ...]

    def find(self, names: Sequence[str]) -> tuple[Group | None, bool]:
        """Return the group of a module that is known under `names`, and whether its name, not its class, chose it.

        ignore wins: an equal name, a dotted end of the name, or a regular expression from the start on. Then names and
        regular expressions, in the order of the file; then classes, of experts the more special one first.
        """
        for name in names:
            parts = name.split(".")
            ends = (".".join(parts[i:]) for i in range(len(parts)))
            if any(end in self.ignored for end in ends) or any(p.match(name) for p in self.ignored_patterns):
                return None, True
        for group in self.groups:
            for target in group.targets:
                pattern = self.patterns.get(target)
                if target in names or (pattern is not None and any(pattern.match(name) for name in names)):
                    return group, True
        for one in EXPERT_CLASSES if _EXPERT.search(names[0]) else ("linear",):
            for group in self.groups:
                if one in (target.lower() for target in group.targets):
                    return group, False
        return None, False


def find(module: Module, index: Index) -> tuple[Group | None, bool]:
    """Return the group of one linear, and whether its name chose it (Declared.find)."""
    return declared(index).find(tuple(dict.fromkeys((stem(module, index), module.name))))


@lru_cache(maxsize=8)
def declared(index: Index) -> Declared:
    """Parse what a checkpoint declares (parse)."""
    return parse(settings(index, FORMAT), f"{index.root.name}: config.json")


def parse(given: Mapping[str, Any], where: str = "config.json") -> Declared:
    """Parse a quantization_config. Nothing is raised for what is malformed: it becomes problems and faults."""
    inner = given.get("quantization_config")  # old compression_config held it beside the sparsity
    if "config_groups" not in given and isinstance(inner, Mapping):
        given = {**given, **inner}
    wrong: list[tuple[str, str]] = []
    held, ignore, top = given.get("config_groups"), given.get("ignore") or [], given.get("format")
    if not isinstance(held, Mapping) or not held:
        wrong.append((f"config_groups is {_shown(held)}", "groups of targets by name"))
        held = {}
    groups = tuple(_group(str(name), raw, top) for name, raw in held.items())
    if not _strings(ignore):
        wrong.append((f"ignore is {_shown(ignore)}", "a list of module names"))
        ignore = []
    patterns = {}
    for text in dict.fromkeys([*ignore, *(target for group in groups for target in group.targets)]):
        if text.startswith("re:"):
            try:
                patterns[text] = re.compile(text[3:])
            except re.error as error:
                wrong.append((f"{text} is no regular expression: {error}", "one that compiles"))
    return Declared(
        groups,
        frozenset(text for text in ignore if not text.startswith("re:")),
        tuple(patterns[text] for text in ignore if text in patterns),
        patterns,
        (*(_malformed(where, *pair) for pair in wrong), *_refused_as_a_whole(where, given)),
    )


def _refused_as_a_whole(where: str, given: Mapping[str, Any]) -> list[Problem]:
    """Sparsity and transforms change what the stored numbers mean. A dense sparsity format stores all weights."""
    found = []
    for key in ("sparsity_config", "moe_sparsity_config", "transform_config"):
        held = given.get(key)
        if key == "transform_config" and isinstance(held, Mapping) and not held.get("config_groups", True):
            continue
        if held and not (isinstance(held, Mapping) and held.get("format") == "dense"):
            found.append(
                Problem(
                    "format-feature",
                    f"the checkpoint has a {key}, which is not supported",
                    where,
                    _shown(held),
                    "a checkpoint without it",
                )
            )
    return found


def _group(name: str, raw: Any, top: Any) -> Group:  # noqa: ANN401
    if isinstance(raw, list):  # a preset: its name for a key, its targets for a value
        raw = {"targets": raw, **_preset(name)}
    if not isinstance(raw, Mapping):
        return Group(name, (), faults=(Fault("file-malformed", f"group {name} is {_shown(raw)}, no JSON object"),))
    faults: list[Fault] = []
    targets = raw.get("targets")
    if not _strings(targets):
        faults.append(Fault("file-malformed", f"targets of {name} is {_shown(targets)}, no list of names"))
        targets = []
    weights = _args(raw.get("weights"), f"{name}.weights", faults)
    inputs = _args(raw.get("input_activations"), f"{name}.input_activations", faults)
    asked = raw.get("format") or (None if top == "mixed-precision" else top)
    form = asked or (PACKED if inputs is None else CODES)
    if not isinstance(form, str) or form not in READ:
        faults.append(_unread(form))
        form = ""
    if form == "dense" or (weights is None and not faults):
        return Group(name, tuple(targets or ()), form, faults=tuple(faults))
    if raw.get("unknown preset"):
        faults.append(Fault("quant-type-unknown", f"{name} is no preset that can be run"))
    if raw.get("output_activations") is not None:
        faults.append(Fault("format-feature", "quantized outputs"))
    if not faults and weights is not None:
        faults += [Fault("format-feature", why) for why in _beyond(weights, inputs)]
    clip = raw.get("activation_use_clip") is True
    return Group(name, tuple(targets or ()), form, weights, inputs, clip, tuple(faults))


def _preset(name: str) -> dict[str, Any]:
    match = _PRESET.match("W8A8" if name == "INT8" else name)
    if match is None:
        return {"unknown preset": True, "weights": {}}
    bits, activations = int(match[1]), int(match[2])
    weights: dict[str, Any] = {"num_bits": bits, "group_size": 128, "symmetric": not match[3]}
    if (bits, activations) == (8, 8):
        weights = {"num_bits": 8, "strategy": "channel"}
    inputs = {"num_bits": activations, "strategy": "token", "dynamic": True}
    return {"weights": weights, "input_activations": None if activations == 16 else inputs}


def _args(raw: Any, where: str, faults: list[Fault]) -> Args | None:  # noqa: ANN401
    """Read QuantizationArgs; what is of the wrong type or unknown is a fault and falls back to the default."""
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        faults.append(Fault("file-malformed", f"{where} is {_shown(raw)}, no JSON object"))
        return None
    given = {key: raw[key] for key in _FIELDS if raw.get(key) is not None}
    for key in [key for key, value in given.items() if type(value) not in _FIELDS[key]]:
        faults.append(Fault("file-malformed", f"{where}.{key} is {_shown(given.pop(key))}"))
    size = given.get("group_size", 0)
    if size < -1:
        faults.append(Fault("file-malformed", f"{where}.group_size is {size}"))
    by_size = {0: "tensor", -1: "channel"}.get(size, "group")
    strategy = given.get("strategy", by_size).lower()
    if strategy == "group" and size <= 0:
        faults.append(Fault("file-malformed", f"{where} is by group and has group_size {size}"))
    for value, known in ((strategy, STRATEGIES + OTHER_STRATEGIES), (given.get("type", "int"), ("int", "float"))):
        if value not in known:
            faults.append(Fault("quant-type-unknown", f"{where} is by {_shown(value)}, known: {', '.join(known)}"))
    order = given.get("actorder")
    if order not in ORDERS:
        faults.append(Fault("quant-type-unknown", f"{where}.actorder is {_shown(order)}"))
    return Args(
        given.get("num_bits", 8),
        given.get("type", "int"),
        given.get("symmetric", True),
        strategy,
        size if strategy == "group" else 0,
        given.get("dynamic", False),
        ORDERS.get(order, False) and strategy == "group",
    )


def _beyond(weights: Args, inputs: Args | None) -> list[str]:
    """Say what of a well-formed group nobody can run."""
    found = []
    if weights.kind != "int" or weights.bits not in (4, 8):
        found.append(f"{weights.bits}-bit {weights.kind} weights; int weights of 4 and 8 bits are run")
    if weights.strategy not in STRATEGIES:
        found.append(f"weight scales by {weights.strategy}; by {', '.join(STRATEGIES)} are run")
    if weights.dynamic:
        found.append("weights that are quantized while running")
    if inputs is None:
        return found
    if (inputs.kind, inputs.bits) != ("int", 8):
        found.append(f"{inputs.bits}-bit {inputs.kind} activations; int activations of 8 bits are run")
    elif (inputs.strategy, inputs.dynamic) not in (("token", True), ("tensor", False)):
        kind = "dynamic" if inputs.dynamic else "static"
        found.append(f"{kind} activations by {inputs.strategy}; dynamic by token and static by tensor are run")
    elif weights.bits == 4 and not inputs.dynamic:
        found.append("static activations with 4-bit weights; with 8-bit ones they are run")
    return found


def _unread(form: Any) -> Fault:  # noqa: ANN401
    if form in REFUSED:
        return Fault("format-feature", f"format {form}; {', '.join(READ)} are read")
    if not isinstance(form, str):
        return Fault("file-malformed", f"format is {_shown(form)}")
    near = nearest(form, READ + REFUSED)
    return Fault("quant-type-unknown", f"format {form} is unknown; nearest: {near[0] if near else CODES}")


def _strings(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _shown(value: Any) -> str:  # noqa: ANN401
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _malformed(where: str, what: str, expected: str) -> Problem:
    return Problem(
        "file-malformed",
        f"quantization_config: {what}",
        where,
        f"expected: {expected}",
        "fetch the checkpoint again   or   mend quantization_config by the model card",
    )
