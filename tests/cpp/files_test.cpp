// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Safetensors files: what is written is found again, and what is damaged is refused.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <sys/stat.h>

#include <cstdlib>

#include "files/crc32c.h"
#include "files_support.h"

namespace fusestep::test {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using ::testing::UnorderedElementsAre;

// ---- CRC-32C --------------------------------------------------------------------------------

using detail::crc32c;
using detail::crc32c_portable;

/// Bit by bit, as RFC 3720 describes it.
std::uint32_t reference_crc(std::string_view bytes) {
  std::uint32_t state = ~0u;
  for (const char byte : bytes) {
    state ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) state = state >> 1 ^ (state & 1 ? 0x82f63b78u : 0);
  }
  return ~state;
}

std::uint32_t crc(std::string_view bytes, std::uint32_t before = 0) {
  return crc32c(before, bytes.data(), bytes.size());
}

std::uint32_t portable_crc(std::string_view bytes, std::uint32_t before = 0) {
  return crc32c_portable(before, bytes.data(), bytes.size());
}

TEST(Crc32c, VectorsOfRfc3720) {
  std::string ascending, descending;
  for (char i = 0; i < 32; ++i) {
    ascending += i;
    descending += static_cast<char>(31 - i);
  }
  const unsigned char read_command[] = {0x01, 0xc0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
                                        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x14, 0x00, 0x00, 0x00,
                                        0x00, 0x00, 0x04, 0x00, 0x00, 0x00, 0x00, 0x14, 0x00, 0x00,
                                        0x00, 0x18, 0x28, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
                                        0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00};
  const std::pair<std::string, std::uint32_t> vectors[] = {
      {std::string(32, '\0'), 0x8a9136aa},
      {std::string(32, '\xff'), 0x62a8ab43},
      {ascending, 0x46dd794e},
      {descending, 0x113fdb5c},
      {{reinterpret_cast<const char*>(read_command), sizeof read_command}, 0xd9963a56},
      {"123456789", 0xe3069283},
      {"", 0}};
  for (const auto& [bytes, expected] : vectors) {
    EXPECT_EQ(crc(bytes), expected);
    EXPECT_EQ(portable_crc(bytes), expected);
    EXPECT_EQ(reference_crc(bytes), expected);
  }
}

TEST(Crc32c, EveryAlignmentLengthAndSplit) {
  const std::string bytes = random_bytes(11, 400);
  for (std::size_t begin = 0; begin < 16; ++begin) {
    for (std::size_t length = 0; length < 300; ++length) {
      const std::string_view part = std::string_view(bytes).substr(begin, length);
      const std::uint32_t expected = reference_crc(part);
      ASSERT_EQ(crc(part), expected) << begin << " " << length;
      ASSERT_EQ(portable_crc(part), expected) << begin << " " << length;
    }
  }
  const std::string_view all = bytes;
  for (std::size_t split = 0; split <= all.size(); ++split) {
    ASSERT_EQ(crc(all.substr(split), crc(all.substr(0, split))), crc(all)) << split;
    ASSERT_EQ(portable_crc(all.substr(split), portable_crc(all.substr(0, split))), crc(all));
  }
}

/// Around the lengths at which the number of streams changes.
TEST(Crc32c, LongOnes) {
  const std::string bytes = random_bytes(12, 200'000);
  for (const std::size_t length :
       {3u * 256, 6u * 256, 3u * 8192, 6u * 8192, 3u * 8192 + 3 * 256, 199'000u}) {
    for (int difference = -9; difference <= 9; ++difference) {
      const std::string_view part = std::string_view(bytes).substr(
          length % 7, static_cast<std::size_t>(static_cast<int>(length) + difference));
      ASSERT_EQ(crc(part), portable_crc(part)) << part.size();
    }
    const std::string_view part = std::string_view(bytes).substr(0, length);
    ASSERT_EQ(crc(part), reference_crc(part)) << length;
  }
}

// ---- what is written is found again ---------------------------------------------------------

struct Stored {
  const char* name;
  std::size_t bits;
};
constexpr Stored kStored[] = {
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},   {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"I16", 16}, {"U16", 16},
    {"F16", 16},    {"BF16", 16},   {"I32", 32},    {"U32", 32},        {"F32", 32}, {"C64", 64},
    {"F64", 64},    {"I64", 64},    {"U64", 64},    {"F8_E5M2FNUZ", 8},
};

std::uint64_t length_of_header(const std::string& bytes) {
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof length);
  return length;
}

