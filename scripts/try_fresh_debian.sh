#!/bin/bash
# The README's commands as a new user sees them: in a bare Debian root with nothing installed, in a clean clone of HEAD.
#
#   scripts/try_fresh_debian.sh [SUITE [COMMAND...]]      (bookworm; ./quickstart.sh and then ./test.sh)
#
# Needs root and debootstrap. The bare system is kept in /var/tmp/cadre-SUITE; each run works on a fresh copy of it.
set -euo pipefail

suite=${1:-bookworm}
shift || true
commands=("${@:-./quickstart.sh}")
[ $# -gt 0 ] || commands+=(./test.sh)

source=$(cd "$(dirname "$0")/.." && pwd)
bare=/var/tmp/cadre-$suite
root=/var/tmp/cadre-$suite-try

unmount() {
    umount "$root/proc" "$root/sys" "$root/dev" 2>/dev/null || true
}

if [ ! -d "$bare" ]; then
    # The mirror that this machine's own packages come from.
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
        awk '$2 !~ /-/ { print $1; exit }')
    debootstrap --variant=minbase "$suite" "$bare.part" "$mirror"
    mv "$bare.part" "$bare"
fi
# Never delete through a mount left by a run that was killed.
unmount
if mountpoint -q "$root/dev" || mountpoint -q "$root/sys" || mountpoint -q "$root/proc"; then
    echo "try_fresh_debian.sh: $root is still in use" >&2
    exit 1
fi
rm -rf "$root"
cp -a "$bare" "$root"
cp /etc/resolv.conf "$root/etc/resolv.conf"
# An installed system knows its own name; without it each look-up waits for a time-out.
printf '127.0.0.1 localhost %s\n' "$(hostname)" >"$root/etc/hosts"
git clone -q --no-hardlinks "$source" "$root/root/cadre"
trap unmount EXIT
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount --bind /dev "$root/dev"

for command in "${commands[@]}"; do
    printf '\n#### %s on %s\n' "$command" "$suite"
    start=$SECONDS
    env -i HOME=/root TERM=dumb PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        chroot "$root" bash -c "cd /root/cadre && $command"
    printf '#### %s: %d s\n' "$command" $((SECONDS - start))
done
