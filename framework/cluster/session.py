"""The driver's view of a deployment: ranks that load a plan and run what is asked, together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from framework.cluster.options import LOADER, ClusterOptions
from framework.cluster.rank import Rank, RankInfo

OnProgress = Callable[[int, int], None]  # bytes done and bytes in all, over all ranks


class Session(Protocol):
    """Ranks ready to work. Any rank's failure ends all ranks and reaches the caller as one exception.

    Raises, from every method:
        UserError: what a rank refused, as it said it; or Refused `rank-lost`, `collective-timeout`.
        Exception: a bug on a rank, with that rank's traceback as a note.
    """

    def load(
        self,
        plan: Any,  # noqa: ANN401
        tokenizer_json: str | None = None,
        on_progress: OnProgress | None = None,
        *,
        loader: str | None = None,
    ) -> None:
        """Load a plan on its `size` ranks, in place of what they held; `loader`: for this once."""
        ...

    def stream(self, method: str, *args: Any) -> Iterator[Any]:  # noqa: ANN401
        """Run the loaded model's generator on every rank; yield rank 0's items as they come."""
        ...

    def call(self, method: str, *args: Any) -> list[Any]:  # noqa: ANN401
        """Run the loaded model's method on every rank; return the results in rank order."""
        ...

    def tell(self, method: str, *args: Any) -> None:  # noqa: ANN401
        """Run rank 0's method while a stream runs, and wait for nothing. From any thread; in the order of the calls."""
        ...

    def alive(self, timeout_s: float) -> bool:
        """Return whether every rank answers, while a stream runs too. From any thread; raises nothing."""
        ...

    def unload(self) -> None:
        """Drop the loaded model on every rank; the ranks stay."""
        ...

    def describe(self) -> list[RankInfo]:
        """Return where each rank lives."""
        ...

    def close(self) -> None:
        """End the ranks, and the Ray that was started for them."""
        ...


@contextmanager
def open_session(
    cluster: Any,  # noqa: ANN401
    plan: Any,  # noqa: ANN401
    *,
    loader: str = LOADER,
    log_dir: Path | None = None,
    shared: bool = False,
) -> Iterator[Session]:
    """Start the ranks of a plan and end them with the block, however that ends.

    One rank on the CPU with `cluster=local` lives in this process, without Ray; not where it is `shared` with other
    sessions, which then all use the Ray of the first one.

    Args:
        cluster: the recipe's cluster choice (see ClusterOptions.of).
        plan: says `size`, `runtime.device` and `runtime.threads`.
        loader: `module:function` that a rank calls to load; tests put their own here.
        log_dir: where to keep `log.rank<k>.txt` of a rank that fails.
        shared: other sessions run beside this one, in blocks within this one's.

    Raises:
        Refused: `placement`, `ray-unreachable`, and as Session.
    """
    options = ClusterOptions.of(cluster)
    session: Session
    if not shared and options.name == "local" and plan.size == 1 and plan.runtime.device == "cpu":
        session = InProcess(options, loader)
    else:
        from framework.cluster.ray_session import RaySession

        session = RaySession.start(options, plan.size, plan.runtime.device, plan.runtime.threads, loader, log_dir)
    try:
        yield session
    finally:
        session.close()


class InProcess:
    """A session of one rank in this process."""

    def __init__(self, options: ClusterOptions, loader: str) -> None:
        self._rank = Rank(0, "cpu", options)
        self._loader = loader

    def load(
        self,
        plan: Any,  # noqa: ANN401
        tokenizer_json: str | None = None,
        on_progress: OnProgress | None = None,
        *,
        loader: str | None = None,
    ) -> None:
        """See Session."""
        self._rank.join(1)
        self._rank.load(loader or self._loader, plan, tokenizer_json, on_progress or (lambda done, total: None))

    def stream(self, method: str, *args: Any) -> Iterator[Any]:  # noqa: ANN401
        """See Session."""
        yield from self._rank.call(method, *args)

    def call(self, method: str, *args: Any) -> list[Any]:  # noqa: ANN401
        """See Session."""
        return [self._rank.call(method, *args)]

    def tell(self, method: str, *args: Any) -> None:  # noqa: ANN401
        """See Session."""
        self._rank.call(method, *args)

    def alive(self, timeout_s: float) -> bool:
        """See Session."""
        return True

    def unload(self) -> None:
        """See Session."""
        self._rank.unload()

    def describe(self) -> list[RankInfo]:
        """See Session."""
        return [self._rank.describe()]

    def close(self) -> None:
        """See Session."""
        self._rank.unload()
