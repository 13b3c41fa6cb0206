"""The command line: Hydra's, with the contract's exit statuses and messages a person can act on."""

from __future__ import annotations

import os

# an installed torch_npu must not be loaded by whoever imports torch, here or in a child
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import contextlib
import importlib
import logging
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from framework.errors import InputError, Problem, UserError
from framework.recipe.arguments import Arguments, split_arguments
from framework.recipe.secrets import mask_secrets
from framework.report.errors import format_problems

if TYPE_CHECKING:
    from framework.recipe.schema import Recipe

BUG = 70
INTERRUPTED = 130

_OURS = logging.getLogger("framework")
_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1, 2, 70 or 130.

    Args:
        argv: arguments without the program's name; None: those of this process.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if not _OURS.handlers:
        _OURS.addHandler(logging.NullHandler())  # else logging itself prints errors, until a run opens its log.txt
    if threading.current_thread() is threading.main_thread():
        # a polite end is an interrupt: everything that cleans up on Ctrl-C does so then too
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    return _guarded(lambda: _run(given, full_error), full_error)


def _run(given: list[str], full_error: bool) -> int:
    arguments = split_arguments(given)
    if arguments.version:
        return _version()
    if arguments.help:
        from framework.recipe.help import help_text

        sys.stdout.write(help_text(_program()))
        return 0
    if not arguments.flags:
        return _run_once(arguments.overrides)
    return _run_by_hydra(arguments, full_error)


def _run_once(overrides: Sequence[str]) -> int:
    """The plain run: the same composition as Hydra's entry, in half its time."""
    from framework.recipe.compose import compose

    return _job(compose(overrides, program=_program()))


def _job(recipe: Recipe) -> int:
    return int(importlib.import_module(f"framework.jobs.{recipe.job.name}").run(recipe))


def _apart(recipe: Recipe, number: int | None) -> Recipe:
    """The recipe of a sweep's job, with its own folder below the run directory that all of them name."""
    if number is None or recipe.run.dir == "auto":
        return recipe
    folder = str(Path(recipe.run.dir) / str(number))
    resolved = {**recipe.resolved, "run": {**recipe.resolved["run"], "dir": folder}}
    return replace(recipe, run=replace(recipe.run, dir=folder), resolved=resolved)


def _run_by_hydra(arguments: Arguments, full_error: bool) -> int:
    """Sweeps, --cfg, --info, completion: Hydra's own entry."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from framework.recipe.compose import conf_dir, to_recipe
    from framework.recipe.config_source import register
    from framework.recipe.overrides import prepare

    ready = list(arguments.overrides)
    if not arguments.completing:
        flags = {"multirun": arguments.multirun, "running": arguments.running}
        ready = prepare(ready, **flags, program=_program())
    register()
    statuses: list[int] = []

    def task(config: DictConfig) -> None:
        composed = HydraConfig.get()
        choice, overrides = composed.runtime.choices.get("recipe"), list(composed.overrides.task)
        number = composed.job.num if arguments.multirun else None
        status = _guarded(lambda: _job(_apart(to_recipe(config, choice, overrides), number)), full_error)
        statuses.append(status)
        if status == INTERRUPTED:
            raise KeyboardInterrupt

    entry = hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(task)
    with tempfile.TemporaryDirectory() as sweep_dir:
        # Hydra writes multirun.yaml into the sweep's folder whatever its config says
        hidden = [f"hydra.sweep.dir='{sweep_dir}'"] if arguments.multirun else []
        with _hydra_argv([*arguments.flags, *ready, *hidden]):
            try:
                entry()
            except KeyboardInterrupt:
                if INTERRUPTED not in statuses:
                    raise
            except SystemExit as ended:
                statuses.append(ended.code if isinstance(ended.code, int) else 2 if ended.code else 0)
    return max(statuses, default=0)


@contextlib.contextmanager
def _hydra_argv(arguments: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and hides exceptions unless HYDRA_FULL_ERROR says otherwise."""
    kept_argv, kept_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [kept_argv[0] or "launch.py", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = kept_argv
        if kept_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = kept_error


def _guarded(action: Callable[[], int], full_error: bool) -> int:
    """Run and turn every way to end into an exit status and a message on standard error."""
    try:
        return action()
    except UserError as error:
        return _show(error, full_error)
    except KeyboardInterrupt:
        _LOG.info("interrupted")
        sys.stderr.write("\ninterrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read standard output has had enough; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the one place where a bug ends
        problem = _hydra_problem(error)
        if problem is not None:
            return _show(InputError(problem), full_error)
        _LOG.exception("a bug")
        sys.stderr.write(mask_secrets(traceback.format_exc()))
        sys.stderr.write("\nThis is a bug. Please report it with the lines above and the run directory's log.txt.\n")
        return BUG


def _show(error: UserError, full_error: bool) -> int:
    if full_error:
        sys.stderr.write(mask_secrets(traceback.format_exc()) + "\n")
    sys.stdout.flush()
    _LOG.error("%s", format_problems(error.problems, colour=False))
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    sys.stderr.write(format_problems(error.problems, colour=colour))
    return error.exit_status


def _hydra_problem(error: BaseException) -> Problem | None:
    """Say in a user's words what Hydra or OmegaConf refused; None if it was neither of them."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    chain: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in chain:
        chain.append(inner)
        inner = inner.__cause__ or inner.__context__
    if not isinstance(error, HydraException | OmegaConfBaseException):
        # --resolve without --cfg and the like: Hydra says so with a ValueError of its own module
        frames = traceback.extract_tb(error.__traceback__)
        own = frames and f"{os.sep}hydra{os.sep}_internal{os.sep}" in frames[-1].filename
        return Problem("hydra", str(error), "command line") if own and isinstance(error, ValueError) else None
    at = next((e for e in chain if isinstance(e, OmegaConfBaseException) and getattr(e, "full_key", None)), error)
    lines = [line for line in str(at).splitlines() if line.strip() and "hydra.cc" not in line]
    key = str(getattr(at, "full_key", None) or "")
    return Problem("config", lines[0] if lines else type(at).__name__, key or "command line", "\n".join(lines[1:3]))


def _program() -> str:
    name = sys.argv[0]
    return f"python {Path(name).name}" if name.endswith(".py") else Path(name).name or "npu-launch"


def _version() -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        sys.stdout.write(f"npu-launch {version('npu-launch')}\n")
    except PackageNotFoundError:
        sys.stdout.write("npu-launch, not installed\n")
    return 0
