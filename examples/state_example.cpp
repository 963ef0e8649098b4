// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include <fusestep/fusestep.h>

#include <iostream>
#include <vector>

int main() {
  std::vector<float> body(6, 0.5f), head(3, 0.5f), body_grad(6, 0.1f), head_grad(3, 0.1f);
  const fusestep::Parameter body_weight{"body.weight", fusestep::view(body.data(), {3, 2}),
                                        fusestep::view(body_grad.data(), {3, 2})};
  const fusestep::Parameter head_weight{"head.weight", fusestep::view(head.data(), {3}),
                                        fusestep::view(head_grad.data(), {3})};

  fusestep::Optimizer first;  // trains the head
  first.add_group("all", fusestep::AdamWHyper{.lr = 0.01}, {head_weight});
  for (int i = 0; i < 10; ++i) first.step();
  first.save("head.safetensors", {.values = true, .metadata = {{"epoch", "1"}}});

  fusestep::Optimizer second;  // goes on with the whole network
  second.add_group("body", fusestep::AdamWHyper{.lr = 0.001}, {body_weight});
  second.add_group("head", fusestep::AdamWHyper{.lr = 0.02}, {head_weight});
  const fusestep::LoadReport report = second.load("head.safetensors", {.strict = false});
  std::cout << report;  // matching 1 head.weight, missing 1 body.weight, lr of 'head' taken
  second.step();
  second.save_async("whole.safetensors");  // the next steps need not wait for it
  second.step();
  second.wait_for_save();
  return second.state("head.weight").step() == 12 && second.state("body.weight").step() == 2 ? 0
                                                                                             : 1;
}
