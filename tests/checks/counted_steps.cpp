// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Steps whose instructions tests/checks/instructions.py counts under callgrind: each case once,
// inside counted(), after two that are not counted. Prints a line per case: its name, and the
// number of parameters or elements its count is divided by.
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "borrowed.h"
#include "fusestep/fusestep.h"

/// The name callgrind is told. A function pointer keeps it from being inlined into its callers.
extern "C" __attribute__((noinline)) void counted(const std::function<void()>& work) { work(); }

namespace {

using namespace fusestep;

constexpr int kTensors = 1000;
constexpr std::int64_t kElements = 1 << 18;

struct Case {
  std::string name;
  std::int64_t items;
  std::function<void()> work;
};

/// Any dtype, aligned for all of them; zeros.
std::vector<double> memory(std::int64_t elements) {
  return std::vector<double>(static_cast<std::size_t>(elements));
}

/// A thousand parameters of one element: what a step costs outside its loops.
struct ManySmall {
  std::vector<double> values = memory(kTensors), grads = memory(kTensors),
                      other_grads = memory(kTensors);
  Optimizer optimizer;
  bool moved = false;

  static std::string name(int i) { return "p" + std::to_string(i); }
  static TensorView one(std::vector<double>& from, int i) {
    return view(reinterpret_cast<float*>(&from[static_cast<std::size_t>(i)]), {1});
  }

  ManySmall() {
    std::vector<Parameter> parameters;
    for (int i = 0; i < kTensors; ++i) {
      parameters.push_back({name(i), one(values, i), one(grads, i)});
    }
    optimizer.add_group("all", AdamHyper{}, std::move(parameters));
  }
  void move_gradients() {
    moved = !moved;
    const std::vector<ParameterRef> parameters = optimizer.group("all").parameters();
    for (int i = 0; i < kTensors; ++i) {
      ParameterRef parameter = parameters[static_cast<std::size_t>(i)];
      parameter.set_grad(one(moved ? other_grads : grads, i));
    }
  }
};

/// The same in a step that skip_source skips: all that the host does for it, and nothing of what a
/// GPU would do.
struct Skipped {
  std::vector<double> values, grads;
  float skip = 1;
  Optimizer optimizer;

  Skipped(int tensors, bool is_flat) : values(memory(tensors)), grads(memory(tensors)) {
    std::vector<Parameter> parameters;
    for (int i = 0; i < tensors; ++i) {
      parameters.push_back(
          {ManySmall::name(i), ManySmall::one(values, i), ManySmall::one(grads, i)});
    }
    if (is_flat) {
      optimizer.add_flat_group("all", AdamHyper{}, std::move(parameters));
    } else {
      optimizer.add_group("all", AdamHyper{}, std::move(parameters));
    }
  }
  void step() { optimizer.step({.skip_source = view(&skip, {})}); }
};

/// Tensors as torch's users step them, that are handed over at every step; those of flat groups, in
/// which nothing has changed, are not.
struct ManyBorrowed {
  std::vector<double> values, grads, other_grads, slots, counts;
  std::vector<detail::BorrowedGroup> groups{{AdamHyper{}}};
  std::vector<detail::BorrowedTensor> tensors;
  detail::BorrowedOptimizer optimizer;
  float skip = 1;
  bool moved = false, has_stepped = false;

  explicit ManyBorrowed(int count)
      : values(memory(count)),
        grads(memory(count)),
        other_grads(memory(count)),
        slots(memory(2 * count)),
        counts(memory(count)),
        tensors(static_cast<std::size_t>(count)) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      detail::BorrowedTensor& tensor = tensors[i];
      tensor.value = &values[i];
      tensor.grad = &grads[i];
      tensor.slot[0] = &slots[2 * i];
      tensor.slot[1] = &slots[2 * i + 1];
      tensor.step_tensor = &counts[i];
      tensor.size = 1;
      tensor.buffer_filled = tensor.steps = true;
    }
  }
  void step() { optimizer.step(groups, tensors, {}); }
  void skip_flat() {
    const StepOptions options{.skip_source = view(&skip, {})};
    if (has_stepped) return optimizer.step_again(groups, options);
    optimizer.step(groups, tensors, options);
    has_stepped = true;
  }
  void move_gradients() {
    moved = !moved;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      tensors[i].grad = moved ? &other_grads[i] : &grads[i];
    }
  }
};

