"""job=serve: an OpenAI-compatible server on the ranks. The driver imports no torch where those are elsewhere."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.cluster.options import LOADER
from framework.cluster.session import Session, open_session
from framework.errors import InputError, Problem, Refused
from framework.families.calls import CALLS
from framework.families.pipeline import describe_pipeline
from framework.jobs import run_dir
from framework.jobs.common import open_checked, options, resolve_device
from framework.jobs.drawing import arguments_of
from framework.jobs.log import note
from framework.planning.check import Checked
from framework.planning.make import make_plan
from framework.planning.plan import Plan
from framework.planning.runnable import require_runnable
from framework.recipe.schema import Recipe
from framework.report.progress import transfer_progress, waiting
from framework.report.serve import first_line, ready_line, serving_line
from framework.serving.app import make_app
from framework.serving.metrics import Metrics
from framework.serving.pictures import PictureModel, PictureSession
from framework.serving.prompts import Model
from framework.serving.protocol import ApiError
from framework.serving.replicas import Limits, Pool, Replica
from framework.serving.replicas import Session as ReplicaSession
from framework.serving.server import serve
from framework.text.tokenizer import load_tokenizer

PAGE_TOKENS = 128
DRAWER = "framework.diffusion.serving:load_drawer"


@dataclass(frozen=True, slots=True)
class _Served:
    """What differs between kinds of models: the endpoint's model, and how a replica's session is loaded and used."""

    model: Model | PictureModel
    limits: Limits
    loader: str
    tokenizer_json: str | None
    adapt: Callable[[Session], ReplicaSession]


def run(recipe: Recipe) -> int:
    """Serve until told to end. Returns 0 if no answer was cut off by that."""
    start = time.perf_counter()
    chosen = options(recipe)
    keys = read_keys(recipe)
    checked = open_checked(recipe)
    require_runnable(checked)
    plan = make_plan(checked, resolve_device(recipe))
    replicas = int(chosen["replicas"])
    note(first_line(plan.to_json(), replicas))
    served = (_pictures if recipe.model.kind == "diffusion" else _texts)(recipe, checked, plan)
    metrics = Metrics()
    with ExitStack() as stack:
        listener = stack.enter_context(bound(str(chosen["host"]), int(chosen["port"])))
        run = run_dir.create(recipe, plan)
        with waiting("starting ranks"):
            sessions = [
                stack.enter_context(
                    open_session(
                        recipe.cluster, plan, loader=served.loader, log_dir=run.path, shared=replicas > 1
                    )
                )
                for _ in range(replicas)
            ]  # fmt: skip
        progress = stack.enter_context(transfer_progress())
        pool = Pool(
            [
                Replica(i, served.adapt(s), _loader(s, plan, served.tokenizer_json, progress), served.limits, metrics)
                for i, s in enumerate(sessions)
            ],
            served.limits,
            metrics,
        )

        def on_ready() -> None:
            note(ready_line(time.perf_counter() - start, plan.to_json(), replicas))
            note(serving_line(*listener.getsockname()[:2], served.model.id))

        serve(
            lambda: make_app(served.model, pool, metrics, keys=keys, max_body_bytes=int(chosen["max_body_mib"]) << 20),
            pool,
            listener,
            on_ready,
            float(chosen["drain_s"]),
        )
        run.write_json("metrics.json", {"total_s": time.perf_counter() - start, **metrics.totals()})
    return 0


def _texts(recipe: Recipe, checked: Checked, plan: Plan) -> _Served:
    assert plan.spec is not None
    runtime, tokenizer = plan.runtime, load_tokenizer(checked.index)
    model = Model(
        _model_id(recipe), tokenizer, min(runtime.context, runtime.cache_pages * PAGE_TOKENS), plan.spec.vocab
    )
    limits = Limits(runtime.max_batch, int(options(recipe)["max_queue"]), runtime.cache_pages)
    return _Served(model, limits, LOADER, tokenizer.to_json(), lambda session: session)


def _pictures(recipe: Recipe, checked: Checked, plan: Plan) -> _Served:
    chosen, pipeline, copies = options(recipe), describe_pipeline(checked.root), plan.layout.data_size
    words = CALLS[pipeline.class_name].words if pipeline.class_name in CALLS else {}
    defaults = {name: chosen[name] for name in ("steps", "guidance") if chosen[name] is not None}
    if "frames" in words:
        defaults["frames"] = 1  # of a pipeline of videos, a picture
    labels: dict[int, str] = {}
    if "labels" in words:
        (spec,) = plan.transformers.values()
        labels = {int(number): str(name) for number, name in pipeline.options.get("id2label", {}).items()}
        labels = labels or {i: str(i) for i in range(spec.options["num_embeds_ada_norm"])}
    what: dict[str, Any] = {"labels": [next(iter(labels))]} if labels else {"prompts": ["x"]}
    arguments_of(pipeline, {**defaults, **what})  # what no request could mend is refused before anything is loaded

    def settle(asked: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return arguments_of(pipeline, {**defaults, **asked})[0]
        except InputError as error:
            problem = error.problems[0]
            raise ApiError(400, f"{problem.what}: {problem.why}", "invalid_value") from error

    return _Served(
        PictureModel(_model_id(recipe), settle, labels, int(chosen["max_pixels"])),
        Limits(copies, int(chosen["max_queue"]), 0),
        DRAWER,
        None,
        lambda session: PictureSession(session, copies),
    )


def _model_id(recipe: Recipe) -> str:
    return str(options(recipe)["model_id"] or Path(recipe.name).stem)


def _loader(
    session: Session, plan: Plan, tokenizer_json: str | None, progress: Callable[[str, int, int], None]
) -> Callable[[], None]:
    return lambda: session.load(plan, tokenizer_json, lambda done, total: progress("load", done, total))


def read_keys(recipe: Recipe) -> list[str]:
    """Return the keys of `job.api_key_file`, one a line; without a file none, on the loopback interface alone.

    Raises:
        InputError: `api-key`.
    """
    chosen = options(recipe)
    if chosen["api_key_file"] is None:
        if _is_loopback(str(chosen["host"])):
            return []
        raise InputError(
            Problem(
                "api-key",
                f"{chosen['host']} is reached by others, and there is no key",
                "job.host",
                "whoever reaches the port could use the model",
                "job.api_key_file=FILE   or   job.host=127.0.0.1",
            )
        )
    path = Path(chosen["api_key_file"])
    try:
        keys = path.read_text(encoding="utf-8").split()
        why = "it is empty"
    except (OSError, UnicodeDecodeError) as error:
        keys, why = [], str(error)
    if not keys:
        raise InputError(
            Problem("api-key", "the file of API keys holds none", str(path), why,
                    f"openssl rand -hex 32 > {path}; chmod 600 {path}")
        )  # fmt: skip
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address and does not listen yet: nobody connects to a server that loads.

    Raises:
        Refused: `port`.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise Refused(
            Problem("port", f"{host}:{port} cannot be served at", "job.host, job.port", str(error), "job.port=0: any")
        ) from error
    return listener
