// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include <fusestep/fusestep.h>

#include <cstdio>
#include <vector>

int main() {
  std::vector<float> weight(4, 1.0f), grad(4, 0.5f);
  fusestep::Optimizer optimizer;
  optimizer.add_group(
      "all", fusestep::SgdHyper{.lr = 0.25},
      {{"weight", fusestep::view(weight.data(), {2, 2}), fusestep::view(grad.data(), {2, 2})}});
  optimizer.step();
  try {
    optimizer.group("none");
  } catch (const fusestep::InvalidArgument& error) {
    std::printf("%s; weight[3] = %g\n", error.what(), weight[3]);
    return weight[3] == 0.875f ? 0 : 1;
  }
  return 2;
}
