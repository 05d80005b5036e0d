"""The command line, built once for all tests of a process: that takes longer than what most of them do with it."""

import functools

import typer
import typer.testing

from galore_torch.cli import build_app

app = functools.cache(build_app)
typer.testing._get_command = functools.cache(typer.main.get_command)  # which CliRunner asks at each invocation
