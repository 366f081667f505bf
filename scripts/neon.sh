#!/bin/sh
# Compile every source of the kernels for Linux on ARM, where a cross compiler is at hand: scripts/neon.sh PYTHON
#
# Objects only, since there is no MLX for ARM here to link with; its headers, nanobind's and Python's are PYTHON's.
set -eu
cd "$(dirname "$0")/.."
export COMPILER="${AARCH64_CXX:-aarch64-linux-gnu-g++}"
if ! command -v "$COMPILER" >/dev/null 2>&1; then
    echo "SKIPPED: the kernels were not compiled for ARM; there is no $COMPILER (Debian: g++-aarch64-linux-gnu)" >&2
    exit 0
fi
INCLUDES=$("$1" -c 'import pathlib, sysconfig, mlx.core, nanobind
print("-isystem", pathlib.Path(mlx.core.__file__).parent / "include", "-isystem", nanobind.include_dir(),
      "-isystem", sysconfig.get_path("include"))')
OUT=$(mktemp -d)
export INCLUDES OUT
trap 'rm -rf "$OUT"' EXIT
# As CMakeLists.txt has it: only what is called where the processor has it may use dot products.
printf '%s\n' edger1/kernels/src/*.cpp | xargs -P "$(getconf _NPROCESSORS_ONLN)" -I SOURCE sh -eu -c '
    case SOURCE in *_neon.cpp) arch=armv8.2-a+dotprod+fp16 ;; *) arch=armv8-a ;; esac
    ${CMAKE_CXX_COMPILER_LAUNCHER:-} "$COMPILER" -std=c++20 -O1 -fPIC -fvisibility=hidden -march=$arch \
        -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi -Werror -DEDGER1_HAS_OPS -DEDGER1_MLX_VERSION=\"\" $INCLUDES \
        -c SOURCE -o "$OUT/$(basename SOURCE).o"'
echo "All $(ls "$OUT" | wc -l) sources compile with $COMPILER"
