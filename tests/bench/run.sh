#!/bin/sh
# Builds the benchmarks in release mode and runs them all.  Not tests: they print numbers and judge nothing.
#   tests/bench/run.sh [build folder]      SIZES="tiny 0.1b" by default
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$root/build/bench}
cmake -S "$root" -B "$build" -DOBM_BENCH=ON -DOBM_INSTALL=OFF -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build "$build" -j2 --target bench_kernels bench_main bench_merge bench_planes >/dev/null
# A forced OpenBLAS core or cache size would measure another machine than this one.
bench() { env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE "$build/tests/bench/$@"; }
bench bench_kernels
for size in ${SIZES:-tiny 0.1b}; do
    echo
    bench bench_main --size "$size"
done
for size in ${SIZES:-tiny 0.1b}; do
    echo
    bench bench_merge --size "$size"
done
for size in ${PLANE_SIZES:-tiny 0.4b}; do
    echo
    bench bench_planes --size "$size"
done
echo
bench bench_planes --what tasks --size "${TASKS_SIZE:-0.1b}"
