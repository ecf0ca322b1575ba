"""The command line: gathers the nouns and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from expunge.cli import (
    audits,
    certificate,
    demo,
    exact,
    forget_sets,
    ledger,
    methods,
    push,
    report,
    requests,
    runs,
    service,
    suggest,
    suite,
    tune,
    work,
    workloads,
)

app = typer.Typer(
    help="Remove the influence of chosen data from trained models, and show how far it got.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("unlearn")(work.unlearn)
app.command("audit")(work.audit)
app.command("compare")(work.compare)
app.command("forget-sets")(forget_sets.forget_sets)
app.command("suggest")(suggest.suggest)
app.command("tune")(tune.tune)
app.command("reproduce")(work.reproduce)
app.command("report")(report.report)
app.command("push")(push.push)
app.add_typer(methods.app, name="methods")
app.add_typer(audits.app, name="audits")
app.add_typer(workloads.app, name="workloads")
app.add_typer(suite.app, name="suite")
app.add_typer(runs.app, name="runs")
app.add_typer(exact.app, name="exact")
app.add_typer(requests.app, name="requests")
app.command("worker")(service.worker)
app.command("serve")(service.serve)
app.add_typer(certificate.app, name="certificate")
app.add_typer(ledger.app, name="ledger")


@app.callback()
def version_option(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    """Hold options of the whole program."""


def main() -> None:
    """Run the command line; exit 0, 2 for what the user can mend, 1 for a failure."""
    if sys.argv[1:] == ["--version"]:
        from expunge import __version__

        print(f"expunge {__version__}")
        return
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = _complain("stopped; finished steps are kept, run the same command to go on", 130)
    except SystemExit as stop:
        code = stop.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # the one place where every error becomes a line
        if os.environ.get("EXPUNGE_DEBUG"):
            traceback.print_exc()
        code = _complain(*_sentence(error))
    sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: Exception) -> tuple[str, int]:
    from expunge.core.errors import ExpungeError

    if isinstance(error, ExpungeError):
        return str(error), error.exit_code
    shown = getattr(error, "format_message", None)
    if callable(shown):  # the option parser's own complaints
        words = str(shown())  # empty when a noun came without a verb and its help was printed
        return (f"{words}; see expunge --help" if words else "name one of the commands above"), 2
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}", 1
    return f"{type(error).__name__}: {error} (set EXPUNGE_DEBUG=1 to see where)", 1


def _complain(text: str, code: int) -> int:
    print("expunge: " + " ".join(text.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
