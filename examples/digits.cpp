// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Trains a small network on real handwritten digits, once with every optimizer of fusestep: 64
// pixels, a hidden layer, 10 classes. In the first half of the training the hidden layer is frozen.
//
//   digits [FILE]     writes the loss curves to FILE, digits-loss.csv if none is given
//
// What concerns fusestep is in optimizers() and train(); the rest is an ordinary network and its
// data. Exit code 1 if an optimizer ends below 95 % on images it has never seen.
#include <fusestep/fusestep.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr int kPixels = 64, kHidden = 64, kClasses = 10;
constexpr int kEpochs = 30, kBatch = 16;
constexpr unsigned kSeed = 2026;
constexpr double kWantedAccuracy = 0.95;

// ---------------------------------------------------------------------------------------- the data

struct Digits {
  std::vector<float> pixels;  // [count, 64], from 0 to 1
  std::vector<int> labels;    // [count]

  int count() const { return static_cast<int>(labels.size()); }
  const float* image(int i) const { return pixels.data() + i * kPixels; }
  int label(int i) const { return labels[static_cast<std::size_t>(i)]; }
};

struct Data {
  Digits train, test;
};

/// From 0 to n - 1. The distributions of <random> differ between standard libraries, the generators
/// do not.
int below(int n, std::mt19937& random) {
  return static_cast<int>(random() % static_cast<unsigned>(n));
}

template <class T>
void shuffle(std::vector<T>& items, std::mt19937& random) {
  for (int i = static_cast<int>(items.size()) - 1; i > 0; --i) {
    std::swap(items[static_cast<std::size_t>(i)],
              items[static_cast<std::size_t>(below(i + 1, random))]);
  }
}

/// A line of the file: 64 pixels from 0 to 16, then the digit. A fifth of them is for the test.
Data read_digits(const std::string& path) {
  std::vector<std::string> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  if (lines.empty()) throw std::runtime_error("cannot read " + path);
  std::mt19937 random(kSeed);
  shuffle(lines, random);

  Data data;
  for (std::string& line : lines) {
    std::replace(line.begin(), line.end(), ',', ' ');
    std::istringstream numbers(line);
    const bool for_test = data.test.labels.size() < lines.size() / 5;
    Digits& part = for_test ? data.test : data.train;
    for (int i = 0, pixel = 0; i < kPixels && numbers >> pixel; ++i) {
      part.pixels.push_back(static_cast<float>(pixel) / 16);
    }
    int label = -1;
    numbers >> label;
    if (label < 0 || label >= kClasses) throw std::runtime_error(path + ": not a digit: " + line);
    part.labels.push_back(label);
  }
  return data;
}

// ------------------------------------------------------------------------------------- the network

/// y = x W + b, with the gradients of W and b.
struct Layer {
  int in, out;
  std::vector<float> weight, bias;  // [in, out], [out]
  std::vector<float> weight_grad, bias_grad;

  Layer(int in_features, int out_features, std::mt19937& random)
      : in(in_features),
        out(out_features),
        weight(static_cast<std::size_t>(in) * static_cast<std::size_t>(out)),
        bias(static_cast<std::size_t>(out)),
        weight_grad(weight.size()),
        bias_grad(bias.size()) {
    const float bound = std::sqrt(6.0F / static_cast<float>(in));  // He et al. 2015
    constexpr int half = 1 << 23;
    for (float& w : weight) {
      w = bound * static_cast<float>(below(2 * half, random) - half) / static_cast<float>(half);
    }
  }

  void forward(const float* x, float* y) const {
    std::copy(bias.begin(), bias.end(), y);
    for (int i = 0; i < in; ++i) {
      const float* row = weight.data() + i * out;
      for (int o = 0; o < out; ++o) y[o] += x[i] * row[o];
    }
  }

  /// Adds one image's share to the gradients.
  void backward(const float* x, const float* y_grad) {
    for (int o = 0; o < out; ++o) bias_grad[static_cast<std::size_t>(o)] += y_grad[o];
    for (int i = 0; i < in; ++i) {
      float* row = weight_grad.data() + i * out;
      for (int o = 0; o < out; ++o) row[o] += x[i] * y_grad[o];
    }
  }

