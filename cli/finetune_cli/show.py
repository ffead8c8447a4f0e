"""Tables and lines for people. Results go to stdout, everything else to stderr, so that `-o json` can be piped."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[str] = ()) -> None:
    """Prints a table; columns named in `words` hold text, the others numbers (to the right). Cells are printed as they are."""
    out = Table(title=Text(title), title_justify="left", title_style="bold")
    for name in header:
        text = name in words
        out.add_column(Text(name), justify="left" if text else "right", overflow="fold")
    for row in rows:
        # Text, because a label such as "[b]" is not markup.
        out.add_row(*(Text(cell) for cell in row))
    Console().print(out)


def scores(title: str, per_class: Sequence[dict[str, Any]]) -> None:
    """Precision, recall, f1 and number of examples per label."""
    rows = [
        (str(r["label"]), f"{r['precision']:.4f}", f"{r['recall']:.4f}", f"{r['f1']:.4f}", str(r["support"])) for r in per_class
    ]
    table(title, ("label", "precision", "recall", "f1", "examples"), rows, words=("label",))


def line(text: str) -> None:
    """One line on stdout, never wrapped: paths in it can be copied."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def as_json(value: Any) -> None:
    """Indented JSON on stdout."""
    line(json.dumps(value, indent=2, ensure_ascii=False))
