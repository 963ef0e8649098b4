// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Every input that is refused: the exception, its whole text, and that nothing has changed.
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <limits>

#include "support.h"

namespace fusestep::test {
namespace {

const double kNan = std::nan("");

/// A small training that has taken two steps.
struct World {
  Array a{DType::kFloat32, 4}, a_grad{DType::kFloat32, 4};
  Array b{DType::kFloat32, 6}, b_grad{DType::kFloat32, 6};
  Array c{DType::kFloat64, 5}, c_grad{DType::kFloat64, 5};
  Array h{DType::kBFloat16, 4}, h_grad{DType::kBFloat16, 4};
  Array spare{DType::kFloat32, 64}, wide{DType::kFloat64, 64}, half{DType::kBFloat16, 64};
  Optimizer optimizer;

  World() {
    std::uint64_t seed = 0;
    for (Array* array : {&a, &a_grad, &b, &b_grad, &c, &c_grad, &h, &h_grad}) {
      array->fill_numbers(++seed);
    }
    optimizer.add_group(
        "body", AdamHyper{},
        {{"a", a.view(), a_grad.view()}, {"b", b.view({2, 3}), b_grad.view({2, 3})}});
    optimizer.add_group("head", SgdHyper{.momentum = 0.9}, {{"c", c.view(), c_grad.view()}});
    optimizer.add_group("half", RmspropHyper{}, {{"h", h.view(), h_grad.view()}});
    optimizer.step();
    optimizer.step();
  }
  void restore_gradients() {
    optimizer.parameter("a").set_grad(a_grad.view());
    optimizer.parameter("b").set_grad(b_grad.view({2, 3}));
    optimizer.parameter("c").set_grad(c_grad.view());
    optimizer.parameter("h").set_grad(h_grad.view());
  }
  /// Everything that can be asked of an optimizer.
  std::string everything() {
    std::string all = snapshot(optimizer);
    for (const GroupRef& group : optimizer.groups()) {
      all += '\n' + group.name() + ' ' + std::string(rule_name(group.hyper())) + ' ';
      std::visit(
          [&](const auto& h) {
            for (const double x : {h.lr, h.weight_decay}) all += std::to_string(bits(x)) + ' ';
          },
          group.hyper());
      for (const ParameterRef& p : group.parameters()) {
        all += p.name() + (p.frozen() ? " frozen" : "") + to_string(p.value().shape);
      }
    }
    for (const auto& [slot, bytes] : optimizer.memory_report()) {
      all += '\n' + slot + ' ' + std::to_string(bytes);
    }
    return all + ' ' + std::to_string(optimizer.skipped_steps());
  }
};

Parameter with_grad(std::string name, Array& value, Array& grad) {
  return {std::move(name), value.view(), grad.view()};
}

struct BadInput {
  std::string name;
  std::function<void(World&)> act;
  std::string text;  ///< `*` stands for an address
};

void PrintTo(const BadInput& row, std::ostream* out) { *out << row.name; }

/// add_group("new", Adam, parameter "n").
BadInput bad_parameter(std::string name, std::function<Parameter(World&)> parameter,
                       const std::string& text) {
  return {std::move(name),
          [parameter](World& w) { w.optimizer.add_group("new", AdamHyper{}, {parameter(w)}); },
          "group 'new', parameter 'n': " + text};
}

/// The state of the world, with something changed, is loaded.
BadInput bad_state(std::string name, std::function<void(StateDict&)> change, std::string text) {
  return {std::move(name),
          [change](World& w) {
            StateDict state = w.optimizer.state_dict();
            change(state);
            w.optimizer.load_state_dict(state);
          },
          std::move(text)};
}

std::vector<BadInput> bad_states() {
  const std::string mismatch =
      "the state does not match this optimizer, nothing was loaded (strict=false loads what "
      "matches):\n";
  return {
      bad_state(
          "state_of_fewer_groups",
          [](StateDict& state) {
            state.param_groups.pop_back();
            state.state.pop_back();
          },
          "loaded state dict has a different number of parameter groups"),
      bad_state(
          "state_of_other_groups",
          [](StateDict& state) {
            state.param_groups[0].params = {0};
            state.param_groups[1].params = {1, 2};
          },
          "loaded state dict contains a parameter group that doesn't match the size of optimizer's "
          "group"),
      bad_state(
          "state_position_twice", [](StateDict& state) { state.param_groups[1].params = {1}; },
          "group 'head': params has 1, expected every position in state once"),
      bad_state(
          "state_position_negative", [](StateDict& state) { state.param_groups[1].params = {-1}; },
          "group 'head': params has -1, expected every position in state once"),
      bad_state(
          "state_position_beyond", [](StateDict& state) { state.param_groups[1].params = {4}; },
          "group 'head': params has 4, expected every position in state once"),
      bad_state(
          "state_without_group", [](StateDict& state) { state.param_groups[1].params.clear(); },
          "state has 4 parameters, and groups have 3"),
      bad_state(
          "state_step_negative", [](StateDict& state) { state.state[2].step = -1; },
          "parameter 'c': step must be >= 0, got -1"),
      bad_state(
          "state_slot_too_short",
          [](StateDict& state) { state.state[0].slots["exp_avg"].data.pop_back(); },
          "parameter 'a', slot 'exp_avg': expected 16 bytes, got 15"),
      bad_state(
          "state_slot_of_no_shape",
          [](StateDict& state) {
            state.state[0].slots["exp_avg"].shape = {std::int64_t{1} << 40, std::int64_t{1} << 40};
          },
          "parameter 'a', slot 'exp_avg': no tensor has the shape [1099511627776, 1099511627776]"),
      bad_state(
          "state_shape",
          [](StateDict& state) {
            state.state[1].shape = {3, 2};
          },
          mismatch + "matching    3     a, c, h\ndoes not fit\n  b shape saved [3, 2] here [2, "
                     "3]\n"),
      bad_state(
          "state_slot_shape", [](StateDict& state) { state.state[1].slots["exp_avg"].shape = {6}; },
          mismatch + "*  b/exp_avg shape saved [6] here [2, 3]\n"),
      bad_state(
          "state_slot_dtype",
          [](StateDict& state) {
            state.state[2].slots["momentum_buffer"] = {
                DType::kFloat32, {5}, std::vector<std::byte>(20)};
          },
          mismatch + "*  c/momentum_buffer dtype saved float32 here float64\n"),
      bad_state(
          "state_slot_missing",
          [](StateDict& state) {
            state.state[3].slots.clear();
            state.state[0].slots.erase("exp_avg");
          },
          mismatch + "*missing     1     a/exp_avg\n"),
      bad_state(
          "state_rule", [](StateDict& state) { state.param_groups[1].hyper = AdamHyper{}; },
          mismatch + "*head rule saved Adam here SGD\n"),
      bad_state(
          "state_settings",
          [](StateDict& state) { state.param_groups[0].hyper = AdamHyper{.lr = -1}; },
          "settings saved of group 'body': lr must be >= 0, got -1"),
      bad_state(
          "state_initial_lr", [](StateDict& state) { state.param_groups[0].initial_lr = kNan; },
          "settings saved of group 'body': initial_lr must be >= 0, got nan"),
      {"load_names_twice",
       [](World& w) {
         StateDict state = w.optimizer.state_dict();
         state.state[0].name = "b";
         w.optimizer.load(state);
       },
       "there are two saved parameters named 'b'"},
      {"load_renamed_to_one",
       [](World& w) {
         w.optimizer.load(w.optimizer.state_dict(),
                          {.rename = [](const std::string&) { return "a"; }});
       },
       "rename: there are two parameters named 'a', one of them 'b'"},
      {"load_stream_of_the_cpu",
       [](World& w) {
         const Stream stream(Device::cpu(), static_cast<void*>(&w));
         w.optimizer.load(w.optimizer.state_dict(), {.streams = {&stream, 1}});
       },
       "a stream must belong to a CUDA device, got one of cpu"},
      {"state_dict_of_two_streams",
       [](World& w) {
         const Stream stream(Device::cuda(), static_cast<void*>(&w));
         const Stream streams[] = {stream, stream};
         w.optimizer.state_dict(streams);
       },
       "there are two streams of cuda:0"},
      {"save_stream_of_the_cpu",
       [](World& w) {
         const Stream stream(Device::cpu(), static_cast<void*>(&w));
         w.optimizer.save("/nowhere/at/all", {.streams = {&stream, 1}});
       },
       "a stream must belong to a CUDA device, got one of cpu"},
      {"save_reserved_metadata",
       [](World& w) {
         w.optimizer.save("/nowhere/at/all", {.metadata = {{"fusestep.groups", "mine"}}});
       },
       "metadata: keys that begin with 'fusestep.' are reserved, got 'fusestep.groups'"},
      {"save_async_reserved_metadata",
       [](World& w) {
         w.optimizer.save_async("/nowhere/at/all", {.metadata = {{"fusestep.x", "mine"}}});
       },
       "metadata: keys that begin with 'fusestep.' are reserved, got 'fusestep.x'"},
      {"save_metadata_not_utf8",
       [](World& w) {
         w.optimizer.save("/nowhere/at/all", {.metadata = {{"note", "\xff"}}});
       },
       "*UTF-8*"},
  };
}

std::vector<BadInput> bad_inputs() {
  std::vector<BadInput> rows = {
      // names
      {"group_name_taken",
       [](World& w) {
         w.optimizer.add_group("body", AdamHyper{}, {{"n", w.spare.view()}});
       },
       "group 'body': there is a group of this name already"},
      {"parameter_name_taken",
       [](World& w) {
         w.optimizer.add_group("new", AdamHyper{}, {{"a", w.spare.view()}});
       },
       "group 'new', parameter 'a': there is a parameter of this name already"},
      {"parameter_name_twice",
       [](World& w) {
         w.optimizer.add_group("new", AdamHyper{}, {{"n", w.spare.view()}, {"n", w.wide.view()}});
       },
       "group 'new', parameter 'n': there is a parameter of this name already"},
      {"empty_group", [](World& w) { w.optimizer.add_group("new", AdamHyper{}, {}); },
       "group 'new': has no parameters"},
      {"unknown_group", [](World& w) { w.optimizer.group("tail"); },
       "there is no group named 'tail'"},
      {"unknown_parameter", [](World& w) { w.optimizer.parameter("z"); },
       "there is no parameter named 'z'"},
      {"group_is_no_parameter", [](World& w) { w.optimizer.parameter("body"); },
       "there is no parameter named 'body'"},
      {"unknown_state", [](World& w) { w.optimizer.state("z"); },
       "there is no parameter named 'z'"},
      {"freeze_unknown", [](World& w) { w.optimizer.freeze("z"); },
       "there is no group or parameter named 'z'"},
      {"thaw_unknown", [](World& w) { w.optimizer.thaw("z"); },
       "there is no group or parameter named 'z'"},
      {"unknown_slot", [](World& w) { w.optimizer.state("a").slot("momentum_buffer"); },
       "group 'body', parameter 'a': has no slot 'momentum_buffer'; its slots are: exp_avg, "
       "exp_avg_sq"},

      // memory
      bad_parameter(
          "value_absent",
          [](World&) {
            return Parameter{"n", {}};
          },
          "has no value"),
      bad_parameter(
          "value_null",
          [](World&) {
            return Parameter{"n", view(static_cast<float*>(nullptr), {2, 2})};
          },
          "value of shape [2, 2] is a null pointer"),
      bad_parameter(
          "gradient_null",
          [](World& w) {
            return Parameter{"n", w.spare.view({64}), view(static_cast<float*>(nullptr), {64})};
          },
          "gradient of shape [64] is a null pointer"),
      bad_parameter(
          "negative_extent",
          [](World& w) {
            return Parameter{"n", w.spare.view({4, -2})};
          },
          "value has the negative extent -2 in shape [4, -2]"),
      bad_parameter(
          "too_many_elements",
          [](World& w) {
            return Parameter{"n", w.spare.view({std::int64_t{1} << 40, std::int64_t{1} << 40})};
          },
          "value of shape [1099511627776, 1099511627776] has more elements than can be addressed"),
      bad_parameter(
          "misaligned_value",
          [](World& w) {
            TensorView moved = w.spare.view({4});
            moved.data = static_cast<char*>(moved.data) + 2;
            return Parameter{"n", moved};
          },
          "address of value must be a multiple of 4 for float32, got *"),
      bad_parameter(
          "misaligned_gradient",
          [](World& w) {
            TensorView moved = w.wide.view({4});
            moved.data = static_cast<char*>(moved.data) + 12;
            TensorView value = w.wide.view({4});
            value.data = static_cast<char*>(value.data) + 256;
            return Parameter{"n", value, moved};
          },
          "address of gradient must be a multiple of 8 for float64, got *"),
      bad_parameter(
          "gradient_dtype",
          [](World& w) {
            return Parameter{"n", w.spare.view({4}), w.half.view({4})};
          },
          "gradient has dtype bfloat16, expected float32"),
      bad_parameter(
          "gradient_shape",
          [](World& w) {
            return Parameter{"n", w.spare.view({2, 4}), w.spare.view({4, 2})};
          },
          "gradient has shape [4, 2], expected [2, 4]"),
      bad_parameter(
          "gradient_device",
          [](World& w) {
            TensorView grad = w.spare.view({4});
            grad.device = Device::cuda(0);
            return Parameter{"n", w.spare.view({4}), grad};
          },
          "gradient has device cuda:0, expected cpu"),
      bad_parameter(
          "no_such_cpu",
          [](World& w) {
            TensorView value = w.spare.view({4});
            value.device.index = 3;
            return Parameter{"n", value};
          },
          "there is no device cpu"),
      bad_parameter(
          "no_such_gpu",
          [](World& w) {
            TensorView value = w.spare.view({4});
            value.device = Device::cuda(99);
            return Parameter{"n", value};
          },
          "there is no device cuda:99 (" + cuda_status() + ")"),
      {"same_parameter_twice",
       [](World& w) {
         w.optimizer.add_group("new", AdamHyper{},
                               {{"n", w.spare.view({8})}, {"m", w.spare.view({8})}});
       },
       "memory overlaps: 'value' of group 'new', parameter '*' and 'value' of group 'new', "
       "parameter '*'"},
      {"value_of_another_group",
       [](World& w) {
         w.optimizer.add_group("new", AdamHyper{}, {{"n", w.b.view({6})}});
       },
       "memory overlaps: 'value' of group '*"},
      {"value_overlaps_by_one",
       [](World& w) {
         TensorView later = w.spare.view({8});
         later.data = static_cast<float*>(later.data) + 7;
         w.optimizer.add_group("new", AdamHyper{}, {{"n", w.spare.view({8})}, {"m", later}});
       },
       "memory overlaps: 'value' of group 'new', parameter 'n' and 'value' of group 'new', "
       "parameter 'm'"},
      {"value_in_a_slot",
       [](World& w) {
         TensorView slot = w.optimizer.state("c").slot("momentum_buffer");
         w.optimizer.add_group("new", AdamHyper{}, {{"n", slot}});
       },
       "memory overlaps: '*' of group '*', parameter '*' and '*' of group '*', parameter '*'"},
      {"second_parameter_is_bad",
       [](World& w) {
         w.optimizer.add_group("new", AdamHyper{}, {{"m", w.wide.view()}, {"n", {}}});
       },
       "group 'new', parameter 'n': has no value"},

      // gradients
      {"set_grad_dtype", [](World& w) { w.optimizer.parameter("a").set_grad(w.wide.view({4})); },
       "group 'body', parameter 'a': gradient has dtype float64, expected float32"},
      {"set_grad_shape", [](World& w) { w.optimizer.parameter("b").set_grad(w.spare.view({6})); },
       "group 'body', parameter 'b': gradient has shape [6], expected [2, 3]"},
      {"set_grad_null",
       [](World& w) {
         w.optimizer.parameter("a").set_grad(view(static_cast<float*>(nullptr), {4}));
       },
       "group 'body', parameter 'a': gradient of shape [4] is a null pointer"},
      {"gradient_is_its_value",
       [](World& w) {
         w.optimizer.parameter("a").set_grad(w.a.view());
         w.optimizer.step();
       },
       "memory overlaps: '*' of group 'body', parameter 'a' and '*' of group 'body', parameter "
       "'a'"},
      {"gradient_is_another_value",
       [](World& w) {
         TensorView grad = w.b.view({4});
         w.optimizer.parameter("a").set_grad(grad);
         w.optimizer.step();
       },
       "memory overlaps: '*' of group 'body', parameter '*' and '*' of group 'body', parameter "
       "'*'"},
      {"gradient_shared",
       [](World& w) {
         w.optimizer.parameter("a").set_grad(w.b_grad.view({4}));
         w.optimizer.grad_norm();
       },
       "memory overlaps: 'gradient' of group 'body', parameter '*' and 'gradient' of group "
       "'body', parameter '*'"},
      {"gradient_in_a_slot",
       [](World& w) {
         TensorView slot = w.optimizer.state("b").slot("exp_avg");
         slot.shape = {4};
         w.optimizer.parameter("a").set_grad(slot);
         w.optimizer.step();
       },
       "memory overlaps: '*' of group 'body', parameter '*' and '*' of group 'body', parameter "
       "'*'"},

      // values
      {"set_value_absent", [](World& w) { w.optimizer.parameter("a").set_value({}); },
       "group 'body', parameter 'a': has no value"},
      {"set_value_dtype", [](World& w) { w.optimizer.parameter("a").set_value(w.wide.view({4})); },
       "group 'body', parameter 'a': value has dtype float64, expected float32"},
      {"set_value_shape", [](World& w) { w.optimizer.parameter("a").set_value(w.spare.view({5})); },
       "group 'body', parameter 'a': value has shape [5], expected [4]"},
      {"set_value_overlaps", [](World& w) { w.optimizer.parameter("a").set_value(w.b.view({4})); },
       "memory overlaps: 'value' of group 'body', parameter '*' and 'value' of group 'body', "
       "parameter '*'"},

      // state
      {"bind_unknown_slot",
       [](World& w) { w.optimizer.state("a").bind_slot("momentum_buffer", w.spare.view({4})); },
       "group 'body', parameter 'a': adam has no slot 'momentum_buffer'"},
      {"bind_slot_dtype",
       [](World& w) { w.optimizer.state("a").bind_slot("exp_avg", w.wide.view({4})); },
       "group 'body', parameter 'a': slot 'exp_avg' has dtype float64, expected float32"},
      {"bind_slot_dtype_of_half",
       [](World& w) { w.optimizer.state("h").bind_slot("square_avg", w.half.view({4})); },
       "group 'half', parameter 'h': slot 'square_avg' has dtype bfloat16, expected float32"},
      {"bind_slot_shape",
       [](World& w) {
         w.optimizer.state("b").bind_slot("exp_avg", w.spare.view({3, 2}));
       },
       "group 'body', parameter 'b': slot 'exp_avg' has shape [3, 2], expected [2, 3]"},
      {"bind_slot_absent", [](World& w) { w.optimizer.state("a").bind_slot("exp_avg", {}); },
       "group 'body', parameter 'a': slot 'exp_avg' is absent"},
      {"bind_slot_over_value",
       [](World& w) { w.optimizer.state("a").bind_slot("exp_avg", w.a.view()); },
       "memory overlaps: '*' of group 'body', parameter 'a' and '*' of group 'body', parameter "
       "'a'"},
      {"negative_step", [](World& w) { w.optimizer.state("a").set_step(-1); },
       "group 'body', parameter 'a': step must be >= 0, got -1"},

      // settings
      {"other_rule", [](World& w) { w.optimizer.group("body").set_hyper(SgdHyper{}); },
       "group 'body': its rule is Adam and cannot become SGD"},
      {"set_lr_negative", [](World& w) { w.optimizer.group("head").set_lr(-0.5); },
       "group 'head': lr must be >= 0, got -0.5"},
      {"set_lr_nan", [](World& w) { w.optimizer.group("head").set_lr(kNan); },
       "group 'head': lr must be >= 0, got nan"},
      {"lr_source_dtype",
       [](World& w) { w.optimizer.group("head").set_lr_source(w.half.view({1})); },
       "group 'head': lr must be one float32 or float64 element, got shape [1] of bfloat16"},
      {"lr_source_size",
       [](World& w) { w.optimizer.group("head").set_lr_source(w.spare.view({2})); },
       "group 'head': lr must be one float32 or float64 element, got shape [2] of float32"},
      {"lr_source_huge",
       [](World& w) {
         const std::int64_t huge = std::int64_t{1} << 62;
         w.optimizer.group("head").set_lr_source(w.spare.view({huge, huge}));
       },
       "group 'head': lr must be one float32 or float64 element, got shape [4611686018427387904, "
       "4611686018427387904] of float32"},
      {"lr_source_null",
       [](World& w) {
         w.optimizer.group("head").set_lr_source(view(static_cast<float*>(nullptr), {}));
       },
       "group 'head': lr: its memory of shape [] is a null pointer"},
      {"lr_source_device",
       [](World& w) {
         TensorView source = w.spare.view({});
         source.device = Device::cuda(0);
         w.optimizer.group("head").set_lr_source(source);
       },
       "group 'head': lr must live where the group's parameters live, on cpu, got cuda:0"},

      // one step
      {"max_grad_norm_negative", [](World& w) { w.optimizer.step({.max_grad_norm = -1}); },
       "max_grad_norm must be >= 0, got -1.000000"},
      {"max_grad_norm_nan", [](World& w) { w.optimizer.step({.max_grad_norm = kNan}); },
       "max_grad_norm must be >= 0, got nan"},
      {"multiplier_nan", [](World& w) { w.optimizer.step({.grad_multiplier = kNan}); },
       "grad_multiplier must be a number, got NaN"},
      {"bad_options_of_a_skipped_step",
       [](World& w) { w.optimizer.step({.skip = true, .grad_multiplier = kNan}); },
       "grad_multiplier must be a number, got NaN"},
      {"skip_source_dtype", [](World& w) { w.optimizer.step({.skip_source = w.half.view({})}); },
       "skip_source must be one float32 or float64 element, got shape [] of bfloat16"},
      {"skip_source_size", [](World& w) { w.optimizer.step({.skip_source = w.spare.view({0})}); },
       "skip_source must be one float32 or float64 element, got shape [0] of float32"},
      {"skip_source_device",
       [](World& w) {
         TensorView source = w.spare.view({});
         source.device = Device::cuda(99);
         w.optimizer.step({.skip_source = source});
       },
       "skip_source: there is no device cuda:99 (" + cuda_status() + ")"},
      {"multiplier_source_size",
       [](World& w) { w.optimizer.step({.grad_multiplier_source = w.wide.view({2})}); },
       "grad_multiplier_source must be one float32 or float64 element, got shape [2] of float64"},
      {"multiplier_source_device",
       [](World& w) {
         TensorView source = w.spare.view({});
         source.device = Device::cuda(99);
         w.optimizer.step({.grad_multiplier_source = source});
       },
       "grad_multiplier_source: there is no device cuda:99 (" + cuda_status() + ")"},
      {"multiplier_source_device_at_a_first_step",
       [](World& w) {
         w.optimizer.add_group("late", AdamHyper{}, {{"n", w.spare.view({8}), {}}});
         TensorView source = w.wide.view({});
         source.device = Device::cuda(99);
         TensorView grad = w.spare.view({8});
         grad.data = static_cast<float*>(grad.data) + 8;
         w.optimizer.parameter("n").set_grad(grad);
         try {
           w.optimizer.step({.grad_multiplier_source = source});
         } catch (const InvalidArgument&) {
           EXPECT_TRUE(w.optimizer.state("n").slot_names().empty());
           throw;
         }
       },
       "grad_multiplier_source: there is no device cuda:99 (" + cuda_status() + ")"},
      {"stream_of_the_cpu",
       [](World& w) {
         int something = 0;
         const Stream stream(Device::cpu(), static_cast<void*>(&something));
         w.optimizer.step({.streams = {&stream, 1}});
       },
       "a stream must belong to a CUDA device, got one of cpu"},
      {"stream_of_the_cpu_for_the_norm",
       [](World& w) {
         int something = 0;
         const Stream stream(Device::cpu(), static_cast<void*>(&something));
         w.optimizer.grad_norm({&stream, 1});
       },
       "a stream must belong to a CUDA device, got one of cpu"},

      // settings of the process
      {"no_threads", [](World&) { set_num_threads(0); },
       "set_num_threads: threads must be >= 1, got 0"},
      {"negative_threads", [](World&) { set_num_threads(-3); },
       "set_num_threads: threads must be >= 1, got -3"},
      {"runner_without_a_number",
       [](World&) { set_thread_runner([](int, ThreadWork, void*) {}, nullptr); },
       "set_thread_runner: run and max_threads must both be given or both null"},
      {"number_without_a_runner", [](World&) { set_thread_runner(nullptr, [] { return 1; }); },
       "set_thread_runner: run and max_threads must both be given or both null"},

      // schedules
      {"step_decay_size", [](World&) { step_decay(0); },
       "step_decay: step_size must be >= 1, got 0"},
      {"warmup_longer_than_total", [](World&) { cosine_with_warmup(10, 10); },
       "cosine_with_warmup: warmup must be in [0, total), got 10 of 10"},
      {"warmup_negative", [](World&) { cosine_with_warmup(-1, 10); },
       "cosine_with_warmup: warmup must be in [0, total), got -1 of 10"},
      {"cosine_floor", [](World&) { cosine_with_warmup(1, 10, 1.5); },
       "cosine_with_warmup: floor must be in [0, 1], got 1.500000"},
      {"cosine_floor_nan", [](World&) { cosine_with_warmup(1, 10, kNan); },
       "cosine_with_warmup: floor must be in [0, 1], got nan"},
      {"schedule_base_unknown",
       [](World& w) {
         LrSchedule(w.optimizer, step_decay(1), 3, {{"tail", 1.0}});
       },
       "there is no group named 'tail'"},
      {"schedule_negative_step", [](World& w) { LrSchedule(w.optimizer, step_decay(1), -1); },
       "LrSchedule: step must be >= 0, got -1"},
      {"schedule_negative_factor",
       [](World& w) { LrSchedule(w.optimizer, [](std::int64_t) { return -0.5; }); },
       "LrSchedule: the factor at step 0 must be >= 0, got -0.500000"},
      {"schedule_nan_factor",
       [](World& w) { LrSchedule(w.optimizer, [](std::int64_t) { return std::nan(""); }); },
       "LrSchedule: the factor at step 0 must be >= 0, got nan"},
      {"schedule_negative_base",
       [](World& w) {
         LrSchedule(w.optimizer, step_decay(1), 0, {{"half", -1.0}});
       },
       "LrSchedule: the base of group 'half' must be >= 0, got -1.000000"},
  };

  // torch.optim's limits, at add_group() and at set_hyper().
  struct BadHyper {
    const char* name;
    const char* group;
    Hyper hyper;
    const char* text;
  };
  const BadHyper hypers[] = {
      {"adam_lr", "body", AdamHyper{.lr = -1e-3}, "lr must be >= 0, got -0.001"},
      {"adam_lr_nan", "body", AdamHyper{.lr = kNan}, "lr must be >= 0, got nan"},
      {"adam_eps", "body", AdamHyper{.eps = -1e-8}, "eps must be >= 0, got -1e-08"},
      {"adam_eps_nan", "body", AdamHyper{.eps = kNan}, "eps must be >= 0, got nan"},
      {"adam_beta1_one", "body", AdamHyper{.betas = {1.0, 0.9}},
       "betas[0] must be in [0, 1), got 1"},
      {"adam_beta1_negative", "body", AdamHyper{.betas = {-0.1, 0.9}},
       "betas[0] must be in [0, 1), got -0.1"},
      {"adam_beta1_nan", "body", AdamHyper{.betas = {kNan, 0.9}},
       "betas[0] must be in [0, 1), got nan"},
      {"adam_beta2_one", "body", AdamHyper{.betas = {0.9, 1.0}},
       "betas[1] must be in [0, 1), got 1"},
      {"adam_beta2_nan", "body", AdamHyper{.betas = {0.9, kNan}},
       "betas[1] must be in [0, 1), got nan"},
      {"adam_weight_decay", "body", AdamHyper{.weight_decay = -1},
       "weight_decay must be >= 0, got -1"},
      {"adamw_weight_decay_nan", "body", AdamWHyper{.weight_decay = kNan},
       "weight_decay must be >= 0, got nan"},
      {"sgd_lr", "head", SgdHyper{.lr = -1}, "lr must be >= 0, got -1"},
      {"sgd_momentum", "head", SgdHyper{.momentum = -0.9}, "momentum must be >= 0, got -0.9"},
      {"sgd_momentum_nan", "head", SgdHyper{.momentum = kNan}, "momentum must be >= 0, got nan"},
      {"sgd_weight_decay", "head", SgdHyper{.weight_decay = -1},
       "weight_decay must be >= 0, got -1"},
      {"sgd_nesterov_without_momentum", "head", SgdHyper{.nesterov = true},
       "momentum must be > 0 with nesterov, got 0"},
      {"sgd_nesterov_with_dampening", "head",
       SgdHyper{.momentum = 0.9, .dampening = 0.1, .nesterov = true},
       "dampening must be 0 with nesterov, got 0.1"},
      {"rmsprop_lr", "half", RmspropHyper{.lr = kNan}, "lr must be >= 0, got nan"},
      {"rmsprop_eps", "half", RmspropHyper{.eps = -1}, "eps must be >= 0, got -1"},
      {"rmsprop_alpha", "half", RmspropHyper{.alpha = -0.5}, "alpha must be >= 0, got -0.5"},
      {"rmsprop_alpha_nan", "half", RmspropHyper{.alpha = kNan}, "alpha must be >= 0, got nan"},
      {"rmsprop_momentum", "half", RmspropHyper{.momentum = -1}, "momentum must be >= 0, got -1"},
      {"rmsprop_weight_decay", "half", RmspropHyper{.weight_decay = -1},
       "weight_decay must be >= 0, got -1"},
  };
  const std::vector<BadInput> states = bad_states();
  rows.insert(rows.end(), states.begin(), states.end());
  for (const BadHyper& bad : hypers) {
    rows.push_back({std::string("add_") + bad.name,
                    [hyper = bad.hyper](World& w) {
                      w.optimizer.add_group("new", hyper, {{"n", w.spare.view()}});
                    },
                    std::string("group 'new': ") + bad.text});
    rows.push_back({std::string("set_") + bad.name,
                    [hyper = bad.hyper, group = std::string(bad.group)](World& w) {
                      w.optimizer.group(group).set_hyper(hyper);
                    },
                    "group '" + std::string(bad.group) + "': " + bad.text});
  }
  return rows;
}

/// `pattern`, where `*` stands for anything, is the whole of `text`.
bool matches(std::string_view pattern, std::string_view text) {
  const std::size_t star = pattern.find('*');
  if (star == std::string_view::npos) return pattern == text;
  if (text.substr(0, star) != pattern.substr(0, star)) return false;
  for (std::size_t i = star; i <= text.size(); ++i) {
    if (matches(pattern.substr(star + 1), text.substr(i))) return true;
  }
  return false;
}

class BadInputs : public ::testing::TestWithParam<BadInput> {};

TEST_P(BadInputs, AreRefusedAndChangeNothing) {
  World world, control;
  const int threads = num_threads();
  const std::string before = world.everything();
  try {
    GetParam().act(world);
    FAIL() << "nothing was thrown, expected: " << GetParam().text;
  } catch (const InvalidArgument& error) {
    EXPECT_TRUE(matches(GetParam().text, error.what()))
        << "got:      " << error.what() << "\nexpected: " << GetParam().text;
  }
  EXPECT_EQ(num_threads(), threads);
  if (world.optimizer.groups().size() == 3) {
    EXPECT_TRUE(world.everything() == before);
  } else {
    // The story itself has added a group: it has to step like the others.
    Array value(DType::kFloat32, 8), grad(DType::kFloat32, 8);
    for (std::uint64_t i = 0; i < 8; ++i) grad.set(static_cast<std::int64_t>(i), 0);
    control.optimizer.add_group("late", AdamHyper{}, {{"n", value.view(), grad.view()}});
    world.restore_gradients();
    world.optimizer.step({.max_grad_norm = 0.5});
    control.optimizer.step({.max_grad_norm = 0.5});
    EXPECT_TRUE(world.everything() == control.everything());
    return;
  }
  world.restore_gradients();
  for (int i = 0; i < 2; ++i) {
    world.optimizer.step({.max_grad_norm = 0.5});
    control.optimizer.step({.max_grad_norm = 0.5});
  }
  EXPECT_TRUE(world.everything() == control.everything());
  for (Array* array : {&world.a, &world.b, &world.c, &world.h}) {
    EXPECT_TRUE(array->guards_intact());
  }
}

INSTANTIATE_TEST_SUITE_P(Table, BadInputs, ::testing::ValuesIn(bad_inputs()),
                         [](const auto& info) { return info.param.name; });

/// Slots torch would not have named are refused before the first step too.
TEST(BadInput, SlotsOfAParameterThatHasNotStepped) {
  Array value(DType::kFloat32, 4);
  Optimizer optimizer;
  optimizer.add_group("g", AdamHyper{}, {{"p", value.view()}});
  try {
    optimizer.state("p").slot("exp_avg");
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(),
                 "group 'g', parameter 'p': has no slot 'exp_avg'; its slots are: none yet");
  }
}

TEST(BadInput, NameOfAGroupAndAParameter) {
  Array x(DType::kFloat32, 4), y(DType::kFloat32, 4);
  Optimizer optimizer;
  optimizer.add_group("x", AdamHyper{}, {{"y", x.view()}});
  optimizer.add_group("y", AdamHyper{}, {{"x", y.view()}});
  for (const char* name : {"x", "y"}) {
    try {
      optimizer.freeze(name);
      FAIL();
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(error.what(), "both a group and a parameter are named '" + std::string(name) +
                                  "': use group(name) or parameter(name)");
    }
    EXPECT_FALSE(optimizer.parameter(name).frozen());
  }
}

/// A group that was refused leaves its names and its memory free.
TEST(BadInput, CanBeCorrected) {
  Array x(DType::kFloat32, 4), y(DType::kFloat32, 4);
  Optimizer optimizer;
  EXPECT_THROW(optimizer.add_group("g", AdamHyper{}, {{"x", x.view()}, {"y", x.view()}}),
               InvalidArgument);
  EXPECT_TRUE(optimizer.groups().empty());
  EXPECT_THROW(optimizer.parameter("x"), InvalidArgument);
  optimizer.add_group("g", AdamHyper{}, {{"x", x.view()}, {"y", y.view()}});
  EXPECT_EQ(optimizer.groups().size(), 1u);
}

/// Without memory for slots a step is refused and changes nothing.
TEST(BadInput, MoreStateThanThereIsMemory) {
  if (kAddressSanitizer || kThreadSanitizer) {
    GTEST_SKIP() << "the sanitizer ends the process where operator new would return null";
  }
  Array x(DType::kFloat32, 4), x_grad(DType::kFloat32, 4);
  x_grad.fill_numbers(1);
  Optimizer optimizer;
  optimizer.add_group("small", AdamHyper{}, {with_grad("x", x, x_grad)});
  optimizer.step();
  // Addresses nobody will touch: the state for 2^55 bytes cannot be had.
  const std::int64_t elements = std::int64_t{1} << 53;
  auto* value = reinterpret_cast<float*>(std::uintptr_t{1} << 60);
  auto* grad = reinterpret_cast<float*>(std::uintptr_t{1} << 61);
  optimizer.add_group("large", AdamHyper{},
                      {{"y", view(value, {elements}), view(grad, {elements})}});
  for (int attempt = 0; attempt < 2; ++attempt) {
    try {
      optimizer.step();
      FAIL();
    } catch (const OutOfMemory& error) {
      EXPECT_STREQ(error.what(), "no memory for 72057594037930112 bytes of state on cpu");
    }
    EXPECT_TRUE(optimizer.state("y").slot_names().empty());
    EXPECT_EQ(optimizer.state("y").step(), 0);
    EXPECT_EQ(optimizer.state("x").step(), 1);
  }
  optimizer.freeze("large");
  optimizer.step();
  EXPECT_EQ(optimizer.state("x").step(), 2);
}

}  // namespace
}  // namespace fusestep::test
