"""Runs the command `mm-transformers` in this process."""

from typer.testing import CliRunner

from mm_transformers.cli import app


def mm(*arguments, ok: bool = True) -> str:
    """What the command prints; its error is one sentence."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if ok:
        assert result.exit_code == 0, (result.output, result.exception)
    else:
        assert (result.exit_code, result.exception.__class__) == (2, SystemExit), (result.output, result.exception)
        assert "Error: " in result.output
    return result.output
