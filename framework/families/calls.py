"""What the call of each diffusers pipeline takes, in a recipe's words; how it rounds sizes; schedulers that fit it.

From the calls of diffusers 0.42; tests hold the tables against the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from framework.checkpoint.safetensors import read_json
from framework.errors import Problem
from framework.families.pipeline import Component, Pipeline

Configs = Callable[[str], Mapping[str, Any]]  # the config of a component by its name; empty where there is none

TEXT = ("prompt", "negative_prompt", "max_sequence_length")  # arguments that text encoders take

_PICTURE = {
    "prompts": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "height": "height",
    "width": "width",
}
_CACHED = {"cache_threshold": "cache_threshold"}  # not of the call: for the transformers' own cache
_VIDEO = _PICTURE | _CACHED | {"guidance_2": "guidance_scale_2", "frames": "num_frames"}


@dataclass(frozen=True, slots=True)
class Call:
    """A pipeline's call: `words` of a recipe to its arguments.

    `refuses` and `floors` return the number that height and width must be a multiple of, or are rounded down to one of
    (1: any), from the configs of its components. `period`: frames are rounded to a multiple of it, and one.
    `schedulers`: words of SCHEDULERS whose steps it can take.
    """

    words: Mapping[str, str]
    refuses: Callable[[Configs], int] = lambda configs: 1
    floors: Callable[[Configs], int] = lambda configs: 1
    period: Callable[[Configs], int] = lambda configs: 1
    schedulers: tuple[str, ...] = ("flow_match_euler",)


def _blocks(configs: Configs) -> int:
    """Pixels to a latent of a VAE that halves between its blocks."""
    return 1 << (len(configs("vae").get("block_out_channels", (0,) * 4)) - 1)


def _wan(configs: Configs) -> int:
    return int(configs("vae").get("scale_factor_spatial", 8)) * int(configs("transformer").get("patch_size", (1, 2))[1])


def _wan_call(words: Mapping[str, str]) -> Call:
    return Call(
        words,
        refuses=lambda configs: 16,
        floors=_wan,
        period=lambda configs: int(configs("vae").get("scale_factor_temporal", 4)),
        schedulers=("unipc", "flow_match_euler"),
    )


def embedded(arguments: Mapping[str, Any], embeddings: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a call with embeddings in place of the prompts that they were made of."""
    return {name: value for name, value in arguments.items() if name not in TEXT[:2]} | dict(embeddings)


SCHEDULERS = {
    "unipc": "UniPCMultistepScheduler",
    "flow_match_euler": "FlowMatchEulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
}
CALLS = {
    "WanPipeline": _wan_call(_VIDEO),
    "WanImageToVideoPipeline": _wan_call(_VIDEO | {"image": "image"}),
    "FluxPipeline": Call(_PICTURE | _CACHED | {"true_guidance": "true_cfg_scale"}, floors=lambda c: 2 * _blocks(c)),
    "StableDiffusion3Pipeline": Call(
        _PICTURE, refuses=lambda c: _blocks(c) * int(c("transformer").get("patch_size", 2))
    ),
    "QwenImagePipeline": Call(
        _PICTURE | {"guidance": "true_cfg_scale"},
        floors=lambda c: 2 * 2 ** len(c("vae").get("temperal_downsample", (0,) * 3)),
    ),
    "DiTPipeline": Call(
        {"labels": "class_labels", "steps": "num_inference_steps", "guidance": "guidance_scale"},
        schedulers=("ddim", "unipc"),
    ),
}


@dataclass(frozen=True, slots=True)
class Settled:
    """Arguments of the pipeline's call, what was changed and is to be said, what cannot be.

    `scheduler`: another class than the pipeline's, with what differs from its config.
    """

    arguments: dict[str, Any]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]
    scheduler: tuple[str, dict[str, Any]] | None = None


def settle(pipeline: Pipeline, given: Mapping[str, Any]) -> Settled:
    """Return the arguments for settings in a recipe's words (None, empty: left to the pipeline).

    Problems: `pipeline-unsupported`; `component-missing`; `setting-unknown`; `label-unknown`;
    `size-multiple`; `scheduler-mismatch`.
    """
    call = CALLS.get(pipeline.class_name)
    if call is None:
        return Settled({}, (), (_unsupported(pipeline),))
    missing = [component for component in pipeline.components if not component.folder.is_dir()]
    problems = [_missing(component) for component in missing]
    folders = {component.name: component.folder for component in pipeline.components}
    asked = {word: value for word, value in given.items() if value not in (None, (), [], "", "auto")}

    def configs(name: str) -> Mapping[str, Any]:
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        path = folders[name] / file if name in folders else None
        return read_json(path) if path is not None and path.is_file() else {}

    word, shift = asked.pop("scheduler", ""), asked.pop("flow_shift", None)
    scheduler = _scheduler(pipeline, call, word, shift, configs("scheduler")) if word or shift else None
    if isinstance(scheduler, Problem):
        problems.append(scheduler)
        scheduler = None
    problems += [_unknown(pipeline, word, call) for word in asked if word not in call.words]
    if "guidance_2" in asked and "guidance_2" in call.words and not pipeline.options.get("boundary_ratio"):
        problems.append(_one_expert(pipeline))
    notes = []
    for word in ("height", "width"):
        if word in asked and word in call.words:
            problem, note, asked[word] = _size(word, asked[word], call.refuses(configs), call.floors(configs))
            problems += [problem] if problem else []
            notes += [note] if note else []
    if "labels" in call.words:
        problems += _labels(pipeline, asked.get("labels", ()), configs("transformer"))
    period = call.period(configs)
    if period > 1 and asked.get("frames", 1) % period != 1:
        frames = asked["frames"] // period * period + 1
        notes.append(f"job.frames={asked['frames']}: this pipeline makes {period}k+1 frames, {frames} are made")
        asked["frames"] = frames
    arguments = {call.words[word]: value for word, value in asked.items() if word in call.words}
    return Settled(arguments, tuple(notes), tuple(problems), scheduler)


