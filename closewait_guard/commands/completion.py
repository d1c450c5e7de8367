"""`completion`: what a shell needs to complete our commands, made by argcomplete."""

from __future__ import annotations

import argparse

from closewait_guard.commands._output import FINE, say
from closewait_guard.exceptions import MissingExtraError

_DESCRIPTION = """\
Prints the script that completes commands, options and process numbers."""
_EPILOG = """\
example:  eval "$(closewait-guard completion bash)"              in ~/.bashrc
          eval "$(closewait-guard completion zsh)"               in ~/.zshrc
          closewait-guard completion fish | source               in config.fish"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as missing:
        raise MissingExtraError(
            f"completion needs argcomplete, which cannot be imported ({missing}); "
            "install it with: pip install 'closewait_guard[cli]'"
        ) from missing
    say(shellcode(["closewait-guard"], shell=arguments.shell))
    return FINE


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, which asks by a variable of the environment, and end."""
    try:
        from argcomplete import autocomplete
    except ImportError:
        return
    autocomplete(parser)
