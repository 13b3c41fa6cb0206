"""The wheel carries configs and recipes: installed elsewhere it checks the quickstart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.network
@pytest.mark.slow
def test_an_installed_wheel_checks_the_quickstart(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = subprocess.run(
        [*pip, "wheel", str(ROOT), "--no-deps", "-w", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if built.returncode and not os.environ.get("NPU_LAUNCH_NETWORK_REQUIRED"):
        pytest.skip("no package index to build with")
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob("npu_launch-*.whl"))
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = "import framework, sys; from framework.cli import main\n"
    code += "print(framework.__file__, flush=True); sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "recipe=quickstart", "job=check"],
        capture_output=True, text=True, cwd=tmp_path, check=False, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(site / "framework" / "__init__.py")
    assert "gguf.w4a16.linear" in done.stdout
    assert (site / "bin" / "npu-launch").is_file()
