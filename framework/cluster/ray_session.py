"""A session of ranks that are Ray actors."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from framework.cluster import placement, processes
from framework.cluster.failures import Kind, Remains, Scene, digest, kind_of
from framework.cluster.options import ClusterOptions
from framework.cluster.rank import Rank, RankInfo

# a death may be noticed by its peers before Ray tells of it
BETTER_CAUSE_S = {Kind.APPLICATION: 0.0, Kind.DEATH: 0.2, Kind.COLLECTIVE: 3.0}
ASIDE = "aside"  # the concurrency group of calls that run while a stream does
EXAMINE_S = 4.0
KILL_S = 1.0


class RaySession:
    """Ranks 0 .. n - 1, one actor each, in one placement group. See session.Session."""

    def __init__(
        self,
        cluster: placement.Cluster,
        group: Any,  # noqa: ANN401
        make: Callable[[int], Any],
        size: int,
        loader: str,
        log_dir: Path | None,
    ) -> None:
        self._cluster, self._group, self._make, self._size = cluster, group, make, size
        self._loader, self._log_dir = loader, log_dir
        self._actors: list[Any] = []
        self._infos: dict[int, RankInfo] = {}
        self._joined = 0
        self._stages: dict[int, str] = {}
        self._oom_kills = processes.oom_kills()
        self._carrier = ""
        self._closed = False

    @classmethod
    def start(
        cls,
        options: ClusterOptions,
        ranks: int,
        device: str,
        threads: int,
        loader: str,
        log_dir: Path | None = None,
    ) -> RaySession:
        """Start or attach to Ray, reserve `ranks` places; actors start as plans need them, the first at once.

        Raises:
            Refused: `ray-unreachable`, `placement`.
        """
        cluster = placement.start(options, ranks, threads)
        try:
            group = placement.place(cluster, options, ranks, device)
            make = _maker(cluster, options, group, device, threads, loader)
        except BaseException:
            placement.stop(cluster)
            raise
        return cls(cluster, group, make, ranks, loader, log_dir)

    def load(
        self,
        plan: Any,  # noqa: ANN401
        tokenizer_json: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        loader: str | None = None,
    ) -> None:
        """See Session."""
        chosen = loader or self._loader
        self._gather(plan.size)
        self._note("loading")
        streams = {
            actor.load_streaming.options(num_returns="streaming").remote(chosen, plan, tokenizer_json): rank
            for rank, actor in enumerate(self._active())
        }
        latest: dict[int, tuple[int, int]] = {}
        for rank, (done, total) in self._items(streams):
            if not total:
                continue
            latest[rank] = done, total
            self._stages[rank] = f"loading ({100 * done // total} %)"
            if on_progress is not None and len(latest) == plan.size:
                sums = [sum(values) for values in zip(*latest.values(), strict=True)]
                on_progress(sums[0], sums[1])
        self._note("ready")

    def stream(self, method: str, *args: Any) -> Iterator[Any]:  # noqa: ANN401
        """See Session."""
        self._note("in prefill" if method == "generate" else f"running {method}")
        first, *others = self._active()
        waiting = {first.stream.options(num_returns="streaming").remote(method, *args): 0}
        waiting |= {actor.follow.remote(method, *args): rank for rank, actor in enumerate(others, 1)}
        for rank, items in self._items(waiting):
            if rank:
                continue
            for item in items:
                if item and method == "generate":
                    self._note("in decode")
                yield item
        self._note("ready")

    def call(self, method: str, *args: Any) -> list[Any]:  # noqa: ANN401
        """See Session."""
        self._note(f"running {method}")
        results = self._results(lambda actor, rank: actor.call.remote(method, *args))
        self._note("ready")
        return results

    def tell(self, method: str, *args: Any) -> None:  # noqa: ANN401
        """See Session."""
        for actor in self._active()[:1]:  # none: the stream says why
            actor.call.options(concurrency_group=ASIDE).remote(method, *args)

    def alive(self, timeout_s: float) -> bool:
        """See Session."""
        import ray

        actors = self._active()
        asked = [actor.describe.options(concurrency_group=ASIDE).remote() for actor in actors]
        try:
            ray.get(asked, timeout=timeout_s)
        except ray.exceptions.RayError:
            return False
        return bool(actors)

    def unload(self) -> None:
        """See Session."""
        self._results(lambda actor, rank: actor.unload.remote())

    def describe(self) -> list[RankInfo]:
        """See Session."""
        return self._results(lambda actor, rank: actor.describe.remote())

    def carrier(self) -> str:
        """Return what carries the collectives of the last joined group."""
        return self._carrier

    def close(self) -> None:
        """See Session."""
        if self._closed:
            return
        self._closed = True
        with _no_interrupts():
            self._kill()
            placement.remove(self._cluster, self._group)
            placement.stop(self._cluster)

    def _active(self) -> list[Any]:
        return self._actors[: self._joined or len(self._actors)]

    def _gather(self, size: int) -> None:
        """Start the actors that are missing for `size` ranks and let them meet."""
        if size > self._size:
            raise ValueError(f"a plan of {size} ranks in a session of {self._size}")
        if size == self._joined:
            return
        self._note("starting")
        self._joined = 0
        self._actors += [self._make(rank) for rank in range(len(self._actors), size)]
        self._joined = size
        self._infos = dict(enumerate(self.describe()))
        self._note("joining")
        store = self._one(0, self._actors[0].open_store.remote()) if size > 1 else None
        self._carrier = self._results(lambda actor, rank: actor.join.remote(size, store))[0]

    def _note(self, stage: str) -> None:
        self._stages = dict.fromkeys(range(self._size), stage)

    def _one(self, rank: int, reference: Any) -> Any:  # noqa: ANN401
        return next(value for _, value in self._items({reference: rank}))

    def _results(self, submit: Callable[[Any, int], Any]) -> list[Any]:
        references = {submit(actor, rank): rank for rank, actor in enumerate(self._active())}
        return [value for _, value in sorted(self._items(references), key=lambda item: item[0])]

    def _items(self, waiting: dict[Any, int]) -> Iterator[tuple[int, Any]]:
        """Yield (rank, value) of references and streams as they come; the first failure ends all ranks."""
        import ray
        from ray import ObjectRefGenerator

        waiting = dict(waiting)
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            source = ready[0]
            rank = waiting[source]
            try:
                if isinstance(source, ObjectRefGenerator):
                    value = ray.get(next(source))
                else:
                    value = ray.get(source)
                    del waiting[source]
            except StopIteration:
                del waiting[source]
                continue
            except Exception as error:  # noqa: BLE001 -- whatever a rank raised; digested and raised
                del waiting[source]
                raise self._fail({rank: error}, waiting) from None
            yield rank, value

    def _fail(self, errors: dict[int, BaseException], waiting: dict[Any, int]) -> BaseException:
        """Wait a little for a better explanation, end all ranks, return what to raise."""
        import ray
        from ray import ObjectRefGenerator

        deadline = time.monotonic() + BETTER_CAUSE_S[min(map(kind_of, errors.values()))]
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            for source in ready:
                try:
                    ray.get(next(source) if isinstance(source, ObjectRefGenerator) else source)
                except StopIteration:
                    del waiting[source]
                except Exception as error:  # noqa: BLE001 -- gathered for the digest
                    rank = waiting.pop(source)
                    errors[rank] = error
                    deadline = min(deadline, time.monotonic() + BETTER_CAUSE_S[kind_of(error)])
                else:
                    if not isinstance(source, ObjectRefGenerator):
                        del waiting[source]
        logs = self._keep_logs(errors)
        found = digest(errors, Scene(self._infos, self._stages, logs, self._examine))
        self._kill()
        return found

    def _examine(self, info: RankInfo) -> Remains:
        """Look at what a dead rank left, on its node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self._cluster.owned or (info.host == platform.node() and Path(info.log_path).is_file()):
            return _remains(info.log_path, self._oom_kills)
        node = next((n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == info.address), None)
        if node is None:
            return Remains([], None, False)
        task = ray.remote(_remains).options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        )
        try:
            return ray.get(task.remote(info.log_path, -1), timeout=EXAMINE_S)
        except Exception:  # noqa: BLE001 -- the death is reported all the same
            return Remains([], None, False)

    def _keep_logs(self, errors: dict[int, BaseException]) -> dict[int, str]:
        """Write the failed ranks' logs to `log_dir`; return the paths that stay to be read, by rank."""
        logs = {} if self._cluster.owned else {r: i.log_path for r, i in self._infos.items() if i.log_path}
        if self._log_dir is None:
            return logs
        for rank in errors.keys() & self._infos.keys():
            path = self._log_dir / f"log.rank{rank}.txt"
            with suppress(OSError):
                lines = self._examine(self._infos[rank]).lines
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
                logs[rank] = str(path)
        return logs

    def _kill(self) -> None:
        import ray

        for actor in self._actors:
            with suppress(Exception):
                ray.kill(actor, no_restart=True)
        if self._cluster.owned:
            # while their parent lives it reaps them
            mine = {info.pid for info in self._infos.values()}
            below = processes.descendants(os.getpid())
            processes.end((process for process in below if process.pid in mine), KILL_S)
        self._actors = []
        self._joined = 0


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Let a second Ctrl-C not leave half of a clean-up undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _maker(
    cluster: placement.Cluster,
    options: ClusterOptions,
    group: Any,  # noqa: ANN401
    device: str,
    threads: int,
    loader: str,
) -> Callable[[int], Any]:
    import ray
    from ray.util import placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    wanted = placement.bundle(options, device)
    # our own Ray was started with this environment already: its workers, started ahead, can be used
    environment = {"runtime_env": {"env_vars": placement.worker_environment(threads)}}
    if cluster.owned:
        environment = {}

    def make(rank: int) -> Any:  # noqa: ANN401
        # anew each time: where a node was lost, Ray moves its bundles
        placement.await_place(cluster, options, len(group.bundle_specs), device, group)
        node = placement_group_table(group)["bundles_to_node_id"][rank]
        address = next(each["NodeManagerAddress"] for each in ray.nodes() if each["NodeID"] == node)
        actor = ray.remote(concurrency_groups={ASIDE: 1})(Rank).options(
            num_cpus=wanted["CPU"],
            resources={name: amount for name, amount in wanted.items() if name != "CPU"},
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            **environment,
        )
        return actor.remote(rank, device, options, address, loader.partition(":")[0])

    return make


def _remains(log_path: str, oom_kills_before: int) -> Remains:
    return Remains(
        processes.last_lines(log_path),
        processes.memory_available_bytes(),
        0 <= oom_kills_before < processes.oom_kills(),
    )