/// One parameter that fills its loops.
struct OneLarge {
  std::vector<double> value = memory(kElements), grad = memory(kElements);
  Optimizer optimizer;

  OneLarge(const Hyper& hyper, DType dtype, SlotDType slots) {
    const TensorView values{value.data(), dtype, {kElements}, Device::cpu(), true};
    const TensorView grads{grad.data(), dtype, {kElements}, Device::cpu(), true};
    optimizer.add_group("all", hyper, {{"p", values, grads}}, {slots});
  }
};

template <class T, class F>
void add(std::vector<Case>& cases, const std::string& name, std::int64_t items,
         std::shared_ptr<T> world, F work) {
  cases.push_back({name, items, [world, work] { work(*world); }});
}

std::vector<Case> make_cases() {
  std::vector<Case> cases;
  const auto many = std::make_shared<ManySmall>();
  add(cases, "step of 1000 parameters", kTensors, many,
      [](ManySmall& world) { world.optimizer.step(); });
  add(cases, "step of 1000 parameters with gradients elsewhere", kTensors, many,
      [](ManySmall& world) {
        world.move_gradients();
        world.optimizer.step();
      });
  const auto borrowed = std::make_shared<ManyBorrowed>(kTensors);
  add(cases, "step of 1000 borrowed tensors", kTensors, borrowed,
      [](ManyBorrowed& world) { world.step(); });
  add(cases, "step of 1000 borrowed tensors with gradients elsewhere", kTensors, borrowed,
      [](ManyBorrowed& world) {
        world.move_gradients();
        world.step();
      });

  for (const int tensors : {1000, 10'000}) {
    const std::string of = " of " + std::to_string(tensors) + " parameters";
    for (const bool is_flat : {false, true}) {
      add(cases, "a skipped step" + of + (is_flat ? ", flat" : ""), 1,
          std::make_shared<Skipped>(tensors, is_flat), [](Skipped& world) { world.step(); });
    }
    add(cases, "a skipped step" + of + ", borrowed and flat", 1,
        std::make_shared<ManyBorrowed>(tensors), [](ManyBorrowed& world) { world.skip_flat(); });
  }

  struct Loop {
    const char* name;
    Hyper hyper;
    DType dtype = DType::kFloat32;
    SlotDType slots = SlotDType::kFloat32;
  };
  const Loop loops[] = {
      {"sgd", SgdHyper{}},
      {"sgd momentum nesterov", SgdHyper{.momentum = 0.9, .nesterov = true}},
      {"adam", AdamHyper{}},
      {"adamw", AdamWHyper{}},
      {"amsgrad", AdamHyper{.amsgrad = true}},
      {"rmsprop", RmspropHyper{}},
      {"rmsprop momentum centered", RmspropHyper{.momentum = 0.9, .centered = true}},
      {"adam float64", AdamHyper{}, DType::kFloat64},
      {"adam bfloat16, float32 slots", AdamHyper{}, DType::kBFloat16},
      {"adam bfloat16", AdamHyper{}, DType::kBFloat16, SlotDType::kLikeParameter},
      {"adam float16, float32 slots", AdamHyper{}, DType::kFloat16},
      {"adam float16", AdamHyper{}, DType::kFloat16, SlotDType::kLikeParameter},
  };
  for (const Loop& loop : loops) {
    add(cases, std::string("element of ") + loop.name, kElements,
        std::make_shared<OneLarge>(loop.hyper, loop.dtype, loop.slots),
        [](OneLarge& world) { world.optimizer.step(); });
  }
  add(cases, "element of the gradient norm", kElements,
      std::make_shared<OneLarge>(SgdHyper{}, DType::kFloat32, SlotDType::kFloat32),
      [](OneLarge& world) { world.optimizer.grad_norm(); });
  return cases;
}

}  // namespace

int main() {
  set_num_threads(1);
  for (const Case& one : make_cases()) {
    one.work();
    one.work();
    counted(one.work);
    std::printf("%s\t%lld\n", one.name.c_str(), static_cast<long long>(one.items));
  }
  return 0;
}
