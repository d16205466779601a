"""The command's entry, `onebitmerge` and `python -m onebitmerge`.  It loads everything else late: from here on Ctrl-C is one
line and exit code 130, and what SIGTERM and SIGHUP ask for comes after the same clean-up."""

import os
import signal
import sys

ENDINGS = {signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal went away"}


class Ended(BaseException):
    """A signal that asks the process to end; like KeyboardInterrupt no Exception."""


def end(number, frame):
    raise Ended(number)


def die_of(number):
    """As the signal would have it without us, so that who waits for the process (a shell, a batch system) sees it."""
    sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def say(what, error):
    print("; ".join([f"onebitmerge: {what}", *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)


def main(argv=None):
    # OpenBLAS reads it when it is loaded.  Its own threads are never used, yet each takes 128 MiB of address space, and
    # one that does not get them (ulimit -v) tries again forever.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        for number in ENDINGS:
            if signal.getsignal(number) == signal.SIG_DFL:   # else nohup has it ignored, or a program around us waits for it
                signal.signal(number, end)
        from onebitmerge import cli
        return cli.main(argv)
    except KeyboardInterrupt as e:
        say("interrupted", e)
        return 130
    except Ended as e:
        for number in ENDINGS:
            signal.signal(number, signal.SIG_IGN)
        say(ENDINGS[e.args[0]], e)
        die_of(e.args[0])


if __name__ == "__main__":
    sys.exit(main())
