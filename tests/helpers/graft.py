"""The `graft` command in this process."""

from click.testing import Result
from typer.testing import CliRunner

from sft.cli import app


def run(*args: object, code: int = 0, **more) -> Result:
    """The same command line in this process, which has imported the libraries already."""
    done = CliRunner().invoke(app, [str(a) for a in args], **more)
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done
