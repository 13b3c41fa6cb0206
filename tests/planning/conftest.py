"""Ways to run a check: the job itself on a checkpoint, the command line on a recipe file."""

from dataclasses import replace
from functools import cache

import pytest

from framework import cli
from framework.errors import UserError
from framework.jobs import check as check_job
from framework.recipe.compose import compose
from framework.report.errors import format_problems
from tests.checkpoints import stand_in
from tests.planning.malformed import Said


@cache
def composed(overrides):
    return compose(["recipe=llm/local", "model.path=/model", "job=check", *overrides])


@pytest.fixture
def check(tmp_path, capsys):
    """Run `job=check` on what a maker makes, as the command line does once it has read the recipe."""

    def run(make, *overrides):
        recipe = composed(overrides)
        recipe = replace(recipe, model=replace(recipe.model, path=str(make(tmp_path / "model"))))
        try:
            status = check_job.run(recipe)
        except UserError as error:
            status = error.exit_status
            print(format_problems(error.problems))
        return Said(status, capsys.readouterr().out)

    return run


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Run the command line on a recipe file: its text, with MODEL for the path of a sound W8A8_DYNAMIC checkpoint."""
    monkeypatch.setattr("sys.argv", ["launch.py"])

    def run(text, *overrides):
        file = tmp_path / "recipe.yaml"
        file.write_text(text.replace("MODEL", str(stand_in("modelslim", "w8a8_dynamic").write(tmp_path / "model"))))
        status = cli.main([f"recipe={file}", *overrides])
        shown = capsys.readouterr()
        return Said(status, shown.out + shown.err)

    return run
