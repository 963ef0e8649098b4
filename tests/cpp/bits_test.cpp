// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The same bits whatever computes them: instruction set, threads, addresses, cuts, the caller's
// floating-point settings, the compiler.
#include <gtest/gtest.h>

#include <cfenv>
#include <functional>
#include <memory>
#include <random>
#include <span>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"
#include "cpu/tuning.h"
#include "fusestep/detail/norm.h"
#include "fusestep/detail/rule_list.h"
#include "golden.h"
#include "support.h"

namespace fusestep::test {
namespace {

using detail::CpuKernels;
using detail::TensorRow;

std::vector<const CpuKernels*> all_kernels() {
  std::vector<const CpuKernels*> all = {&detail::cpu_kernels_baseline()};
#if defined(__x86_64__)
  for (const std::string_view name : available_instruction_sets()) {
    if (name == "avx2") all.push_back(&detail::cpu_kernels_avx2());
    if (name == "avx512") all.push_back(&detail::cpu_kernels_avx512());
  }
#endif
  return all;
}

/// What prepare() hands to the loops, for step `step` of one tensor.
detail::ScalarRow scalar_row(const Hyper& hyper, bool wide, std::int64_t step) {
  const detail::NoiseKey noise = detail::noise_key(detail::noise_seed(7, "p"), step);
  detail::ScalarRow row{};
  detail::Rules::for_each([&]<int kIndex, class R>() {
    if (kIndex != detail::find_rule(hyper)) return;
    const auto& settings = std::get<typename R::Hyper>(hyper);
    const auto fill = [&]<class Real>(Real sign) {
      row.set(detail::RuleScalars<R, Real>{
          sign, Real(0.5), Real(__builtin_huge_val()), noise,
          R::template prepare<Real>(settings, Progress{step, step == 1})});
    };
    wide ? fill(settings.maximize ? -1.0 : 1.0) : fill(settings.maximize ? -1.0f : 1.0f);
  });
  return row;
}

/// One tensor, its slots and its step count, without an engine around them.
class Cell {
 public:
  Cell(const RuleCase& rule, const LayoutCase& layout, std::int64_t size, int offset = 0)
      : hyper_(rule.hyper),
        rule_(detail::find_rule(rule.hyper)),
        layout_(layout_index(rule_, layout)),
        wide_(layout.value == DType::kFloat64),
        stores_grads_(layout.stores_grads),
        value(layout.value, size, offset),
        grad(layout.grad, size, offset) {
    const detail::SlotNames names = detail::rule_info(rule_).slots;
    if (layout.master) master = std::make_unique<Array>(DType::kFloat32, size, offset);
    for (const std::string_view name : names) {
      slots.emplace_back(layout.slot, size, offset);
      positive.push_back(name.find("sq") != std::string_view::npos);
    }
  }

  void fill_special(std::uint64_t seed) {
    const auto fill = [&](Array& array, std::uint64_t salt, bool is_positive) {
      array.fill([&](std::uint64_t i) {
        return special_number(seed * 8 + salt, i, array.dtype(), is_positive);
      });
    };
    fill(value, 0, false);
    fill(grad, 1, false);
    if (master != nullptr) fill(*master, 7, false);
    for (std::size_t i = 0; i < slots.size(); ++i) fill(slots[i], 2 + i, positive[i]);
  }

  /// One step, the tensor cut at these places.
  void step(const CpuKernels& kernels, const std::vector<std::int64_t>& cuts = {}) {
    TensorRow row{};
    row.value = value.data();
    row.grad = grad.data();
    for (std::size_t i = 0; i < slots.size(); ++i) row.slot[i] = slots[i].data();
    if (master != nullptr) row.master = master->data();
    row.size = value.size();
    row.grad_dtype = grad.dtype();
    const detail::ScalarRow scalars = scalar_row(hyper_, wide_, ++step_);
    std::int64_t begin = 0;
    for (const std::int64_t cut : cuts) {
      kernels.apply[rule_][layout_](row, scalars, begin, cut - begin);
      begin = cut;
    }
    kernels.apply[rule_][layout_](row, scalars, begin, value.size() - begin);
  }