TEST(Files, RoundTripOfAllDtypesAndSizes) {
  const TemporaryDirectory directory;
  Content content;
  const std::vector<std::vector<std::int64_t>> shapes = {{0}, {3, 0, 5}, {4}, {2, 3, 4}, {300'004}};
  for (const Stored& stored : kStored) {
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      std::size_t elements = 1;
      for (const std::int64_t extent : shapes[i]) elements *= static_cast<std::size_t>(extent);
      content.add(stored.name + std::to_string(i), stored.name, shapes[i],
                  random_bytes(content.data.size(), elements * stored.bits / 8));
    }
    if (stored.bits >= 8) {
      content.add(stored.name + std::string(".scalar"), stored.name, {},
                  random_bytes(content.data.size(), stored.bits / 8));
    }
  }
  save(directory / "all", content);
  expect_content(directory / "all", content);

  const std::uint64_t data_begin = 8 + length_of_header(read_bytes(directory / "all"));
  EXPECT_EQ(data_begin % 64, 0u);
  const SafetensorsReader reader(directory / "all");
  for (const TensorInfo& tensor : reader.tensors()) {
    for (const Stored& stored : kStored) {
      if (tensor.dtype != stored.name || tensor.bytes() == 0 || stored.bits < 8) continue;
      EXPECT_EQ((data_begin + tensor.begin) % (stored.bits / 8), 0u) << tensor.name;
    }
  }
}

TEST(Files, NothingButAHeader) {
  const TemporaryDirectory directory;
  save(directory / "empty", {});
  expect_content(directory / "empty", {});
  Content metadata_only;
  metadata_only.metadata["a"] = "b";
  save(directory / "metadata", metadata_only);
  expect_content(directory / "metadata", metadata_only);
}

TEST(Files, AnyText) {
  const TemporaryDirectory directory;
  Content content;
  const std::string texts[] = {"",
                               "with \"quotes\" and \\ and /",
                               std::string("a\0b", 3),
                               "line\nbreak\ttab\x7f",
                               "\xc3\xa9\xe2\x82\xac\xf0\x9f\x94\xa5",
                               "fusestep.version",
                               "\"fusestep.header_crc32c\":\"00000000\"",
                               "{\"__metadata__\":{\"fusestep.header_crc32c\":\"00000000\"",
                               std::string(100'000, 'x')};
  for (const std::string& text : texts) {
    if (text != "fusestep.version") content.metadata[text] = text;
    content.add(text, "U8", {1}, random_bytes(text.size(), 1));
  }
  save(directory / "texts", content);
  expect_content(directory / "texts", content);
}

TEST(Files, InTheOrderOfThePublicWriter) {
  const TemporaryDirectory directory;
  Content content;
  for (const char* dtype : {"U8", "F32", "F64", "BF16", "I64", "F16"}) {
    for (const char* name : {".b", ".a"}) {
      content.add(dtype + std::string(name), dtype, {0}, "");
    }
  }
  save(directory / "order", content);
  const std::string bytes = read_bytes(directory / "order");
  std::size_t last = bytes.find("}\",");  // behind the checksums
  for (const char* name : {"I64.a", "I64.b", "F64.a", "F64.b", "F32.a", "F32.b", "BF16.a", "BF16.b",
                           "F16.a", "F16.b", "U8.a", "U8.b"}) {
    const std::size_t place = bytes.find('"' + std::string(name) + '"');
    EXPECT_NE(place, std::string::npos) << name;
    EXPECT_GT(place, last) << name;
    last = place;
  }
}

TEST(Files, PiecesInTurns) {
  const TemporaryDirectory directory;
  Content content;
  content.add("a", "U8", {600'001}, random_bytes(1, 600'001));
  content.add("b", "F32", {150'001}, random_bytes(2, 600'004));
  SafetensorsWriter writer(directory / "turns", {}, content.tensors);
  std::size_t done[2] = {0, 0};
  for (std::uint64_t turn = 0; done[0] + done[1] < 1'200'005; ++turn) {
    for (std::size_t i = 0; i < 2; ++i) {
      const std::size_t piece =
          std::min<std::size_t>(hash(i, turn) % 300'000, content.data[i].size() - done[i]);
      writer.write(i, content.data[i].data() + done[i], piece);
      done[i] += piece;
    }
  }
  writer.commit();
  expect_content(directory / "turns", content);
}

TEST(Files, AFileIsThereWhenItIsCommitted) {
  const TemporaryDirectory directory;
  const Content content = small_content();
  {
    SafetensorsWriter writer(directory / "a", content.metadata, content.tensors);
    EXPECT_FALSE(std::filesystem::exists(directory / "a"));
    EXPECT_EQ(directory.entries().size(), 1u);  // the temporary one
  }
  EXPECT_EQ(directory.entries().size(), 0u);
  save(directory / "a", content);
  EXPECT_THAT(directory.entries(), ElementsAre("a"));
}

TEST(Files, ReadInParts) {
  const TemporaryDirectory directory;
  Content content;
  content.add("a", "U8", {700'000}, random_bytes(1, 700'000));
  content.add("none", "U8", {0}, "");
  save(directory / "a", content);
  const SafetensorsReader reader(directory / "a");
  const std::size_t a = reader.find("a").value();
  const std::pair<std::size_t, std::size_t> parts[] = {
      {0, 0}, {0, 1}, {17, 600'000}, {699'999, 1}, {700'000, 0}};
  for (const auto& [offset, bytes] : parts) {
    std::string part(bytes, '\0');
    reader.read(a, offset, part.data(), part.size());
    EXPECT_TRUE(part == content.data[0].substr(offset, bytes));
  }
  std::string taken;
  reader.read_all(a, [&](const void* piece, std::size_t bytes) {
    taken.append(static_cast<const char*>(piece), bytes);
  });
  EXPECT_TRUE(taken == content.data[0]);
  reader.read_all(reader.find("none").value(), nullptr, 0);
  reader.verify(reader.find("none").value());
  EXPECT_FALSE(reader.find("b"));
  EXPECT_FALSE(reader.find("__metadata__"));
}

/// Metadata that was read can be written again: the writer puts in its own keys.
TEST(Files, MetadataReadCanBeWritten) {
  const TemporaryDirectory directory;
  Content content = small_content();
  save(directory / "a", content);
  content.metadata = SafetensorsReader(directory / "a").metadata();
  content.data[0] = random_bytes(99, content.data[0].size());
  save(directory / "b", content);
  content.metadata = small_content().metadata;
  expect_content(directory / "b", content);
}

TEST(Files, OfOthersHaveNoChecksums) {
  const TemporaryDirectory directory;
  write_bytes(directory / "plain",
              with_length(R"({"__metadata__":{"format":"pt"},)"
                          R"("b":{"shape":[2],"data_offsets":[2,6],"dtype":"F16"},)"
                          R"("a":{"dtype":"U8","shape":[1,2],"data_offsets":[0,2]}}  )") +
                  "abcdef");
  const SafetensorsReader reader(directory / "plain");
  EXPECT_FALSE(reader.has_checksums());
  EXPECT_EQ(reader.metadata(), (Metadata{{"format", "pt"}}));
  ASSERT_EQ(reader.tensors().size(), 2u);
  EXPECT_EQ(reader.tensors()[0].name, "a");
  EXPECT_EQ(tensor_bytes(reader, 0), "ab");
  EXPECT_EQ(tensor_bytes(reader, 1), "cdef");
  reader.verify(1);
}

/// Larger than what fits into 32 bits; a sparse one, of zeros.
TEST(Files, OfManyGigabytes) {
  const TemporaryDirectory directory;
  const std::uint64_t size = std::uint64_t{5} << 30;
  const std::string header = with_length(R"({"a":{"dtype":"U8","shape":[)" + std::to_string(size) +
                                         R"(],"data_offsets":[0,)" + std::to_string(size) + "]}}");
  write_bytes(directory / "large", header);
  std::filesystem::resize_file(directory / "large", header.size() + size);
  std::FILE* file = std::fopen((directory / "large").c_str(), "r+");
  ASSERT_NE(file, nullptr);
  ASSERT_EQ(fseeko(file, -3, SEEK_END), 0);
  std::fputs("end", file);
  ASSERT_EQ(std::fclose(file), 0);
  const SafetensorsReader reader(directory / "large");
  std::string end(4, 'x');
  reader.read(0, size - 4, end.data(), 4);
  EXPECT_EQ(end, std::string("\0end", 4));
}

// ---- what the caller gets wrong -------------------------------------------------------------

/// The text of the InvalidArgument.
template <class Call>
std::string misuse(Call&& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "nothing thrown";
}

TEST(Misuse, OfTheWriterIsRefusedBeforeThereIsAFile) {
  const TemporaryDirectory directory;
  const path file = directory / "a";
  const auto written = [&](std::vector<TensorInfo> tensors, Metadata metadata = {}) {
    return misuse([&] { SafetensorsWriter(file, std::move(metadata), std::move(tensors)); });
  };
  const std::int64_t large = std::int64_t{1} << 62;
  const std::string in = "file '" + file.string() + "'", tensor = in + ", tensor 'w': ";
  EXPECT_EQ(written({{"w", "F32", {1}}, {"b", "F32", {1}}, {"w", "U8", {2}}}),
            tensor + "the name is taken");
  EXPECT_EQ(written({{"__metadata__", "F32", {1}}}),
            in + ", tensor '__metadata__': the name is taken");
  EXPECT_EQ(written({{"w", "float32", {1}}}), tensor + "unknown dtype 'float32'");
  EXPECT_EQ(written({{"w", "F32", {2, -1}}}),
            tensor + "shape [2, -1] of F32 has a negative extent");
  EXPECT_EQ(written({{"w", "F32", {large, 2, 2}}}),
            tensor + "shape [4611686018427387904, 2, 2] of F32 is larger than any file");
  EXPECT_EQ(written({{"w", "F32", {large}}}),
            tensor + "shape [4611686018427387904] of F32 is larger than any file");
  EXPECT_EQ(written({{"w", "U8", {large / 4}}, {"x", "U8", {large / 2 * 3 / 4 * 3}}}),
            in + ", tensor 'x': shape [5188146770730811392] of U8 is larger than any file");
  std::vector<TensorInfo> many;
  for (const char* name : {"a", "b", "c", "d", "e", "f", "g", "h"}) {
    many.push_back({name, "U8", {large / 4}});
  }
  EXPECT_EQ(written(many), in + ", tensor 'h': the file would be larger than a file can be");
  EXPECT_EQ(written({{"w", "F4", {3}}}), tensor + "shape [3] of F4 does not end at a whole byte");
  const std::string not_utf8 = in + ": a name or a text of the metadata is not UTF-8";
  EXPECT_EQ(written({{"\xff", "U8", {3}}}), not_utf8);
  EXPECT_EQ(written({}, {{"\xc3", ""}}), not_utf8);
  EXPECT_EQ(written({}, {{"", "\xed\xa0\x80"}}), not_utf8);
  EXPECT_EQ(written({}, {{"a", std::string(100'000'000, 'x')}}),
            in + ": its header would have 100000128 bytes, more than readers take");
  EXPECT_EQ(directory.entries().size(), 0u);
}

TEST(Misuse, WrongNumbersOfBytes) {
  const TemporaryDirectory directory;
  const path file = directory / "a";
  const std::string in = "file '" + file.string() + "'", tensor = in + ", tensor 'w': ";
  SafetensorsWriter writer(file, {}, {{"w", "F32", {2}}, {"none", "F32", {0}}});
  const std::string bytes(16, 'x');
  const auto write = [&](std::size_t index, std::size_t count) {
    return misuse([&] { writer.write(index, bytes.data(), count); });
  };
  EXPECT_EQ(write(0, 9), tensor + "takes 8 bytes, got 9 after 0");
  EXPECT_EQ(write(2, 1), in + ": has no tensor number 2");
  EXPECT_EQ(write(1, 1), in + ", tensor 'none': takes 0 bytes, got 1 after 0");
  writer.write(0, bytes.data(), 5);
  EXPECT_EQ(write(0, 4), tensor + "takes 8 bytes, got 4 after 5");
  EXPECT_EQ(misuse([&] { writer.commit(); }), tensor + "takes 8 bytes, got 5");
  writer.write(0, bytes.data(), 3);
  EXPECT_EQ(write(0, 1), tensor + "takes 8 bytes, got 1 after 8");
  writer.commit();
  EXPECT_EQ(write(0, 0), in + ": is committed already");
  EXPECT_EQ(misuse([&] { writer.commit(); }), in + ": is committed already");
  EXPECT_EQ(refusal(file), "");
}

TEST(Misuse, OfTheReader) {
  const TemporaryDirectory directory;
  const path file = directory / "a";
  save(file, small_content());
  const SafetensorsReader reader(file);
  const std::size_t w = reader.find("w").value();
  char out[32];
  const std::string in = "file '" + file.string() + "'", tensor = in + ", tensor 'w': has 24 bytes";
  const auto read = [&](std::uint64_t offset, std::size_t bytes) {
    return misuse([&] { reader.read(w, offset, out, bytes); });
  };
  EXPECT_EQ(read(0, 25), tensor + ", asked for 25 at 0");
  EXPECT_EQ(read(20, 5), tensor + ", asked for 5 at 20");
  EXPECT_EQ(read(~std::uint64_t{0}, 2), tensor + ", asked for 2 at 18446744073709551615");
  EXPECT_EQ(misuse([&] { reader.read_all(w, out, 23); }), tensor + ", asked for 23");
  EXPECT_EQ(misuse([&] { reader.verify(4); }), in + ": has no tensor number 4");
}

// ---- what is wrong with a file --------------------------------------------------------------

TEST(Damage, EveryTruncationIsRefused) {
  const TemporaryDirectory directory;
  save(directory / "whole", small_content());
  const std::string whole = read_bytes(directory / "whole");
  for (std::size_t length = 0; length < whole.size(); ++length) {
    write_bytes(directory / "cut", whole.substr(0, length));
    EXPECT_THAT(refusal(directory / "cut"), StartsWith("file '" + (directory / "cut").string()))
        << length << " of " << whole.size() << " bytes";
  }
  write_bytes(directory / "cut", whole + '\0');
  EXPECT_THAT(refusal(directory / "cut"), HasSubstr("its tensors take 38 bytes, but there are 39"));
}

TEST(Damage, EveryFlippedBitIsRefused) {
  const TemporaryDirectory directory;
  save(directory / "whole", small_content());
  const std::string whole = read_bytes(directory / "whole");
  for (std::size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    std::string damaged = whole;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ 1 << bit % 8);
    write_bytes(directory / "damaged", damaged);
    EXPECT_THAT(refusal(directory / "damaged"),
                StartsWith("file '" + (directory / "damaged").string()))
        << "bit " << bit << " of\n"
        << damaged;
  }
}

/// Two bytes changed, anything for anything: what a checksum of 32 bits is for.
TEST(Damage, RandomBytesAreRefused) {
  const TemporaryDirectory directory;
  save(directory / "whole", small_content());
  const std::string whole = read_bytes(directory / "whole");
  for (std::uint64_t i = 0; i < 3000; ++i) {
    std::string damaged = whole;
    for (std::uint64_t j = 0; j < 2; ++j) {
      damaged[hash(i, 2 * j) % whole.size()] = static_cast<char>(hash(i, 2 * j + 1));
    }
    if (damaged == whole) continue;
    write_bytes(directory / "damaged", damaged);
    EXPECT_NE(refusal(directory / "damaged"), "") << damaged;
  }
}

/// The texts for what flipped bits hit.
TEST(Damage, IsNamed) {
  const TemporaryDirectory directory;
  const path file = directory / "a";
  const auto damaged = [&](const std::string& text, const std::string& replacement) {
    save(file, small_content());
    std::string bytes = read_bytes(file);
    const std::size_t place = bytes.find(text);
    EXPECT_NE(place, std::string::npos) << text;
    write_bytes(file, bytes.replace(place, text.size(), replacement));
    return refusal(file);
  };
  const std::string in = "file '" + file.string() + "'";
  EXPECT_THAT(damaged("\"maker\":\"t", "\"maker\":\"r"),
              StartsWith(in + ": its header is damaged: its checksum is "));
  EXPECT_EQ(damaged(random_bytes(1, 4), random_bytes(5, 4)),
            in + ", tensor 'w': its data are damaged: the checksum differs");
  EXPECT_EQ(damaged("version\":\"1", "version\":\"2"),
            in + ": written by a newer fusestep: its format is '2', this one reads '1'");
  EXPECT_EQ(damaged("fusestep.version", "fusestep.varsion"),
            in + ": has metadata of fusestep, but not 'fusestep.version'");
  EXPECT_THAT(damaged("fusestep.crc32c", "fusestep.crc32d"),
              StartsWith(in + ": its header is damaged: its checksum is "));
  EXPECT_EQ(damaged("fusestep.header_crc32c", "fusestep.header_crc32d"),
            in + ": has metadata of fusestep, but not 'fusestep.header_crc32c'");
}

/// A file in the form of ours, with the right checksum of its header.
std::string sealed(const std::string& metadata, const std::string& tensors) {
  const std::string start = R"({"__metadata__":{"fusestep.header_crc32c":")";
  std::string bytes = with_length(start + "00000000\"" + metadata + "}" + tensors + "}");
  char digits[9];
  std::snprintf(digits, sizeof digits, "%08x", crc(bytes));
  return bytes.replace(8 + start.size(), 8, digits);
}

struct BadFile {
  const char* name;
  std::string bytes, text;
};

/// One tensor "a" whose entry is this, and data.
std::string entry(const std::string& text, std::size_t data) {
  return with_length(R"({"a":)" + text + "}") + std::string(data, 'x');
}

/// A header, and data.
std::string header(const std::string& text, std::size_t data = 0) {
  return with_length(text) + std::string(data, 'x');
}

std::string repeated(const std::string& text, int count) {
  std::string all;
  for (int i = 0; i < count; ++i) all += text;
  return all;
}

std::vector<BadFile> bad_files() {
  const std::string good = R"({"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
  const std::string version = R"(,"fusestep.version":"1")";
  const std::string of_a = R"(, tensor 'a': )";
  const auto not_json = [](std::size_t byte) {
    return ": its header is not JSON in UTF-8, at its byte " + std::to_string(byte);
  };
  return {
      {"empty", "", ": has 0 bytes, too few for a safetensors file"},
      {"seven bytes", "\x02\0\0\0\0\0\0", ": has 1 bytes, too few for a safetensors file"},
      {"no header", std::string(8, '\0'), ": its header does not begin with '{'"},
      {"longer than the file", header("{}").substr(0, 9),
       ": is no safetensors file, or cut off: a header of 2 bytes in a file of 9"},
      {"longest length", std::string(8, '\xff') + "{}",
       ": is no safetensors file, or cut off: a header of 18446744073709551615 bytes in a file of "
       "10"},
      {"some text", "Dear reader, this is a letter and no file of tensors.",
       ": is no safetensors file, or cut off: a header of 7018141078010291524 bytes in a file of "
       "53"},
      {"space first", header(" {}"), ": its header does not begin with '{'"},
      {"byte order mark", header("\xef\xbb\xbf{}"), ": its header does not begin with '{'"},
      {"an array", header("[]"), ": its header does not begin with '{'"},
      {"not closed", header("{"), not_json(2)},
      {"text behind it", header("{} x"), not_json(4)},
      {"second object", header("{}{}"), not_json(3)},
      {"zero behind it", header(std::string("{}\0garbage", 10)), not_json(3)},
      {"comment", header("{/**/}"), not_json(2)},
      {"comma", header("{\"a\":" + good + ",}", 1), not_json(54)},
      {"single quotes", header("{'a':" + good + "}", 1), not_json(2)},
      {"not UTF-8", header("{\"\xff\":" + good + "}", 1), not_json(3)},
      {"half a surrogate", header("{\"\\ud800\":" + good + "}", 1), not_json(9)},
      {"overlong UTF-8", header("{\"\xc0\xaf\":" + good + "}", 1), not_json(3)},
      {"NaN", entry(R"({"dtype":"U8","shape":[NaN],"data_offsets":[0,1]})", 1), not_json(29)},
      {"hexadecimal", entry(R"({"dtype":"U8","shape":[0x1],"data_offsets":[0,1]})", 1),
       not_json(30)},
      {"leading zero", entry(R"({"dtype":"U8","shape":[01],"data_offsets":[0,1]})", 1),
       not_json(30)},
      {"too large for double", entry(R"({"dtype":"U8","shape":[1e999],"data_offsets":[0,1]})", 1),
       not_json(33)},
      {"tensor twice", header("{\"a\":" + good + ",\"a\":" + good + "}", 1),
       ": its header has 'a' twice"},
      {"tensor twice, spelt otherwise", header("{\"a\":" + good + ",\"\\u0061\":" + good + "}", 1),
       ": its header has 'a' twice"},
      {"metadata twice", header(R"({"__metadata__":{},"__metadata__":{}})"),
       ": its header has '__metadata__' twice"},
      {"metadata key twice", header(R"({"__metadata__":{"k":"1","k":"1"}})"),
       ": its header has the metadata 'k' twice"},
      {"field twice", entry(R"({"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]})", 1),
       of_a + "'shape' stands there twice"},
      {"metadata null", header(R"({"__metadata__":null})"),
       ": its header has null for '__metadata__', which must be an object"},
      {"metadata a list", header(R"({"__metadata__":[]})"),
       ": its header has an array for '__metadata__', which must be an object"},
      {"metadata of numbers", header(R"({"__metadata__":{"k":1}})"),
       ": its header has a number for the metadata 'k', which must be a string"},
      {"metadata of null", header(R"({"__metadata__":{"k":null}})"),
       ": its header has null for the metadata 'k', which must be a string"},
      {"metadata nested", header(R"({"__metadata__":{"k":{"l":"m"}}})"),
       ": its header has an object for the metadata 'k', which must be a string"},
      {"nested deeply", header("{\"a\":" + repeated("[", 200'000)),
       ": its header has an array for 'a', which must be an object"},
      {"nested deeply in a tensor", header("{\"a\":" + repeated("{\"shape\":", 100'000)),
       of_a + "'shape' must be an array, got an object"},
      {"tensor a number", entry("-7", 0),
       ": its header has a negative number for 'a', which must be an object"},
      {"tensor true", entry("true", 0),
       ": its header has a boolean for 'a', which must be an object"},
      {"tensor without anything", entry("{}", 0), of_a + "'dtype' is missing"},
      {"no shape", entry(R"({"dtype":"U8","data_offsets":[0,1]})", 1), of_a + "'shape' is missing"},
      {"no offsets", entry(R"({"dtype":"U8","shape":[0]})", 0), of_a + "'data_offsets' is missing"},
      {"unknown field", entry(R"({"dtype":"U8","shape":[],"data_offsets":[0,1],"strides":[1]})", 1),
       of_a + "unknown key 'strides'"},
      {"dtype a number", entry(R"({"dtype":8,"shape":[1],"data_offsets":[0,1]})", 1),
       of_a + "'dtype' must be a string, got a number"},
      {"dtype a list", entry(R"({"dtype":["U8"],"shape":[1],"data_offsets":[0,1]})", 1),
       of_a + "'dtype' must be a string, got an array"},
      {"shape a number", entry(R"({"dtype":"U8","shape":1,"data_offsets":[0,1]})", 1),
       of_a + "'shape' must be an array, got a number"},
      {"shape of text", entry(R"({"dtype":"U8","shape":["1"],"data_offsets":[0,1]})", 1),
       of_a + "'shape' must hold whole numbers of at least 0, got a string"},
      {"shape of lists", entry(R"({"dtype":"U8","shape":[[1]],"data_offsets":[0,1]})", 1),
       of_a + "'shape' must hold whole numbers of at least 0, got an array"},
      {"shape with a point", entry(R"({"dtype":"U8","shape":[1.0],"data_offsets":[0,1]})", 1),
       of_a +
           "'shape' must hold whole numbers of at least 0, got a number that is no integer of 64 "
           "bits"},
      {"negative extent", entry(R"({"dtype":"U8","shape":[-1],"data_offsets":[0,1]})", 1),
       of_a + "'shape' must hold whole numbers of at least 0, got a negative number"},
      {"extent of 2^63",
       entry(R"({"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,1]})", 1),
       of_a + "an extent of 9223372036854775808 is larger than any file"},
      {"extent of 2^64",
       entry(R"({"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]})", 1),
       of_a +
           "'shape' must hold whole numbers of at least 0, got a number that is no integer of 64 "
           "bits"},
      {"shape overflows",
       entry(R"({"dtype":"U8","shape":[4294967296,4294967297],"data_offsets":[0,1]})", 1),
       of_a + "shape [4294967296, 4294967297] of U8 is larger than any file"},
      {"shape overflows to 0",
       entry(R"({"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})", 0),
       of_a + "shape [4294967296, 4294967296] of U8 is larger than any file"},
      {"bytes overflow to 8",
       entry(R"({"dtype":"F64","shape":[2305843009213693953],"data_offsets":[0,8]})", 8),
       of_a + "shape [2305843009213693953] of F64 is larger than any file"},
      {"half a byte", entry(R"({"dtype":"F4","shape":[3],"data_offsets":[0,1]})", 1),
       of_a + "shape [3] of F4 does not end at a whole byte"},
      {"unknown dtype", entry(R"({"dtype":"F33","shape":[1],"data_offsets":[0,4]})", 4),
       of_a + "unknown dtype 'F33'"},
      {"dtype in lower case", entry(R"({"dtype":"u8","shape":[1],"data_offsets":[0,1]})", 1),
       of_a + "unknown dtype 'u8'"},
      {"one offset", entry(R"({"dtype":"U8","shape":[1],"data_offsets":[1]})", 1),
       of_a + "'data_offsets' has less than two numbers"},
      {"three offsets", entry(R"({"dtype":"U8","shape":[1],"data_offsets":[0,1,1]})", 1),
       of_a + "'data_offsets' has more than two numbers"},
      {"negative offset", entry(R"({"dtype":"U8","shape":[1],"data_offsets":[-1,0]})", 1),
       of_a + "'data_offsets' must hold whole numbers of at least 0, got a negative number"},
      {"offsets reversed", entry(R"({"dtype":"U8","shape":[1],"data_offsets":[1,0]})", 1),
       of_a + "data_offsets [1, 0], but the data before it end at 0"},
      {"offsets reversed at 0",
       header(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
              R"("b":{"dtype":"U8","shape":[1],"data_offsets":[4,3]}})",
              4),
       ", tensor 'b': data_offsets [4, 3], but shape [1] of U8 takes 1 bytes"},
      {"too few bytes", entry(R"({"dtype":"F32","shape":[2,3],"data_offsets":[0,20]})", 20),
       of_a + "data_offsets [0, 20], but shape [2, 3] of F32 takes 24 bytes"},
      {"too many bytes", entry(R"({"dtype":"F32","shape":[],"data_offsets":[0,5]})", 5),
       of_a + "data_offsets [0, 5], but shape [] of F32 takes 4 bytes"},
      {"bytes for nothing", entry(R"({"dtype":"F32","shape":[0],"data_offsets":[0,4]})", 4),
       of_a + "data_offsets [0, 4], but shape [0] of F32 takes 0 bytes"},
      {"hole at the start", entry(R"({"dtype":"U8","shape":[1],"data_offsets":[1,2]})", 2),
       of_a + "data_offsets [1, 2], but the data before it end at 0"},
      {"hole",
       header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
              R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
              3),
       ", tensor 'b': data_offsets [2, 3], but the data before it end at 1"},
      {"overlap",
       header(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
              R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
              3),
       ", tensor 'b': data_offsets [1, 3], but the data of another tensor end at 2"},
      {"the same data twice",
       header(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
              R"("b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
              2),
       "data_offsets [0, 2], but the data of another tensor end at 2"},
      {"out of range", entry(R"({"dtype":"U8","shape":[9],"data_offsets":[0,9]})", 8),
       ": its tensors take 9 bytes, but there are 8: it is cut off"},
      {"far out of range",
       entry(
           R"({"dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,9223372036854775807]})",
           1),
       of_a + "shape [9223372036854775807] of U8 is larger than any file"},
      {"trailing bytes", entry(good, 2), ": its tensors take 1 bytes, but there are 2"},
      {"data of no tensor", header("{}", 1), ": its tensors take 0 bytes, but there are 1"},
      {"control characters in a name", header(R"({"a\u0000\u001b\n'":7})"),
       R"(: its header has a number for 'a\x00\x1b\x0a'', which must be an object)"},
      {"a very long name", header("{\"" + repeated("\xe2\x82\xac", 100'000) + "\":7}"),
       ": its header has a number for '" + repeated("\xe2\x82\xac", 66) +
           "...', which must be an object"},
      {"reserved key alone", header(R"({"__metadata__":{"fusestep.anything":""}})"),
       ": has metadata of fusestep, but not 'fusestep.version'"},
      {"version alone", header(R"({"__metadata__":{"fusestep.version":"1"}})"),
       ": has metadata of fusestep, but not 'fusestep.header_crc32c'"},
      {"no checksums", sealed(version, ""),
       ": has metadata of fusestep, but not 'fusestep.crc32c'"},
      {"a later version", sealed(R"(,"fusestep.version":"2")", ""),
       ": written by a newer fusestep: its format is '2', this one reads '1'"},
      {"header checksum elsewhere",
       header(R"({"__metadata__":{"fusestep.version":"1","fusestep.crc32c":"{}",)"
              R"("fusestep.header_crc32c":"00000000"}})"),
       ": 'fusestep.header_crc32c' is not the first thing in its header"},
      {"header checksum wrong",
       header(R"({"__metadata__":{"fusestep.header_crc32c":"00000000","fusestep.version":"1",)"
              R"("fusestep.crc32c":"{}"}})"),
       ": its header is damaged: its checksum is "},
      {"header checksum short",
       header(R"({"__metadata__":{"fusestep.header_crc32c":"0","fusestep.version":"1",)"
              R"("fusestep.crc32c":"{}"}})"),
       ": its header is damaged: its checksum is "},
      {"checksums no JSON", sealed(version + R"(,"fusestep.crc32c":"{")", ""),
       ": 'fusestep.crc32c' is not JSON in UTF-8, at its byte 2"},
      {"checksums with a zero", sealed(version + R"(,"fusestep.crc32c":"{}\u0000x")", ""),
       ": 'fusestep.crc32c' is not JSON in UTF-8, at its byte 3"},
      {"checksums a list", sealed(version + R"(,"fusestep.crc32c":"[]")", ""),
       ": 'fusestep.crc32c' must be an object of strings, got an array"},
      {"checksums a string", sealed(version + R"(,"fusestep.crc32c":"\"x\"")", ""),
       ": 'fusestep.crc32c' must be an object of strings, got a string"},
      {"checksums nested", sealed(version + R"(,"fusestep.crc32c":"{\"a\":{}}")", ""),
       ": 'fusestep.crc32c' must be an object of strings, got an object"},
      {"checksum a number", sealed(version + R"(,"fusestep.crc32c":"{\"a\":0}")", ""),
       ": 'fusestep.crc32c' must be an object of strings, got a number"},
      {"checksum twice",
       sealed(version + R"(,"fusestep.crc32c":"{\"a\":\"00000000\",\"a\":\"00000000\"}")", ""),
       ": 'fusestep.crc32c' has 'a' twice"},
      {"checksum of no tensor",
       sealed(version + R"(,"fusestep.crc32c":"{\"a\":\"00000000\"}")", ""),
       ": 'fusestep.crc32c' has more names than there are tensors"},
      {"tensor without checksum",
       sealed(version + R"(,"fusestep.crc32c":"{}")", ",\"a\":" + good) + "x",
       of_a + "has no checksum"},
      {"checksum in upper case",
       sealed(version + R"(,"fusestep.crc32c":"{\"a\":\"ABCDEF01\"}")", ",\"a\":" + good) + "x",
       of_a + "its checksum 'ABCDEF01' is not 8 hexadecimal digits"},
      {"checksum too short",
       sealed(version + R"(,"fusestep.crc32c":"{\"a\":\"0\"}")", ",\"a\":" + good) + "x",
       of_a + "its checksum '0' is not 8 hexadecimal digits"},
      {"checksum wrong",
       sealed(version + R"(,"fusestep.crc32c":"{\"a\":\"00000000\"}")", ",\"a\":" + good) + "x",
       of_a + "its data are damaged: the checksum differs"},
  };
}

TEST(Damage, OfBadFilesIsSaid) {
  const TemporaryDirectory directory;
  for (const BadFile& bad : bad_files()) {
    write_bytes(directory / "bad", bad.bytes);
    const std::string found = refusal(directory / "bad");
    EXPECT_THAT(found, StartsWith("file '" + (directory / "bad").string())) << bad.name;
    EXPECT_THAT(found, HasSubstr(bad.text)) << bad.name;
    EXPECT_LT(found.size(), 1000u) << bad.name;
  }
}

/// What could be taken for damage and is none.
TEST(Damage, OddFilesThatAreFine) {
  const TemporaryDirectory directory;
  const std::string good = R"({"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
  const std::pair<const char*, std::string> files[] = {
      {"nothing in it", header("{}")},
      {"spaces behind it", header("{}     ")},
      {"spaces in it", header("{ \"a\" :\n\t" + good + "\r\n}", 1)},
      {"escapes", header("{\"\\u00e9\\ud83d\\ude00\\/\":" + good + "}", 1)},
      {"empty name", header("{\"\":" + good + "}", 1)},
      {"empty tensors at one place",
       header(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[1,1]},"b":)" + good +
                  R"(,"c":{"dtype":"F64","shape":[3,0],"data_offsets":[0,0]}})",
              1)},
      {"tensors not aligned",
       header(R"({"a":)" + good + R"(,"b":{"dtype":"F64","shape":[],"data_offsets":[1,9]}})", 9)},
      {"a shape of ones", entry(R"({"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1],)"
                                R"("data_offsets":[0,1]})",
                                1)},
      {"checksums with spaces", sealed(R"(,"fusestep.version":"1","fusestep.crc32c":" { } ")", "")},
  };
  for (const auto& [name, bytes] : files) {
    write_bytes(directory / "odd", bytes);
    EXPECT_EQ(refusal(directory / "odd"), "") << name;
  }
}

// ---- what is no file ------------------------------------------------------------------------

/// As a user who has no rights, where the tests run as one who has all. Returns to what it was.
class Unprivileged {
 public:
  Unprivileged() {
    if (geteuid() == 0) active_ = seteuid(65534) == 0;
  }
  ~Unprivileged() {
    if (active_ && seteuid(0) != 0) std::abort();
  }

 private:
  bool active_ = false;
};

TEST(NoFile, IsSaid) {
  const TemporaryDirectory directory;
  const auto in = [](const path& file) { return "file '" + file.string() + "': "; };
  EXPECT_EQ(refusal(directory.name()), in(directory.name()) + "is a directory");
  EXPECT_EQ(refusal(directory / "none"),
            in(directory / "none") + "cannot be opened: No such file or directory");
  EXPECT_EQ(refusal(directory / "none/x"),
            in(directory / "none/x") + "cannot be opened: No such file or directory");
  EXPECT_EQ(refusal(""), in("") + "cannot be opened: No such file or directory");
  EXPECT_EQ(refusal("/dev/zero"), in("/dev/zero") + "is not a regular file");
  ASSERT_EQ(mkfifo((directory / "pipe").c_str(), 0666), 0);
  alarm(20);  // nobody writes to it
  EXPECT_EQ(refusal(directory / "pipe"), in(directory / "pipe") + "is not a regular file");
  alarm(0);
  save(directory / "secret", small_content());
  std::filesystem::permissions(directory.name(), std::filesystem::perms::all);
  std::filesystem::permissions(directory / "secret", std::filesystem::perms::none);
  const Unprivileged user;
  EXPECT_EQ(refusal(directory / "secret"),
            in(directory / "secret") + "cannot be opened: Permission denied");
}

TEST(Changing, WhileItIsRead) {
  const TemporaryDirectory directory;
  const path file = directory / "a";
  const std::string in = "file '" + file.string() + "': ";
  Content content;
  content.add("a", "U8", {1'000'000}, random_bytes(1, 1'000'000));
  const auto problem = [](const SafetensorsReader& reader) -> std::string {
    try {
      tensor_bytes(reader, 0);
      return {};
    } catch (const FileError& error) {
      return error.what();
    }
  };
  {
    save(file, content);
    const SafetensorsReader reader(file);
    std::filesystem::resize_file(file, 500'000);
    EXPECT_EQ(problem(reader), in + "has become shorter while it was read");
    char byte = 0;
    EXPECT_THROW(reader.read(0, 0, &byte, 1), FileError);
    EXPECT_THROW(reader.read(0, 999'999, &byte, 1), FileError);
  }
  {
    save(file, content);
    const SafetensorsReader reader(file);
    std::filesystem::resize_file(file, 2'000'000);
    EXPECT_EQ(problem(reader), in + "has changed while it was read");
  }
  {
    write_bytes(file, header(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 2));
    const SafetensorsReader reader(file);
    usleep(20'000);  // a file system's clock ticks slowly
    overwrite_bytes(file, header(R"({"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 2));
    EXPECT_EQ(problem(reader), in + "has changed while it was read");
  }
  {
    save(file, content);
    const SafetensorsReader reader(file);
    save(file, small_content());  // another file under the same name
    EXPECT_EQ(problem(reader), "");
  }
}

// ---- where a file goes ----------------------------------------------------------------------

std::string save_problem(const path& file, const Content& content = small_content()) {
  try {
    save(file, content);
    return {};
  } catch (const FileError& error) {
    return error.what();
  }
}

mode_t mode_of(const path& file) {
  struct stat status {};
  return stat(file.c_str(), &status) == 0 ? status.st_mode & 07777 : 0;
}

TEST(Target, SymbolicLinksAreFollowed) {
  const TemporaryDirectory directory;
  std::filesystem::create_directory(directory / "far");
  std::filesystem::create_symlink("far/target", directory / "link");
  std::filesystem::create_symlink("link", directory / "link_to_link");
  save(directory / "link", small_content());  // to nothing yet
  EXPECT_TRUE(
      std::filesystem::is_regular_file(std::filesystem::symlink_status(directory / "far/target")));
  Content other;
  other.metadata["other"] = "";
  save(directory / "link_to_link", other);
  expect_content(directory / "far/target", other);
  std::filesystem::create_symlink(directory / "far/target", directory / "absolute");
  save(directory / "absolute", small_content());
  expect_content(directory / "link", small_content());
  EXPECT_TRUE(std::filesystem::is_symlink(directory / "link"));
  EXPECT_TRUE(std::filesystem::is_symlink(directory / "link_to_link"));
  EXPECT_THAT(directory.entries(), ElementsAre("absolute", "far", "link", "link_to_link"));
  std::filesystem::create_symlink("loop", directory / "loop");
  EXPECT_EQ(save_problem(directory / "loop"),
            "file '" + (directory / "loop").string() +
                "': cannot be written: Too many levels of symbolic links");
}

TEST(Target, KeepsItsPermissions) {
  const TemporaryDirectory directory;
  const mode_t before = umask(027);
  save(directory / "new", small_content());
  EXPECT_EQ(mode_of(directory / "new"), 0640u);
  for (const mode_t mode : {0600u, 0666u, 0777u, 0644u}) {
    ASSERT_EQ(chmod((directory / "new").c_str(), mode), 0);
    save(directory / "new", small_content());
    EXPECT_EQ(mode_of(directory / "new"), mode);
  }
  umask(before);
}

TEST(Target, ThatCannotBeWritten) {
  const TemporaryDirectory directory;
  const auto in = [](const path& file) { return "file '" + file.string() + "': "; };
  EXPECT_EQ(save_problem(directory.name()),
            in(directory.name()) + "cannot be written: Is a directory");
  EXPECT_EQ(save_problem(directory / ""), in(directory / "") + "cannot be written: Is a directory");
  EXPECT_EQ(save_problem(directory / "none/x"),
            in(directory / "none/x") + "cannot open its directory: No such file or directory");
  write_bytes(directory / "file", "x");
  EXPECT_EQ(save_problem(directory / "file/x"),
            in(directory / "file/x") + "cannot open its directory: Not a directory");
  ASSERT_EQ(mkfifo((directory / "pipe").c_str(), 0666), 0);
  EXPECT_EQ(save_problem(directory / "pipe"), in(directory / "pipe") + "is not a regular file");
  EXPECT_EQ(save_problem("/dev/null"), in("/dev/null") + "is not a regular file");
  const path long_name = directory / std::string(255, 'n');
  EXPECT_EQ(save_problem(long_name), "");
  EXPECT_EQ(save_problem(long_name.string() + "n"),
            in(long_name.string() + "n") + "cannot be written: File name too long");

  std::filesystem::permissions(directory.name(), std::filesystem::perms::all);
  write_bytes(directory / "protected", "x");
  std::filesystem::permissions(directory / "protected", std::filesystem::perms(0444));
  std::filesystem::create_directory(directory / "closed");
  std::filesystem::permissions(directory / "closed", std::filesystem::perms(0555));
  {
    const Unprivileged user;
    EXPECT_EQ(save_problem(directory / "protected"),
              in(directory / "protected") + "cannot be written: Permission denied");
    EXPECT_EQ(
        save_problem(directory / "closed/x"),
        in(directory / "closed/x") + "cannot create a temporary file beside it: Permission denied");
  }
  std::filesystem::remove(long_name);
  EXPECT_THAT(directory.entries(), ElementsAre("closed", "file", "pipe", "protected"));
}

}  // namespace
}  // namespace fusestep::test
