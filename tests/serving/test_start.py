"""What keeps a server from starting: said before anything is loaded."""

import socket

import pytest

from framework.cli import main
from framework.errors import InputError
from framework.jobs.common import open_checked
from framework.jobs.serve import read_keys
from framework.planning.make import make_plan
from framework.recipe.compose import compose
from framework.report.serve import first_line
from tests.serving.running import TINY


def composed(*overrides):
    return compose(["recipe=llm/local", f"model.path={TINY}", "job=serve", *overrides])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.0.1", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(host):
    assert read_keys(composed(f"job.host='{host}'")) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_any_other_address_needs_a_key(host, tmp_path):
    with pytest.raises(InputError) as caught:
        read_keys(composed(f"job.host='{host}'"))
    assert caught.value.problems[0].code == "api-key"
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n")
    assert read_keys(composed(f"job.host='{host}'", f"job.api_key_file={path}")) == ["one", "two"]


@pytest.mark.parametrize("content", [None, "", "\n", b"\xff"])
def test_a_file_without_keys_is_refused(content, tmp_path):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_keys(composed(f"job.api_key_file={path}"))
    assert caught.value.problems[0].code == "api-key"


def test_a_port_that_is_taken_is_said_before_loading(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [f"job.port={taken.getsockname()[1]}", f"run.dir={tmp_path / 'run'}"]
        assert main(["recipe=llm/local", f"model.path={TINY}", "job=serve", *given]) == 1
    assert "error[port]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_name_without_an_address_is_refused(tmp_path, capsys):
    keys = tmp_path / "keys"
    keys.write_text("key")
    given = ["job.host=no.such.host.invalid", f"job.api_key_file={keys}", f"run.dir={tmp_path / 'run'}"]
    assert main(["recipe=llm/local", f"model.path={TINY}", "job=serve", *given]) == 1
    assert "error[port]" in capsys.readouterr().err


def test_the_first_line_counts_all_ranks_of_a_replica():
    recipe = compose(["recipe=diffusion/digits", "job=serve", "parallel.tp_size=2", "parallel.cfg_size=2"])
    said = first_line(make_plan(open_checked(recipe), "cpu").to_json(), replicas=2)
    assert "2 replicas of 4 ranks on cpu" in said
