// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The file layer as a program, for tests in other languages. Tensors are JSON, data in hexadecimal.
//
//   file_probe list FILE     metadata and tensors of a file, as JSON
//   file_probe write FILE    writes what the JSON on standard input describes
//   file_probe check         for each name of a file on standard input: "ok", or what is wrong
//
//   file_probe ranks FILE    three ranks of an optimizer of two parameters step twice and save this
//
// Exit code 3 and the message if an Error is thrown.
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "files/safetensors.h"
#include "fusestep/error.h"
#include "fusestep/fusestep.h"

namespace {

using fusestep::detail::SafetensorsReader;
using fusestep::detail::SafetensorsWriter;
using fusestep::detail::TensorInfo;
using nlohmann::json;

std::string to_hex(const std::string& bytes) {
  std::string text;
  for (const char byte : bytes) {
    const auto value = static_cast<unsigned char>(byte);
    text += "0123456789abcdef"[value >> 4];
    text += "0123456789abcdef"[value & 15];
  }
  return text;
}

std::string from_hex(const std::string& text) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < text.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(text.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

std::string data(const SafetensorsReader& reader, std::size_t tensor) {
  std::string bytes(reader.tensors()[tensor].bytes(), '\0');
  reader.read_all(tensor, bytes.data(), bytes.size());
  return bytes;
}

void list(const char* file) {
  const SafetensorsReader reader(file);
  json tensors = json::array();
  for (std::size_t i = 0; i < reader.tensors().size(); ++i) {
    const TensorInfo& tensor = reader.tensors()[i];
    tensors.push_back({{"name", tensor.name},
                       {"dtype", tensor.dtype},
                       {"shape", tensor.shape},
                       {"data", to_hex(data(reader, i))}});
  }
  std::cout << json{{"metadata", reader.metadata()},
                    {"has_checksums", reader.has_checksums()},
                    {"tensors", tensors}}
            << '\n';
}

void write(const char* file) {
  const json content = json::parse(std::cin);
  std::vector<TensorInfo> tensors;
  for (const json& tensor : content.at("tensors")) {
    tensors.push_back({tensor.at("name"), tensor.at("dtype"), tensor.at("shape")});
  }
  SafetensorsWriter writer(file, content.at("metadata"), tensors);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::string bytes = from_hex(content.at("tensors")[i].at("data"));
    writer.write(i, bytes.data(), bytes.size());
  }
  writer.commit();
}

void check() {
  for (std::string file; std::getline(std::cin, file);) {
    try {
      const SafetensorsReader reader(file);
      for (std::size_t i = 0; i < reader.tensors().size(); ++i) reader.verify(i);
      std::cout << "ok\n";
    } catch (const fusestep::FileError& error) {
      std::cout << error.what() << '\n';
    }
  }
}

/// Adam over "w" of shape [5, 2], value 0.5 and gradient its index, and "b" of shape [2].
void save_ranks(const char* file) {
  constexpr int world = 3;
  for (int rank = 0; rank < world; ++rank) {
    const std::int64_t first = 10 * rank / world, count = 10 * (rank + 1) / world - first;
    const std::int64_t b_count = rank < 2 ? 1 : 0;
    std::vector<float> w(static_cast<std::size_t>(count), 0.5f), w_grad(w.size());
    for (std::size_t i = 0; i < w_grad.size(); ++i) {
      w_grad[i] = static_cast<float>(first + static_cast<std::int64_t>(i));
    }
    std::vector<float> b(1, 0.5f), b_grad(1, 1.0f);
    fusestep::Optimizer optimizer;
    optimizer.add_group(
        "0", fusestep::AdamHyper{.lr = 0.125},
        {{"w", fusestep::view(w.data(), {count}), fusestep::view(w_grad.data(), {count}),
          fusestep::Shard{first, {5, 2}}},
         {"b", fusestep::view(b.data(), {b_count}), fusestep::view(b_grad.data(), {b_count}),
          fusestep::Shard{std::min(rank, 2), {2}}}});
    for (int step = 0; step < 2; ++step) optimizer.step();
    optimizer.save(
        file,
        {.values = true, .metadata = {{"epoch", "4"}}, .rank = fusestep::SaveRank{rank, world, 7}});
  }
  fusestep::commit_ranks(file, world, 7);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  try {
    if (command == "list" && argc == 3) return list(argv[2]), 0;
    if (command == "write" && argc == 3) return write(argv[2]), 0;
    if (command == "ranks" && argc == 3) return save_ranks(argv[2]), 0;
    if (command == "check" && argc == 2) return check(), 0;
  } catch (const fusestep::Error& error) {
    std::cout << error.what() << '\n';
    return 3;
  }
  return 2;
}
