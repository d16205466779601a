#!/usr/bin/env bash
# The kernel tests on an emulated processor with AVX-512 and AMX: avx512.sh DIR builds Bochs in DIR (once; it has the instructions that
# qemu's emulation lacks) and boots Debian's cloud kernel (unpacked, not installed) in it.  Prints what the tests print; 0 if they passed
# and ran AVX-512 and tiles.  It says nothing about speed.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/deps.sh
mkdir -p "$1"
WORK=$(cd "$1" && pwd)
SECONDS_MOST=1800
# shellcheck disable=SC2086
APT_OPTIONS=--no-install-recommends need_packages $BOCHS_PACKAGES

# Debian 12's Bochs 2.7 rounds some f16 wrongly, and runs under its debugger at a fraction of the speed; 3.0 is in Debian 13.
BOCHS_SOURCE=http://deb.debian.org/debian/pool/main/b/bochs/bochs_3.0+dfsg.orig.tar.xz
BOCHS_SHA256=78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b
BOCHS_PATCH=$PWD/tests/emulated/bochs-amx.patch   # without it Linux does not boot with AMX; its head says why
build_bochs() {   # build_bochs DIR: DIR/bochs
    if [ -x "$1/bochs" ] && cmp -s "$BOCHS_PATCH" "$1/patch"; then return 0; fi
    echo "building Bochs 3.0 in $1"
    rm -rf "$1"
    mkdir -p "$1/build"
    python3 -c 'import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])' "$BOCHS_SOURCE" "$1/source.tar.xz"
    echo "$BOCHS_SHA256  $1/source.tar.xz" | sha256sum --quiet -c
    tar -xf "$1/source.tar.xz" -C "$1"
    patch -s -d "$1/bochs-3.0" -p1 <"$BOCHS_PATCH"
    (cd "$1/build" && CFLAGS="-O2 -w" CXXFLAGS="-O2 -w" ../bochs-3.0/configure --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-amx \
        --enable-all-optimizations --enable-trace-linking --with-nogui --disable-docbook && make -j "$(nproc)" bochs) >"$1/log" 2>&1 ||
        { tail -20 "$1/log"; return 1; }
    mv "$1/build/bochs" "$1/bochs"
    cp "$BOCHS_PATCH" "$1/patch"
    rm -rf "$1/build" "$1/bochs-3.0" "$1/source.tar.xz"
}

boot() {   # boot TEST: a machine for one program
    local here=$WORK/$1 only=ONEBITMERGE_TEST_ISA=avx512
    [ "$1" != test_pair_kernels ] || only=   # quick, and it compares AMX too
    rm -rf "$here"
    mkdir -p "$here/programs" "$here/disc/isolinux"
    cp "$WORK/programs/$1" "$WORK/programs/init" "$here/programs"
    (cd "$here/programs" && find . | cpio --quiet -o -H newc) >"$here/disc/initramfs"
    cp "$IMAGE" "$here/disc/vmlinuz"
    cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$here/disc/isolinux/"
    # acpi=off: switching ACPI on ends in system management mode, where Bochs refuses the control registers that Linux has set.  What the
    # kernel does not know becomes the environment of /init.
    cat >"$here/disc/isolinux/isolinux.cfg" <<EOT
DEFAULT linux
PROMPT 0
LABEL linux
 KERNEL /vmlinuz
 INITRD /initramfs
 APPEND console=ttyS0 quiet panic=-1 rdinit=/init nosmp acpi=off mitigations=off tsc=reliable $only
EOT
    genisoimage -quiet -o "$here/disc.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table \
        -J -R "$here/disc"
    cat >"$here/bochsrc" <<EOT
display_library: nogui
megs: 256
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0-master: type=cdrom, path=$here/disc.iso, status=inserted
boot: cdrom
cpu: model=sapphire_rapids, count=1, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=none
com1: enabled=1, mode=file, dev=$here/serial
log: $here/log
panic: action=fatal
error: action=ignore
info: action=ignore
EOT
    # It ends with an error, also when it ends as it should.
    timeout -k 10 "$SECONDS_MOST" "$WORK/bochs/bochs" -q -f "$here/bochsrc" </dev/null >"$here/screen" 2>&1 || true
    tr -d '\r' <"$here/serial" | { grep -aE "^(emulated|kernels|tiles): |passed$|\.[ch]:[0-9]+: " || true; } | tee "$here/said"
    grep -q "^emulated: PASSED" "$here/said" || { tail -n 20 "$here/serial" "$here/log" "$here/screen"; echo "avx512: $1: did not pass"; return 1; }
}

build_bochs "$WORK/bochs"
rm -rf "$WORK/programs"
mkdir -p "$WORK/programs"
for test in tests/c/test_*kernels.c; do
    gcc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -ffp-contract=off -static -s -Ikernels -Itests/cross \
        "$test" kernels/*.c -lm -o "$WORK/programs/$(basename "$test" .c)"
done
gcc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -static -s tests/emulated/init.c -o "$WORK/programs/init"
IMAGE=$(debian_kernel "$WORK/kernel")
# Each on one core of this machine, as many at a time as there are.
export -f boot
export IMAGE WORK SECONDS_MOST
(cd "$WORK/programs" && printf '%s\n' test_*) | xargs -P "$(nproc)" -I{} bash -c "set -euo pipefail; boot {}"
grep -q "^kernels: avx512 tested" "$WORK/test_kernels/said"
grep -q "^tiles: tested" "$WORK/test_pair_kernels/said"
