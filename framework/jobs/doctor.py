"""job=doctor: versions, devices, what does not fit together and the fix. Imports torch only in child processes."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from framework.capability.tiers import tier_of
from framework.errors import Refused
from framework.jobs.cann import cann_home, cann_version
from framework.jobs.common import emit, emit_json, options, torch_npu_installed
from framework.jobs.run_dir import versions
from framework.recipe.schema import Recipe
from framework.report.doctor import doctor_markdown, doctor_text

IMPORT_LIMIT_S = 120
CONTAINER_NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: what was found, whether it is well (ok, note, no), why and the fix."""

    name: str
    found: str
    verdict: str
    why: str = ""
    fix: str = ""


def run(recipe: Recipe) -> int:
    """Look around and report. Returns 1 only if something installed is broken or the recipe cannot run here."""
    findings = [*_python(), *_torch(), *_npu(), *_ray(), *_machine()]
    asked_npu = recipe.runtime.device == "npu"
    has_npu = any(f.name == "devices" and f.verdict == "ok" for f in findings)
    if asked_npu and not has_npu:
        findings.append(Finding("recipe", "asks for NPUs", "no", "none is usable here", "runtime.device=cpu"))
    broken = [f for f in findings if f.verdict == "no"]
    document = {"ok": not broken, "findings": [asdict(f) for f in findings]}
    match options(recipe)["format"]:
        case "json":
            emit_json(document)
        case "markdown":
            emit(doctor_markdown(document))
        case _:
            emit(doctor_text(document, has_npu=has_npu))
    return 0 if not broken else 1


def _python() -> list[Finding]:
    good = sys.version_info >= (3, 11)
    return [Finding("python", platform.python_version(), "ok" if good else "no", "", "" if good else "Python >= 3.11")]


def _child(code: str) -> tuple[int, str]:
    """Run Python code in a child, with backend autoloading off; returns (status, last lines of its output)."""
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_LIMIT_S,
            env=env,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {IMPORT_LIMIT_S} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode, lines[-1] if lines else f"ended with status {done.returncode}"


def _torch() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return [Finding("torch", "not installed", "no", "", "pip install torch==2.13.0")]
    status, said = _child("import torch; print(torch.__version__, torch.backends.cpu.get_cpu_capability())")
    if status:
        return [Finding("torch", "does not import", "no", said, "pip install --force-reinstall torch==2.13.0")]
    version, _, vectors = said.partition(" ")
    if not version.startswith("2.13."):
        return [
            Finding(
                "torch",
                version,
                "no",
                "this release is built and tested on 2.13",
                "pip install torch==2.13.0",
            )
        ]
    return [Finding("torch", version, "ok", f"cpu vectors {vectors.lower()}")]


_ASK_NPU = """
import torch, torch_npu
count = torch.npu.device_count()
chip = (torch.npu.get_soc_version(), torch.npu.get_device_name()) if count else (0, "-")
print(torch_npu.__version__, count, *chip)
"""


def _tier(number: int, name: str) -> Finding:
    try:
        return Finding("tier", f"{tier_of(number, name)}, {name}", "ok")
    except Refused as refused:
        problem = refused.problems[0]
        return Finding("tier", name, "no", problem.what, problem.fix)


def _npu() -> list[Finding]:
    findings = []
    nodes = sorted(path.name for path in Path("/dev").glob("davinci[0-9]*"))
    if not torch_npu_installed():
        verdict = "no" if nodes else "note"
        findings.append(
            Finding("torch_npu", "not installed", verdict, "", "pip install 'npu-launch[npu]'" if nodes else "")
        )
    else:
        status, said = _child(_ASK_NPU)
        if status:
            fix = "install CANN and source its set_env.sh" if "cannot open shared object" in said else (
                "pip install torch==2.13.0 torch_npu==2.13.0")  # fmt: skip
            verdict = "no" if nodes else "note"
            findings.append(Finding("torch_npu", "does not import", verdict, said, fix))
        else:
            version, count, number, name = said.split()
            findings.append(Finding("torch_npu", version, "ok"))
            if int(count):
                findings.append(Finding("devices", f"{count} NPUs", "ok"))
                findings.append(_tier(int(number), name))
    cann = cann_home()
    if cann or nodes:
        findings.append(
            Finding(
                "cann",
                f"{cann_version() or 'of unknown version'} in {cann}" if cann else "no environment",
                "ok" if cann else "no",
                "",
                "" if cann else "source set_env.sh",
            )
        )
    if nodes:
        missing = [name for name in CONTAINER_NODES if not Path("/dev", name).exists()]
        findings.append(
            Finding(
                "container",
                ", ".join(nodes),
                "no" if missing else "ok",
                f"missing /dev/{', /dev/'.join(missing)}" if missing else "",
                " ".join(f"--device /dev/{name}" for name in missing),
            )
        )
    return findings


def _ray() -> list[Finding]:
    found = versions()["ray"]
    if found is None:
        return [Finding("ray", "not installed", "no", "more than one rank needs it", "pip install ray")]
    address = os.environ.get("RAY_ADDRESS")
    return [Finding("ray", found, "ok", f"RAY_ADDRESS={address}" if address else "no cluster named")]


def _machine() -> list[Finding]:
    packages = ", ".join(f"{k} {v}" for k, v in versions().items() if v and k not in ("python", "torch", "ray"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [
        Finding("packages", packages, "ok"),
        Finding("machine", f"{platform.machine()}, {cores} cores, {pages / 2**30:.0f} GiB", "ok"),
    ]
