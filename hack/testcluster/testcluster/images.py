"""Builds the two images: `python -m testcluster.images` (`make images`) with docker, podman or buildah, whichever is there.

The test node has no registry to pull from. For it the images are built with buildah on a base that debootstrap makes, kept in the
cache, and handed to containerd; what was built from the same files is not built again.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from testcluster import sandbox
from testcluster.node import PAUSE_IMAGE, ctr

ROOT = Path(__file__).parents[3]
PARTS = ("operator", "trainer")
NEEDED = {"buildah": "buildah", "debootstrap": "debootstrap"}
_BASE, _BUILD_BASE = "localhost/finetune-base:bookworm", "localhost/finetune-build-base:bookworm"
_TOOLS = "localhost/finetune-tools:bookworm"
_CERTIFICATES = Path("/etc/ssl/certs")
_ROOM_GB = 26
"""What building the trainer's image takes at its peak: four copies of the packages (6.2 GB each), of which one stays."""


class ImageError(Exception):
    """An image could not be built; the message ends with what the tool said."""


def version() -> str:
    """The tag: the chart's appVersion, which is what it asks for by default."""
    return str(yaml.safe_load((ROOT / "charts/finetune-operator/Chart.yaml").read_text())["appVersion"])


def name_of(part: str, registry: str = "localhost") -> str:
    """The full name of an image."""
    return f"{registry}/finetune-{part}:{version()}"


