#!/usr/bin/env bash
# Prove the agent on 64-bit ARM: install its wheel in an arm64 Debian under qemu, let it join, train a sealed round beside
# two agents of this machine, and answer. Usage: prove.sh [FOLDER]; the Debian stays in FOLDER for the next time.
# Needs root, and Debian's packages debootstrap, qemu-user-static and binfmt-support.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$(realpath -m "${1:-build/arm64}")
python=.venv/bin/python

if [ -z "${IN_OWN_MOUNTS:-}" ]; then # what is mounted below goes when this script does
    IN_OWN_MOUNTS=1 exec unshare --mount bash "$0" "$root"
fi
for tool in debootstrap qemu-aarch64-static update-binfmts; do
    command -v "$tool" >/dev/null || { echo "prove.sh: expected $tool: apt-get install debootstrap qemu-user-static binfmt-support"; exit 2; }
done
mountpoint -q /proc/sys/fs/binfmt_misc || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
update-binfmts --enable qemu-aarch64

if [ ! -e "$root/installed" ]; then
    rm -rf "$root"
    debootstrap --arch=arm64 --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root"
    touch "$root/installed"
fi
rm -rf build/wheel "$root/opt/fedloom"
"$python" -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
mkdir -p "$root/wheel" && cp build/wheel/*.whl "$root/wheel/"
# The network is this machine's: so are its resolver and the authorities that it trusts.
cp /etc/resolv.conf "$root/etc/"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
mount -t proc proc "$root/proc"
echo "arm64 Debian: $(chroot "$root" uname -m), $(chroot "$root" python3 --version)"
chroot "$root" python3 -m venv /opt/fedloom
chroot "$root" env -u PIP_FIND_LINKS /opt/fedloom/bin/pip install --quiet --no-compile --only-binary=:all: \
    "fedloom[agent] @ file:///wheel/$(basename build/wheel/*.whl)"
echo "the agent and what it needs: $(du -sm "$root/opt/fedloom" | cut -f1) MB"

out=$PWD/build/arm64-demo
mkdir -p "$out" "$root/$out"
mount --bind "$out" "$root/$out"
exec "$python" -m examples.arm64 --root "$root" --out "$out" --rounds 1
