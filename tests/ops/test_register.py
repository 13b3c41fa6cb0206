"""Which operators run is decided once per process, so each case is a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest

WITHOUT_CANN = """
raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")
"""

# A torch_npu that loads: it defines two operators for NPU tensors, and the ATB ones as Python functions.
LOADABLE = """
import types
import torch
modes = []
npu = types.SimpleNamespace(is_available=lambda: DEVICES > 0, config=types.SimpleNamespace(),
                            set_compile_mode=lambda **mode: modes.append(mode))
_library = torch.library.Library("npu", "DEF")
_library.define("npu_swiglu(Tensor input, int dim=-1) -> Tensor")
_library.impl("npu_swiglu", lambda input, dim=-1: input.new_empty(()), "PrivateUse1")
def _npu_paged_attention(*args):
    return "theirs"
"""


def run(code, tmp_path, torch_npu=None):
    if torch_npu is not None:
        package = tmp_path / "torch_npu"
        package.mkdir()
        (package / "__init__.py").write_text(torch_npu)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_torch_npu_without_cann_changes_nothing_for_the_cpu(tmp_path):
    code = """
    import torch
    from framework import ops
    from framework.ops import register
    register.ensure_registered("cpu")
    print(ops.npu_swiglu(torch.ones(1, 4)).shape, torch.ops.npu.npu_swiglu(torch.ones(1, 4)).shape)
    """
    assert run(code, tmp_path, WITHOUT_CANN) == "torch.Size([1, 2]) torch.Size([1, 2])\n"


@pytest.mark.parametrize("package", [WITHOUT_CANN, LOADABLE.replace("DEVICES", "1")], ids=["no cann", "cann"])
def test_libraries_find_no_torch_npu_once_operators_run_on_the_cpu(package, tmp_path):
    """transformers and diffusers import what they find; that would abort the process, or fail for want of CANN."""
    (tmp_path / "torch_npu-2.13.0.dist-info").mkdir()
    (tmp_path / "torch_npu-2.13.0.dist-info" / "METADATA").write_text("Name: torch_npu\nVersion: 2.13.0\n")
    code = """
    import torch
    from framework.jobs.common import torch_npu_installed
    from framework.ops import register
    register.ensure_registered("cpu")
    from diffusers.models.transformers import dit_transformer_2d
    from diffusers.utils import is_torch_npu_available as diffusers_finds
    from transformers.utils import is_torch_npu_available as transformers_finds
    print(diffusers_finds(), transformers_finds(), torch_npu_installed())
    """
    assert run(code, tmp_path, package) == "False False True\n"


def test_operators_are_defined_where_torch_npu_is_hidden_already(tmp_path):
    code = """
    import sys, torch
    sys.modules["torch_npu"] = None
    from framework.ops import register
    register.ensure_registered("cpu")
    print(torch.ops.npu.npu_swiglu(torch.ones(1, 4, device="meta")).shape)
    """
    assert run(code, tmp_path) == "torch.Size([1, 2])\n"


ASK_FOR_AN_NPU = """
from framework.errors import Refused
from framework.ops import register
try:
    register.ensure_registered("npu")
except Refused as refusal:
    problem = refusal.problems[0]
    print(problem.code, "|", problem.what, "|", problem.fix)
"""


def test_an_npu_asked_for_without_cann_names_the_missing_library(tmp_path):
    output = run(ASK_FOR_AN_NPU, tmp_path, WITHOUT_CANN)
    assert output.startswith("device-absent | torch_npu cannot be loaded: libhccl.so")
    assert "set_env.sh" in output


def test_an_npu_asked_for_without_torch_npu_says_what_to_install(tmp_path):
    hidden = "import sys\nsys.modules['torch_npu'] = None\n"
    assert "torch_npu is not installed" in run(hidden + ASK_FOR_AN_NPU, tmp_path)


def test_an_npu_asked_for_where_the_driver_shows_none_is_refused(tmp_path):
    assert "no NPU is visible" in run(ASK_FOR_AN_NPU, tmp_path, LOADABLE.replace("DEVICES", "0"))


def test_beside_torch_npu_only_cpu_kernels_are_added(tmp_path):
    """Defining an operator that torch_npu defines, too, raises or aborts the process."""
    code = """
    import torch
    from framework import ops
    from framework.ops import register
    register.ensure_registered("npu")
    register.ensure_registered("cpu")
    assert ops.npu_swiglu is torch.ops.npu.npu_swiglu.default
    assert ops._npu_paged_attention() == "theirs"
    print(ops.npu_swiglu(torch.ones(1, 4)).shape)
    import torch_npu
    print(torch_npu.npu.config.allow_internal_format, torch_npu.modes)
    """
    said = run(code, tmp_path, LOADABLE.replace("DEVICES", "1"))
    assert said == "torch.Size([1, 2])\nTrue [{'jit_compile': False}]\n"


def test_an_npu_cannot_be_asked_for_after_the_cpu_operators_were_defined(tmp_path):
    code = """
    from framework.ops import register
    register.ensure_registered("cpu")
    try:
        register.ensure_registered("npu")
    except RuntimeError as error:
        print(error)
    """
    assert "before the first use" in run(code, tmp_path, LOADABLE.replace("DEVICES", "1"))


def test_importing_the_package_imports_no_torch(tmp_path):
    code = """
    import sys
    import framework.ops, framework.ops.register
    print("torch" in sys.modules)
    """
    assert run(code, tmp_path) == "False\n"
