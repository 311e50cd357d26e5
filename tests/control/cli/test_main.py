"""The `gradserve` command as a whole: help with examples, and shell completion."""

import os
import subprocess
import sys
from pathlib import Path

import typer

from control.cli.main import app


def commands(group, name):
    for command in group.commands.values():
        yield f"{name} {command.name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {command.name}")


def test_the_help_of_every_command_has_an_example_of_it():
    found = dict(commands(typer.main.get_command(app), "gradserve"))
    assert {"gradserve predict", "gradserve keys make", "gradserve train"} <= set(found)
    assert [name for name, command in found.items() if f"{name}" not in command.help.partition("Example:")[2]] == []


def test_bash_completes_commands():
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = subprocess.run(
        ["gradserve", "--show-completion", "bash"],
        env={**environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = 'eval "$SCRIPT"; COMP_WORDS=(gradserve pre); COMP_CWORD=1; _gradserve_completion gradserve'
    words += '; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", words], env={**environ, "SCRIPT": shown.stdout}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["prepare", "predict"]
