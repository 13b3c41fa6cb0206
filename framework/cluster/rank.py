"""One tensor-parallel rank: joins its group, loads its part of a plan, runs what the driver asks.

A plain class: used in this process where there is one rank on the CPU, wrapped as a Ray actor otherwise. The
module imports no torch, so that the driver can name the class.
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
import queue
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.cluster.options import ClusterOptions

PROGRESS_S = 0.25  # between two reports of loading
BATCH_S = 0.025  # streamed items of this long travel together: 40 messages a second at any token rate

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Where a rank lives. `log_path` is empty in the driver's own process; `devices` are physical ids."""

    rank: int
    host: str
    address: str
    pid: int
    device: str
    devices: str
    log_path: str
    peak_host_bytes: int


class Rank:
    """A rank and what it holds. The loaded model is reached by method name.

    Methods run one after another, but for `describe` and `call`, which may run beside another: the method that is
    called has to be made for it.

    Args:
        rank: this rank's number.
        device: cpu or npu (then the one device that this process can see).
        options: time-outs and the backend of collectives.
        address: address of this node for the other ranks.
        preload: module to import (and torch) at once in the background; empty: none.
    """

    def __init__(
        self,
        rank: int,
        device: str = "cpu",
        options: ClusterOptions | None = None,
        address: str = "127.0.0.1",
        preload: str = "",
    ) -> None:
        self._rank, self._device, self._address = rank, device, address
        self._options = options or ClusterOptions()
        self._model: Any = None
        self._group: Any = None
        self._store: Any = None
        if preload:
            # a failed import shows again, with its traceback, in the method that needs the module
            threading.Thread(target=_import_quietly, args=(preload,), daemon=True).start()

    def describe(self) -> RankInfo:
        """Return where this rank runs and the most host memory it has held."""
        path = ""
        with suppress(OSError):
            path = str(Path("/proc/self/fd/2").readlink())
        return RankInfo(
            self._rank,
            platform.node(),
            self._address,
            os.getpid(),
            "npu:0" if self._device == "npu" else "cpu",
            os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "") if self._device == "npu" else "",
            path if path.startswith("/") and not path.startswith("/dev/") else "",
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def open_store(self) -> tuple[str, int]:
        """Open the store where the ranks meet (rank 0); returns host and port."""
        from framework.cluster import groups

        self._store = groups.open_store(self._address, self._options.join_timeout_s)
        return self._store.host, self._store.port

    def join(self, size: int, store: tuple[str, int] | None = None) -> str:
        """Join the first `size` ranks at the store (None: alone); returns what carries the collectives.

        Raises:
            PeerLost: not all came in time.
        """
        from framework.cluster import groups

        if self._group is not None:
            groups.leave(self._group)
        if self._device == "npu":
            import torch
            import torch_npu  # noqa: F401

            torch.npu.set_device(0)
        host, port = store or ("", 0)
        backend = "hccl" if self._device == "npu" else self._options.backend
        self._group = groups.join(
            self._rank,
            size,
            host,
            port,
            backend,
            self._options.collective_timeout_s,
            address=self._address,
            join_timeout_s=self._options.join_timeout_s,
        )
        return groups.name_of(self._group)

    def load(self, loader: str, plan: Any, tokenizer_json: str | None, progress: Progress) -> None:  # noqa: ANN401
        """Drop what was loaded and load this rank's part of the plan.

        `loader` is `module:function`, called with (plan, group, progress); what it returns has the methods
        that the driver will name, and `set_tokenizer` if a tokenizer is given.

        Raises:
            UserError: what the loader refuses.
        """
        import torch

        self.unload()
        torch.set_num_threads(plan.runtime.threads)
        module, _, function = loader.partition(":")
        self._model = getattr(importlib.import_module(module), function)(plan, self._group, progress)
        if tokenizer_json is not None:
            self._model.set_tokenizer(tokenizer_json)
        gc.collect()
        gc.freeze()  # what lives as long as the model is not looked through again while it runs

    def load_streaming(
        self,
        loader: str,
        plan: Any,  # noqa: ANN401
        tokenizer_json: str | None,
    ) -> Iterator[tuple[int, int]]:
        """Load, yielding (bytes done, bytes in all) a few times a second."""
        import torch

        latest = [(0, 0)]
        outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def report(done: int, total: int) -> None:
            latest[0] = done, total

        def work() -> None:
            try:
                self.load(loader, plan, tokenizer_json, report)
            except BaseException as error:  # noqa: BLE001 -- raised again by the generator
                outcome.put(error)
            else:
                outcome.put(None)

        threading.Thread(target=work, daemon=True).start()
        while True:
            try:
                error = outcome.get(timeout=PROGRESS_S)
            except queue.Empty:
                yield latest[0]
                continue
            if error is not None:
                raise error
            torch.set_num_threads(plan.runtime.threads)  # per thread: this one will run the model
            yield latest[0]
            return

    def call(self, name: str, *args: Any) -> Any:  # noqa: ANN401
        """Return the loaded model's `name(*args)`."""
        return getattr(self._model, name)(*args)

    def stream(self, name: str, *args: Any) -> Iterator[list[Any]]:  # noqa: ANN401
        """Yield the items of the model's generator `name(*args)` in lists: the first alone, at once.

        An empty item says that the next one may be long in coming: it sends off what waits and goes no further.
        """
        pending: list[Any] = []
        last = 0.0
        for item in getattr(self._model, name)(*args):
            if item:
                pending.append(item)
            now = time.monotonic()
            if pending and (not item or now - last >= BATCH_S):
                yield pending
                pending, last = [], now
        if pending:
            yield pending

    def follow(self, name: str, *args: Any) -> None:  # noqa: ANN401
        """Run the generator that another rank streams, to its end."""
        for _ in getattr(self._model, name)(*args):
            pass

    def unload(self) -> None:
        """Drop the loaded model; the rank stays in its group."""
        self._model = None
        gc.unfreeze()


def _import_quietly(module: str) -> None:
    with suppress(ImportError):
        importlib.import_module("torch")
        importlib.import_module(module)