  void input_gradient(const float* y_grad, float* x_grad) const {
    for (int i = 0; i < in; ++i) {
      const float* row = weight.data() + i * out;
      x_grad[i] = 0;
      for (int o = 0; o < out; ++o) x_grad[i] += row[o] * y_grad[o];
    }
  }
};

struct Network {
  Layer hidden, head;

  explicit Network(std::mt19937& random)
      : hidden(kPixels, kHidden, random), head(kHidden, kClasses, random) {}

  /// Probabilities of the classes; `activations` is what the hidden layer makes of the image.
  void forward(const float* image, float* activations, float* probabilities) const {
    hidden.forward(image, activations);
    for (int i = 0; i < kHidden; ++i) activations[i] = std::max(activations[i], 0.0F);
    head.forward(activations, probabilities);
    const float largest = *std::max_element(probabilities, probabilities + kClasses);
    double sum = 0;
    for (int c = 0; c < kClasses; ++c) {
      probabilities[c] =
          static_cast<float>(std::exp(static_cast<double>(probabilities[c] - largest)));
      sum += static_cast<double>(probabilities[c]);
    }
    for (int c = 0; c < kClasses; ++c) probabilities[c] /= static_cast<float>(sum);
  }

  /// Gradients of the mean cross entropy of these images; returns its sum.
  double backward(const Digits& digits, const int* images, int count) {
    for (Layer* layer : {&hidden, &head}) {
      std::fill(layer->weight_grad.begin(), layer->weight_grad.end(), 0.0F);
      std::fill(layer->bias_grad.begin(), layer->bias_grad.end(), 0.0F);
    }
    double loss = 0;
    for (int n = 0; n < count; ++n) {
      const float* image = digits.image(images[n]);
      const int label = digits.label(images[n]);
      float activations[kHidden], hidden_grad[kHidden], output[kClasses];
      forward(image, activations, output);
      loss -= std::log(std::max(static_cast<double>(output[label]), 1e-30));
      output[label] -= 1;  // now the gradient of the logits
      for (float& gradient : output) gradient /= static_cast<float>(count);
      head.backward(activations, output);
      head.input_gradient(output, hidden_grad);
      for (int i = 0; i < kHidden; ++i) hidden_grad[i] *= activations[i] > 0 ? 1.0F : 0.0F;
      hidden.backward(image, hidden_grad);
    }
    return loss;
  }

  double accuracy(const Digits& digits) const {
    int right = 0;
    for (int i = 0; i < digits.count(); ++i) {
      float activations[kHidden], output[kClasses];
      forward(digits.image(i), activations, output);
      const auto answer = std::max_element(output, output + kClasses) - output;
      right += answer == digits.label(i) ? 1 : 0;
    }
    return static_cast<double>(right) / digits.count();
  }
};

// ------------------------------------------------------------------------------------ the training

struct Candidate {
  const char* name;
  fusestep::Hyper hyper;
};

std::vector<Candidate> optimizers() {
  using namespace fusestep;
  return {
      {"Adam", AdamHyper{.lr = 5e-3}},
      {"AdamW", AdamWHyper{.lr = 5e-3}},
      {"AMSGrad", AdamHyper{.lr = 5e-3, .amsgrad = true}},
      {"SGD", SgdHyper{.lr = 0.5}},
      {"SGD momentum", SgdHyper{.lr = 0.1, .momentum = 0.9}},
      {"SGD Nesterov", SgdHyper{.lr = 0.1, .momentum = 0.9, .nesterov = true}},
      {"RMSprop", RmspropHyper{.lr = 3e-3}},
      {"RMSprop centered+momentum", RmspropHyper{.lr = 1e-3, .momentum = 0.9, .centered = true}},
  };
}

/// One line a epoch: overwritten in place on a terminal, every fifth elsewhere.
void show_progress(const char* name, int epoch, double loss, double accuracy) {
  static const bool terminal = isatty(fileno(stdout)) != 0;
  if (!terminal && epoch % 5 != 0) return;
  std::printf("%s%-26s epoch %2d/%d  loss %.4f  test accuracy %5.1f %%%s", terminal ? "\r" : "",
              name, epoch, kEpochs, loss, 100 * accuracy, terminal && epoch < kEpochs ? "" : "\n");
  std::fflush(stdout);
}

