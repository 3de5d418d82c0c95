"""The commands: arguments in, one call into the rooms, text out.

Every error that the rooms raise themselves is a sentence and is shown as one; anything else is a defect and keeps its
traceback.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from masa_lib import config
from masa_lib.cli import runs, studies, tools
from masa_lib.cli.parsing import EXIT_USAGE, build_parser, extend
from masa_lib.errors import MasaError, check_system

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PIPE = 1, 130, 141
#: what enters commands, in the order in which `masa --help` lists them
GROUPS = runs, studies, tools


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of ASCII alone gets \xd7 for what it cannot show
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and not options.passes_on:
        parser.error(f"{' '.join(options.rest)} is not an option here")
    options.command = shlex.join(["masa", *arguments])
    try:
        check_system()
        extend()
        options.run_command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `masa models | head`: who reads has seen enough, and Python is not to complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except KeyboardInterrupt as stopped:
        print(f"\n{str(stopped) or 'Stopped.'} {options.interrupted(options)}".rstrip(), file=sys.stderr)
        return getattr(stopped, "exit_code", EXIT_INTERRUPTED)
    except MasaError as error:
        print(f"masa: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, config.ConfigError) else EXIT_FAILED
    return 0
