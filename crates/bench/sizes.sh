#!/bin/sh
# How large the preloaded library is with each device, with none and with all (rule Z10): what is left out costs nothing.
# Prints a table of bytes of the stripped library, and of its code.
set -eu
cd "$(dirname "$0")/../.."

target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
printf '%-24s %12s %12s\n' devices 'file, bytes' 'code, bytes'
for features in "" soft compressed file "soft compressed file"; do
    cargo build --quiet --release -p peerspace-preload --no-default-features --features "$features" --target-dir "$target"
    library=$target/release/libpeerspace_preload.so
    strip -o "$target/stripped.so" "$library"
    code=$(size -A "$library" | awk '$1 == ".text" { print $2 }')
    printf '%-24s %12s %12s\n' "${features:-none}" "$(wc -c <"$target/stripped.so")" "$code"
done