def _labels(pipeline: Pipeline, labels: Iterable[int], config: Mapping[str, Any]) -> list[Problem]:
    """Refuse labels that the model was not trained on: by its names of them, else by the size of its table."""
    names = pipeline.options.get("id2label")
    known = sorted(map(int, names)) if isinstance(names, Mapping) else range(int(config.get("num_embeds_ada_norm", 0)))
    odd = sorted(set(labels) - set(known))
    if not odd:
        return []
    return [
        Problem(
            "label-unknown",
            f"the model has no label {', '.join(map(str, odd))}",
            "job.labels",
            f"it has {len(known)}, from {known[0]} to {known[-1]}" if known else "it has none",
            f"job.labels=[{known[0]}]" if known else "job.labels=[]",
        )
    ]


def _scheduler(
    pipeline: Pipeline, call: Call, word: str, shift: float | None, config: Mapping[str, Any]
) -> tuple[str, dict[str, Any]] | Problem:
    """Return the class and what differs from the shipped scheduler's config."""
    own = str(config.get("_class_name", ""))
    is_flow = own.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
    if word and word not in call.schedulers:
        why = f"the steps of {pipeline.class_name} are made by one of: {', '.join(call.schedulers)}"
        return Problem(
            "scheduler-mismatch", f"{word} does not fit this pipeline", "job.scheduler", why,
            f"job.scheduler={call.schedulers[0]}   or   job.scheduler=auto",
        )  # fmt: skip
    if shift is not None and not is_flow:
        return Problem(
            "scheduler-mismatch", "a flow_shift was given, and this pipeline's model predicts noise, not a flow",
            "job.flow_shift", f"its scheduler is {own}", "job.flow_shift=null",
        )  # fmt: skip
    made = SCHEDULERS.get(word, own)
    shift = shift if shift is not None else config.get("flow_shift", config.get("shift"))
    if made == SCHEDULERS["flow_match_euler"]:
        return made, {"shift": shift}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return made, flow if is_flow else {}


def _unsupported(pipeline: Pipeline) -> Problem:
    return Problem(
        "pipeline-unsupported",
        f"pipelines of class {pipeline.class_name} cannot be run",
        "model_index.json",
        f"those that can: {', '.join(CALLS)}",
        "job=check and job=plan work for all pipelines of known transformers",
    )


def _missing(component: Component) -> Problem:
    return Problem(
        "component-missing",
        f"the pipeline's {component.name} is not there",
        str(component.folder),
        f"model_index.json lists it, of class {component.class_name}",
        "fetch the pipeline again, whole",
    )


def _one_expert(pipeline: Pipeline) -> Problem:
    return Problem(
        "setting-unknown",
        "a second guidance was given, and the pipeline has one expert",
        "job.guidance_2",
        f"{pipeline.class_name} has no boundary_ratio at which a second one would begin",
        "job.guidance_2=null",
    )


def _unknown(pipeline: Pipeline, word: str, call: Call) -> Problem:
    return Problem(
        "setting-unknown",
        f"this pipeline takes no {word}",
        f"job.{word}",
        f"{pipeline.class_name} takes {', '.join(call.words)}",
        f"job.{word}=null" if word not in ("prompts", "labels") else f"job.{word}=[]",
    )


def _size(word: str, value: int, must: int, floor: int) -> tuple[Problem | None, str, int]:
    if value % must:
        below = value // must * must
        fixes = "   or   ".join(f"job.{word}={size}" for size in (below, below + must) if size)
        return (
            Problem(
                "size-multiple", f"a {word} of {value} cannot be made", f"job.{word}",
                f"it has to be a multiple of {must}", fixes,
            ),
            "",
            value,
        )  # fmt: skip
    if value % floor == 0:
        return None, "", value
    made = value // floor * floor
    if not made:
        why = f"it has to be at least {floor}"
        return (
            Problem("size-multiple", f"a {word} of {value} cannot be made", f"job.{word}", why, f"job.{word}={floor}"),
            "",
            value,
        )
    return None, f"job.{word}={value}: this pipeline makes multiples of {floor}, {made} is made", made
