#!/usr/bin/env bash
# The kernel tests on an emulated processor with AVX-512: avx512.sh DIR boots Debian's cloud kernel (unpacked in DIR, not installed) in
# Bochs, which has the instructions that qemu's emulation lacks.  Prints what the tests print; 0 if they passed and ran AVX-512.  It says
# nothing about speed.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/deps.sh
mkdir -p "$1"
WORK=$(cd "$1" && pwd)
SECONDS_MOST=2000
# shellcheck disable=SC2086
APT_OPTIONS=--no-install-recommends need_packages $BOCHS_PACKAGES

rm -rf "$WORK/programs" "$WORK/disc"
mkdir -p "$WORK/programs" "$WORK/disc/isolinux"
for test in tests/c/test_*kernels.c; do
    gcc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -ffp-contract=off -static -s -DOBM_TEST_BOCHS -Ikernels -Itests/cross \
        "$test" kernels/*.c -lm -o "$WORK/programs/$(basename "$test" .c)"
done
gcc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -static -s tests/emulated/init.c -o "$WORK/programs/init"
(cd "$WORK/programs" && find . | cpio --quiet -o -H newc) >"$WORK/disc/initramfs"
cp "$(debian_kernel "$WORK/kernel")" "$WORK/disc/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$WORK/disc/isolinux/"

# Without xsavec and xsaves: Bochs 2.7 tells the size of the plain layout for the compact one, at which Linux takes all vector registers
# away.  A second of the machine is 20 million instructions: the kernel waits for devices in seconds, the tests in none.
cat >"$WORK/disc/isolinux/isolinux.cfg" <<EOF
DEFAULT linux
PROMPT 0
LABEL linux
 KERNEL /vmlinuz
 INITRD /initramfs
 APPEND console=ttyS0 quiet panic=-1 rdinit=/init nosmp mitigations=off clearcpuid=xsavec,xsaves
EOF
genisoimage -quiet -o "$WORK/disc.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table \
    -J -R "$WORK/disc"
cat >"$WORK/bochsrc" <<EOF
display_library: term
megs: 256
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0-master: type=cdrom, path=$WORK/disc.iso, status=inserted
boot: cdrom
cpu: model=corei7_skylake_x, count=1, ips=20000000, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=none
com1: enabled=1, mode=file, dev=$WORK/serial
log: $WORK/log
panic: action=fatal
error: action=ignore
info: action=ignore
EOF
echo c >"$WORK/commands"   # Debian's Bochs begins in its debugger

# It wants a terminal, and is stopped if the machine that switches itself off does not end it.
rm -f "$WORK/serial"
TERM=xterm timeout -k 10 "$SECONDS_MOST" python3 -c 'import pty, sys; pty.spawn(sys.argv[1:])' bochs -q -rc "$WORK/commands" -f "$WORK/bochsrc" \
    </dev/null >"$WORK/screen" 2>&1 &
bochs=$!
while kill -0 "$bochs" 2>/dev/null && ! grep -aqs "^emulated: [A-Z]" "$WORK/serial"; do sleep 1; done
sleep 1
kill "$bochs" 2>/dev/null || true
wait "$bochs" || true
tr -d '\r' <"$WORK/serial" | { grep -aE "^(emulated|kernels): |passed$|\.c:[0-9]+: " || true; } | tee "$WORK/said"
grep -q "^emulated: PASSED" "$WORK/said" || { tail -20 "$WORK/serial" "$WORK/log" "$WORK/screen"; echo "avx512: did not pass"; exit 1; }
grep -q "^kernels: avx512 tested" "$WORK/said"
