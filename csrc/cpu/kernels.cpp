// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Compiled once per instruction set, with FUSESTEP_ISA set to its name: plain loops that the
// compiler vectorises. Everything but the entry point is local to the object: see
// detail/host_device.h for what would happen otherwise.
#include "kernels.h"

#include "fusestep/detail/norm.h"

#define FUSESTEP_JOIN_(a, b) a##b
#define FUSESTEP_JOIN(a, b) FUSESTEP_JOIN_(a, b)
#define FUSESTEP_TEXT_(a) #a
#define FUSESTEP_TEXT(a) FUSESTEP_TEXT_(a)

namespace fusestep::detail {
namespace {

/// Rounded to nearest, or by `noise`.
template <class L, class Stored>
inline __attribute__((always_inline)) Stored stored(typename L::Real x, std::uint32_t noise) {
  if constexpr (L::kExtra == Extra::kStochasticRounding && std::is_same_v<Stored, bfloat16>) {
    return store_stochastically(x, noise);
  } else {
    return store_as<Stored>(x);
  }
}

template <class R, class L>
void apply(const TensorRow& row, const ScalarRow& scalar_row, std::int64_t begin,
           std::int64_t count) {
  using Real = typename L::Real;
  using Value = typename L::Value;
  using Grad = typename L::Grad;
  using Slot = typename L::Slot;
  const RuleScalars<R, Real> scalars = scalar_row.as<RuleScalars<R, Real>>();
  const NoiseKey noise_key = noise_key_from(scalars.noise, begin);
  auto* __restrict value = static_cast<Value*>(row.value) + begin;
  auto* __restrict grad = static_cast<Grad*>(row.grad) + begin;
  auto* __restrict master = L::kHasMaster ? static_cast<float*>(row.master) + begin : nullptr;
  // Three names, not an array: the compiler forgets __restrict for elements of an array.
  Slot* __restrict slot0 = R::kSlots > 0 ? static_cast<Slot*>(row.slot[0]) + begin : nullptr;
  Slot* __restrict slot1 = R::kSlots > 1 ? static_cast<Slot*>(row.slot[1]) + begin : nullptr;
  Slot* __restrict slot2 = R::kSlots > 2 ? static_cast<Slot*>(row.slot[2]) + begin : nullptr;
#if defined(__clang__)
  // It ignores __restrict of local variables, and gives up where that leaves too many pairs to
  // compare: three slots stayed scalar.
#pragma clang loop vectorize(assume_safety)
#else
  // GCC gives up with six arrays: three slots and a master weight.
#pragma GCC ivdep
#endif
  for (std::int64_t i = 0; i < count; ++i) {
    Real p;
    if constexpr (L::kHasMaster) {
      p = master[i];
    } else {
      p = load_as<Real>(value[i]);
    }
    const Real g = load_as<Real>(grad[i]);
    Real slot[kMaxSlots];
    if constexpr (R::kSlots > 0) slot[0] = load_as<Real>(slot0[i]);
    if constexpr (R::kSlots > 1) slot[1] = load_as<Real>(slot1[i]);
    if constexpr (R::kSlots > 2) slot[2] = load_as<Real>(slot2[i]);
    R::template apply<Real>(scalars.rule, p, scaled_and_clipped(scalars, g), slot);
    const Noise noise(noise_key, static_cast<std::uint32_t>(begin + i));  // not used by all layouts
    if constexpr (L::kHasMaster) master[i] = p;
    value[i] = stored<L, Value>(p, noise.of_value());
    if constexpr (L::kExtra == Extra::kStoreGrad) {
      grad[i] = store_as<Grad>(scalars.grad_unscale * g);
    }
    if constexpr (R::kSlots > 0) slot0[i] = stored<L, Slot>(slot[0], noise.of_slot(0));
    if constexpr (R::kSlots > 1) slot1[i] = stored<L, Slot>(slot[1], noise.of_slot(1));
    if constexpr (R::kSlots > 2) slot2[i] = stored<L, Slot>(slot[2], noise.of_slot(2));
  }
}

/// x[i] += x[i + half], from the smallest half that covers `count` elements: those beyond are
/// zeros, and adding +0 to a sum of squares changes no bit.
inline __attribute__((always_inline)) double add_by_halves(double* __restrict x, int count) {
  int width = 1;
  while (width < count) width *= 2;
  for (int i = count; i < width; ++i) x[i] = 0;
  for (int half = width / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return count == 0 ? 0.0 : x[0];
}

template <class Grad>
NormSum sum_squares(const void* grads, int count) {
  const auto* __restrict grad = static_cast<const Grad*>(grads);
  double squares[kNormBlock];
  std::int32_t nonfinite = 0;
  for (int i = 0; i < count; ++i) {
    const NormSum one = square(grad[i]);
    squares[i] = one.squares;
    nonfinite += static_cast<std::int32_t>(one.nonfinite);
  }
  return {add_by_halves(squares, count), nonfinite};
}

NormSum add_sums(NormSum* sums, int count) {
  double squares[kNormBlock];
  std::int64_t nonfinite = 0;
  for (int i = 0; i < count; ++i) {
    squares[i] = sums[i].squares;
    nonfinite += sums[i].nonfinite;
  }
  return {add_by_halves(squares, count), nonfinite};
}

constexpr CpuKernels make_kernels() {
  CpuKernels kernels{};
  kernels.name = FUSESTEP_TEXT(FUSESTEP_ISA);
  Rules::for_each([&]<int kRule, class R>() {
    Layouts::for_each([&]<int kLayout, class L>() {
      if constexpr (is_compiled<R, L>) kernels.apply[kRule][kLayout] = apply<R, L>;
    });
  });
  kernels.norm[static_cast<int>(DType::kFloat32)] = sum_squares<float>;
  kernels.norm[static_cast<int>(DType::kFloat64)] = sum_squares<double>;
  kernels.norm[static_cast<int>(DType::kBFloat16)] = sum_squares<bfloat16>;
  kernels.norm[static_cast<int>(DType::kFloat16)] = sum_squares<float16>;
  kernels.add_sums = add_sums;
  return kernels;
}

constexpr CpuKernels kKernels = make_kernels();

}  // namespace

const CpuKernels& FUSESTEP_JOIN(cpu_kernels_, FUSESTEP_ISA)() { return kKernels; }

}  // namespace fusestep::detail
