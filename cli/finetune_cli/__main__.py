"""The command line: what can be typed, and how errors reach the user (a sentence and an exit code, never a traceback)."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune_cli.errors import UserError

Command = Callable[[argparse.Namespace], int]
SIGINT_EXIT = 130

# finetune_api.names has these too, but importing it would import pydantic: `--help` answers before that. A test compares.
ENV_S3_ROOT = "FINETUNE_S3_ROOT"
ENV_MODEL_MIRROR = "FINETUNE_MODEL_MIRROR"
ENV_DATASET_MIRROR = "FINETUNE_DATASET_MIRROR"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
    command: Command = options.command
    try:
        return command(options)
    except UserError as error:
        sys.stderr.write(f"{parser.prog}: {error.message}\n")
        return error.exit_code
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"{parser.prog}: the Python package {error.name!r} is not installed: pip install 'finetune-operator[cli,trainer]'\n"
        )
        return 1
    except BrokenPipeError:
        # The reader of our output has gone (`finetune predict ... | head`). Without this, Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.stderr.write(f"{parser.prog}: {error.filename or 'this machine'}: {error.strerror or error}\n")
        return 1
    except KeyboardInterrupt:
        return SIGINT_EXIT


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    prog = "kubectl finetune" if Path(sys.argv[0]).name.startswith("kubectl-") else "finetune"
    parser = argparse.ArgumentParser(prog=prog, description="Fine-tunes models from the same manifests that run on Kubernetes.")
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _run_parser(commands)
    _validate_parser(commands)
    _predict_parser(commands)
    _evaluate_parser(commands)
    _checkpoints_parser(commands)
    _sweep_parser(commands)
    crds = commands.add_parser("crds", help="print the CustomResourceDefinitions", description="Prints the CRDs as YAML.")
    crds.set_defaults(command=_crds)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        parser.exit(message=f"{version('finetune-operator')}\n")


_Parsers = argparse._SubParsersAction  # the only name that argparse has for it


def _run_parser(commands: "_Parsers[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "run",
        help="train what a manifest says, on this machine",
        description="Runs a FineTuneJob's recipe on this machine with the trainer that the pod runs, or the trials of a "
        "HyperparameterSweep side by side. Run again, it goes on from the last checkpoint. What only "
        "a cluster knows (spec.trainer: image, env, resources) is not used; credentials come from AWS_*.",
    )
    _manifest_options(parser)
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="scratch folder (default: .finetune/<name>)")
    parser.add_argument(
        "--model-mirror",
        metavar="DIR",
        default=os.environ.get(ENV_MODEL_MIRROR),
        help=f"folder or s3:// prefix laid out as org/name/ in which hf:// models are looked up first (default: {ENV_MODEL_MIRROR})",
    )
    _dataset_option(parser)
    parser.set_defaults(command=_run)


def _validate_parser(commands: "_Parsers[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "validate",
        help="check a manifest and its data without training",
        description="Checks the manifest, reads the data as the trainer would, and counts it; of a sweep, shows what it will do. "
        "Exit 0: fine; 2: something must change.",
    )
    _manifest_options(parser)
    _dataset_option(parser)
    parser.set_defaults(command=_validate)


def _predict_parser(commands: "_Parsers[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "predict",
        help="label texts with a trained model",
        description="Labels texts: those given, else those of --file, else one per line of standard input.",
    )
    _model_options(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="text to label")
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="csv, jsonl or parquet with a text column, or txt with one text per line"
    )
    parser.add_argument("--text-column", metavar="NAME", help="column of --file (default: as in the training data)")
    parser.set_defaults(command=_predict)


def _evaluate_parser(commands: "_Parsers[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a trained model on labelled data",
        description="Scores the model on a csv, jsonl or parquet file with texts and true labels.",
    )
    _model_options(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="csv, jsonl or parquet file")
    parser.add_argument("--text-column", metavar="NAME", help="column with the text (default: as in the training data)")
    parser.add_argument("--label-column", metavar="NAME", help="column with the label (default: as in the training data)")
    parser.set_defaults(command=_evaluate)


def _checkpoints_parser(commands: "_Parsers[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "checkpoints",
        help="list, verify or export checkpoints",
        description="Lists the checkpoints of a job, newest first. Reads only, also while the job trains. Exit 17: one is corrupt.",
    )
    parser.add_argument("uri", nargs="?", metavar="URI", help="where they are, s3://bucket/prefix or file:///path; or -f")
    _manifest_options(parser, required=False)
    parser.add_argument("--verify", action="store_true", help="download every checkpoint and check size and sha256 of each file")
    parser.add_argument(
        "--export", metavar="STEP|best|latest", help="verify this one and write its model/ to --to, for from_pretrained"
    )
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="a new or empty folder for --export")
    _output_option(parser)
    parser.set_defaults(command=_checkpoints)


def _sweep_parser(commands: "_Parsers[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("sweep", help="check or show a sweep", description="Looks at a sweep that runs or has run.")
    what = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    again = what.add_parser(
        "replay",
        help="make all decisions of a sweep again",
        description="Derives every trial's parameters and every verdict anew from what was known then, and compares. Reads only. "
        "Exit 0: all come out as they were kept; 1: some do not.",
    )
    source = again.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "source", nargs="?", type=Path, metavar="FOLDER|FILE", help="folder of finetune run, or a history (sweep.json)"
    )
    source.add_argument("--name", metavar="NAME", help="HyperparameterSweep of the cluster that kubectl speaks to")
    again.add_argument("-n", "--namespace", metavar="NAMESPACE", help="of --name (default: kubectl's)")
    again.add_argument(
        "--warm", type=Path, metavar="FOLDER|FILE", help="the sweep that warmStartFrom names (default: beside FOLDER)"
    )
    again.set_defaults(command=_sweep_replay)
    shown = what.add_parser(
        "report", help="write a sweep's report", description="Writes a page with all trials, to open in a browser."
    )
    shown.add_argument("source", type=Path, metavar="FOLDER|FILE", help="folder of finetune run, or a history (sweep.json)")
    shown.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: report.html beside it)")
    shown.set_defaults(command=_sweep_report)


def _manifest_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "-f",
        "--file",
        type=Path,
        required=required,
        metavar="FILE",
        help="manifest with one FineTuneJob or, for run and validate, one HyperparameterSweep",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="PATH=VALUE",
        help="change a field of spec, for example hyperparameters.epochs=5; repeatable",
    )
    _s3_option(parser)


def _dataset_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset-mirror",
        metavar="DIR",
        default=os.environ.get(ENV_DATASET_MIRROR),
        help=f"folder or s3:// prefix laid out as org/name/ in which hf:// data sets are looked up first (default: {ENV_DATASET_MIRROR})",
    )


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a trained model, or its s3:// or file:// uri")
    _output_option(parser)
    _s3_option(parser)


def _output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="how to print (default: table)")


def _s3_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--s3-root",
        type=Path,
        metavar="DIR",
        default=os.environ.get(ENV_S3_ROOT) or None,
        help=f"folder in place of S3: s3://bucket/key is DIR/bucket/key (default: {ENV_S3_ROOT}, else real S3 by AWS_*)",
    )


# ---------------------------------------------------------------------------------- the commands, loaded when they run ----
def _run(options: argparse.Namespace) -> int:
    from finetune_cli import inputs

    if inputs.is_sweep(options.file):
        from finetune_cli.sweep_run import run_sweep as run
    else:
        from finetune_cli.run import run

    return run(
        options.file,
        options.overrides,
        workdir=options.workdir,
        s3_root=options.s3_root,
        model_mirror=options.model_mirror,
        dataset_mirror=options.dataset_mirror,
    )


def _validate(options: argparse.Namespace) -> int:
    from finetune_cli.validate import validate

    return validate(options.file, options.overrides, s3_root=options.s3_root, dataset_mirror=options.dataset_mirror)


def _predict(options: argparse.Namespace) -> int:
    from finetune_cli.inference import predict

    return predict(
        options.model,
        options.texts,
        file=options.file,
        text_column=options.text_column,
        as_json=options.output == "json",
        s3_root=options.s3_root,
    )


def _evaluate(options: argparse.Namespace) -> int:
    from finetune_cli.inference import evaluate

    return evaluate(
        options.model,
        options.data,
        text_column=options.text_column,
        label_column=options.label_column,
        as_json=options.output == "json",
        s3_root=options.s3_root,
    )


def _checkpoints(options: argparse.Namespace) -> int:
    from finetune_cli.checkpoints import checkpoints

    return checkpoints(
        options.uri,
        options.file,
        options.overrides,
        verify=options.verify,
        export=options.export,
        to=options.to,
        as_json=options.output == "json",
        s3_root=options.s3_root,
    )


def _sweep_replay(options: argparse.Namespace) -> int:
    from finetune_cli.sweep_replay import replay_sweep

    return replay_sweep(options.source, options.name, options.namespace, options.warm)


def _sweep_report(options: argparse.Namespace) -> int:
    from finetune_cli.sweep_replay import report

    return report(options.source, options.output)


def _crds(_: argparse.Namespace) -> int:
    from finetune_api.crd import crds, to_yaml

    sys.stdout.write("---\n".join(to_yaml(document) for document in crds()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
