// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/report.h"

#include <algorithm>
#include <ostream>
#include <utility>

namespace fusestep {
namespace {

/// Lists longer than that are cut: what matters is which kind of name they have.
constexpr std::size_t kShown = 8;

std::string padded(std::string text, std::size_t width) {
  text.resize(std::max(width, text.size()), ' ');
  return text;
}

std::string count_line(const char* what, const std::vector<std::string>& names) {
  if (names.empty()) return "";
  std::string line = padded(what, 12) + padded(std::to_string(names.size()), 6);
  for (std::size_t i = 0; i < std::min(kShown, names.size()); ++i) {
    line += (i == 0 ? "" : ", ") + names[i];
  }
  return line + (names.size() > kShown ? ", ...\n" : "\n");
}

using Row = std::vector<std::string>;

/// Columns as wide as their widest cell, indented.
std::string table(const std::vector<Row>& rows) {
  std::vector<std::size_t> widths;
  for (const Row& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (std::size_t n = 0; n < rows.size(); ++n) {
    if (n == kShown) {
      text += "  ... and " + std::to_string(rows.size() - n) + " more\n";
      break;
    }
    std::string line = " ";
    for (std::size_t i = 0; i < rows[n].size(); ++i) line += " " + padded(rows[n][i], widths[i]);
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string value_text(const std::string& value) { return value.empty() ? "none" : value; }

}  // namespace

std::string LoadReport::to_string() const {
  std::string text = count_line("matching", loaded) + count_line("missing", missing) +
                     count_line("unexpected", unexpected) + count_line("converted", converted) +
                     count_line("left out", left_out);
  std::vector<Row> rows;
  for (const Mismatch& m : mismatched) {
    rows.push_back({m.name, m.what, "saved " + m.saved, "here " + m.here});
  }
  if (!rows.empty()) text += "does not fit\n" + table(rows);
  rows.clear();
  for (const HyperDifference& d : hyper) {
    rows.push_back({d.group, d.key, "saved " + value_text(d.saved), "here " + value_text(d.here),
                    d.taken ? "taken" : "kept"});
  }
  if (!rows.empty()) text += "settings of groups\n" + table(rows);
  return text.empty() ? "nothing was loaded\n" : text;
}

std::ostream& operator<<(std::ostream& out, const LoadReport& report) {
  return out << report.to_string();
}

LoadError::LoadError(LoadReport what_happened)
    : InvalidArgument(
          "the state does not match this optimizer, nothing was loaded "
          "(strict=false loads what matches):\n" +
          what_happened.to_string()),
      report_(std::move(what_happened)) {}

namespace detail {

Json to_json(const LoadReport& report) {
  Json mismatched = Json::array(), hyper = Json::array();
  for (const LoadReport::Mismatch& m : report.mismatched) {
    mismatched.push_back(
        {{"name", m.name}, {"what", m.what}, {"saved", m.saved}, {"here", m.here}});
  }
  for (const LoadReport::HyperDifference& d : report.hyper) {
    hyper.push_back({{"group", d.group},
                     {"key", d.key},
                     {"saved", d.saved},
                     {"here", d.here},
                     {"taken", d.taken}});
  }
  return {{"loaded", report.loaded},
          {"missing", report.missing},
          {"unexpected", report.unexpected},
          {"mismatched", mismatched},
          {"converted", report.converted},
          {"left_out", report.left_out},
          {"hyper", hyper},
          {"metadata", report.metadata},
          {"text", report.to_string()}};
}

}  // namespace detail
}  // namespace fusestep
