"""How a command ends badly on purpose: a sentence for the user and an exit code."""

USAGE = 2
"""Exit code where the command line, the manifest or a file named on the command line has to be changed (as argparse's own)."""


class UserError(Exception):
    """`message` goes to stderr as it is, after the program's name; no traceback."""

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
