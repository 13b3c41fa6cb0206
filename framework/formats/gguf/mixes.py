"""Which type llama.cpp's quantizer gives each tensor: the mixes of types that files are named after."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from framework.checkpoint.gguf import GGML_TYPES
from framework.errors import InputError, Problem, nearest
from framework.formats.base import FLOATS
from framework.geometry import Kind, Module, Role

# Blocks of 32 that are one group of npu_weight_quant_batchmatmul as they are.
KEPT = {"Q4_0": "w4a16", "Q4_1": "w4a16", "Q8_0": "w8a16"}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True)
class Model:
    """What the rules ask of a model: layers, query rows a KV row, routed experts of a layer."""

    layers: int
    gqa: int
    experts: int


Rule = tuple[str, str, Callable[[int, Model], bool]]  # the part's last name, its type, in which layers


def _every(layer: int, model: Model) -> bool:
    return True


def _more(layer: int, model: Model) -> bool:
    """The first and last eighth, and every third in between."""
    eighth = model.layers // 8
    return layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2


def _first_eighth(layer: int, model: Model) -> bool:
    return layer < model.layers // 8


def _grouped(layer: int, model: Model) -> bool:
    return model.gqa >= 4


_K_M: tuple[Rule, ...] = (("v_proj", "Q6_K", _more), ("kv_b_proj", "Q6_K", _more), ("down_proj", "Q6_K", _more))
# mix: type of most tensors, exceptions of which the first holds. Q4_K_M is what `Q4_K` stands for.
MIXES: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "Q2_K": ("Q2_K", (("v_proj", "Q4_K", _grouped), ("v_proj", "Q3_K", _every), ("down_proj", "Q3_K", _every),
                      ("o_proj", "Q3_K", _every))),
    "Q3_K_S": ("Q3_K", ()),
    "Q3_K_M": ("Q3_K", (("v_proj", "Q5_K", lambda layer, _: layer < 2), ("v_proj", "Q4_K", _every),
                        ("down_proj", "Q5_K", lambda layer, model: layer < model.layers // 16),
                        ("down_proj", "Q4_K", _every), ("o_proj", "Q4_K", _every))),
    "Q4_K_S": ("Q4_K", (("v_proj", "Q5_K", lambda layer, _: layer < 4), ("down_proj", "Q5_K", _first_eighth))),
    "Q4_K_M": ("Q4_K", _K_M),
    "Q5_K_S": ("Q5_K", ()),
    "Q5_K_M": ("Q5_K", _K_M),
    "MXFP4_MOE": ("Q8_0", ()),
    **{kind: (kind, ()) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "BF16", "F16", "F32")},
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# with 8 experts a layer attention is small, and worth more bits
_OF_8 = {"k_proj": "Q8_0", "v_proj": "Q8_0", "kv_b_proj": "Q8_0"}
_OUTPUT_OF_8 = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
# when the columns are no multiple of the block
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_MIX_FOR = {"float": "Q4_K_M", "w4a16": "Q4_0", "w8a16": "Q8_0"}


def layer_of(name: str) -> int:
    """Return the number of a module's layer; -1 outside of layers."""
    match = LAYER.match(name)
    return int(match[1]) if match else -1


def types(modules: Sequence[Module], scheme: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ggml type that llama.cpp's quantizer gives each module's weight.

    `scheme` is float or one of KEPT; options are those of GgufLayout.stand_in. Rules: llama_tensor_get_type of
    llama.cpp's llama-quant.cpp.

    Raises:
        InputError: `quant-type-unknown`; `pattern-syntax`.
    """
    mix = str(options.get("mix", _default(scheme)))
    mix = ALIASES.get(mix, mix)
    if mix not in MIXES:
        raise _unknown(f"there is no mix {mix} of GGUF types", "gguf_mix", mix, MIXES)
    if scheme not in ("float", KEPT.get(MIXES[mix][0])):
        why = f"a GGUF of mix {mix} cannot serve {scheme}"
        raise _unknown(why, "gguf_mix", "", [name for name, one in MIXES.items() if KEPT.get(one[0]) == scheme])
    rules = [(_pattern(str(rule["pattern"])), _kind(str(rule["scheme"]))) for rule in options.get("layers", ())]
    model = _model(modules)
    tied = any(module.tied_to for module in modules)
    for module in modules:
        kind = _type(module, mix, model, tied=tied)
        if module.quantizable and module.role is not Role.ROUTER:
            kind = next((asked for pattern, asked in rules if pattern.match(module.names()[0])), kind)
        yield _fitting(kind, module.shape[1]) if module.kind not in (Kind.NORM, Kind.PARAMETER) else kind


def _type(module: Module, mix: str, model: Model, *, tied: bool) -> str:
    base, rules = MIXES[mix]
    if module.kind in (Kind.NORM, Kind.PARAMETER) or module.role is Role.ROUTER:
        return "F32"
    if base in FLOATS:
        return base
    if module.role is Role.HEAD or (module.kind is Kind.EMBEDDING and tied):
        return "Q8_0" if base == "Q8_0" or module.shape[1] % GGML_TYPES[base][1] else "Q6_K"
    if module.kind is Kind.EMBEDDING:
        return base
    if mix == "MXFP4_MOE":
        return "MXFP4" if module.experts else base
    part = module.name.rpartition(".")[2]
    if model.experts == 8 and (part in _OF_8 or (part == "o_proj" and mix in _OUTPUT_OF_8)):
        return _OF_8.get(part, "Q5_K")
    layer = layer_of(module.name)
    kind = next((kind for name, kind, where in rules if name == part and where(layer, model)), base)
    wide = part == "v_proj" and model.layers == 80 and model.gqa > 1 and not model.experts  # Llama 70B, Qwen2 72B
    return "Q5_K" if wide and kind in ("Q3_K", "Q4_K") else kind


def _fitting(kind: str, columns: int) -> str:
    if columns % GGML_TYPES[kind][1]:
        kind = _FALLBACK.get(kind, kind)
    return "F16" if columns % GGML_TYPES[kind][1] else kind


def _model(modules: Sequence[Module]) -> Model:
    layers = {layer_of(module.name) for module in modules} - {-1}
    rows = {module.name.rpartition(".")[2]: module.shape[0] for module in modules if ".self_attn." in module.name}
    gqa = rows["q_proj"] // rows["k_proj"] if "q_proj" in rows and "k_proj" in rows else 1
    return Model(len(layers), gqa, max((module.experts for module in modules), default=0))


def _default(scheme: str) -> str:
    if scheme not in _MIX_FOR:
        raise _unknown(f"no GGUF type serves {scheme}", "scheme", scheme, _MIX_FOR)
    return _MIX_FOR[scheme]


def _kind(scheme: str) -> str:
    """A pattern's scheme, or a type as it is; float: kept in bf16."""
    return "BF16" if scheme == "float" else scheme if scheme in GGML_TYPES else _default(scheme)


def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(f"(?:{pattern[3:]})\\Z" if pattern.startswith("re:") else translate(pattern))
    except re.error as error:
        raise InputError(
            Problem(
                "pattern-syntax",
                f"{pattern} is not a regular expression: {error}",
                "model.assume.layers",
                fix="mend the expression   or   write a glob, without re:",
            )
        ) from error


def _unknown(what: str, where: str, given: str, known: Any) -> InputError:  # noqa: ANN401
    near = nearest(given, known) or list(known)[:1]
    fix = f"model.assume.{where}={near[0]}" if near else ""
    return InputError(Problem("quant-type-unknown", what, "model.assume", f"known: {', '.join(known)}", fix))
