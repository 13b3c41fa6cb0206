"""Flags and overrides told apart, wherever they stand: Hydra wants all flags on one side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from framework.errors import InputError, Problem, nearest

# flag: (Hydra's name, the values it takes; () none, None any)
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_FLAGS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "--help": ("--help", ()),
    "-h": ("--help", ()),
    "--hydra-help": ("--hydra-help", ()),
    "--version": ("--version", ()),
    "--multirun": ("--multirun", ()),
    "-m": ("--multirun", ()),
    "--run": ("--run", ()),
    "-r": ("--run", ()),
    "--resolve": ("--resolve", ()),
    "--cfg": ("--cfg", ("job", "hydra", "all")),
    "-c": ("--cfg", ("job", "hydra", "all")),
    "--info": ("--info", _INFO),
    "-i": ("--info", _INFO),
    "--package": ("--package", None),
    "-p": ("--package", None),
    "--config-dir": ("--config-dir", None),
    "-cd": ("--config-dir", None),
    "--shell-completion": ("--shell-completion", ()),
    "-sc": ("--shell-completion", ()),
}
_NOT_OURS = {
    "--experimental-rerun": "it would unpickle a file",
    "--config-path": "the config of this program is its own",
    "-cp": "the config of this program is its own",
    "--config-name": "the config of this program is its own",
    "-cn": "the config of this program is its own",
}
# flags of other engines (SGLang's and vLLM's server arguments) and the key that does the same here
_ELSEWHERE = {
    "parallel.tp_size": ("--tp", "--tp-size", "--tensor-parallel-size", "-tp"),
    "parallel.ep_size": ("--ep", "--ep-size", "--expert-parallel-size"),
    "model.path": ("--model", "--model-path"),
    "runtime.dtype": ("--dtype",),
    "runtime.device": ("--device",),
    "runtime.context": ("--context-length", "--max-model-len"),
    "runtime.max_batch": ("--max-running-requests", "--max-num-seqs"),
    "runtime.memory_fraction": ("--mem-fraction-static", "--gpu-memory-utilization"),
    "runtime.seed": ("--seed", "--random-seed"),
    "quantization.format": ("--quantization", "--load-format"),
    "job.host": ("--host",),
    "job.port": ("--port",),
    "job.model_id": ("--served-model-name",),
    "job.prompts": ("--prompt",),
}
_OURS = {flag: key for key, flags in _ELSEWHERE.items() for flag in flags}


@dataclass(frozen=True, slots=True)
class Arguments:
    """A command line in Hydra's order."""

    flags: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def multirun(self) -> bool:
        """Commas sweep."""
        return "--multirun" in self.flags

    @property
    def version(self) -> bool:
        """Only the version is asked."""
        return "--version" in self.flags

    @property
    def help(self) -> bool:
        """Only the help text is asked."""
        return "--help" in self.flags

    @property
    def completing(self) -> bool:
        """A shell asks what could come next; its words are Hydra's, not overrides."""
        return "--shell-completion" in self.flags

    @property
    def running(self) -> bool:
        """A job will run: nothing is only shown."""
        shows = ("--help", "--hydra-help", "--cfg", "--info", "--shell-completion")
        return not any(flag.startswith(shows) for flag in self.flags)


def split_arguments(given: Sequence[str]) -> Arguments:
    """Sort flags from overrides.

    Raises:
        InputError: `unknown-flag`.
    """
    flags: list[str] = []
    overrides: list[str] = []
    problems: list[Problem] = []
    rest = list(given)
    while rest:
        text = rest.pop(0)
        if not text.startswith("-") or text == "-":
            overrides.append(text)
            continue
        name, equals, value = text.partition("=")
        if name not in _FLAGS:
            if not equals and name in _OURS and rest and "=" not in rest[0] and not rest[0].startswith("-"):
                value = rest.pop(0)
            problems.append(_unknown(name, value))
            continue
        flag, takes = _FLAGS[name]
        if takes is None or takes:
            if not equals and rest and (takes is None or rest[0] in takes):
                value = rest.pop(0)
            elif not equals and flag == "--info":
                value = "all"
            if takes and value not in takes:
                problems.append(
                    Problem("unknown-flag", f"{flag} takes one of {', '.join(takes)}", "command line",
                            fix=f"{flag} {takes[0]}")
                )  # fmt: skip
            flags.append(f"{flag}={value}")
        else:
            flags.append(flag)
    if problems:
        raise InputError(problems)
    return Arguments(tuple(flags), tuple(overrides))


def _unknown(name: str, value: str) -> Problem:
    if name in _NOT_OURS:
        return Problem("unknown-flag", f"{name} cannot be used here", "command line", _NOT_OURS[name])
    if name in _OURS:
        fix = f"{_OURS[name]}={value or '...'}"
    else:
        near = nearest(name, [flag for flag in _FLAGS if flag.startswith("--")])
        fix = near[0] if near else "--help"
    return Problem("unknown-flag", f"there is no flag {name}", "command line",
                   "options of a run are written key=value, without dashes", fix)  # fmt: skip