  std::string result() const {
    std::string all = canonical(value);
    for (const Array& slot : slots) all += canonical(slot);
    if (master != nullptr) all += canonical(*master);
    if (stores_grads_) all += canonical(grad);
    return all;
  }
  bool guards_intact() const {
    bool intact = value.guards_intact() && grad.guards_intact();
    for (const Array& slot : slots) intact = intact && slot.guards_intact();
    return intact && (master == nullptr || master->guards_intact());
  }

 private:
  /// A rule without slots has one layout for all their dtypes.
  static int layout_index(int rule, const LayoutCase& layout) {
    detail::LayoutKey key{layout.value, layout.grad, layout.slot, layout.master};
    if (detail::rule_info(rule).slots.empty()) key.slot = key.value;
    if (layout.rounding == Rounding::kStochastic && size_of(key.slot) + size_of(key.value) < 8) {
      key.extra = detail::Extra::kStochasticRounding;
    }
    if (layout.stores_grads) key.extra = detail::Extra::kStoreGrad;
    return detail::find_layout(key).value();
  }

  Hyper hyper_;
  int rule_, layout_;
  bool wide_, stores_grads_;
  std::int64_t step_ = 0;

 public:
  Array value, grad;
  std::unique_ptr<Array> master;
  std::vector<Array> slots;
  std::vector<bool> positive;
};

std::uint64_t golden_hash(const CpuKernels& kernels, const RuleCase& rule,
                          std::span<const LayoutCase> layouts) {
  std::uint64_t result = fnv("");
  for (const LayoutCase& layout : layouts) {
    Cell cell(rule, layout, 301);
    cell.value.fill_numbers(1);
    if (cell.master != nullptr) cell.master->fill_numbers(1);
    for (std::uint64_t step = 1; step <= 20; ++step) {
      cell.grad.fill_numbers(1 + step);
      cell.step(kernels);
    }
    result = fnv(cell.result(), result);
  }
  return result;
}

TEST(Bits, AreTheGoldenOnes) {
  for (const RuleCase& rule : rule_cases()) {
    for (const CpuKernels* kernels : all_kernels()) {
      const auto golden = kGolden.find(rule.name);
      const std::uint64_t found = golden_hash(*kernels, rule, kLayoutCases);
      EXPECT_TRUE(golden != kGolden.end() && golden->second == found)
          << "    {\"" << rule.name << "\", 0x" << std::hex << found << "u},  // " << kernels->name;
    }
  }
  EXPECT_EQ(kGolden.size(), rule_cases().size()) << "golden.h has hashes of no rule";
}

TEST(Bits, AreTheGoldenOnesInFurtherLayouts) {
  for (const RuleCase& rule : variant_cases()) {
    for (const CpuKernels* kernels : all_kernels()) {
      const auto golden = kGoldenFurther.find(rule.name);
      const std::uint64_t found = golden_hash(*kernels, rule, further_layout_cases());
      EXPECT_TRUE(golden != kGoldenFurther.end() && golden->second == found)
          << "    {\"" << rule.name << "\", 0x" << std::hex << found << "u},  // " << kernels->name;
    }
  }
}

class EveryRuleBits : public ::testing::TestWithParam<RuleCase> {};

/// Two steps (the first one is special) over special values: every instruction set, address and cut
/// against the baseline in one piece.
void check_bits(const RuleCase& rule, std::span<const LayoutCase> layouts) {
  const std::uint64_t seed = fnv(rule.name);
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  constexpr std::int64_t size = 301;
  for (const LayoutCase& layout : layouts) {
    Cell expected(rule, layout, size);
    expected.fill_special(seed);
    expected.step(detail::cpu_kernels_baseline());
    expected.step(detail::cpu_kernels_baseline());
    const std::string expected_bits = expected.result();
    for (const CpuKernels* kernels : all_kernels()) {
      for (int offset = 0; offset < 16; ++offset) {
        std::vector<std::int64_t> cuts;
        if (offset % 2 == 1) {
          for (int i = 0; i < 5; ++i) cuts.push_back(static_cast<std::int64_t>(random() % size));
          std::sort(cuts.begin(), cuts.end());
        }
        Cell cell(rule, layout, size, offset);
        cell.fill_special(seed);
        cell.step(*kernels, cuts);
        cell.step(*kernels, cuts);
        ASSERT_TRUE(cell.result() == expected_bits)
            << kernels->name << ", " << layout.name << ", offset " << offset << ", " << cuts.size()
            << " cuts";
        ASSERT_TRUE(cell.guards_intact()) << kernels->name << ", " << layout.name;
      }
    }
  }
}

TEST_P(EveryRuleBits, DoNotDependOnInstructionSetAddressAndCut) {
  check_bits(GetParam(), kLayoutCases);
}

TEST(Bits, OfFurtherLayoutsDoNotDependOnInstructionSetAddressAndCut) {
  for (const RuleCase& rule : variant_cases()) check_bits(rule, further_layout_cases());
}

INSTANTIATE_TEST_SUITE_P(Rules, EveryRuleBits, ::testing::ValuesIn(rule_cases()),
                         [](const auto& info) { return info.param.name; });

TEST(NormBits, DoNotDependOnInstructionSetAndAddress) {
  for (const LayoutCase& layout : kLayoutCases) {
    for (const int size : {1, 2, 7, 64, 100, 4095, 4096}) {
      for (const bool special : {false, true}) {
        std::uint64_t expected = 0;
        std::int64_t expected_nonfinite = -1;
        for (const CpuKernels* kernels : all_kernels()) {
          for (int offset = 0; offset < 16; offset += 3) {
            Array grads(layout.value, size, offset);
            grads.fill([&](std::uint64_t i) {
              return special ? special_number(5, i, layout.value) : number(5, i);
            });
            const detail::NormSum sum =
                kernels->norm[static_cast<int>(layout.value)](grads.data(), size);
            const std::uint64_t found = std::isnan(sum.squares) ? 1 : bits(sum.squares);
            std::int64_t nonfinite = 0;
            for (std::int64_t i = 0; i < size; ++i) nonfinite += !std::isfinite(grads.get(i));
            ASSERT_EQ(sum.nonfinite, nonfinite) << kernels->name << ' ' << layout.name;
            if (expected_nonfinite < 0) {
              expected = found;
              expected_nonfinite = nonfinite;
            }
            ASSERT_EQ(found, expected)
                << kernels->name << ' ' << layout.name << ' ' << size << " offset " << offset;
          }
        }
      }
    }
  }
}

/// Every layout and several rules in one optimizer, tensors from none to several chunks.
class World {
 public:
  explicit World(int offset = 0) {
    const std::int64_t sizes[] = {50'001, 1, 0, 4096, 3 * detail::kCpuChunk, 17, 70'000};
    std::uint64_t seed = 0;
    for (const RuleCase& rule : rule_cases()) {
      const LayoutCase& layout = kLayoutCases[seed % std::size(kLayoutCases)];
      const std::int64_t size = sizes[seed % std::size(sizes)];
      arrays_.push_back(std::make_unique<Array>(layout.value, size, offset));
      Array& value = *arrays_.back();
      arrays_.push_back(std::make_unique<Array>(layout.value, size, offset));
      Array& grad = *arrays_.back();
      value.fill([&](std::uint64_t i) { return number(seed, i); });
      grad.fill([&](std::uint64_t i) {
        const bool large = hash(seed, i) % 4 == 0;
        const double g = number(seed + 100, i);
        return large ? g * 1e3 : hash(seed, i) % 5 == 0 ? g * 0x1p-130 : g;
      });
      optimizer.add_group(rule.name, rule.hyper, {{rule.name + ".p", value.view(), grad.view()}},
                          {layout.slots});
      ++seed;
    }
  }
  double reference_norm() const {
    long double sum = 0;
    for (std::size_t i = 1; i < arrays_.size(); i += 2) {
      for (std::int64_t k = 0; k < arrays_[i]->size(); ++k) {
        const long double g = arrays_[i]->get(k);
        sum += g * g;
      }
    }
    return static_cast<double>(std::sqrt(sum));
  }
  std::string run() {
    std::string out = std::to_string(bits(optimizer.grad_norm().norm));
    for (int step = 0; step < 3; ++step) {
      optimizer.step({.grad_multiplier = 0.3, .max_grad_norm = 500.0});
      out += '|' + std::to_string(bits(optimizer.last_grad_norm().norm));
    }
    return out + snapshot(optimizer);
  }
  Optimizer optimizer;

