#!/usr/bin/env bash
# Placement on a real kernel with one, two and four NUMA nodes: run.sh BUILD boots Debian's cloud kernel (unpacked, not installed) in
# qemu, by emulation, with BUILD/tests/numa/numa_vm as its only program.  Prints what that found; 0 if every machine passed and all had
# the same logits.  It says nothing about speed: all the nodes are one machine's memory.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/deps.sh
BUILD=$(cd "$1" && pwd)
WORK=$BUILD/numa
SECONDS_EACH=600
mkdir -p "$WORK"
# shellcheck disable=SC2086
APT_OPTIONS=--no-install-recommends need_packages $NUMA_PACKAGES

initramfs() {   # the program as /init, with the libraries that it loads
    local root=$WORK/root file
    rm -rf "$root"
    mkdir -p "$root"
    cp "$BUILD/tests/numa/numa_vm" "$root/init"
    for file in $(ldd "$root/init" | grep -o '/[^ ]*'); do
        mkdir -p "$root/$(dirname "$file")"
        cp -L "$file" "$root/$file"
    done
    (cd "$root" && find . | cpio --quiet -o -H newc) >"$WORK/initramfs"
}

boot() {   # boot NODES: four processors and 1 GiB, shared out evenly; one thread emulates them (with more, kernels that patch their code may crash)
    local nodes=$1 i last options=()
    for ((i = 0; i < nodes; i++)); do
        last=$(((i + 1) * 4 / nodes - 1))
        options+=(-object "memory-backend-ram,id=m$i,size=$((1024 / nodes))M" -numa "node,nodeid=$i,cpus=$((i * 4 / nodes))-$last,memdev=m$i")
    done
    timeout -k 10 "$SECONDS_EACH" qemu-system-x86_64 -accel tcg,thread=single -cpu max -machine pc -smp 4 -m 1G "${options[@]}" -kernel "$IMAGE" \
        -initrd "$WORK/initramfs" -append "console=ttyS0 quiet panic=-1 no_timer_check rdinit=/init" -nodefaults -display none -serial stdio -no-reboot \
        </dev/null | tr -d '\r' | tee "$WORK/log$nodes" | { grep '^numa: ' || true; }
    grep -q "^numa: PASSED" "$WORK/log$nodes" || { tail -20 "$WORK/log$nodes"; echo "numa: $nodes nodes: did not pass"; return 1; }
}

IMAGE=$(debian_kernel "$WORK/kernel")
initramfs
# Each on one core of this machine, as many at a time as there are.
export -f boot
export IMAGE WORK SECONDS_EACH
printf '%s\n' 4 2 1 | xargs -P "$(nproc)" -I{} bash -c "set -euo pipefail; boot {}"
for nodes in 1 2 4; do grep -q "^numa: nodes $nodes, " "$WORK/log$nodes"; done
[ "$(sed -n 's/^numa: nodes .*, logits //p' "$WORK"/log[124] | sort -u | wc -l)" -eq 1 ] || { echo "numa: logits differ between machines"; exit 1; }
echo "numa: 3 machines passed, the same logits on all"
