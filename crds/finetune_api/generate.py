"""Writes everything that is made from the models and tables: the CRD, the chart's copy of it, the reference pages.

`make generate` runs it; a test and `--check` compare what it would write with what is there.
"""

import argparse
import sys
from pathlib import Path

from finetune_api import crd, docs

CRD_FILE = Path("crds") / f"{crd.CRD_NAME}.yaml"
CHART_FILE = Path("charts/finetune-operator/files/crds") / f"{crd.CRD_NAME}.yaml"


def outputs() -> dict[Path, str]:
    """Every generated file: path below the repository, and its text."""
    plain = crd.crd()
    # In the chart the CRD belongs to the release, so that an upgrade updates it; an uninstall must not take all jobs with it.
    kept = {**plain, "metadata": {**plain["metadata"], "annotations": {"helm.sh/resource-policy": "keep"}}}
    return {
        CRD_FILE: crd.to_yaml(plain),
        CHART_FILE: crd.to_yaml(kept),
        Path("docs/reference/finetunejob.md"): docs.resource_page(),
        Path("docs/reference/failures.md"): docs.failures_page(),
    }


def stale(root: Path) -> list[Path]:
    """Generated files below `root` that are missing or not what the models say."""
    return [path for path, text in outputs().items() if not _says(root / path, text)]


def _says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune_api.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: the current folder)")
    args = parser.parse_args(argv)
    if not (args.root / "crds" / "finetune_api").is_dir():
        parser.error(f"{args.root.resolve()} is not a checkout of this project: it has no crds/finetune_api")
    old = stale(args.root)
    for path in old:
        if args.check:
            sys.stderr.write(f"{path} is out of date: run `make generate`\n")
        else:
            target = args.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(outputs()[path], encoding="utf-8")
            sys.stdout.write(f"wrote {path}\n")
    return 1 if args.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
