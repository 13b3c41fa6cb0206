"""job=serve: an OpenAI-compatible server on the ranks. The driver imports no torch where those are elsewhere."""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from framework.cluster.session import Session, open_session
from framework.errors import InputError, Problem, Refused
from framework.jobs import run_dir
from framework.jobs.common import open_checked, options, resolve_device
from framework.planning.make import make_plan
from framework.planning.plan import Plan
from framework.planning.runnable import require_runnable
from framework.recipe.schema import Recipe
from framework.report.progress import transfer_progress, waiting
from framework.report.serve import first_line, ready_line, serving_line
from framework.serving.app import make_app
from framework.serving.metrics import Metrics
from framework.serving.prompts import Model
from framework.serving.replicas import Limits, Pool, Replica
from framework.serving.server import serve
from framework.text.tokenizer import load_tokenizer

PAGE_TOKENS = 128


def run(recipe: Recipe) -> int:
    """Serve until told to end. Returns 0 if no answer was cut off by that."""
    start = time.perf_counter()
    chosen = options(recipe)
    keys = read_keys(recipe)
    checked = open_checked(recipe)
    require_runnable(checked)
    plan = make_plan(checked, resolve_device(recipe))
    replicas = int(chosen["replicas"])
    _note(first_line(plan.to_json(), replicas))
    tokenizer = load_tokenizer(checked.index)
    runtime, id_ = plan.runtime, chosen["model_id"] or Path(recipe.name).stem
    model = Model(id_, tokenizer, min(runtime.context, runtime.cache_pages * PAGE_TOKENS), plan.spec.vocab)
    metrics = Metrics()
    limits = Limits(runtime.max_batch, int(chosen["max_queue"]), runtime.cache_pages)
    with ExitStack() as stack:
        listener = stack.enter_context(bound(str(chosen["host"]), int(chosen["port"])))
        run = run_dir.create(recipe, plan)
        with waiting("starting ranks"):
            sessions = [
                stack.enter_context(open_session(recipe.cluster, plan, log_dir=run.path, shared=replicas > 1))
                for _ in range(replicas)
            ]
        progress = stack.enter_context(transfer_progress())
        loads = [_loader(session, plan, tokenizer.to_json(), progress) for session in sessions]
        pool = Pool(
            [Replica(i, s, load, limits, metrics) for i, (s, load) in enumerate(zip(sessions, loads, strict=True))],
            limits,
            metrics,
        )

        def on_ready() -> None:
            _note(ready_line(time.perf_counter() - start, plan.to_json(), replicas))
            _note(serving_line(*listener.getsockname()[:2], model.id))

        serve(
            lambda: make_app(model, pool, metrics, keys=keys, max_body_bytes=int(chosen["max_body_mib"]) << 20),
            pool,
            listener,
            on_ready,
            float(chosen["drain_s"]),
        )
        run.write_json("metrics.json", {"total_s": time.perf_counter() - start, **metrics.totals()})
    return 0


def _loader(
    session: Session, plan: Plan, tokenizer_json: str, progress: Callable[[str, int, int], None]
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


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
