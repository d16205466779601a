#!/usr/bin/env bash
# Installs a build into a fresh prefix and builds the consumer against it three ways.  Usage: run.sh BUILD_DIR
set -euo pipefail
build=$(realpath "$1")
here=$(dirname "$(realpath "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake --install "$build" --prefix "$work/prefix" >/dev/null
library=$(find "$work/prefix" -name 'libonebitmerge.so.0')
libdir=$(dirname "$library")

cmake -S "$here" -B "$work/consumer" -DCMAKE_PREFIX_PATH="$work/prefix" >/dev/null
cmake --build "$work/consumer" >/dev/null
"$work/consumer/consumer"

# cmake --install --prefix does not rewrite a .pc file that was configured for another prefix; pkg-config can.
export PKG_CONFIG_PATH="$libdir/pkgconfig"
pc() { pkg-config --define-variable=prefix="$work/prefix" "$@" onebitmerge; }
cc "$here/consumer.c" -o "$work/shared" $(pc --cflags --libs)
LD_LIBRARY_PATH="$libdir" "$work/shared"
# Our archive with the shared libraries it needs: fully static ones would want the development files of their own needs.
needs=$(pc --print-requires-private)
cc "$here/consumer.c" -o "$work/static" $(pc --cflags) "$libdir/libonebitmerge.a" $(pkg-config --libs $needs) -pthread -lm
"$work/static"

foreign=$(nm -D --defined-only "$library" | awk '{print $3}' | grep -v '^obm_[a-z]' || true)
if [ -n "$foreign" ]; then
    echo "exported, but not obm_*: $foreign" >&2
    exit 1
fi
echo "install: shared by CMake and by pkg-config, static by pkg-config, symbols"
