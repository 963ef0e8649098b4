// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A step looks at six objects of every parameter, with Adam its five tensors and its dict of state:
// each some lines of memory that have left the caches since the last step, and are reached one
// through the other.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

namespace fusestep::bindings {

/// Where a pass over Python's objects went the last time, to ask for the same memory ahead of it.
/// Hints alone: nothing is read through what is remembered, so that it may be out of date.
class Trail {
 public:
  /// Lines of memory that reading an object comes to. Null where there are fewer.
  struct Place {
    const char* object;
    const char* body;        // of what the object stands for: four lines
    const char* further[4];  // what that points to: up to two lines each

    /// `impl`: where torch has the tensor itself.
    static Place of_tensor(PyObject* tensor, const char* impl) {
      Place place{reinterpret_cast<const char*>(tensor), impl, {}};
      // In torch 2: the storage, what autograd knows (the gradient), extras, the version counter.
      std::memcpy(place.further, impl + 16, sizeof place.further);
      return place;
    }
    static Place of_dict(PyObject* dict) {
      const auto* const fields = reinterpret_cast<const PyDictObject*>(dict);
      return {reinterpret_cast<const char*>(dict),
              reinterpret_cast<const char*>(fields->ma_keys),
              {reinterpret_cast<const char*>(fields->ma_values)}};
    }
  };

  void begin() { at_ = asked_ = 0; }

  /// Before the next object is read.
  void ask_ahead() {
    const std::size_t end = std::min(at_ + kAhead, places_.size());
    for (; asked_ < end; ++asked_) {
      const Place& place = places_[asked_];
      prefetch(place.object);
      for (const int offset : {0, 64, 128, 160}) prefetch(place.body + offset);
      for (const char* const there : place.further) {
        if (there == nullptr) continue;
        prefetch(there);
        prefetch(there + 56);
      }
    }
  }

  /// After it was read.
  void note(const Place& place) {
    if (at_ == places_.size()) places_.emplace_back();
    places_[at_++] = place;
  }

 private:
  static constexpr std::size_t kAhead = 16;  // objects

  /// Inlined by force: GCC leaves out calls of functions that do nothing else.
  [[gnu::always_inline]] static void prefetch([[maybe_unused]] const char* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#endif
  }

  std::vector<Place> places_;
  std::size_t at_ = 0, asked_ = 0;
};

}  // namespace fusestep::bindings
