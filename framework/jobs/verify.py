"""job=verify: is my deployment right? Logits against a reference file or another recipe; see verify_drawing too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.cluster.session import Session
from framework.errors import InputError, Problem
from framework.geometry import Split
from framework.jobs import run_dir, verify_drawing
from framework.jobs.common import (
    emit,
    emit_json,
    is_given,
    open_checked,
    options,
    other_recipe,
    require_reference,
    resolve_device,
)
from framework.jobs.compare import compare
from framework.jobs.drawing import WORDS
from framework.jobs.ranks import started
from framework.jobs.reference import Reference, read_reference
from framework.planning.make import make_plan
from framework.planning.plan import Plan
from framework.planning.runnable import require_runnable
from framework.recipe.schema import LayerRule, Recipe
from framework.report.progress import waiting
from framework.report.verify import verify_markdown, verify_text

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Tie = dict[str, Any]  # position, layer, decision (experts, groups), margin
# Two experts or groups closer than this may change places by rounding, at no more than this share of the positions.
TIE = 1e-3
MOST_FLIPPED = 0.05
MOST_TRIED = 8  # forward passes, for each prompt that does not hold
DEFAULT_TOLERANCE = {"float32": 1e-3}  # of the largest absolute reference logit; else 5e-2
# a text of several scripts and a piece of code, for two recipes that bring no prompt of their own
TEXT = "The quick brown fox jumps over the lazy dog.\ndef fib(n): return n if n < 2 else fib(n-1) + fib(n-2)\n"


def run(recipe: Recipe) -> int:
    """Verify and report. Returns 0 when every prompt holds, else 1.

    Raises:
        InputError: `job-kind`, options that are for the other kind of model; what cannot be read.
    """
    _fits(recipe)
    if recipe.model.kind == "diffusion":
        return verify_drawing.run(recipe)
    start = time.perf_counter()
    chosen = options(recipe)
    plan = plan_of(recipe)
    references = _references(recipe, plan)
    run = run_dir.create(recipe, plan)
    largest = max(float(abs(r.logits).max()) for r in references)
    tolerance = chosen["tolerance"]
    if tolerance is None:
        scale = largest if chosen["metric"] == "max_abs" else 1.0
        tolerance = DEFAULT_TOLERANCE.get(recipe.runtime.dtype, 5e-2) * scale
    holds = Holds(chosen["metric"], float(tolerance), float(chosen["min_top1"]))
    with started(recipe, plan) as (session, _), waiting("computing logits"):
        prompts = [_verified(session, plan, reference, holds) for reference in references]
    ok = [holds(prompt) for prompt in prompts]
    document: dict[str, Any] = {
        "ok": all(ok),
        "metric": chosen["metric"],
        "prompts": prompts,
        "tolerance": float(tolerance),
    }
    if chosen["per_module"]:
        document["modules"] = _per_module(recipe, plan, references[0].ids)
    run.write_json("verify.json", document)
    run.write_json("metrics.json", {"total_s": time.perf_counter() - start, "ok": document["ok"]})
    against = chosen["reference"] or chosen["against"]
    match chosen["format"]:
        case "json":
            emit_json(document)
        case "markdown":
            emit(verify_markdown(document))
        case _:
            emit(verify_text(document, plan.to_json(), ok, str(against), float(chosen["min_top1"])))
            emit(f"results   {run.path / 'verify.json'}")
    return 0 if document["ok"] else 1


# options of this job that are for one kind of model
LLM_ONLY = ("logits_key", "min_top1", "per_module")
DIFFUSION_ONLY = (*WORDS, "prompt_file", "frames_tolerance")


def _fits(recipe: Recipe) -> None:
    other, names = ("llm", LLM_ONLY) if recipe.model.kind == "diffusion" else ("diffusion", DIFFUSION_ONLY)
    given = [f"job.{name}" for name in names if is_given(recipe, f"job.{name}")]
    if given:
        raise InputError(
            Problem(
                "job-kind",
                f"{', '.join(given)}: for models of kind {other}",
                recipe.origins[given[0]],
                f"this recipe is of kind {recipe.model.kind}",
                "leave it out",
            )
        )


def plan_of(recipe: Recipe) -> Plan:
    """Check a recipe and plan it for the device that is here."""
    checked = open_checked(recipe)
    require_runnable(checked)
    return make_plan(checked, resolve_device(recipe))


def scores(recipe: Recipe, plan: Plan, prompts: Sequence[list[int]]) -> list[Array]:
    """Load the plan and return the logits [T, vocab] of all positions of each prompt."""
    with started(recipe, plan) as (session, _), waiting("computing logits"):
        return [session.call("score", ids)[0] for ids in prompts]


def _verified(session: Session, plan: Plan, reference: Reference, holds: Holds) -> dict[str, Any]:
    """Compute one prompt's logits and compare them."""
    ids = reference.ids
    logits: Array = session.call("score", ids)[0]
    has_routers = plan.spec is not None and plan.spec.moe is not None
    ties = near_ties(session.call("router_margins", ids)[0]) if has_routers else []

    def rescore(turned: list[Tie]) -> Array:
        choices = [(tie["layer"], tie["position"], tie["decision"]) for tie in turned]
        return session.call("score", ids, choices)[0]  # type: ignore[no-any-return]

    return _compare(logits, reference, ties, holds, rescore)


