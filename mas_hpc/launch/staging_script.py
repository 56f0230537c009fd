"""What nodes run to stage: one script for bash, whose words are given as arguments and never become its text.

A copy is made beside its target, compared with the sums that the first node took from the source, tried, and only then
renamed: whoever finds the target finds all of it. In it .staged/ has the sums, which are its marker, and of an environment
the archive, which the node passes on. A copy of that name of an earlier job is kept where it is the same, and otherwise goes
as a whole when its successor is there.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mas_hpc.launch.plan import Staged

SSH = (
    "ssh", "-x", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new", "-o", "ConnectTimeout=20",
    "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4",
)  # fmt: skip
"""A node that does not answer costs 20 s, one that stops answering a minute."""
CHECK = Path(__file__).with_name("staged_check.py").read_text(encoding="utf-8")
ABSENT = 3
"""Exit code of "has" where a node has no whole copy."""
SCRIPT = r"""
set -euo pipefail
export LC_ALL=C
fail() { echo "$*" >&2; exit 1; }

# KIND FOLDER: "SUM  FILE" of all that is sent, by name.
sums() {
    cd "$2"
    if [ "$1" = environment ]; then sha256sum ./.staged/archive; return; fi
    find -L . -path ./.staged -prune -o -type f -print0 | xargs -0 -r -n 4 -P 8 sha256sum | sort -k 2
}

# KIND FOLDER: the first file that is not as .staged/sums has it.
difference() {
    { cat "$2/.staged/sums"; echo; (sums "$1" "$2") || true; } | awk -v folder="$2" '
        function bad(name, want, found) {
            print folder substr(name, 2) ": sha256 expected " want ", found " found; is_told = 1
        }
        $0 == "" { is_copy = 1; next }
        { name = substr($0, 67); sum = substr($0, 1, 64) }
        is_told { next }  # read to the end: who writes into a closed pipe fails
        !is_copy { wanted[name] = sum; next }
        wanted[name] != sum { bad(name, wanted[name] ? wanted[name] : "no file", sum) }
        { delete wanted[name] }
        END { if (!is_told) for (name in wanted) bad(name, wanted[name], "no file") }'
}

# KIND FOLDER DIGEST: whether it is a whole copy of what has these sums.
whole() {
    [ -f "$2/.staged/sums" ] && [ "$(sha256sum < "$2/.staged/sums")" = "$3  -" ] && [ -z "$(difference "$1" "$2")" ]
}

# FOLDER CHECK SHARED...: whether an environment stands alone.
try() {
    [ -x "$1/bin/python" ] || fail "no bin/python in it; make the archive with tar -C ENVIRONMENT -czf env.tar.gz ."
    "$1/bin/python" -B -c "$2" "$1" "${@:3}" > /dev/null
}

# TARGET: a folder for a copy, beside it; those of jobs that were killed go.
new_part() {
    mkdir -p "$(dirname "$1")"
    find "$(dirname "$1")" -maxdepth 1 -name "$(basename "$1").part.*" -mmin +240 -exec rm -rf {} +
    part=$(mktemp -d "$1.part.XXXXXX")
    chmod 755 "$part"
    trap 'rm -rf "$part" "$part.old"' EXIT
}

# KIND TARGET DIGEST CHECK SHARED...: of a copy that is all there, make the target.
finish() {
    wrong=$(difference "$1" "$part")
    [ -z "$wrong" ] || fail "$wrong; leave the node out, or stage again"
    [ "$(sha256sum < "$part/.staged/sums")" = "$3  -" ] || fail "$part/.staged/sums: not those of the source; stage again"
    if [ "$1" = environment ]; then
        tar -xf "$part/.staged/archive" -C "$part"
        try "$part" "${@:4}"
    fi
    exec 9> "$2.lock"
    flock 9
    whole "$1" "$2" "$3" && return
    if [ -e "$2" ]; then mv -T "$2" "$part.old"; fi
    mv -T "$part" "$2"
}

# The first node: KIND SOURCE TARGET CHECK SHARED...; prints the digest of the sums.
fetch() {
    new_part "$3"
    mkdir "$part/.staged"
    case $1 in
        environment) sum=$(sha256sum < "$2"); echo "${sum%% *}  ./.staged/archive" ;;
        file) (cd "$(dirname "$2")"; sha256sum "./$(basename "$2")") ;;
        folder) (sums folder "$2") ;;
    esac > "$part/.staged/sums"
    digest=$(sha256sum < "$part/.staged/sums")
    if ! (has "$1" "$3" "${digest%% *}" "${@:4}"); then
        case $1 in
            environment) cp "$2" "$part/.staged/archive" ;;
            file) cp "$2" "$part/" ;;
            folder) tar -chf - --exclude=./.staged -C "$2" . | tar -xf - -C "$part" ;;
        esac
        finish "$1" "$3" "${digest%% *}" "${@:4}"
    fi
    echo "${digest%% *}"
}

# KIND TARGET DIGEST CHECK SHARED...
has() {
    whole "$1" "$2" "$3" || exit 3
    if [ "$1" = environment ]; then (try "$2" "${@:4}") 2> /dev/null || exit 3; fi
}

# The same, with the copy's files as its input.
receive() {
    new_part "$2"
    tar -xf - -C "$part"
    finish "$@"
}

# A node that has it: KIND TARGET HAS RECEIVE SSH...; the third and fourth are commands for the node that the last words reach.
send() {
    code=0
    "${@:5}" "$3" < /dev/null || code=$?
    case $code in 0) return ;; 3) ;; *) exit "$code" ;; esac
    what=.
    if [ "$1" = environment ]; then what=./.staged; fi
    tar -cf - -C "$2" "$what" | "${@:5}" "$4"
}

"$@"
"""


def fetch_words(item: Staged, mounts: Sequence[str]) -> tuple[str, ...]:
    """For the first node: from where things are; prints the digest that all copies have."""
    return _words("fetch", kind_of(item), item.source, item.target, CHECK, *mounts)


def send_words(item: Staged, host: str, digest: str, mounts: Sequence[str]) -> tuple[str, ...]:
    """For a node that has a copy: to another, unless that has one too."""
    kind = kind_of(item)
    has, receive = (shlex.join(_words(what, kind, item.target, digest, CHECK, *mounts)) for what in ("has", "receive"))
    return _words("send", kind, item.target, has, receive, *SSH, host)


def kind_of(item: Staged) -> str:
    """environment, folder or file."""
    return "environment" if item.is_environment else "folder" if Path(item.source).is_dir() else "file"


def _words(*words: str) -> tuple[str, ...]:
    return ("bash", "-c", SCRIPT, "staging", *words)
