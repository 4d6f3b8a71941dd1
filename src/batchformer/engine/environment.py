"""Versions, hardware and memory of a run."""

import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(precision: str | None = None, command: str | None = None) -> dict[str, Any]:
    """Return the versions, the hardware and the command, without which a number cannot be compared.

    Args:
        precision: Precision of the run, as Lightning names it.
        command: Command line that the user typed.

    Example:
        >>> sorted(environment())
        ['command', 'date', 'git', 'hardware', 'precision', 'python', 'versions']
    """
    packages = ("batchformer", "torch", "lightning", "torchvision", "timm", "transformers", "torchmetrics", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "python": platform.python_version(),
        "versions": versions,
        "hardware": {
            "system": platform.platform(terse=True),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "precision": precision,
        "git": _git(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def memory_mb(device: torch.device) -> float | None:
    """Return the memory in use now in MB: allocated tensors on a GPU, else resident memory; ``None`` if unknown.

    Args:
        device: Device that the run trains on.
    """
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else _resident_mb("VmRSS")


def peak_memory_mb(device: torch.device) -> float | None:
    """Return the highest memory so far in MB: allocated tensors on a GPU, else resident memory; ``None`` if unknown.

    Args:
        device: Device that the run trains on.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not getrusage where this is known: its peak outlives exec, and would be that of the parent process.
    peak = _resident_mb("VmHWM")
    if peak is None:
        try:
            import resource
        except ImportError:  # not a POSIX system
            return None
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = most / 2**20 if sys.platform == "darwin" else most / 2**10
    return peak


def free_memory_mb() -> float | None:
    """Return the memory in MB that programs can still have without swapping; ``None`` where it is unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**10)
    except (OSError, StopIteration):
        return None
    try:  # a container or a batch job may have less than the machine
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text(encoding="utf-8").split("::/")[1].strip()
        most, used = ((group / f"memory.{name}").read_text(encoding="utf-8") for name in ("max", "current"))
        found.append((int(most) - int(used)) / 2**20)
    except (OSError, ValueError, IndexError):  # no limit, or none that can be read
        pass
    return min(found)


def _resident_mb(entry: str) -> float | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(next(line for line in status.splitlines() if line.startswith(entry)).split()[1]) / 2**10
    except (OSError, StopIteration):
        return None