 private:
  std::vector<std::unique_ptr<Array>> arrays_;
};

std::string expected_run() {
  static const std::string expected = [] {
    set_num_threads(1);
    return World().run();
  }();
  return expected;
}

TEST(EngineBits, DoNotDependOnThreads) {
  const std::string expected = expected_run();
  for (int threads = 1; threads <= 4; ++threads) {
    set_num_threads(threads);
    ASSERT_EQ(num_threads(), threads);
    EXPECT_TRUE(World().run() == expected) << threads << " threads";
  }
}

TEST(EngineBits, DoNotDependOnAddresses) {
  set_num_threads(2);
  for (int offset = 1; offset < 16; offset += 4) {
    EXPECT_TRUE(World(offset).run() == expected_run()) << "offset " << offset;
  }
}

TEST(EngineBits, NormIsTheOneOfTheDefinition) {
  World world;
  const GradNorm norm = world.optimizer.grad_norm();
  EXPECT_NEAR(norm.norm, world.reference_norm(), 1e-14 * norm.norm);
  EXPECT_EQ(norm.nonfinite, 0);
  world.optimizer.step({.grad_multiplier = -0.5, .measure_grad_norm = true});
  EXPECT_EQ(bits(world.optimizer.last_grad_norm().norm), bits(norm.norm * 0.5));
}

/// norm.h's order, written out with recursion.
double sum_by_halves(std::vector<double> x) {
  std::size_t width = 1;
  while (width < x.size()) width *= 2;
  x.resize(width);
  if (width == 1) return x[0];
  std::vector<double> half(width / 2);
  for (std::size_t i = 0; i < half.size(); ++i) half[i] = x[i] + x[i + half.size()];
  return sum_by_halves(half);
}
double sum_as_documented(std::vector<double> x) {
  while (x.size() > 1) {
    std::vector<double> sums;
    for (std::size_t begin = 0; begin < x.size(); begin += 4096) {
      sums.push_back(sum_by_halves(
          {x.begin() + static_cast<std::ptrdiff_t>(begin),
           x.begin() + static_cast<std::ptrdiff_t>(std::min(begin + 4096, x.size()))}));
    }
    x = sums;
  }
  return x.empty() ? 0.0 : x[0];
}

/// A double with all its bits in use: sums of squares of number() alone are often exact.
double long_number(std::uint64_t seed, std::uint64_t i) {
  return number(seed, i) * (1 + number(seed + 1, i) / 3);
}

TEST(NormBits, BlocksAreSummedInTheDocumentedOrder) {
  for (const CpuKernels* kernels : all_kernels()) {
    for (const int size : {1, 2, 3, 5, 31, 64, 1000, 4095, 4096}) {
      Array grads(DType::kFloat64, size);
      grads.fill([&](std::uint64_t i) { return long_number(9, i); });
      std::vector<double> squares;
      std::vector<detail::NormSum> sums;
      for (int i = 0; i < size; ++i) {
        squares.push_back(grads.get(i) * grads.get(i));
        sums.push_back({squares.back(), i % 3});
      }
      const double expected = sum_by_halves(squares);
      const auto dtype = static_cast<int>(DType::kFloat64);
      EXPECT_EQ(bits(kernels->norm[dtype](grads.data(), size).squares), bits(expected))
          << kernels->name << ' ' << size;
      const detail::NormSum sum = kernels->add_sums(sums.data(), size);
      EXPECT_EQ(bits(sum.squares), bits(expected)) << kernels->name << ' ' << size;
      std::int64_t nonfinite = 0;
      for (int i = 0; i < size; ++i) nonfinite += i % 3;
      EXPECT_EQ(sum.nonfinite, nonfinite);
    }
  }
}

TEST(EngineBits, NormIsSummedInTheDocumentedOrder) {
  // 5,000 tensors give more blocks than one round of the list can sum.
  std::vector<std::unique_ptr<Array>> values, grads;
  std::vector<Parameter> parameters;
  for (int t = 0; t < 5000; ++t) {
    const std::int64_t size = t == 17 ? 20'000 : t % 7;
    values.push_back(std::make_unique<Array>(DType::kFloat64, size));
    grads.push_back(std::make_unique<Array>(DType::kFloat64, size));
    parameters.push_back({"p" + std::to_string(t), values.back()->view(), grads.back()->view()});
  }
  Optimizer optimizer;
  optimizer.add_group("all", SgdHyper{}, parameters);
  // The square root hides half of what differs in the last bit: ten sets of gradients.
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    std::vector<double> blocks;
    for (const auto& grad : grads) {
      grad->fill([&](std::uint64_t i) { return long_number(hash(seed, i), blocks.size() + i); });
      for (std::int64_t begin = 0; begin < grad->size(); begin += 4096) {
        std::vector<double> squares;
        for (std::int64_t i = begin; i < std::min(begin + 4096, grad->size()); ++i) {
          squares.push_back(grad->get(i) * grad->get(i));
        }
        blocks.push_back(sum_by_halves(squares));
      }
    }
    set_num_threads(1 + static_cast<int>(seed % 3));
    EXPECT_EQ(bits(optimizer.grad_norm().norm), bits(std::sqrt(sum_as_documented(blocks))));
  }
}

TEST(EngineBits, NonfiniteGradientsAreCounted) {
  for (const LayoutCase& layout : kLayoutCases) {
    Array value(layout.value, 40'000), grad(layout.value, 40'000);
    grad.fill_numbers(3);
    Optimizer optimizer;
    optimizer.add_group("g", SgdHyper{}, {{"p", value.view(), grad.view()}}, {layout.slots});
    grad.set(0, HUGE_VAL);
    grad.set(5000, -HUGE_VAL);
    EXPECT_EQ(optimizer.grad_norm().nonfinite, 2) << layout.name;
    EXPECT_EQ(optimizer.grad_norm().norm, HUGE_VAL) << layout.name;
    grad.set(39'999, std::nan(""));
    EXPECT_EQ(optimizer.grad_norm().nonfinite, 3) << layout.name;
    EXPECT_TRUE(std::isnan(optimizer.grad_norm().norm)) << layout.name;
  }
}

struct CallerSetting {
  const char* name;
  std::function<void()> set;
};

std::vector<CallerSetting> caller_settings() {
  std::vector<CallerSetting> settings = {
      {"round up", [] { std::fesetround(FE_UPWARD); }},
      {"round down", [] { std::fesetround(FE_DOWNWARD); }},
      {"round to zero", [] { std::fesetround(FE_TOWARDZERO); }},
  };
#if defined(__x86_64__)
  settings.push_back({"flush to zero", [] { _mm_setcsr(_mm_getcsr() | 0x8000); }});
  settings.push_back({"denormals are zero", [] { _mm_setcsr(_mm_getcsr() | 0x0040); }});
  settings.push_back({"all of it", [] {
                        std::fesetround(FE_UPWARD);
                        _mm_setcsr(_mm_getcsr() | 0x8040);
                      }});
#endif
  return settings;
}

TEST(EngineBits, DoNotDependOnTheCallersFloatingPointSettings) {
  for (const int threads : {1, 2}) {
    const std::string expected = expected_run();
    set_num_threads(threads);
    for (const CallerSetting& setting : caller_settings()) {
      World world;
      std::fenv_t before;
      std::fegetenv(&before);
      setting.set();
      const int rounding = std::fegetround();
#if defined(__x86_64__)
      const unsigned control = _mm_getcsr() & ~0x3fu;  // without the sticky flags
#endif
      const std::string found = world.run();
      const int rounding_after = std::fegetround();
#if defined(__x86_64__)
      const unsigned control_after = _mm_getcsr() & ~0x3fu;
#endif
      std::fesetenv(&before);
      EXPECT_TRUE(found == expected) << setting.name << ", " << threads << " threads";
      EXPECT_EQ(rounding_after, rounding) << setting.name;
#if defined(__x86_64__)
      EXPECT_EQ(control_after, control) << setting.name;
#endif
    }
  }
}

TEST(EngineBits, LeaveTheCallersFloatingPointFlagsAlone) {
  set_num_threads(1);
  World world;
  std::feclearexcept(FE_ALL_EXCEPT);
  world.optimizer.step();
  EXPECT_EQ(std::fetestexcept(FE_ALL_EXCEPT), 0);
}

}  // namespace
}  // namespace fusestep::test
