"""Decides once per process whose operators run: torch_npu's, or the CPU kernels of this package."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

from framework.errors import Problem, Refused
from framework.ops.schema import OPERATORS, SCHEMAS, qualified_name

Device = Literal["cpu", "npu"]

# Registrations vanish with their Library object.
_LIBRARIES: list[Any] = []
_LOCK = threading.Lock()


def ensure_registered(device: Device) -> None:
    """Make the operators callable for tensors on `device` (CPU tensors always). Later calls do nothing.

    Raises:
        Refused: `device-absent` when an NPU is asked for and torch_npu cannot be imported or sees none.
        RuntimeError: an NPU is asked for after the operators were defined for the CPU alone; torch_npu
            would abort the process (it registers the same names).
    """
    with _LOCK:
        _ensure_registered(device)


def _ensure_registered(device: Device) -> None:
    if _LIBRARIES:
        if device == "npu" and sys.modules.get("torch_npu") is None:
            raise RuntimeError("ensure_registered('npu') must come before the first use of an operator")
        return
    if device == "npu":
        _import_torch_npu()
    define = sys.modules.get("torch_npu") is None
    if define:
        # to libraries that look for it, it is not installed: loading it now would abort the process
        sys.modules["torch_npu"] = None  # type: ignore[assignment]
    _register(define=define)


def operator(name: str) -> Callable[..., Any]:
    """Return the operator of this name, registering the CPU kernels if nothing is registered yet.

    Where torch_npu is absent this is the CPU kernel itself: going through the dispatcher to the same function
    costs 2 to 4 us a call, 330 calls a token in a model of 30 layers. With torch_npu it is the registered
    operator; one with a single overload is bound to it, so that a call skips overload resolution.
    """
    ensure_registered("cpu")
    import torch

    torch_npu = sys.modules.get("torch_npu")
    if torch_npu is None:
        from framework.ops.cpu import KERNELS

        return KERNELS[f"{OPERATORS[name]}::{name}"]
    if OPERATORS[name] == "atb":
        # torch_npu's Python function loads the ATB library before its first call.
        return getattr(torch_npu, name)  # type: ignore[no-any-return]
    packet = getattr(getattr(torch.ops, OPERATORS[name]), name)
    overloads = packet.overloads()
    return packet.default if overloads == ["default"] else packet  # type: ignore[no-any-return]


def _register(*, define: bool) -> None:
    import torch

    from framework.ops import meta
    from framework.ops.cpu import KERNELS

    kind = "FRAGMENT" if define else "IMPL"
    libraries = {namespace: torch.library.Library(namespace, kind) for namespace in sorted(set(OPERATORS.values()))}
    for schema in SCHEMAS:
        name = qualified_name(schema)
        namespace, _, local_name = name.partition("::")
        library = libraries[namespace]
        if define:
            library.define(schema.removeprefix(f"{namespace}::"))
            library.impl(local_name, meta.KERNELS[name], "Meta")
        library.impl(local_name, KERNELS[name], "CPU")
    _LIBRARIES.extend(libraries.values())


def _import_torch_npu() -> None:
    try:
        torch_npu = importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:
        raise Refused(_absent(error)) from error
    if not torch_npu.npu.is_available():
        raise Refused(
            Problem(
                "device-absent",
                what="no NPU is visible to this process",
                where="runtime.device",
                why="torch_npu and CANN load, but the driver shows no device",
                fix="runtime.device=cpu runs the same operators on the CPU; npu-smi info lists the devices",
            )
        )
    # without it a cast to FRACTAL_NZ does nothing; off by default on A3 (op-plugin's documents of torch_npu.npu.config)
    torch_npu.npu.config.allow_internal_format = True
    torch_npu.npu.set_compile_mode(jit_compile=False)  # compiled kernels of CANN, not one made for each new shape


def _absent(error: ImportError | OSError) -> Problem:
    """Name what is missing: the package itself, or one of CANN's libraries."""
    if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
        return Problem(
            "device-absent",
            what="torch_npu is not installed",
            where="runtime.device",
            why="an NPU is driven through torch_npu and CANN",
            fix="pip install 'npu-launch[npu]' on the Ascend host, or runtime.device=cpu",
        )
    return Problem(
        "device-absent",
        what=f"torch_npu cannot be loaded: {error}",
        where="runtime.device",
        why="it needs the libraries of CANN, and its environment script puts them on the loader path",
        fix="source .../ascend-toolkit/set_env.sh in this shell, or runtime.device=cpu",
    )
