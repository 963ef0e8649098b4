// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What is right, written slowly and without the library's code: the 16-bit types from their
// definition, the rules from their papers and torch's documentation, and numbers that carry their
// own error bound.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "fusestep/dtype.h"
#include "fusestep/hyper.h"

namespace fusestep::test {

/// A binary floating-point format of 16 bits.
struct SmallFormat {
  int exponent_bits, fraction_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int top_exponent() const { return (1 << exponent_bits) - 1; }
};
inline constexpr SmallFormat kBFloat16Format{8, 7}, kFloat16Format{5, 10};

inline double decode(SmallFormat format, std::uint16_t bits) {
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const int exponent = bits >> format.fraction_bits & format.top_exponent();
  const double sign = bits >> 15 != 0 ? -1.0 : 1.0;
  if (exponent == format.top_exponent()) return fraction != 0 ? std::nan("") : sign * HUGE_VAL;
  const int implicit = exponent == 0 ? 0 : 1 << format.fraction_bits;
  return sign * std::ldexp(fraction + implicit,
                           std::max(exponent, 1) - format.bias() - format.fraction_bits);
}

/// To nearest, ties to even: the number as a multiple of the unit in its last place.
inline std::uint16_t encode(SmallFormat format, double x) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const int infinity = format.top_exponent() << format.fraction_bits;
  if (std::isnan(x)) return static_cast<std::uint16_t>(infinity | 1 << (format.fraction_bits - 1));
  if (std::isinf(x)) return static_cast<std::uint16_t>(sign | infinity);
  const double magnitude = std::fabs(x);
  const int lowest = 1 - format.bias();  // exponent of subnormals
  const int exponent = magnitude == 0 ? lowest : std::max(std::ilogb(magnitude), lowest);
  const double units = std::ldexp(magnitude, format.fraction_bits - exponent);
  double rounded = std::floor(units);
  const double rest = units - rounded;
  if (rest > 0.5 || (rest == 0.5 && std::fmod(rounded, 2.0) == 1.0)) rounded += 1;
  // A significand that rounds up to the next power of two carries into the exponent by itself.
  const int code = (exponent - lowest) * (1 << format.fraction_bits) + static_cast<int>(rounded);
  return static_cast<std::uint16_t>(sign | std::min(code, infinity));
}

inline double read_element(const void* data, DType dtype, std::int64_t i) {
  const char* at = static_cast<const char*>(data) + static_cast<std::size_t>(i) * size_of(dtype);
  float narrow;
  double wide;
  std::uint16_t half;
  switch (dtype) {
    case DType::kFloat32: std::memcpy(&narrow, at, 4); return narrow;
    case DType::kFloat64: std::memcpy(&wide, at, 8); return wide;
    case DType::kBFloat16: std::memcpy(&half, at, 2); return decode(kBFloat16Format, half);
    case DType::kFloat16: std::memcpy(&half, at, 2); return decode(kFloat16Format, half);
  }
  return 0;
}

/// `x` as the dtype would store it, rounded to nearest even once.
inline void write_element(void* data, DType dtype, std::int64_t i, double x) {
  char* at = static_cast<char*>(data) + static_cast<std::size_t>(i) * size_of(dtype);
  const auto narrow = static_cast<float>(x);
  std::uint16_t half = 0;
  switch (dtype) {
    case DType::kFloat32: std::memcpy(at, &narrow, 4); return;
    case DType::kFloat64: std::memcpy(at, &x, 8); return;
    case DType::kBFloat16: half = encode(kBFloat16Format, x); break;
    case DType::kFloat16: half = encode(kFloat16Format, x); break;
  }
  std::memcpy(at, &half, 2);
}

inline double rounded_to(DType dtype, double x) {
  unsigned char memory[8];
  write_element(memory, dtype, 0, x);
  return read_element(memory, dtype, 0);
}

/// The largest number of a 16-bit dtype that is not above `x`.
inline double rounded_down(DType dtype, double x) {
  const SmallFormat format = dtype == DType::kBFloat16 ? kBFloat16Format : kFloat16Format;
  const int code = encode(format, x);
  if (!(decode(format, static_cast<std::uint16_t>(code)) > x)) {
    return decode(format, static_cast<std::uint16_t>(code));
  }
  const int below = code >= 0x8000 ? code + 1 : code == 0 ? 0x8001 : code - 1;
  return decode(format, static_cast<std::uint16_t>(below));
}

/// A number computed in `Wide`, and how far the same computation in a type with unit roundoff
/// `unit` can be from it: every operation adds one rounding and hands on the errors of its operands
/// (running error analysis: Higham, "Accuracy and stability of numerical algorithms", 3.3).
template <class Wide>
struct Bounded {
  Wide value = 0, error = 0;

  static inline Wide unit = 0;      // 2^-24 for float32, 2^-53 for float64
  static inline Wide smallest = 0;  // half the smallest subnormal

  static Bounded rounded(Wide value, Wide error) {
    return {value, error + unit * std::fabs(value) + smallest};
  }
  /// A setting, which the library rounds to the type of arithmetic.
  static Bounded setting(Wide value) { return rounded(value, 0); }

