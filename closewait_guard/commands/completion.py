"""`completion`: what a shell needs to complete our commands, made by argcomplete."""

from __future__ import annotations

import argparse

from closewait_guard.commands._output import FINE, say
from closewait_guard.exceptions import MissingExtraError

_SHELLS = ("bash", "zsh", "fish")
_DESCRIPTION = """\
Print the script by which a shell completes commands, options and PIDs."""
_EPILOG = """\
exit status: 0 printed, 2 usage error or argcomplete is not installed
examples:    eval "$(closewait-guard completion bash)"     # in ~/.bashrc
             eval "$(closewait-guard completion zsh)"      # in ~/.zshrc
             closewait-guard completion fish | source      # in config.fish"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("shell", type=_shell, choices=_SHELLS, help="whose completion script")
    parser.set_defaults(run=run)


def _shell(text: str) -> str:
    if text not in _SHELLS:
        from closewait_guard._config import unknown_name

        raise argparse.ArgumentTypeError(unknown_name("shell", text, _SHELLS, "Shells"))
    return text


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as missing:
        raise MissingExtraError(
            f"completion needs argcomplete: pip install 'closewait-guard[cli]' ({missing})"
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
