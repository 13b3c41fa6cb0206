"""Everything before launch runs where neither torch nor Ray can be imported, and quickly."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "tiny-qwen3"
BLOCKED = ("torch", "torch_npu", "ray", "transformers", "diffusers", "numpy", "gguf", "huggingface_hub")
CODE = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
from framework.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("job", ["check", "plan"])
@pytest.mark.parametrize("model", [GOLDEN / "gguf-q4_k_m" / "model.gguf", GOLDEN / "base"], ids=["gguf", "safetensors"])
def test_check_and_plan_run_where_torch_and_ray_cannot_be_imported(job, model, tmp_path):
    given = ["recipe=llm/local", f"model.path={model}", f"job={job}", "parallel.tp_size=2", "job.format=json"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *given, f"run.dir={tmp_path / 'run'}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
    assert done.stderr == ""
    assert (tmp_path / "run").exists() == (job == "plan")
