#!/bin/sh
# Compile the NEON kernels for Linux on ARM, where a cross compiler is at hand: scripts/neon.sh PYTHON
set -eu
cd "$(dirname "$0")/.."
compiler=${AARCH64_CXX:-aarch64-linux-gnu-g++}
if ! command -v "$compiler" >/dev/null 2>&1; then
    echo "SKIPPED: the NEON kernels were not compiled; there is no $compiler (Debian: g++-aarch64-linux-gnu)" >&2
    exit 0
fi
include=$("$1" -c 'import pathlib, mlx.core; print(pathlib.Path(mlx.core.__file__).parent / "include")')
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for source in edger1/kernels/src/*_neon.cpp edger1/kernels/src/*_portable.cpp edger1/kernels/src/*_driver.cpp \
    edger1/kernels/src/pool.cpp edger1/kernels/src/cpu_features.cpp; do
    "$compiler" -std=c++20 -O2 -march=armv8.2-a+dotprod+fp16 -ffp-contract=off -Wall -Wextra -Wno-psabi \
        -I "$include" -c "$source" -o "$out/$(basename "$source").o"
done
echo "The NEON kernels compile with $compiler"