# ------------------------------------------------------------------------------------------------------- for everybody ---
def build_with(tool: str, registry: str, arguments: list[str]) -> None:
    """Both images with this tool; `arguments` go to its build command."""
    revision = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    for part in PARTS:
        labels = [f"--build-arg=VERSION={version()}", f"--build-arg=REVISION={revision or 'unknown'}"]
        command = [tool, "build", *labels, *arguments, f"--file=Dockerfile.{part}", f"--tag={name_of(part, registry)}", "."]
        print(" ".join(command), flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise ImageError(f"{tool} could not build Dockerfile.{part}: see above")


def find_tool() -> str:
    """docker (with a daemon that answers), podman or buildah. Raises ImageError where there is none."""
    for tool in ("docker", "podman", "buildah"):
        if shutil.which(tool) and subprocess.run([tool, "info"], capture_output=True, check=False).returncode == 0:
            return tool
    raise ImageError("None of docker (with its daemon running), podman and buildah is there: install one of them.")


# -------------------------------------------------------------------------------------------------------- for the node ---
def prepare() -> None:
    """What the node needs: the pause image and both parts, built where their files changed. Root, outside of the sandbox."""
    sandbox.install_packages(NEEDED)
    with (_store() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another build of the same images is waited for
        if not _exists(_BUILD_BASE) or not _exists(PAUSE_IMAGE):
            _make_bases()
        _forget_other_packages()
        for part in PARTS:
            done = _stamp(part)
            if not (done.is_file() and done.read_text() == _digest(part) and _exists(name_of(part))):
                _build(part)
                done.write_text(_digest(part))


def _build(part: str) -> None:
    _buildah("", "rm", "--all")  # of a build that was killed
    free = shutil.disk_usage(_store()).free / 1e9
    if not _exists(name_of(part)) and free < _ROOM_GB:
        raise ImageError(
            f"Building {name_of(part)} takes up to {_ROOM_GB} GB below {_store()}; {free:.0f} GB are free: "
            "make room, or set FINETUNE_CACHE_DIR to a folder on a larger disk."
        )
    bases = [f"--build-arg=BASE={_BASE}", f"--build-arg=BUILD_BASE={_BUILD_BASE}"]
    # The base trusts what Debian trusts; while it is built, what this machine trusts.
    how = ["--isolation=chroot", "--network=host", "--pull-never", "--layers", f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro"]
    bud = ["bud", *how, *bases, f"--file=Dockerfile.{part}"]
    # A stage that comes from the cache is no place to mount from (buildah 1.28); an image is.
    _buildah("", *bud, "--target=tools", f"--tag={_TOOLS}", ".")
    tools = f"--build-context=tools=container-image://{_TOOLS}"
    _buildah(f"building {name_of(part)}", *bud, tools, f"--tag={name_of(part)}", ".")


def load() -> None:
    """Into the containerd of the node in this sandbox, where it does not have them."""
    for name, content in ((PAUSE_IMAGE, "1"), *((name_of(part), _digest(part)) for part in PARTS)):
        mark = _store() / f"loaded-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        if mark.is_file() and mark.read_text() == content and name in ctr("images", "list", "-q").stdout.split():
            continue
        started = time.monotonic()
        push = [*_command("push", "-q"), name, f"docker-archive:/dev/stdout:{name}"]
        with subprocess.Popen(push, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as pushing:
            ctr("images", "import", "-", stdin=pushing.stdout)
            if pushing.wait() != 0:
                raise ImageError(f"{name} could not be read: {pushing.stderr.read() if pushing.stderr else ''}")
        mark.write_text(content)
        _say(f"loading {name}", started)


def _make_bases() -> None:
    root = _store() / "rootfs"
    shutil.rmtree(root, ignore_errors=True)
    started = time.monotonic()
    command = ["debootstrap", "--variant=minbase", "--include=python3,ca-certificates", "bookworm", str(root), *_mirror()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ImageError(f"debootstrap ended with {done.returncode}: {(done.stdout + done.stderr)[-1000:]}")
    _say("a Debian base (debootstrap)", started)
    (root / "usr/bin/python").symlink_to("python3")
    for leftover in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / leftover)
    container = _buildah("", "from", "scratch").strip()
    _buildah("", "add", "-q", container, str(root), "/")
    _buildah("", "commit", "-q", container, _BASE)
    _buildah("", "config", '--entrypoint=["/bin/sleep", "infinity"]', container)
    _buildah("", "commit", "-q", "--rm", container, PAUSE_IMAGE)
    shutil.rmtree(root)
    container = _buildah("", "from", "--pull-never", _BASE).strip()
    install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv"
    _buildah("the base with pip", "run", "--isolation=chroot", "--network=host", container, "--", "sh", "-c", install)
    _buildah("", "commit", "-q", "--rm", container, _BUILD_BASE)


def _forget_other_packages() -> None:
    """Layers with packages that are no longer asked for: the trainer's take 6.2 GB here and twice that in containerd."""
    wanted, known = hashlib.sha256(), _store() / "packages.digest"
    for file in (file for part in PARTS for file in _pinned(part)):
        wanted.update(file.read_bytes())
    if known.is_file() and known.read_text() != wanted.hexdigest():
        for name in (name_of(part) for part in PARTS):
            subprocess.run(_command("rmi", "--force", name), capture_output=True, check=False)  # it may not be there
        _buildah("", "rmi", "--prune", "--force")
        sandbox.forget_images()
    known.write_text(wanted.hexdigest())


def _mirror() -> list[str]:
    """Debian's mirror as this machine has it; debootstrap knows only the public one."""
    for file in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        for line in file.read_text().splitlines() if file.is_file() else []:
            words = line.split()
            if words[:1] in (["URIs:"], ["deb"]):
                return [next(word for word in words if "://" in word)]
    return []


def _digest(part: str) -> str:
    """Of all that goes into an image."""
    total = hashlib.sha256()
    for file in _files(part):
        total.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return total.hexdigest()


def _files(part: str) -> Iterator[Path]:
    yield from _pinned(part)
    yield from (ROOT / name for name in (".dockerignore", "pyproject.toml", "README.md", "LICENSE"))
    for folder in ("crds/finetune_api", "operator/finetune_operator", "trainer/finetune_trainer", "cli/finetune_cli"):
        yield from sorted(file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def _pinned(part: str) -> Iterator[Path]:
    yield ROOT / f"Dockerfile.{part}"
    yield from (ROOT / "requirements" / f"{name}.txt" for name in ("bootstrap", "build", part))


def _store() -> Path:
    folder = sandbox.home() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _stamp(part: str) -> Path:
    return _store() / f"{part}.digest"


def _command(*words: str) -> list[str]:
    # A runroot below /run, which the sandbox has for itself; outside of it, one that is ours.
    return ["buildah", f"--root={_store() / 'storage'}", f"--runroot={_store() / 'run'}", "--storage-driver=overlay", *words]


def _exists(name: str) -> bool:
    return subprocess.run(_command("inspect", "--type=image", name), capture_output=True, check=False).returncode == 0


def _buildah(title: str, *words: str) -> str:
    started = time.monotonic()
    scratch = _store() / "tmp"
    shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch)}
    done = subprocess.run(_command(*words), cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise ImageError(f"buildah {' '.join(words)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    if title:
        _say(title, started)
    return done.stdout


def _say(what: str, started: float) -> None:
    print(f"testcluster: {what}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m testcluster.images", description="Builds the operator's and the trainer's image."
    )
    parser.add_argument("--tool", help="docker, podman or buildah; default: the first that works")
    parser.add_argument("--registry", default="localhost", help="first part of the images' names")
    parser.add_argument("--node", action="store_true", help="for the test node, on a base made here (root)")
    parser.add_argument("arguments", nargs="*", help="after --: further arguments of the build command, as --build-arg=BASE=...")
    options = parser.parse_args()
    try:
        if options.node:
            sandbox.check()
            prepare()
            return 0
        build_with(options.tool or find_tool(), options.registry, options.arguments)
    except (ImageError, sandbox.NoSandboxError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
