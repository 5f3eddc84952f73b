"""The `medgen` command. Bodies are short: parse, call one task, show."""

import sys

import typer

from medgen.errors import MedgenError

_INTERRUPTED = 130

app = typer.Typer(
    name="medgen",
    help="Learn what a set of scans looks like; make more of them; find the ones that do not belong.\n\n"
    "Research use only, not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; a user's mistake gets one sentence and an exit code, never a traceback."""
    from medgen.cli import codes, data, model, task  # noqa: F401  (they add their commands)

    try:
        app()
    except MedgenError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        place = f" with {error.filename}" if error.filename else ""
        sys.stderr.write(f"Error: The system says{place}: {error.strerror or error}.\n")
        raise SystemExit(3) from None
    except SystemExit as stopped:
        # Typer turns Ctrl-C into this code, and says nothing.
        if stopped.code == _INTERRUPTED:
            sys.stderr.write("Interrupted. Run the same command again to go on from here.\n")
        raise


__all__ = ["app", "main"]
