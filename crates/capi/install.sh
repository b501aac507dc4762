#!/bin/sh
# Installs the C library: header, shared and static library, pkg-config file.
#
#   sh crates/capi/install.sh [--prefix DIR] [--libdir DIR] [--destdir DIR] [--from DIR]
#
# --prefix   where it is going to be used (/usr/local)
# --libdir   where libraries are going to be (PREFIX/lib)
# --destdir  where to put all of that for now, for makers of packages (nowhere else)
# --from     the directory that has libpeerspace_capi.so and .a already (built here otherwise, for release)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
prefix=/usr/local libdir='' destdir='' from=''

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
while [ $# -gt 0 ]; do
    case $1 in
    --help) usage && exit 0 ;;
    --prefix | --libdir | --destdir | --from) [ $# -ge 2 ] || { echo "install.sh: $1 needs a directory" >&2 && exit 2; } ;;
    *) echo "install.sh: what is $1? See --help" >&2 && exit 2 ;;
    esac
    case $1 in
    --prefix) prefix=$2 ;;
    --libdir) libdir=$2 ;;
    --destdir) destdir=$2 ;;
    --from) from=$2 ;;
    esac
    shift 2
done
case $prefix in
/*) ;;
*) echo "install.sh: --prefix $prefix is not absolute: programs find the library by it" >&2 && exit 2 ;;
esac
[ -n "$libdir" ] || libdir=$prefix/lib

version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$here/../../Cargo.toml")
[ -n "$version" ] || { echo "install.sh: there is no version in the workspace's Cargo.toml" >&2 && exit 1; }

if [ -z "$from" ]; then
    cargo build --release --manifest-path "$here/Cargo.toml" -p peerspace-capi
    from=${CARGO_TARGET_DIR:-$here/../../target}/release
fi
for file in libpeerspace_capi.so libpeerspace_capi.a; do
    [ -f "$from/$file" ] || { echo "install.sh: there is no $file in $from" >&2 && exit 1; }
done

lib=$destdir$libdir
install -d "$lib/pkgconfig" "$destdir$prefix/include"
install -m 644 "$here/include/peerspace.h" "$destdir$prefix/include/peerspace.h"
install -m 755 "$from/libpeerspace_capi.so" "$lib/libpeerspace.so.$version"
# The number that build.rs gives the library: programs ask for that one.
ln -sf "libpeerspace.so.$version" "$lib/libpeerspace.so.0"
ln -sf libpeerspace.so.0 "$lib/libpeerspace.so"
install -m 644 "$from/libpeerspace_capi.a" "$lib/libpeerspace.a"
sed -e "s|@prefix@|$prefix|" -e "s|@libdir@|$libdir|" -e "s|@version@|$version|" "$here/peerspace.pc.in" \
    >"$lib/pkgconfig/peerspace.pc"
chmod 644 "$lib/pkgconfig/peerspace.pc"
