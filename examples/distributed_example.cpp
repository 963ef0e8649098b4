// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include <fusestep/fusestep.h>

#include <vector>

// What rank `rank` of `world` has of one weight of shape [3, 4]; the ranks here take turns.
struct Rank {
  Rank(int rank, int world) : first(12 * rank / world), count(12 * (rank + 1) / world - first) {
    value.assign(count, 1.0f);
    grad.assign(count, 0.5f);
    optimizer.add_group("all", fusestep::AdamWHyper{.lr = 0.1},
                        {{"weight", fusestep::view(value.data(), {count}),
                          fusestep::view(grad.data(), {count}), fusestep::Shard{first, {3, 4}}}});
  }
  std::int64_t first, count;
  std::vector<float> value, grad;
  fusestep::Optimizer optimizer;
};

int main() {
  const int world = 2;
  Rank ranks[] = {{0, world}, {1, world}};

  // The norm of all gradients: two numbers of every rank, added up by the program.
  double sums[2] = {};
  double* of_rank[2];
  for (int r = 0; r < world; ++r) {
    of_rank[r] = static_cast<double*>(ranks[r].optimizer.norm_begin().data);
    for (int i = 0; i < 2; ++i) sums[i] += of_rank[r][i];  // all-reduce
  }
  for (int r = 0; r < world; ++r) {
    for (int i = 0; i < 2; ++i) of_rank[r][i] = sums[i];
    ranks[r].optimizer.norm_end();
    ranks[r].optimizer.step({.max_grad_norm = 1.0, .skip_nonfinite = true});
  }

  // A checkpoint: every rank saves, then, when all have (a barrier), one makes it the checkpoint.
  const std::int64_t generation = 1;  // the number of the step
  for (int r = 0; r < world; ++r) {
    ranks[r].optimizer.save("sharded.safetensors",
                            {.values = true, .rank = fusestep::SaveRank{r, world, generation}});
  }
  fusestep::commit_ranks("sharded.safetensors", world, generation);

  Rank more[] = {{0, 5}, {1, 5}, {2, 5}, {3, 5}, {4, 5}};  // go on with five
  for (Rank& rank : more) rank.optimizer.load("sharded.safetensors");
  const bool good =
      more[4].value[0] == ranks[1].value[0] && more[4].optimizer.state("weight").step() == 1;
  return good ? 0 : 1;
}
