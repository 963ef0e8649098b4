// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A loop on the threads of the CPU backend: its own, or those it was given.
#pragma once

#include <type_traits>

namespace fusestep::detail {

/// Calls body(0), ..., body(count - 1), each once, on num_threads() threads, the caller's included;
/// returns when all have returned. Where the library's own threads are at work for somebody else,
/// or there is no memory for the loop, the caller does it alone. `body` must not throw.
void parallel_for(int count, void (*body)(void* context, int index), void* context);

template <class F>
void parallel_for(int count, F&& body) {
  using Body = std::remove_reference_t<F>;
  parallel_for(
      count, [](void* context, int index) { (*static_cast<Body*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fusestep::detail
