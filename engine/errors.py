"""What the user can mend is a UserError, and a script ends on one with a line and a code."""

import sys


class UserError(Exception):
    """A mistake that the user can mend. Its message says in one line what is wrong, what to do."""


def run_script(main, name, after_interrupt=""):
    """Runs a script's `main`.

    main: a function without arguments; name: of the script, for the message; after_interrupt: how
    what was begun goes on.
    A UserError ends the process with one line and exit code 2, Ctrl-C with one line and 130.
    """
    try:
        main()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted{after_interrupt}", file=sys.stderr)
        sys.exit(130)
