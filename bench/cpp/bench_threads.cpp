// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Which threads should a step run on? The same work (an axpy over 1M elements, in pieces of 32,768)
// on the library's own pool, OpenMP and oneTBB, each right after another pool has worked on all
// cores, as the backward pass of a training program does.
#include <omp.h>
#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include "cpu/parallel_for.h"

namespace {

constexpr int kPiece = 32768, kPieces = 32, kRepeats = 201;
std::vector<float> x(std::size_t{kPiece} * kPieces, 1e-3f), y(std::size_t{kPiece} * kPieces, 1.0f);

void piece(int index) {
  float* __restrict to = y.data() + std::ptrdiff_t{index} * kPiece;
  const float* __restrict from = x.data() + std::ptrdiff_t{index} * kPiece;
  for (int i = 0; i < kPiece; ++i) to[i] = 0.999f * from[i] + to[i];
}

/// About a millisecond on every core.
void busy(int) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
  while (std::chrono::steady_clock::now() < end) {
  }
}

using Loop = std::function<void(int count, void (*body)(int))>;
struct Candidate {
  const char* name;
  Loop loop;
};

const Candidate kNone{"nothing", [](int, void (*)(int)) {
                        std::this_thread::sleep_for(std::chrono::milliseconds(1));
                      }};
const Candidate kCandidates[] = {
    {"own pool",
     [](int count, void (*body)(int)) {
       fusestep::detail::parallel_for(count, [=](int i) { body(i); });
     }},
    {"OpenMP",
     [](int count, void (*body)(int)) {
#pragma omp parallel for schedule(dynamic)
       for (int i = 0; i < count; ++i) body(i);
     }},
    {"oneTBB",
     [](int count, void (*body)(int)) {
       tbb::parallel_for(tbb::blocked_range<int>(0, count, 1), [=](const auto& range) {
         for (int i = range.begin(); i < range.end(); ++i) body(i);
       });
     }},
};

double median_us(const Candidate& before, const Candidate& step) {
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  std::vector<double> times;
  for (int i = 0; i < kRepeats; ++i) {
    before.loop(cores, busy);
    const auto begin = std::chrono::steady_clock::now();
    step.loop(kPieces, piece);
    times.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
            .count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace

int main() {
  std::printf("%-10s", "us after");
  std::vector<Candidate> befores = {kNone};
  befores.insert(befores.end(), std::begin(kCandidates), std::end(kCandidates));
  for (const Candidate& before : befores) std::printf(" %10s", before.name);
  std::printf("\n");
  for (const Candidate& step : kCandidates) {
    std::printf("%-10s", step.name);
    for (const Candidate& before : befores) std::printf(" %10.0f", median_us(before, step));
    std::printf("\n");
  }
  std::printf("%-10s", "serial");
  const Candidate serial{"serial", [](int count, void (*body)(int)) {
                           for (int i = 0; i < count; ++i) body(i);
                         }};
  for (const Candidate& before : befores) std::printf(" %10.0f", median_us(before, serial));
  std::printf("\n");
  return 0;
}
