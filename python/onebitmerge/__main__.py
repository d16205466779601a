"""The command's entry, `onebitmerge` and `python -m onebitmerge`.  It loads everything else late: from here on Ctrl-C is one
line and exit code 130, and what SIGTERM and SIGHUP ask for comes after the same clean-up."""

import contextlib
import os
import signal
import sys
import time

ENDINGS = {signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal went away"}
received = {}   # of these, and when


class Ended(BaseException):
    """A signal that asks the process to end; like KeyboardInterrupt no Exception."""


def end(number, frame):
    """Often two are sent, SIGHUP behind SIGTERM or one more to the group: the second is not to stop the clean-up."""
    now = time.monotonic()
    again = any(now - before < 1 for before in received.values())
    received.setdefault(number, now)
    if not again:
        raise Ended(number)


def die_of(number):
    """As the signal would have it without us, so that who waits for the process (a shell, a batch system) sees it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def say(what, error):
    with contextlib.suppress(OSError):   # of a terminal that is gone
        print("; ".join([f"onebitmerge: {what}", *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)


def main(argv=None):
    # OpenBLAS reads it when it is loaded.  Its own threads are never used, yet each takes 128 MiB of address space, and
    # one that does not get them (ulimit -v) tries again forever.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    code = 1
    try:
        for number in ENDINGS:
            if signal.getsignal(number) == signal.SIG_DFL:   # else nohup has it ignored, or a program around us waits for it
                signal.signal(number, end)
        from onebitmerge import cli
        code = cli.main(argv)
    except KeyboardInterrupt as e:
        say("interrupted", e)
        code = 130
    except Ended as e:
        say(ENDINGS[e.args[0]], e)
    except OSError:
        if not received:   # else what the clean-up had to say to a terminal that is gone
            raise
    if received:
        die_of(next(iter(received)))
    return code


if __name__ == "__main__":
    sys.exit(main())
