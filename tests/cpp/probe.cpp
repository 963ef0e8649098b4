// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A small program for tests that look at a process from outside: it steps every rule and layout,
// then prints the instruction set in use and a hash of the result. Exit code 3 and the message if
// an Error is thrown.
#include <cstdio>
#include <memory>

#include "support.h"

int main() {
  using namespace fusestep;
  using namespace fusestep::test;
  try {
    Optimizer optimizer;
    std::vector<std::unique_ptr<Array>> arrays;
    std::uint64_t seed = 0;
    for (const RuleCase& rule : rule_cases()) {
      for (const LayoutCase& layout : kLayoutCases) {
        arrays.push_back(std::make_unique<Array>(layout.value, 501));
        Array& value = *arrays.back();
        arrays.push_back(std::make_unique<Array>(layout.value, 501));
        Array& grad = *arrays.back();
        value.fill_numbers(++seed);
        grad.fill_numbers(++seed);
        const std::string name = std::to_string(seed);
        optimizer.add_group(name, rule.hyper, {{name, value.view(), grad.view()}}, {layout.slots});
      }
    }
    for (int i = 0; i < 5; ++i) optimizer.step({.max_grad_norm = 10});
    std::printf("%s %016llx\n", std::string(instruction_set()).c_str(),
                static_cast<unsigned long long>(fnv(snapshot(optimizer))));
    return 0;
  } catch (const Error& error) {
    std::printf("%s\n", error.what());
    return 3;
  }
}
