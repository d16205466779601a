# Sourced by examples/quickstart.sh and tests/run.sh: installs what is missing on Debian or Ubuntu.
#   need_packages PACKAGE...   Debian packages
#   need_python VENV           a virtual environment with CPython >= 3.11
#   debian_kernel DIR          prints the path of Debian's cloud kernel, unpacked in DIR

BUILD_PACKAGES="build-essential cmake pkg-config libopenblas-dev libhwloc-dev libjansson-dev libpcre2-dev libutf8proc-dev libyaml-dev libxxhash-dev
python3-dev python3-venv"
LUA_PACKAGES="lua5.4 liblua5.4-dev"
TEST_PACKAGES="libcmocka-dev lua-busted luarocks lua-check"
FUZZ_PACKAGES="clang libclang-rt-14-dev"
NUMA_PACKAGES="qemu-system-x86 cpio"
BOCHS_PACKAGES="patch bochsbios vgabios genisoimage isolinux syslinux-common cpio"
CROSS_PACKAGES="gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"

need_packages() {
    missing=""
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    if ! command -v apt-get >/dev/null; then
        echo "These packages (Debian's names) are missing, and there is no apt-get here to install them:$missing" >&2
        return 1
    fi
    sudo=""
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || { echo "As root: apt-get install$missing" >&2; return 1; }
        sudo=sudo
    fi
    echo "Installing:$missing"
    # shellcheck disable=SC2086
    $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq ${APT_OPTIONS:-} $missing >/dev/null
}

need_python() {
    if [ ! -x "$1/bin/python" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "CPython 3.11 or newer is needed, found $(python3 -V)" >&2; return 1; }
        python3 -m venv "$1"
    fi
    PYTHON="$1/bin/python"
}

newest_kernel() { apt-cache pkgnames linux-image- | { grep -E '^linux-image-[0-9].*-cloud-amd64-unsigned$' || true; } | sort -V | tail -1; }
debian_kernel() {
    local image name
    mkdir -p "$1"
    image=$(find "$1" -name 'vmlinuz-*')
    if [ -z "$image" ]; then
        name=$(newest_kernel)
        [ -n "$name" ] || { apt-get update -qq && name=$(newest_kernel); }
        [ -n "$name" ] || { echo "no linux-image-*-cloud-amd64-unsigned among the packages" >&2; return 1; }
        (cd "$1" && apt-get -qq -o APT::Sandbox::User=root download "$name" && dpkg-deb -x ./*.deb . && rm -rf ./*.deb lib usr)
        image=$(find "$1" -name 'vmlinuz-*')
    fi
    echo "$image"
}
