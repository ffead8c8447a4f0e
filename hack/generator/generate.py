"""Writes everything that is made from models, tables, values and code: CRD, chart's copy and value schema, reference pages, pictures.

`make generate` runs it; a test and `--check` compare what it would write with what is there. It stands outside the packages because it reads
several of them.
"""

import argparse
import sys
from pathlib import Path

import chart_docs
import metrics_docs
import schedule_plots
from finetune_api import crd, docs

CHART = Path("charts/finetune-operator")


def outputs(root: Path) -> dict[Path, str]:
    """Every generated file: path below the repository, and its text."""
    schema = CHART / "values.schema.json"
    return {
        **_definitions(),
        schema: chart_docs.values_schema((root / schema).read_text(encoding="utf-8")),
        Path("docs/reference/finetunejob.md"): docs.resource_page(),
        Path("docs/reference/hyperparametersweep.md"): docs.sweep_page(),
        Path("docs/reference/failures.md"): docs.failures_page(),
        Path("docs/reference/values.md"): chart_docs.values_page((root / CHART / "values.yaml").read_text(encoding="utf-8")),
        Path("docs/reference/permissions.md"): chart_docs.permissions_page(),
        Path("docs/reference/metrics.md"): metrics_docs.metrics_page(),
        Path("docs/images/schedules.svg"): schedule_plots.svg(),
    }


def _definitions() -> dict[Path, str]:
    files = {}
    for plain in crd.crds():
        name = f"{plain['metadata']['name']}.yaml"
        files[Path("crds") / name] = crd.to_yaml(plain)
        # In the chart a CRD belongs to the release, so that an upgrade updates it; an uninstall must not take all jobs with it.
        kept = {**plain, "metadata": {**plain["metadata"], "annotations": {"helm.sh/resource-policy": "keep"}}}
        files[CHART / "files/crds" / name] = crd.to_yaml(kept)
    return files


def stale(root: Path) -> list[Path]:
    """Generated files below `root` that are missing or not what their sources say."""
    return [path for path, text in outputs(root).items() if not _says(root / path, text)]


def _says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make generate", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: the current folder)")
    args = parser.parse_args(argv)
    if not (args.root / CHART / "values.yaml").is_file():
        parser.error(f"{args.root.resolve()} is not a checkout of this project: it has no {CHART}/values.yaml")
    for path in (old := stale(args.root)):
        if args.check:
            sys.stderr.write(f"{path} is out of date: run `make generate`\n")
        else:
            target = args.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(outputs(args.root)[path], encoding="utf-8")
            sys.stdout.write(f"wrote {path}\n")
    return 1 if args.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
