#!/usr/bin/env bash
# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
#
# run.sh TREE WORK static|shared [cmake options]: builds the program beside this file with the
# library as a subproject, installs that library, and builds the program again from the package.
# run.sh BUILD WORK built [cmake options]: installs what BUILD has, with the CUDA backend if it is
# there, and builds the program from that package.
set -euo pipefail
tree=$1 work=$2 kind=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
rm -rf "$work"
mkdir -p "$work"

case $kind in
  static) subproject=add_subdirectory shared=OFF library='libfusestep.a' ;;
  shared) subproject=FetchContent shared=ON library='libfusestep.so' ;;
  built) ;;
  *) echo "unknown kind: $kind"; exit 2 ;;
esac

# build DIRECTORY OPTIONS...: configures, builds and runs the program.
build() {
  local directory=$work/$1
  shift
  cmake -S "$here" -B "$directory" -DCMAKE_BUILD_TYPE=Release "$@" > "$work/log" 2>&1 &&
    cmake --build "$directory" >> "$work/log" 2>&1 ||
    { cat "$work/log"; exit 1; }
  "$directory/user"
}

if [[ $kind == built ]]; then
  cmake --install "$tree" --prefix "$work/prefix" > "$work/log"
  build package "${@}" -DFUSESTEP_FROM=find_package -DCMAKE_PREFIX_PATH="$work/prefix"
  exit
fi

echo "--- $subproject, $kind"
build subproject "${@}" -DFUSESTEP_FROM="$subproject" -DFUSESTEP_TREE="$tree" -DFUSESTEP_CUDA=OFF \
  -DBUILD_SHARED_LIBS="$shared"
extra=$(find "$work/subproject" -name '*_test*' -o -name '*gtest*' -o -path '*/fusestep/tests*' \
  -o -path '*/fusestep/examples*')
[[ -z $extra ]] || { echo "a subproject built more than the library:"; echo "$extra"; exit 1; }

echo "--- find_package, $kind"
cmake --install "$work/subproject" --prefix "$work/prefix" > "$work/log"
[[ -n $(find "$work/prefix" -name "$library") ]] || { cat "$work/log"; exit 1; }
# Moved: the package may hold no path of the tree it came from.
mv "$work/prefix" "$work/elsewhere"
mv "$work/subproject" "$work/subproject-gone"
if grep -rn --include='*.cmake' -e "$tree" -e "$work/subproject" "$work/elsewhere"; then
  echo "the package names paths of the tree it was built from"
  exit 1
fi
build package "${@}" -DFUSESTEP_FROM=find_package -DCMAKE_PREFIX_PATH="$work/elsewhere"

if [[ $kind == shared ]] && command -v nm > /dev/null; then
  exported=$(nm -D -C --defined-only "$(find "$work/elsewhere" -name "$library")")
  if grep ' fusestep::detail::' <<< "$exported"; then
    echo "the shared library exports internals"
    exit 1
  fi
  grep -q ' fusestep::Optimizer::step' <<< "$exported" || { echo "step is not exported"; exit 1; }
fi
