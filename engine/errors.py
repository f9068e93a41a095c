"""What the user can mend is a UserError, and a script ends on one with a line and a code."""

import io
import os
import signal
import sys


class UserError(Exception):
    """A mistake that the user can mend. Its message says in one line what is wrong, what to do."""


def printable(text):
    """A text on one line, with every character that a terminal would obey written as an escape.

    Column names, model types and answers are the work of strangers: an escape sequence in them
    could hide or forge what a terminal shows.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error):
    """What an exception says, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text[:200])


def stop(number, frame):
    """A signal handler: ends the process as Ctrl-C does. number: of the signal."""
    raise KeyboardInterrupt(number)


def out_of_memory(error):
    """Whether a RuntimeError of torch says that there is no memory left."""
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def run_script(main, name, after_interrupt=""):
    """Runs a script's `main`, and ends the process with one line when it fails.

    main: a function without arguments; name: of the script, for the message; after_interrupt: how
    what was begun goes on.
    Exit codes: 2 after a UserError; 1 when the system fails (a full disk, no memory); 130, 143 and
    129 after Ctrl-C, SIGTERM and SIGHUP.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks is no reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, stop)
    try:
        main()
    except UserError as error:
        message, code = f"error: {error}", 2
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        message, code = f"interrupted{after_interrupt}", 128 + number
    except BrokenPipeError:  # who read the output has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        message, code = f"error: {error}; what was saved before is whole", 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not out_of_memory(error):
            raise
        message, code = "error: out of memory: README, Troubleshooting, says what to lower", 1
    else:
        return
    print(f"{name}: {printable(message)}", file=sys.stderr)
    sys.exit(code)
