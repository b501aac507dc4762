#!/bin/sh
# How large the preloaded library is without device memory at all, with the layer for it but no device, with each device and
# with all (rule Z10): what is left out costs nothing.
# Prints a table of bytes: of the stripped library, of its code, of the functions that resolve a fault (the modules fault,
# pages and block of the engine), and of the functions that only device memory needs. Where that is left out, there must be
# none of the latter.
set -eu
cd "$(dirname "$0")/../.."

target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT

# The bytes of the functions that a pattern fits.
functions() {
    nm -S --demangle "$library" | awk -v pattern="$1" '
        function number(hex,  i, n) { for (i = 1; i <= length(hex); i++) n = 16 * n + index("0123456789abcdef", substr(hex, i, 1)) - 1; return n }
        $3 ~ /^[tTwW]$/ && $0 ~ pattern { sum += number($2) }
        END { print sum + 0 }'
}

# The modules that only device memory needs; those that have a stand-in without it are not among them, but for `tiers`.
library_modules='announce|attach|device|launch|migrate|peers|persistent|placement|ports|spec|view'
engine_modules='announce|copy|detach|device_fault|device_step|empty|launch|make_room|migrate|named|place|placing|prefetch|send|stays_fault|tiers?|to_device|watch'
core_modules='altmap|bitmap|buddy|devmap|inverted|pagemap|shootdown|vmemmap|wars'

printf '%-24s %12s %12s %12s %12s\n' devices 'file, bytes' 'code, bytes' 'fault path' 'device layer'
for features in "" devices soft compressed dax file "soft compressed dax file"; do
    cargo build --quiet --release -p peerspace-preload --no-default-features --features "$features" --target-dir "$target"
    library=$target/release/libpeerspace_preload.so
    strip -o "$target/stripped.so" "$library"
    code=$(size -A "$library" | awk '$1 == ".text" { print $2 }')
    path=$(functions 'peerspace::engine::(fault|pages|block)::')
    devices=$(functions "peerspace::($library_modules|engine::($engine_modules))::|peerspace_core::($core_modules)::")
    case $features in
        "") name="no device memory" ;;
        devices) name=none ;;
        *) name=$features ;;
    esac
    printf '%-24s %12s %12s %12s %12s\n' "$name" "$(wc -c <"$target/stripped.so")" "$code" "$path" "$devices"
    if [ "$path" = 0 ] || { [ -z "$features" ] && [ "$devices" != 0 ]; }; then
        echo "the functions counted are not those that were meant" >&2
        exit 1
    fi
done
