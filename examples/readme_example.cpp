// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include <fusestep/fusestep.h>

#include <cstdio>
#include <vector>

int main() {
  std::vector<float> w{0, 0}, w_grad(2), b{0}, b_grad(1);  // your memory: fusestep points to it

  fusestep::Optimizer optimizer;
  optimizer.add_group("weights", fusestep::AdamWHyper{.lr = 0.1},
                      {{"w", fusestep::view(w.data(), {2}), fusestep::view(w_grad.data(), {2})}});
  optimizer.add_group("biases", fusestep::SgdHyper{.lr = 0.1, .momentum = 0.9},
                      {{"b", fusestep::view(b.data(), {1}), fusestep::view(b_grad.data(), {1})}});

  for (int i = 0; i < 200; ++i) {
    const float error = 3 * w[0] - 2 * w[1] + b[0] - 5;  // of the model, for one sample
    w_grad = {3 * error, -2 * error};
    b_grad = {error};
    optimizer.step({.max_grad_norm = 1.0});
  }
  std::printf("%.2f, after %d steps\n", 3 * w[0] - 2 * w[1] + b[0],
              int(optimizer.state("w").step()));
}
