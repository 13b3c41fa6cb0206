"""How ranks are started: the cluster group of a recipe, typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from framework.errors import InputError, Problem, nearest

NAMES = ("local", "attach")
STRATEGIES = ("PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD")
LOADER = "framework.loading.load:load"


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Where ranks run and how long to wait for them.

    Attributes:
        name: `local` (an own Ray on this host, none for one rank on the CPU) or `attach` (a running Ray).
        address: with attach, `auto` (RAY_ADDRESS, or the Ray on this host) or host:port.
        strategy: how ranks are dealt to nodes; STRICT_PACK wants all on one.
        cpus_per_rank: CPU resource of a rank in Ray's books; a fraction, since threads are set by the plan.
        placement_timeout_s: how long to wait for a free place.
        join_timeout_s: how long to wait until all ranks have met (they import torch meanwhile).
        collective_timeout_s: how long a collective waits for a live rank.
        backend: of collectives: auto, shared_memory, gloo or hccl.
    """

    name: str = "local"
    address: str = "auto"
    strategy: str = "PACK"
    cpus_per_rank: float = 0.01
    placement_timeout_s: float = 30.0
    join_timeout_s: float = 180.0
    collective_timeout_s: float = 600.0
    backend: str = "auto"

    @classmethod
    def of(cls, choice: Any) -> ClusterOptions:  # noqa: ANN401
        """Read a group choice: a name, a mapping, an object with `name` and `options`, or ClusterOptions.

        Raises:
            InputError: `unknown-key` or `unknown-value`.
        """
        if isinstance(choice, cls):
            return choice
        if isinstance(choice, str):
            given: dict[str, Any] = {"name": choice}
        elif isinstance(choice, Mapping):
            given = dict(choice)
        else:
            given = {"name": choice.name, **dict(getattr(choice, "options", None) or {})}
        known = {f.name: f for f in fields(cls)}
        problems = [_unknown_key(key, list(known)) for key in given if key not in known]
        if given.get("name", "local") not in NAMES:
            problems.append(_unknown_value("cluster", given["name"], NAMES))
        if given.get("strategy", "PACK") not in STRATEGIES:
            problems.append(_unknown_value("cluster.strategy", given["strategy"], STRATEGIES))
        if problems:
            raise InputError(problems)
        floats = {key: float(value) for key, value in given.items() if known[key].type == "float"}
        return cls(**{**given, **floats})


def _unknown_key(key: str, known: list[str]) -> Problem:
    near = nearest(key, known)
    fix = f"did you mean cluster.{near[0]}?" if near else "known keys: " + ", ".join(known)
    return Problem("unknown-key", f"cluster.{key} is not a key of a recipe", "cluster", fix=fix)


def _unknown_value(key: str, value: object, known: tuple[str, ...]) -> Problem:
    return Problem("unknown-value", f"{key} cannot be {value!r}", key, fix="one of " + ", ".join(known))
