#!/bin/bash
# Runs a command as root: as it is when we are root, else with sudo. Packages install without questions.
set -euo pipefail

if [ "$(id -u)" = 0 ]; then
    exec env DEBIAN_FRONTEND=noninteractive "$@"
elif command -v sudo >/dev/null; then
    exec sudo env DEBIAN_FRONTEND=noninteractive "$@"
fi
echo "as_root.sh: not root and no sudo; as root run: $*" >&2
exit 1
