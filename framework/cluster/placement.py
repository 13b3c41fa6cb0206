"""Ray itself: start an own one or attach to a running one, and reserve a place for every rank."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.cluster import processes
from framework.cluster.options import ClusterOptions
from framework.cluster.processes import Process
from framework.errors import InputError, Problem, Refused

OBJECT_STORE_BYTES = 200 << 20
SMALLEST_OBJECT_STORE_BYTES = 80 << 20
CHECKOUT = Path(__file__).resolve().parents[2]
GROUP_NAME = "npu-launch"
SHUTDOWN_S = 4.0  # of Ray's own, usually 1.5
GRACE_S = 1.0  # for its processes to end after that


@dataclass(frozen=True, slots=True)
class Cluster:
    """A connected Ray.

    Attributes:
        label: for messages.
        owned: started by us, to be ended by us.
        connected_here: this process was not connected before.
        folder: of our own Ray: its files.
        roots: of our own Ray: its processes.
    """

    label: str
    owned: bool
    connected_here: bool
    folder: Path | None = None
    roots: tuple[Process, ...] = ()


def start(options: ClusterOptions, ranks: int, threads: int) -> Cluster:
    """Start a Ray on this host for `ranks` ranks, or attach to the one that is asked for.

    Where this process is connected to a Ray already, that one is used and left running.

    Raises:
        Refused: `ray-unreachable`.
        InputError: `package-missing`.
    """
    _environment(options)
    try:
        import ray
    except ImportError as error:
        raise InputError(
            Problem(
                "package-missing",
                "more than one rank needs Ray",
                "python environment",
                str(error),
                "pip install ray",
            )
        ) from error
    _quiet()
    if ray.is_initialized():
        return Cluster(f"Ray at {ray.get_runtime_context().gcs_address}", False, False)
    if options.name == "attach":
        return _attach(options)
    return _start_local(ranks, threads)


def _start_local(ranks: int, threads: int) -> Cluster:
    import ray

    folder = _folder("nl-")
    before = set(processes.descendants(os.getpid()))
    try:
        with _loopback(), _stderr_to(folder / "driver.err"), _variables(worker_environment(threads)):
            ray.init(
                address="local",
                num_cpus=max(1, ranks),  # as many workers are started ahead
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                object_store_memory=_object_store_bytes(),
                _temp_dir=str(folder / "r"),  # Ray opens its folder to everybody; ours around it stays closed
            )
    except BaseException:
        stop(Cluster("", True, True, folder, _since(before)))
        raise
    _end_on_sigterm()
    return Cluster("the local Ray", True, True, folder, _since(before))


def _end_on_sigterm() -> None:
    """Turn SIGTERM into an orderly end, in place of Ray's handler, which prints a stack."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _since(before: set[Process]) -> tuple[Process, ...]:
    return tuple(process for process in processes.descendants(os.getpid()) if process not in before)


def _attach(options: ClusterOptions) -> Cluster:
    import ray

    address = _address(options.address)
    _reach(address)
    try:
        with _stderr_to(Path(os.devnull)):
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused(_no_ray(address, first)) from error
    return Cluster(f"Ray at {ray.get_runtime_context().gcs_address}", False, True)


def _address(asked: str) -> str:
    """Return host:port; `auto` is RAY_ADDRESS, or what the last `ray start` on this host has recorded."""
    from ray._private.services import find_bootstrap_address

    address = asked
    if asked == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "auto":
        found = find_bootstrap_address(None)
        if not found:
            raise Refused(_no_ray("auto", "RAY_ADDRESS is not set, and no `ray start` was recorded on this host"))
        address = str(found)
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        why = f"{address} is not of the form HOST:PORT (the port of `ray start --head`, usually 6379)"
        raise InputError(Problem("unknown-value", "the cluster's address is not readable", "cluster.address", why))
    return address


def _reach(address: str) -> None:
    """Try the address for 3 s: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError as error:
        raise Refused(_no_ray(address, f"{host}:{port}: {error.strerror or error}")) from error


def _no_ray(address: str, why: str) -> Problem:
    return Problem(
        "ray-unreachable",
        "no Ray cluster answers",
        f"cluster.address={address}",
        why,
        "ray start --head   on one node, cluster.address=HOST:PORT, or cluster=local; "
        "with tokens on, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=…",
    )


def stop(cluster: Cluster) -> None:
    """Disconnect; end the Ray that we started, even if its own shutdown hangs, and remove its files."""
    import ray

    below = {p for root in cluster.roots for p in [root, *processes.descendants(root.pid)] if root.alive()}
    if cluster.connected_here:
        _at_most(SHUTDOWN_S, ray.shutdown)
    processes.end(below, GRACE_S)
    if cluster.folder is not None:
        shutil.rmtree(cluster.folder, ignore_errors=True)


def bundle(options: ClusterOptions, device: str) -> dict[str, float]:
    """Return what one rank takes in Ray's books."""
    return {"CPU": options.cpus_per_rank} | ({"NPU": 1.0} if device == "npu" else {})