  friend Bounded operator-(Bounded a) { return {-a.value, a.error}; }
  friend Bounded operator+(Bounded a, Bounded b) {
    return rounded(a.value + b.value, a.error + b.error);
  }
  friend Bounded operator-(Bounded a, Bounded b) { return a + -b; }
  friend Bounded operator*(Bounded a, Bounded b) {
    return rounded(a.value * b.value,
                   std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error);
  }
  friend Bounded operator/(Bounded a, Bounded b) {
    const Wide quotient = a.value / b.value;
    return rounded(quotient, (a.error + std::fabs(quotient) * b.error) /
                                 std::max(std::fabs(b.value) - b.error, Wide(0)));
  }
  friend Bounded sqrt(Bounded a) {
    const Wide low = std::sqrt(std::max(a.value - a.error, Wide(0)));
    const Wide root = std::sqrt(a.value), high = std::sqrt(a.value + a.error);
    return rounded(root, std::max(root - low, high - root));
  }
  friend Bounded max(Bounded a, Bounded b) {
    return {std::max(a.value, b.value), std::max(a.error, b.error)};
  }
};

/// One element's state by slot name.
template <class Number>
struct ReferenceState {
  Number exp_avg, exp_avg_sq, max_exp_avg_sq, momentum_buffer, square_avg, grad_avg;

  Number& slot(const std::string& name) {
    return name == "exp_avg"           ? exp_avg
           : name == "exp_avg_sq"      ? exp_avg_sq
           : name == "max_exp_avg_sq"  ? max_exp_avg_sq
           : name == "momentum_buffer" ? momentum_buffer
           : name == "square_avg"      ? square_avg
                                       : grad_avg;
  }
};

/// 1 - beta^t. The library computes it in double whatever the type of arithmetic: at most two
/// roundings per bit of t.
template <class Wide>
Bounded<Wide> bias_correction(double beta, std::int64_t t) {
  const Wide power = std::pow(Wide(beta), Wide(t));
  const Wide roundings = 2 * (std::log2(Wide(t)) + 1);
  return {1 - power, roundings * Wide(0x1p-53) * power};
}

/// Kingma & Ba, algorithm 1, with t the number of this step: 1, 2, ...; weight decay as in AdamW
/// (Loshchilov & Hutter, algorithm 2, with eta_t = 1 and torch's lr * wd) or added to the gradient;
/// AMSGrad as in torch.optim.Adam.
template <class Wide>
void reference_step(const AdamHyper& h, Bounded<Wide>& p, Bounded<Wide> g,
                    ReferenceState<Bounded<Wide>>& s, std::int64_t t, bool) {
  using N = Bounded<Wide>;
  const N one{1};
  const auto setting = N::setting;
  if (h.maximize) g = -g;
  if (h.weight_decay != 0) {
    if (h.decoupled_weight_decay) {
      p = p * (one - setting(Wide(h.lr) * Wide(h.weight_decay)));
    } else {
      g = g + setting(h.weight_decay) * p;
    }
  }
  s.exp_avg = setting(h.betas[0]) * s.exp_avg + setting(1 - Wide(h.betas[0])) * g;
  s.exp_avg_sq = setting(h.betas[1]) * s.exp_avg_sq + setting(1 - Wide(h.betas[1])) * (g * g);
  N second_moment = s.exp_avg_sq;
  if (h.amsgrad) second_moment = s.max_exp_avg_sq = max(s.max_exp_avg_sq, s.exp_avg_sq);
  const N denominator =
      sqrt(second_moment) / sqrt(bias_correction<Wide>(h.betas[1], t)) + setting(h.eps);
  p = p - setting(h.lr) / bias_correction<Wide>(h.betas[0], t) * (s.exp_avg / denominator);
}

/// torch.optim.SGD's algorithm. `first`: no step has filled the buffer.
template <class Wide>
void reference_step(const SgdHyper& h, Bounded<Wide>& p, Bounded<Wide> g,
                    ReferenceState<Bounded<Wide>>& s, std::int64_t, bool first) {
  const auto setting = Bounded<Wide>::setting;
  if (h.maximize) g = -g;
  if (h.weight_decay != 0) g = g + setting(h.weight_decay) * p;
  if (h.momentum != 0) {
    s.momentum_buffer =
        first ? g : setting(h.momentum) * s.momentum_buffer + setting(1 - Wide(h.dampening)) * g;
    g = h.nesterov ? g + setting(h.momentum) * s.momentum_buffer : s.momentum_buffer;
  }
  p = p - setting(h.lr) * g;
}

/// torch.optim.RMSprop's algorithm; the variance cannot be negative.
template <class Wide>
void reference_step(const RmspropHyper& h, Bounded<Wide>& p, Bounded<Wide> g,
                    ReferenceState<Bounded<Wide>>& s, std::int64_t, bool) {
  using N = Bounded<Wide>;
  const auto setting = N::setting;
  if (h.maximize) g = -g;
  if (h.weight_decay != 0) g = g + setting(h.weight_decay) * p;
  const N alpha = setting(h.alpha), rest = setting(1 - Wide(h.alpha));
  s.square_avg = alpha * s.square_avg + rest * (g * g);
  N variance = s.square_avg;
  if (h.centered) {
    s.grad_avg = alpha * s.grad_avg + rest * g;
    variance = max(variance - s.grad_avg * s.grad_avg, N{0});
  }
  N update = g / (sqrt(variance) + setting(h.eps));
  if (h.momentum > 0) {
    update = s.momentum_buffer = setting(h.momentum) * s.momentum_buffer + update;
  }
  p = p - setting(h.lr) * update;
}

}  // namespace fusestep::test
