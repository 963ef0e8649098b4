#!/usr/bin/env bash
# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
#
# kernel_objects.sh weak OBJECT            the object of one instruction set defines no weak symbol
# kernel_objects.sh vectorised OBJECT REG  every loop of a rule works on whole REG (ymm, zmm) vectors
#
# Weak: of an inline function that was not inlined each object has a weak copy, and the linker may
# keep the AVX-512 one for everybody. Vectorised: without one of the compiler's flags the loops stay
# scalar, correct and several times slower, and no other test would notice.
set -euo pipefail
check=$1 object=$2 register=${3:-}

for tool in nm objdump; do
  command -v "$tool" > /dev/null || { echo "skipped: $tool is not installed (binutils)"; exit 77; }
done

case $check in
  weak)
    symbols=$(nm -C "$object")
    if found=$(grep -E '^([0-9a-f]+| +) [WVuvw] ' <<< "$symbols"); then
      echo "weak or unique symbols in $object:"
      echo "$found"
      exit 1
    fi
    # Without any symbol the check would say nothing.
    grep -q -E ' T fusestep::detail::cpu_kernels_[a-z0-9]+\(\)' <<< "$symbols" ||
      { echo "no entry point in $object"; exit 1; }
    entries=$(grep -c -E ' [TDBRG] ' <<< "$symbols")
    [[ $entries == 1 ]] || { echo "$object has $entries global symbols, expected 1"; exit 1; }
    ;;
  vectorised)
    objdump -d -C --no-show-raw-insn "$object" | awk -v register="$register" '
      /^[0-9a-f]+ <.*>:$/ {
        name = ""
        # apply<fusestep::Adam<false>, fusestep::detail::Layout<float, float, float, void, ...> >
        if (match($0, /apply<fusestep::.*Layout<[^>]*>/)) {
          name = substr($0, RSTART + 6, RLENGTH - 6)
          gsub(/fusestep::(detail::)?/, "", name)
          seen[name] = 1
        }
        next
      }
      name != "" && index($0, "%" register) {
        if ($2 ~ /^vsqrtp[sd]$/) root[name] = 1
        if ($2 ~ /^vdivp[sd]$/) quotient[name] = 1
        if ($2 ~ /^vfn?m(add|sub)[0-9]+p[sd]$/) fma[name] = 1
      }
      # Two functions of the same code: one jumps to the other.
      name != "" && $2 == "jmp" && match($0, /apply<fusestep::.*Layout<[^>]*>/) && !/\+0x/ {
        target = substr($0, RSTART + 6, RLENGTH - 6)
        gsub(/fusestep::(detail::)?/, "", target)
        if (target != name) alias[name] = target
      }
      END {
        for (name in seen) {
          ++count
          rules[substr(name, 1, index(name, ", Layout") - 1)] = 1
          code = name in alias ? alias[name] : name
          complete = fma[code] && (name ~ /^Sgd</ || (root[code] && quotient[code]))
          if (!complete) {
            printf "no packed %s%s%sin %s\n", root[code] || name ~ /^Sgd</ ? "" : "sqrt ",
                   quotient[code] || name ~ /^Sgd</ ? "" : "div ", fma[code] ? "" : "fma ", name
            failed = 1
          }
        }
        for (rule in rules) {
          if (!((rule ", Layout<float, float, float, void, (Extra)0>") in seen) ||
              !((rule ", Layout<double, double, double, void, (Extra)0>") in seen)) {
            print "no loops of float32 and float64 for " rule
            failed = 1
          }
        }
        print count " loops looked at"
        if (!count) failed = 1
        exit failed
      }'
    ;;
  *) echo "unknown check: $check"; exit 2 ;;
esac
