"""Ranks started and loaded, with progress: how every job that runs a model begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from framework.cluster.session import Session, open_session
from framework.planning.plan import Plan
from framework.recipe.schema import Recipe
from framework.report.progress import transfer_progress, waiting

_LOG = logging.getLogger(__name__)


@contextmanager
def started(
    recipe: Recipe,
    plan: Plan,
    tokenizer_json: str | None = None,
    *,
    log_dir: Path | None = None,
    loader: str | None = None,
) -> Iterator[tuple[Session, float]]:
    """Start the ranks of a plan and load it, saying what is waited for; yield the session and the load's seconds."""
    with ExitStack() as stack:
        with waiting("starting ranks"):
            session = stack.enter_context(open_session(recipe.cluster, plan, log_dir=log_dir))
        begin = time.perf_counter()
        load(session, plan, tokenizer_json, loader=loader)
        yield session, time.perf_counter() - begin


def load(session: Session, plan: Plan, tokenizer_json: str | None = None, *, loader: str | None = None) -> None:
    """Load a plan on ranks that run, in place of what they held, with progress."""
    with transfer_progress() as report:
        report("load", 0, 0)
        session.load(plan, tokenizer_json, lambda done, total: report("load", done, total), loader=loader)
    for rank in session.describe():
        where = f"{rank.device} {rank.devices}".strip()
        _LOG.info(
            "rank %d on %s (%s), process %d, %s: loaded, at most %.0f MiB of host memory so far",
            *(rank.rank, rank.host, rank.address, rank.pid, where, rank.peak_host_bytes / 2**20),
        )
