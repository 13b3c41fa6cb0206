"""The command line as people script it: exit statuses, messages, nothing left behind."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from framework import cli
from framework.errors import InputError, Problem, Refused
from framework.jobs import run_dir
from framework.jobs.log import note

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield folder
    root.handlers[:], root.level = handlers, level  # Hydra's --info adds one to standard output
    assert list(folder.iterdir()) == [], "something was left in the working directory"


@pytest.fixture
def job(monkeypatch):
    """Replace what job=schema runs by a function of the test."""

    def replace(function):
        import framework.jobs.schema

        monkeypatch.setattr(framework.jobs.schema, "run", function)

    return replace


def test_help_version_and_schema_say_what_they_should(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "recipe=quickstart" in text and "job=doctor" in text and "hardware=a2|a3|a5" in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("npu-launch ")
    assert cli.main(["job=schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "npu-launch recipe"


def test_the_composed_config_can_be_shown_wherever_the_flag_stands(capsys):
    for arguments in (
        ["--cfg", "job", "recipe=quickstart", "parallel.tp_size=3"],
        ["recipe=quickstart", "--cfg", "job", "parallel.tp_size=3"],
        ["recipe=quickstart", "parallel.tp_size=3", "-c", "job"],
        ["recipe=quickstart", "--cfg=job", "parallel.tp_size=3"],
    ):
        assert cli.main(arguments) == 0
        assert "tp_size: 3" in capsys.readouterr().out
    assert cli.main(["recipe=llm/local", "--cfg", "job"]) == 0
    assert "???" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["searchpath", "defaults", "defaults-tree", "config"])
def test_info_works(capsys, what):
    assert cli.main(["recipe=quickstart", "--info", what]) == 0
    assert capsys.readouterr().out


def test_what_a_job_returns_is_the_exit_status(job):
    for status in (0, 1):
        job(lambda recipe, status=status: status)
        assert cli.main(["recipe=quickstart", "job=schema"]) == status


@pytest.mark.parametrize(("error", "status"), [(InputError, 2), (Refused, 1)])
def test_a_user_error_is_a_message_without_traceback(job, capsys, error, status):
    def run(recipe):
        raise error([Problem("a-code", "what", "where", "why", "fix"), Problem("b-code", "again")])

    job(run)
    assert cli.main(["recipe=quickstart", "job=schema"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("error[a-code]  what\n  where  where\n  why    why\n  fix    fix\n\nerror[b-code]  again\n")


def test_ways_out_that_do_not_fit_on_a_line_stand_below_each_other(job, capsys):
    ways = [f"parallel.tp_size={'1' * length}" for length in (40, 61)]

    def run(recipe):
        raise Refused(
            [Problem("a-code", "what", fix="   or   ".join(ways)), Problem("b-code", "what", fix="a   or   b")]
        )

    job(run)
    cli.main(["recipe=quickstart", "job=schema"])
    below = f"  fix    {ways[0]}\n         or  {ways[1]}\n"
    assert capsys.readouterr().err == f"error[a-code]  what\n{below}\nerror[b-code]  what\n  fix    a   or   b\n"


def test_a_bug_keeps_its_traceback_and_exits_70(job, capsys):
    def run(recipe):
        raise ZeroDivisionError("https://me:secret99@host")

    job(run)
    for arguments in (["job=schema"], ["-m", "job=schema"]):
        assert cli.main(arguments) == 70
        text = capsys.readouterr().err
        assert "Traceback" in text and "report" in text and "secret99" not in text


def test_an_interrupt_exits_130(job, capsys):
    calls = []

    def run(recipe):
        calls.append(recipe)
        raise KeyboardInterrupt

    job(run)
    assert cli.main(["job=schema"]) == 130
    assert cli.main(["-m", "job=schema", "runtime.seed=1,2"]) == 130
    assert len(calls) == 2, "the sweep went on"
    assert "Traceback" not in capsys.readouterr().err


def test_the_jobs_of_a_sweep_do_not_share_a_run_directory(job, tmp_path):
    seen = []

    def run(recipe):
        seen.append((recipe.run.dir, recipe.resolved["run"]["dir"]))
        return 0

    job(run)
    assert cli.main(["recipe=quickstart", "-m", "job=schema", "runtime.seed=0,1", f"run.dir={tmp_path}/r"]) == 0
    assert seen == [(f"{tmp_path}/r/{number}",) * 2 for number in (0, 1)]
    assert cli.main(["recipe=quickstart", "job=schema", f"run.dir={tmp_path}/r"]) == 0
    assert seen[-1] == (f"{tmp_path}/r",) * 2


@pytest.mark.parametrize(
    "ended", [Refused(Problem("refused", "no seats")), ZeroDivisionError("zero https://a:secret99@b")]
)
def test_the_log_keeps_how_a_run_ended_and_what_libraries_warned_of(job, tmp_path, ended):
    def run(recipe):
        run_dir.create(recipe, None)
        note("ready in no time")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("a library's worry", UserWarning, stacklevel=1)
        raise ended

    job(run)
    logging.captureWarnings(False)  # pytest takes its own hook back after each test
    cli.main(["job=schema", f"run.dir={tmp_path}/r"])
    logging.captureWarnings(False)
    log = (tmp_path / "r" / "log.txt").read_text()
    assert "ready in no time" in log and "a library's worry" in log and str(ended).split(" https")[0][:4] in log
    assert "secret99" not in log


def test_a_sweep_runs_all_jobs_and_ends_with_the_worst_status(job, capsys):
    seen = []

    def run(recipe):
        seen.append(recipe.runtime.seed)
        if recipe.runtime.seed == 1:
            raise Refused(Problem("refused", "no"))
        if recipe.runtime.seed == 2:
            raise InputError(Problem("input", "wrong"))
        return 0

    job(run)
    arguments = ["recipe=quickstart", "-m", "job=schema", "runtime.seed=0,1,2,3"]
    assert cli.main(arguments) == 2
    assert seen == [0, 1, 2, 3]
    seen.clear()
    assert cli.main([*arguments[:3], "runtime.seed=0,1,3"]) == 1
    assert seen == [0, 1, 3]
    capsys.readouterr()


def test_a_sweep_may_go_over_recipes_and_jobs(job, capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {path: m}\n")
    seen = []
    job(lambda recipe: seen.append((recipe.name, recipe.job.name)) or 0)
    assert cli.main([f"recipe=quickstart,{path}", "job=schema", "-m"]) == 0
    assert [name for name, _ in seen] == ["quickstart", str(path).removesuffix(".yaml")]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["recipe=quickstart", "paralel.tp_size=4"], "unknown-key"),
        (["recipe=quickstart", "++foo=1"], "unknown-key"),
        (["recipe=quickstart", "parallel.tp_size=x"], "wrong-type"),
        (["recipe=nowhere"], "recipe-not-found"),
        (["recipe=/nowhere/at/all.yaml"], "recipe-not-found"),
        ([], "recipe-missing"),
        (["job=check"], "recipe-missing"),
        (["recipe=llm/local", "job=check"], "missing-key"),
        (["recipe=quickstart", "model.path=a=b"], "override-syntax"),
        (["recipe=quickstart", "parallel.tp_size=1,2"], "override-syntax"),
        (["recipe=quickstart", "job=server"], "unknown-value"),
        (["recipe=quickstart", "--jobs", "check"], "unknown-flag"),
        (["recipe=quickstart", "--cfg", "jop"], "unknown-flag"),
        (["--experimental-rerun", "x"], "unknown-flag"),
        (["recipe=quickstart", "-m", "--cfg", "job"], "hydra"),
        (["recipe=quickstart", "-m", "hydra.nothing=1"], "config"),
        (["recipe=quickstart", "hydra.nothing=1"], "config"),
    ],
)
def test_wrong_input_is_one_message_and_status_2(capsys, arguments, code):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error[{code}]  ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    prose = [line for line in captured.err.splitlines() if not line.startswith("  fix")]
    assert all(len(line) <= 100 or str(Path.cwd()) in line for line in prose)


def test_the_users_own_switch_shows_tracebacks(capsys, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert cli.main(["recipe=nowhere"]) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text and "error[recipe-not-found]" in text
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_the_environment_and_the_arguments_of_the_process_are_as_before(capsys):
    before = list(sys.argv)
    cli.main(["job=schema", "-m"])
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ
    capsys.readouterr()


def run(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def test_the_entry_imports_nothing_heavy(elsewhere):
    code = (
        "import runpy, sys\nsys.argv = ['launch.py', 'recipe=quickstart', 'job=schema']\n"
        f"try: runpy.run_path({str(ROOT / 'launch.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "import os\nassert os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] == '0'\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'gguf', 'tokenizers', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_script_works_from_any_directory_and_prints_the_command_that_was_typed(elsewhere):
    done = run("recipe=quickstart", "paralel.tp_size=4", cwd=elsewhere)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "  fix    python launch.py recipe=quickstart parallel.tp_size=4"


def test_a_reader_that_leaves_early_is_no_bug(elsewhere):
    done = subprocess.run(
        f"{sys.executable} {ROOT / 'launch.py'} job=schema | head -1", shell=True, cwd=elsewhere,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_completion_names_groups_and_recipes(elsewhere):
    done = run("-sc", "install=bash", cwd=elsewhere)
    assert done.returncode == 0
    assert re.search(r"hydra_bash_completion", done.stdout)
    done = run("-sc", "query=bash", cwd=elsewhere, COMP_LINE="python launch.py recipe=", COMP_POINT="24")
    assert "recipe=quickstart" in done.stdout.split()


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        (["--tp-size", "4"], "parallel.tp_size=4"),
        (["--tp=2"], "parallel.tp_size=2"),
        (["--model-path", "x"], "model.path=x"),
        (["--max-model-len"], "runtime.context=..."),
    ],
)
def test_flags_of_other_engines_are_answered_with_the_key(capsys, typed, key):
    assert cli.main(["recipe=quickstart", *typed]) == 2
    assert f"fix    {key}\n" in capsys.readouterr().err
