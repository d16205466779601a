#!/usr/bin/env bash
# The main job on a bare Debian or Ubuntu machine: installs what is missing, builds, and runs examples/quickstart.py on the
# model family in examples/models.  --fast: fewer test items, about a minute after the build.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/deps.sh
# shellcheck disable=SC2086
need_packages $BUILD_PACKAGES
need_python build/venv
"$PYTHON" -m pip install -q --disable-pip-version-check ".[chat]"
exec "$PYTHON" examples/quickstart.py "$@"