def place(cluster: Cluster, options: ClusterOptions, ranks: int, device: str) -> Any:  # noqa: ANN401
    """Reserve one bundle per rank and return the placement group; bundle order is rank order.

    Raises:
        Refused: `placement`, with what each node has, after `placement_timeout_s`; the group is removed.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    wanted = bundle(options, device)
    name = f"{GROUP_NAME}-{os.getpid()}-{secrets.token_hex(4)}"  # Ray wants another one for each replica
    group = placement_group([wanted] * ranks, strategy=options.strategy, name=name)
    try:
        await_place(cluster, options, ranks, device, group)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def await_place(cluster: Cluster, options: ClusterOptions, ranks: int, device: str, group: Any) -> None:  # noqa: ANN401
    """Wait until all bundles have their place: at first, and again where Ray moves them since a node was lost.

    Raises:
        Refused: `placement`, after `placement_timeout_s`.
    """
    if not group.wait(options.placement_timeout_s):
        raise Refused(_no_place(cluster, options, ranks, bundle(options, device), group))


def _no_place(
    cluster: Cluster,
    options: ClusterOptions,
    ranks: int,
    wanted: dict[str, float],
    group: Any,  # noqa: ANN401
) -> Problem:
    import ray
    from ray._private.state import available_resources_per_node
    from ray.util import placement_group_table

    unit = "NPU" if "NPU" in wanted else "CPU"
    free_of = available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    lines, total = [], 0.0
    for node in nodes:
        has = node["Resources"].get(unit, 0.0)
        total += has
        free = free_of.get(node["NodeID"], {}).get(unit, 0.0)
        said = f"{free:g} of {has:g} {unit} free" if has else f"no {unit} registered"
        lines.append(f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node['NodeID'][:6]}): {said}")
    state = placement_group_table(group).get("stats", {}).get("scheduling_state", "")
    never = "; no node can ever give this" if state == "INFEASIBLE" else ""
    asked = f"asked {ranks} x {wanted[unit]:g} {unit}, {options.strategy}{never}"
    one = " on one node" if options.strategy == "STRICT_PACK" else ""
    fixes = [f"parallel.tp_size={int(total / wanted[unit])} or less"] if total < ranks * wanted[unit] else []
    if one and total >= ranks * wanted[unit]:
        fixes.append("cluster.strategy=PACK")
    if unit == "NPU":
        fixes.append("register what a node has:  ray start … --resources='{\"NPU\": 8}'")
    fixes.append("wait, or stop the other deployment")
    return Problem(
        "placement",
        f"the cluster cannot give {ranks} x {wanted[unit]:g} {unit}{one}",
        f"{cluster.label}, waited {options.placement_timeout_s:g} s",
        "\n".join([asked, *lines]),
        "; ".join(fixes),
    )


def remove(cluster: Cluster, group: Any) -> None:  # noqa: ANN401
    """Give the ranks' places back; disconnecting does it too, and a cluster that no longer answers has none to give."""
    from ray.exceptions import RayError
    from ray.util.placement_group import remove_placement_group

    def give_back() -> None:
        with suppress(RayError):
            remove_placement_group(group)

    if not cluster.connected_here:
        _at_most(SHUTDOWN_S, give_back)


def _at_most(seconds: float, action: Callable[[], None]) -> None:
    """Wait so long for what hangs where a node or its raylet is gone."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)


def worker_environment(threads: int) -> dict[str, str]:
    """Return the variables of a rank's process: this checkout, its threads, no device plug-in by itself."""
    paths = [str(CHECKOUT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "OMP_NUM_THREADS": str(threads),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


def _environment(options: ClusterOptions) -> None:
    """Set what Ray reads once, when it is imported or started. What the user has set stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    if options.name == "local":
        path = _folder("nl-token-") / "token"
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
        atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    elif not (Path.home() / ".ray" / "auth_token").exists():
        return
    # a Ray that was imported before would not see it; it turns tokens on by itself where it finds one
    if "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"


def _folder(prefix: str) -> Path:
    # a socket's path may have 107 characters, and Ray appends some 70
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=base if len(base) <= 20 else "/tmp"))


def _object_store_bytes() -> int:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return max(SMALLEST_OBJECT_STORE_BYTES, min(OBJECT_STORE_BYTES, free * 3 // 4))


def _quiet() -> None:
    """Keep Ray off the screen: it warns of NPUs without `acl`, and prints the deaths of workers to stdout."""
    import ray._private.worker

    for name in ("ray", "ray._private.accelerators.npu"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # no setting silences these messages, and the digest of failures says what they would
    ray._private.worker.print_to_stdstream = lambda *args, **kwargs: None


@contextmanager
def _loopback() -> Iterator[None]:
    """Let a Ray that starts within listen on the loopback interface alone.

    Ray does so where it makes no clusters, on Windows and macOS; elsewhere there is no setting for it, and
    127.0.0.1, if given as the address, is replaced by the host's.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the block: what starts within inherits them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Send this process's standard error, Ray's own code in it and its children's included, to a file."""
    sys.stderr.flush()
    saved = os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 2)
    os.close(file)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
