"""The command's entry, `onebitmerge` and `python -m onebitmerge`.  It loads everything else late: from here on Ctrl-C is one
line and exit code 130."""

import os
import sys


def main(argv=None):
    # OpenBLAS reads it when it is loaded.  Its own threads are never used, yet each takes 128 MiB of address space, and
    # one that does not get them (ulimit -v) tries again forever.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from onebitmerge import cli
        return cli.main(argv)
    except KeyboardInterrupt:
        print("onebitmerge: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