def near_ties(margins: Mapping[str, Mapping[str, Array]]) -> list[Tie]:
    """Return where the last expert or group chosen was less than TIE from the next one, the closest first."""
    found = [
        {"position": position, "layer": layer, "decision": decision, "margin": float(margin)}
        for layer, of_layer in margins.items()
        for decision, by_position in of_layer.items()
        for position, margin in enumerate(by_position)
        if margin < TIE
    ]
    return sorted(found, key=lambda tie: tie["margin"])


@dataclass(frozen=True, slots=True)
class Holds:
    """What a prompt's comparison must satisfy."""

    metric: str
    tolerance: float
    min_top1: float

    def __call__(self, found: Mapping[str, Any]) -> bool:
        """Whether it does."""
        return bool(found[self.metric] <= self.tolerance and found["top1"] >= self.min_top1)


def _compare(
    ours: Array,
    reference: Reference,
    ties: list[Tie],
    holds: Holds,
    rescore: Callable[[list[Tie]], Array],
) -> dict[str, Any]:
    """Compare one prompt. Where it does not hold, the closest near-ties are turned: every position must hold then.

    A flip moves its own position and those after it. So they are tried from the first position on, and what brings
    its own position nearer stays turned. `rescore` computes logits with these choices the other way.
    """
    if ours.shape != reference.logits.shape:
        raise InputError(
            Problem(
                "reference-mismatch",
                f"the reference has logits of shape {list(reference.logits.shape)}, the model {list(ours.shape)}",
                "job.reference",
                "they are of different vocabularies",
                "a reference made with this tokenizer, or job.logits_key=",
            )
        )
    found: dict[str, Any] = compare(ours, reference.logits)
    if not ties:
        return found
    best, turned = found, []
    for tie in sorted(ties[:MOST_TRIED], key=lambda tie: tie["position"]):
        if holds(best):
            break
        # a router decides once a position: the later one takes the place of another
        place, row = (tie["layer"], tie["position"]), tie["position"]
        tried = [*(each for each in turned if (each["layer"], each["position"]) != place), tie]
        if len({each["position"] for each in tried}) > MOST_FLIPPED * len(ours):
            continue
        other = rescore(tried)
        if _distance(other[row], reference.logits[row]) < _distance(ours[row], reference.logits[row]):
            ours, turned = other, tried
            best = compare(ours, reference.logits)
    if turned and holds(best):
        found = best | {"turned": turned}
    return found | {"near_ties": ties}


def _distance(ours: Array, reference: Array) -> float:
    return float(abs(ours - reference).max())


def _references(recipe: Recipe, plan: Plan) -> list[Reference]:
    chosen = options(recipe)
    require_reference(chosen)
    given = read_reference(Path(chosen["reference"]), chosen["logits_key"]) if chosen["reference"] else []
    for i, reference in enumerate(given):
        ids = reference.ids or [-1]
        if not 0 <= min(ids) <= max(ids) < plan.spec.vocab or len(ids) > plan.runtime.context:
            raise InputError(
                Problem(
                    "reference-mismatch",
                    f"prompt {i} of the reference does not fit the model",
                    "job.reference",
                    f"{len(reference.ids)} tokens of a context of {plan.runtime.context}, ids "
                    f"{min(ids)} to {max(ids)} of {plan.spec.vocab}",
                )
            )
    if not chosen["against"]:
        return given
    other = other_recipe(str(chosen["against"]))
    other_plan = plan_of(other)
    prompts = [r.ids for r in given] or [_default_ids(recipe, plan.spec.vocab)]
    return [Reference(ids, logits) for ids, logits in zip(prompts, scores(other, other_plan, prompts), strict=True)]


def _default_ids(recipe: Recipe, vocab: int) -> list[int]:
    from framework.text.tokenizer import load_tokenizer

    try:
        return load_tokenizer(open_checked(recipe).index).encode(TEXT, add_special=True)
    except InputError:
        # no tokenizer: any ids will do, both recipes get the same
        return [(7919 * i + 17) % vocab for i in range(64)]


def _per_module(recipe: Recipe, plan: Plan, ids: list[int]) -> list[dict[str, Any]]:
    """Compare every module's output with the same file dequantized, in fp32, on one rank."""
    exact = replace(
        recipe,
        quantization=replace(recipe.quantization, layers=(LayerRule(pattern="*", scheme="float"),), online=False),
        parallel=replace(recipe.parallel, tp_size=1, ep_size=1),
        runtime=replace(recipe.runtime, dtype="float32", device="cpu"),
    )
    expected = _trace(exact, plan_of(exact), ids)
    rows = []
    for name, ours in _trace(recipe, plan, ids).items():
        distance = abs(ours - expected[name]).max() / max(abs(expected[name]).max(), 1e-30)
        rows.append({"name": name, "max_abs": float(abs(ours - expected[name]).max()), "relative": float(distance)})
    return rows


def _trace(recipe: Recipe, plan: Plan, ids: list[int]) -> dict[str, Array]:
    """Run one prompt and return each linear module's whole output [T, N], put together from the ranks'."""
    import numpy as np

    with started(recipe, plan) as (session, _), waiting("tracing modules"):
        parts = session.call("trace", ids)
    outputs = {}
    for planned in plan.modules:
        name = planned.module.name
        if name not in parts[0]:
            continue
        if planned.split in (Split.COLUMN, Split.VOCAB):
            whole = np.zeros((len(ids), planned.module.shape[0]), np.float32)
            for rect, part in zip(planned.shards, parts, strict=True):
                whole[:, rect.n0 : rect.n1] = part[name]
        else:
            whole = parts[0][name]
        outputs[name] = whole
    return outputs