struct Result {
  double accuracy;
  long hidden_steps, head_steps;
  std::size_t state_bytes;
};

/// A layer's parameters as fusestep sees them: names, and views of memory that stays ours.
std::vector<fusestep::Parameter> parameters(const std::string& name, Layer& layer) {
  using fusestep::view;
  return {{name + ".weight", view(layer.weight.data(), {layer.in, layer.out}),
           view(layer.weight_grad.data(), {layer.in, layer.out})},
          {name + ".bias", view(layer.bias.data(), {layer.out}),
           view(layer.bias_grad.data(), {layer.out})}};
}

Result train(const Candidate& candidate, const Data& data, std::ofstream& curves) {
  std::mt19937 random(kSeed);  // the same start and order for every optimizer
  Network network(random);
  const int images = data.train.count();
  const int steps = kEpochs * ((images + kBatch - 1) / kBatch);

  fusestep::Optimizer optimizer;
  optimizer.add_group("head", candidate.hyper, parameters("head", network.head));
  optimizer.add_group("hidden", candidate.hyper, parameters("hidden", network.hidden))
      .set_lr(0.5 * fusestep::learning_rate(candidate.hyper));
  fusestep::LrSchedule schedule(optimizer, fusestep::cosine_with_warmup(steps / 20, steps, 0.01));
  optimizer.freeze("hidden");

  std::vector<int> order(static_cast<std::size_t>(images));
  std::iota(order.begin(), order.end(), 0);
  double accuracy = 0;
  for (int epoch = 1; epoch <= kEpochs; ++epoch) {
    if (epoch == kEpochs / 2 + 1) optimizer.thaw("hidden");
    shuffle(order, random);
    double loss = 0;
    for (int first = 0; first < images; first += kBatch) {
      loss += network.backward(data.train, order.data() + first, std::min(kBatch, images - first));
      optimizer.step({.max_grad_norm = 5.0});
      schedule.step();
    }
    loss /= images;
    accuracy = network.accuracy(data.test);
    curves << candidate.name << ',' << epoch << ',' << loss << ',' << accuracy << '\n';
    show_progress(candidate.name, epoch, loss, accuracy);
  }

  std::size_t state_bytes = 0;
  for (const auto& [slot, bytes] : optimizer.memory_report()) state_bytes += bytes;
  return {accuracy, optimizer.state("hidden.weight").step(), optimizer.state("head.weight").step(),
          state_bytes};
}

int run(const std::string& curves_path) {
  const Data data = read_digits(FUSESTEP_DIGITS_CSV);
  std::ofstream curves(curves_path);
  curves << "optimizer,epoch,loss,test_accuracy\n";
  std::printf("%d images to learn from, %d to test with; %s, %d threads\n", data.train.count(),
              data.test.count(), std::string(fusestep::instruction_set()).c_str(),
              fusestep::num_threads());

  std::string table;
  bool good = true;
  for (const Candidate& candidate : optimizers()) {
    const Result result = train(candidate, data, curves);
    char row[128];
    std::snprintf(row, sizeof row, "%-26s %11.1f %% %14ld %12ld %12zu\n", candidate.name,
                  100 * result.accuracy, result.hidden_steps, result.head_steps,
                  result.state_bytes);
    table += row;
    good = good && result.accuracy >= kWantedAccuracy;
  }
  std::printf("\n%-26s %13s %14s %12s %12s\n%s", "optimizer", "test accuracy", "hidden steps",
              "head steps", "state bytes", table.c_str());
  curves.close();
  if (!curves) throw std::runtime_error("cannot write " + curves_path);
  std::printf("loss curves: %s\n", curves_path.c_str());
  if (!good) std::printf("an optimizer ended below %.0f %%\n", 100 * kWantedAccuracy);
  return good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? argv[1] : "digits-loss.csv");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "digits: %s\n", error.what());
    return 2;
  }
}
