// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Several processes that train together: each has parts of the parameters, they save together, and
// any number of them goes on. Every element is computed alone, so bits do not depend on the cuts.
#include <gmock/gmock.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <csignal>
#include <fstream>
#include <functional>
#include <random>

#include "checkpoint/state_file.h"
#include "files/safetensors.h"
#include "state_support.h"

namespace fusestep::test {
namespace {

using testing::HasSubstr;

/// The first element of every rank's part, and the end.
using Cuts = std::vector<std::int64_t>;
using Divide = std::function<Cuts(std::int64_t elements, int world)>;

/// As FSDP does it: the last ones have less, or nothing.
Cuts evenly(std::int64_t elements, int world) {
  const std::int64_t part = (elements + world - 1) / world;
  Cuts cuts;
  for (int rank = 0; rank <= world; ++rank) cuts.push_back(std::min(elements, part * rank));
  return cuts;
}

/// Anywhere, so that parts are uneven and some are empty.
Cuts anyhow(std::int64_t elements, int world) {
  std::mt19937 random(static_cast<unsigned>(elements * 31 + world));
  Cuts cuts = {0, elements};
  for (int rank = 1; rank < world; ++rank) {
    cuts.push_back(static_cast<std::int64_t>(random()) % (elements + 1));
  }
  std::sort(cuts.begin(), cuts.end());
  return cuts;
}

ModelSpec small_model() {
  return {{"adam", AdamHyper{.lr = 0.5, .amsgrad = true}, {{"w", {7, 5, 3}}, {"scalar", {}}}},
          {"sgd", SgdHyper{.lr = 0.25, .momentum = 0.5}, {{"b", {3}}, {"empty", {0, 4}}}},
          {"rms",
           RmspropHyper{.lr = 0.5, .momentum = 0.5, .centered = true},
           {{"h", {11}, DType::kBFloat16}, {"d", {2, 9}, DType::kFloat64}}}};
}

/// One rank's part of the model that Model is all of.
class RankModel {
 public:
  RankModel(const ModelSpec& groups, int rank, int world, const Divide& divide) {
    for (const StateGroupSpec& group : groups) {
      std::vector<Parameter> parameters;
      for (const ParameterSpec& spec : group.parameters) {
        const std::int64_t elements = elements_of(spec.shape);
        const Cuts cuts = divide(elements, world);
        const auto at = static_cast<std::size_t>(rank);
        Part& part = parts_.emplace_back(spec, cuts[at], cuts[at + 1] - cuts[at]);
        part.fill(part.value, fnv(spec.name));
        parameters.push_back(
            {spec.name, part.value.view(), part.grad.view(), Shard{part.begin, spec.shape}});
      }
      optimizer.add_group(group.name, group.hyper, std::move(parameters), {group.slots});
    }
  }
  void steps(std::uint64_t first, std::uint64_t count) {
    for (std::uint64_t i = first; i < first + count; ++i) {
      for (Part& part : parts_) part.fill(part.grad, fnv(part.spec.name) + 2 + i);
      optimizer.step();
    }
  }
  /// Empty, or the first difference to what the whole model has in this place.
  std::string difference_to(Model& whole) {
    const StateDict dict = whole.optimizer.state_dict();
    for (Part& part : parts_) {
      const std::string& name = part.spec.name;
      const auto at = static_cast<std::size_t>(whole.optimizer.parameter(name).value().bytes());
      const auto* value =
          static_cast<const std::byte*>(whole.optimizer.parameter(name).value().data);
      if (at != 0 && part.differs(value, part.value.data(), part.spec.dtype))
        return name + "/value";
      StateRef state = optimizer.state(name);
      StateRef expected = whole.optimizer.state(name);
      if (state.step() != expected.step()) return name + ": step " + std::to_string(state.step());
      const auto names = [](StateRef& of) {
        const std::vector<std::string> found = of.slot_names();
        return std::set<std::string>(found.begin(), found.end());
      };
      if (names(state) != names(expected)) return name + ": slots";
      for (const std::string& slot : names(state)) {
        const TensorView here = state.slot(slot), there = expected.slot(slot);
        if (part.differs(static_cast<const std::byte*>(there.data), here.data, there.dtype)) {
          return name + "/" + slot;
        }
      }
    }
    return "";
  }

  Optimizer optimizer;

 private:
  struct Part {
    Part(const ParameterSpec& s, std::int64_t first, std::int64_t count)
        : spec(s), begin(first), value(s.dtype, count), grad(s.dtype, count) {}
    void fill(Array& part, std::uint64_t seed) const {
      Array whole(spec.dtype, elements_of(spec.shape));
      whole.fill_numbers(seed);
      if (part.bytes() == 0) return;
      std::memcpy(part.data(), whole.data() + static_cast<std::size_t>(begin) * size_of(spec.dtype),
                  part.bytes());
    }
    bool differs(const std::byte* whole, const void* here, DType dtype) const {
      const std::size_t size = size_of(dtype);
      const std::size_t bytes = value.bytes() / size_of(spec.dtype) * size;
      return bytes != 0 &&
             std::memcmp(whole + static_cast<std::size_t>(begin) * size, here, bytes) != 0;
    }
    ParameterSpec spec;
    std::int64_t begin;
    Array value, grad;
  };
  std::deque<Part> parts_;
};

// ---- processes ----------------------------------------------------------------------------------

pid_t start(const std::function<void()>& work) {
  const pid_t child = fork();
  if (child != 0) return child;
  alarm(120);
  try {
    work();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "in a rank: %s\n", error.what());
    _exit(1);
  }
  _exit(testing::Test::HasFailure() ? 2 : 0);
}

int wait_for(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/// A process for every rank; true if all have ended well.
bool on_ranks(int world, const std::function<void(int rank)>& work) {
  std::vector<pid_t> children;
  for (int rank = 0; rank < world; ++rank) children.push_back(start([&] { work(rank); }));
  bool good = true;
  for (const pid_t child : children) good = wait_for(child) == 0 && good;
  return good;
}

/// All ranks train `steps` steps and save them as this generation.
bool train_and_save(const std::filesystem::path& path, int world, const Divide& divide,
                    std::uint64_t steps, std::int64_t generation) {
  return on_ranks(world, [&](int rank) {
    RankModel model(small_model(), rank, world, divide);
    model.steps(0, steps);
    model.optimizer.save(path, {.values = true,
                                .metadata = {{"rank", std::to_string(rank)}},
                                .rank = SaveRank{rank, world, generation}});
  });
}

/// Every rank goes on from the checkpoint as if it had never been interrupted.
bool load_and_go_on(const std::filesystem::path& path, int world, const Divide& divide,
                    std::uint64_t steps) {
  return on_ranks(world, [&](int rank) {
    for (const std::uint64_t before : {0, 2}) {  // into fresh state, and over what was there
      Model whole(small_model());
      whole.steps(0, steps);
      RankModel model(small_model(), rank, world, divide);
      model.steps(90, before);
      const LoadReport report = model.optimizer.load(path);
      EXPECT_TRUE(report.complete()) << report;
      EXPECT_EQ(report.metadata.at("rank"), "0");
      EXPECT_EQ(model.difference_to(whole), "");
      whole.steps(steps, 3);
      model.steps(steps, 3);
      EXPECT_EQ(model.difference_to(whole), "") << "after more steps";
    }
  });
}

std::set<std::string> committed_files(int world, std::int64_t generation) {
  std::set<std::string> names = {"state.safetensors"};
  for (int rank = 0; rank < world; ++rank) {
    names.insert(rank_file("state.safetensors", {rank, world, generation}).string());
  }
  return names;
}

struct WorldCase {
  int from, to;
  bool evenly_from, evenly_to;
};
void PrintTo(const WorldCase& worlds, std::ostream* out) {
  *out << worlds.from << (worlds.evenly_from ? "e" : "u") << "_to_" << worlds.to
       << (worlds.evenly_to ? "e" : "u");
}
class Worlds : public testing::TestWithParam<WorldCase> {};

TEST_P(Worlds, GoOnFromOneAnother) {
  const WorldCase& worlds = GetParam();
  const TemporaryDirectory directory;
  const auto path = directory / "state.safetensors";
  const Divide from = worlds.evenly_from ? evenly : anyhow, to = worlds.evenly_to ? evenly : anyhow;
  ASSERT_TRUE(train_and_save(path, worlds.from, from, 4, 7));
  EXPECT_FALSE(std::filesystem::exists(path));
  commit_ranks(path, worlds.from, 7);
  EXPECT_EQ(directory.names(), committed_files(worlds.from, 7));
  EXPECT_TRUE(load_and_go_on(path, worlds.to, to, 4));
}

INSTANTIATE_TEST_SUITE_P(Table, Worlds,
                         testing::Values(WorldCase{1, 2, true, true}, WorldCase{2, 1, true, true},
                                         WorldCase{2, 2, true, true}, WorldCase{2, 2, true, false},
                                         WorldCase{2, 4, true, true}, WorldCase{4, 2, true, true},
                                         WorldCase{4, 3, false, true},
                                         WorldCase{3, 4, false, false},
                                         WorldCase{4, 4, false, false},
                                         WorldCase{4, 1, false, true}),
                         testing::PrintToStringParamName());

/// One process that has everything is the world of one that needs no index.
TEST(Ranks, WholeParametersAndPartsOfThem) {
  const TemporaryDirectory directory;
  const auto one = directory / "one", several = directory / "state.safetensors";
  Model whole(small_model());
  whole.steps(0, 4);
  whole.optimizer.save(one, {.values = true, .metadata = {{"rank", "0"}}});
  EXPECT_TRUE(load_and_go_on(one, 4, anyhow, 4));
  ASSERT_TRUE(train_and_save(several, 4, anyhow, 4, 1));
  commit_ranks(several, 4, 1);
  Model loaded(small_model());
  EXPECT_TRUE(loaded.optimizer.load(several).complete());
  whole.optimizer.load(one);  // which has the same metadata
  EXPECT_EQ("", difference(loaded.state(), whole.state()));
  // And as a value.
  const StateDict dict = read_state_dict(several);
  ASSERT_EQ(dict.state.size(), 6u);
  EXPECT_FALSE(dict.state[0].shard);
  EXPECT_EQ(dict.state[0].shape, (std::vector<std::int64_t>{7, 5, 3}));
  Model from_dict(small_model());
  from_dict.optimizer.load(dict);
  EXPECT_EQ("", difference(from_dict.state(), whole.state()));
}

TEST(Ranks, AStateDictOfOneRankIsItsPart) {
  RankModel from(small_model(), 1, 3, anyhow), to(small_model(), 1, 3, anyhow),
      other(small_model(), 2, 3, anyhow);
  Model whole(small_model());
  from.steps(0, 3);
  whole.steps(0, 3);
  const StateDict dict = from.optimizer.state_dict();
  EXPECT_EQ(dict.state[0].shard->whole_shape, (std::vector<std::int64_t>{7, 5, 3}));
  to.steps(0, 3);
  to.steps(50, 1);
  to.optimizer.load_state_dict(dict);
  from.steps(3, 2);
  EXPECT_EQ(text_of(dict), text_of(to.optimizer.state_dict()));
  try {
    other.optimizer.load_state_dict(dict);
    FAIL();
  } catch (const LoadError& error) {
    EXPECT_THAT(error.what(), HasSubstr("w shard saved elements "));
    EXPECT_THAT(error.what(), HasSubstr(" of [7, 5, 3]"));
  }
}

/// ZeRO: a rank has some parameters and knows nothing of the others; some are on every rank.
TEST(Ranks, WithParametersOfTheirOwn) {
  const TemporaryDirectory directory;
  const auto path = directory / "state.safetensors";
  const ParameterSpec a{"a", {5}}, b{"b", {6}}, norm{"norm", {4}};
  const ModelSpec all = {{"g", AdamHyper{.lr = 0.5}, {norm, a, b}}};
  const ModelSpec ranks[] = {{{"g", AdamHyper{.lr = 0.5}, {norm, a}}},
                             {{"g", AdamHyper{.lr = 0.5}, {norm, b}}}};
  ASSERT_TRUE(on_ranks(2, [&](int rank) {
    Model model(ranks[rank]);
    model.steps(0, 2);
    model.optimizer.save_async(path, {.values = true, .rank = SaveRank{rank, 2}});
    model.optimizer.wait_for_save();
  }));
  commit_ranks(path, 2, 0);
  Model whole(all), loaded(all);
  whole.steps(0, 2);
  EXPECT_TRUE(loaded.optimizer.load(path).complete());
  EXPECT_EQ("", difference(loaded.everything(), whole.everything()));
}

// ---- saves that fail ----------------------------------------------------------------------------

TEST(Ranks, OneThatIsKilledLeavesTheOlderCheckpoint) {
  const TemporaryDirectory directory;
  const auto path = directory / "state.safetensors";
  ASSERT_TRUE(train_and_save(path, 4, anyhow, 4, 1));
  commit_ranks(path, 4, 1);
  const unsigned seed = std::random_device()();
  std::mt19937 random(seed);
  int killed = 0;
  for (int round = 0; round < 12; ++round) {
    SCOPED_TRACE("round " + std::to_string(round) + ", seed " + std::to_string(seed));
    std::vector<pid_t> children;
    for (int rank = 0; rank < 4; ++rank) {
      children.push_back(start([&] {
        RankModel model(small_model(), rank, 4, anyhow);
        model.steps(0, 5);
        // The one that is killed is in a save all the time, the first of which may succeed.
        for (int i = 0; rank == 2 || i < 1; ++i) {
          model.optimizer.save(path, {.values = true, .rank = SaveRank{rank, 4, 2 + i}});
        }
      }));
    }
    usleep(static_cast<useconds_t>(random() % 8000));
    kill(children[2], SIGKILL);
    killed += wait_for(children[2]) == 128 + SIGKILL ? 1 : 0;
    for (const int rank : {0, 1, 3})
      EXPECT_EQ(wait_for(children[static_cast<std::size_t>(rank)]), 0);
    const bool complete = std::filesystem::exists(rank_file(path, {2, 4, 2}));
    if (complete) {
      std::filesystem::remove(rank_file(path, {2, 4, 2}));  // as if it had died before
    }
    EXPECT_THROW(commit_ranks(path, 4, 2), FileError);
  }
  EXPECT_EQ(killed, 12);
  EXPECT_TRUE(load_and_go_on(path, 4, anyhow, 4));
  EXPECT_TRUE(load_and_go_on(path, 2, evenly, 4));
  // The next one that is complete cleans up what is older.
  ASSERT_TRUE(train_and_save(path, 4, anyhow, 6, 1'000'000));
  commit_ranks(path, 4, 1'000'000);
  EXPECT_EQ(directory.names(), committed_files(4, 1'000'000));
  EXPECT_TRUE(load_and_go_on(path, 3, evenly, 6));
}

TEST(Ranks, FilesOfAnAttemptThatFailedAreReplaced) {
  const TemporaryDirectory directory;
  const auto path = directory / "state.safetensors";
  ASSERT_TRUE(train_and_save(path, 2, evenly, 2, 1));
  commit_ranks(path, 2, 1);
  RankModel half(small_model(), 0, 2, evenly);
  half.steps(40, 3);
  half.optimizer.save(path, {.values = true, .rank = SaveRank{0, 2, 5}});  // and rank 1 died
  EXPECT_TRUE(load_and_go_on(path, 2, evenly, 2));
  ASSERT_TRUE(train_and_save(path, 2, evenly, 3, 5));
  commit_ranks(path, 2, 5);
  EXPECT_TRUE(load_and_go_on(path, 2, evenly, 3));
  EXPECT_EQ(directory.names(), committed_files(2, 5));
}

TEST(Ranks, FilesOfTheCheckpointAreNotOverwritten) {
  const TemporaryDirectory directory;
  const auto path = directory / "state.safetensors";
  ASSERT_TRUE(train_and_save(path, 2, evenly, 2, 3));
  commit_ranks(path, 2, 3);
  RankModel model(small_model(), 0, 2, evenly);
  model.steps(0, 1);
  for (const bool in_background : {false, true}) {
    const SaveOptions options{.rank = SaveRank{0, 2, 3}};
    try {
      in_background ? model.optimizer.save_async(path, options)
                    : model.optimizer.save(path, options);
      FAIL();
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(), HasSubstr("generation 3 is the checkpoint that is there"));
    }
  }
  for (const SaveRank& rank :
       {SaveRank{2, 2, 4}, SaveRank{-1, 2, 4}, SaveRank{0, 0, 4}, SaveRank{0, 2, -1}}) {
    EXPECT_THROW(model.optimizer.save(path, {.rank = rank}), InvalidArgument);
  }
  EXPECT_THROW(commit_ranks(path, 0, 3), InvalidArgument);
  EXPECT_EQ(directory.names(), committed_files(2, 3));
  EXPECT_TRUE(load_and_go_on(path, 2, evenly, 2));
}

TEST(Ranks, AMixtureOfSavesIsNeverLoaded) {
  const TemporaryDirectory directory;
  const auto path = directory / "state.safetensors";
  ASSERT_TRUE(train_and_save(path, 2, evenly, 2, 1));
  commit_ranks(path, 2, 1);
  const auto file = rank_file(path, {1, 2, 1});
  ASSERT_TRUE(train_and_save(directory / "other.safetensors", 2, evenly, 3, 1));
  std::filesystem::copy_file(rank_file(directory / "other.safetensors", {1, 2, 1}), file,
                             std::filesystem::copy_options::overwrite_existing);
  Model model(small_model());
  const std::string before = model.everything();
  try {
    model.optimizer.load(path);
    FAIL();
  } catch (const FileError& error) {
    EXPECT_THAT(error.what(), HasSubstr("state.1.1-of-2.safetensors': is not the file that the "
                                        "index file '"));
  }
  EXPECT_EQ("", difference(model.everything(), before));
  // The rank that needs nothing of it does not mind.
  RankModel first(small_model(), 0, 2, evenly);
  EXPECT_TRUE(first.optimizer.load(path).complete());
}

TEST(Ranks, DamageInAPartIsFound) {
  const TemporaryDirectory directory;
  const auto path = directory / "state.safetensors";
  ASSERT_TRUE(train_and_save(path, 2, evenly, 2, 1));
  commit_ranks(path, 2, 1);
  const auto damaged = rank_file(path, {1, 2, 1});
  const auto size = std::filesystem::file_size(damaged);
  {
    std::fstream file(damaged, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(size) - 1);
    const int last = file.get();
    file.seekp(static_cast<std::streamoff>(size) - 1);
    file.put(static_cast<char>(last ^ 1));
  }
  for (const std::uint64_t steps : {0, 2}) {
    Model model(small_model());
    model.steps(30, steps);
    const std::string before = model.everything();
    EXPECT_THROW(model.optimizer.load(path), FileError);
    EXPECT_EQ("", difference(model.everything(), before));
  }
  std::filesystem::resize_file(damaged, size / 2);
  Model model(small_model());
  EXPECT_THROW(model.optimizer.load(path), FileError);
  std::filesystem::remove(damaged);
  EXPECT_THROW(model.optimizer.load(path), FileError);
  EXPECT_THROW(commit_ranks(path, 2, 1), FileError);
}

// ---- files that are no parts of one state -------------------------------------------------------

struct Disagreement {
  std::string name, message;
  std::function<void(RankModel&, int rank)> change;
  Divide divide = evenly;
  ModelSpec second = small_model();  // of rank 1
};

TEST(Ranks, ThatDisagreeAreRefused) {
  const auto with_gap = [](std::int64_t elements, int world) {
    Cuts cuts = evenly(elements, world);
    if (elements > 3) cuts.back() -= 1;
    return cuts;
  };
  ModelSpec other_shape = small_model(), other_dtype = small_model(), other_group = small_model();
  other_shape[0].parameters[0].shape = {7, 15};
  other_dtype[2].parameters[0].dtype = DType::kFloat16;
  std::swap(other_group[0].parameters[0], other_group[1].parameters[0]);
  const auto on_second = [](auto&& change) {
    return [change](RankModel& model, int rank) {
      if (rank == 1) change(model);
    };
  };
  const Disagreement rows[] = {
      {"step",
       "parameter 'w': its step count is 2 in 'state.1.0-of-2.safetensors', and 3 in "
       "'state.1.1-of-2.safetensors'",
       on_second([](RankModel& model) { model.steps(2, 1); })},
      {"settings", "group 'adam' is Adam {\"lr\":0.5",
       on_second([](RankModel& model) { model.optimizer.group("adam").set_lr(0.125); })},
      {"frozen", "parameter 'w': its frozen flag is not set in ",
       on_second([](RankModel& model) { model.optimizer.freeze("w"); })},
      {"gap", "have not all of parameter 'w' of shape [7, 5, 3]: element 104 is in none",
       [](RankModel&, int) {}, with_gap},
      {"whole shape", "parameter 'w': its whole shape is [7, 5, 3] in ", [](RankModel&, int) {},
       evenly, other_shape},
      {"dtype", "parameter 'h': its dtype is bfloat16 in ", [](RankModel&, int) {}, evenly,
       other_dtype},
      {"group", "parameter 'b': its group is sgd in ", [](RankModel&, int) {}, evenly, other_group},
  };
  for (const Disagreement& row : rows) {
    SCOPED_TRACE(row.name);
    const TemporaryDirectory directory;
    const auto path = directory / "state.safetensors";
    for (int rank = 0; rank < 2; ++rank) {
      RankModel model(rank == 0 ? small_model() : row.second, rank, 2, row.divide);
      model.steps(0, 2);
      row.change(model, rank);
      model.optimizer.save(path, {.rank = SaveRank{rank, 2, 1}});
    }
    const std::set<std::string> before = directory.names();
    try {
      commit_ranks(path, 2, 1);
      ADD_FAILURE() << "was accepted";
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(), HasSubstr(row.message));
    }
    EXPECT_EQ(directory.names(), before);
  }
}

// ---- an index that somebody has made ------------------------------------------------------------

TEST(Ranks, ABadIndexIsRefused) {
  const TemporaryDirectory directory;
  const auto path = directory / "state.safetensors";
  ASSERT_TRUE(train_and_save(path, 2, evenly, 2, 1));
  commit_ranks(path, 2, 1);
  detail::Metadata good = detail::SafetensorsReader(path).metadata();
  struct Row {
    const char *key, *from, *to, *message;
  };
  const Row rows[] = {
      {"fusestep.ranks", "\"state.1.1", "\"../state.1.1",
       "'../state.1.1-of-2.safetensors' is no name"},
      {"fusestep.ranks", "\"state.1.1-of-2.safetensors\"", "\"..\"", "'..' is no name"},
      {"fusestep.ranks", "\"files\"", "\"flies\"", "fusestep.ranks: "},
      {"fusestep.ranks", "{\"generation\":1", "[", "fusestep.ranks is not JSON"},
      {"fusestep.groups", "\"parts\":[[0,0,0,53],[1,53,53,105]]", "\"parts\":[[0,0,0,53]]",
       "parts must be "},
      {"fusestep.groups", "[1,53,53,105]", "[2,53,53,105]", "parts must be "},
      {"fusestep.groups", "[1,53,53,105]", "[1,54,53,105]", "parts must be "},
      {"fusestep.groups", "[1,53,53,105]", "[1,53,54,105]", "parts must be "},
      {"fusestep.groups", "[1,53,53,105]", "[1,-1,53,105]", "parts must be "},
      {"fusestep.groups", "[1,53,53,105]", "[1,0.5,53,105]", "parts must be "},
      {"fusestep.groups", "[1,53,53,105]", "[1,0,53,105]", "is missing or too short in "},
      {"fusestep.groups", "\"parts\":[[0,0,0,53],[1,53,53,105]]", "\"parts\":3", "parts must be "},
      {"fusestep.groups", "\"shape\":[7,5,3]", "\"shape\":[7,5,4]", "has another shape"},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(std::string(row.from) + " becomes " + row.to);
    detail::Metadata bad = good;
    std::string& text = bad.at(row.key);
    const std::size_t at = text.find(row.from);
    ASSERT_NE(at, std::string::npos) << text;
    text.replace(at, std::string(row.from).size(), row.to);
    detail::SafetensorsWriter(path, bad, {}).commit();
    Model model(small_model());
    const std::string before = model.everything();
    try {
      model.optimizer.load(path);
      ADD_FAILURE() << "was accepted";
    } catch (const FileError& error) {
      EXPECT_THAT(error.what(), HasSubstr(row.message));
    }
    EXPECT_EQ("", difference(model.everything(), before));
  }
}

// ---- the norm in two halves ---------------------------------------------------------------------

/// A sum over processes, in memory they share.
class Sums {
 public:
  explicit Sums(int world) : world_(world) {
    place_ = static_cast<Place*>(
        mmap(nullptr, sizeof(Place), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    new (place_) Place;
  }
  ~Sums() { munmap(place_, sizeof(Place)); }
  Sums(const Sums&) = delete;
  Sums& operator=(const Sums&) = delete;
  void all_reduce(int rank, double* sums) {
    double* mine = place_->of[rank];
    std::copy(sums, sums + 2, mine);
    meet();
    std::fill(sums, sums + 2, 0.0);
    for (int other = 0; other < world_; ++other) {
      for (int i = 0; i < 2; ++i) sums[i] += place_->of[other][i];
    }
    meet();
  }

 private:
  struct Place {
    double of[8][2];
    std::atomic<int> arrived{0};
  };
  void meet() {
    const int now = place_->arrived.fetch_add(1);
    const int all = (now / world_ + 1) * world_;
    while (place_->arrived.load() < all) usleep(10);
  }
  int world_;
  Place* place_;
};

/// Multiples of 1/4: their squares add up exactly, in any order, so the norm has the same bits.
double simple_number(std::uint64_t seed, std::uint64_t i) {
  return static_cast<double>(static_cast<int>(hash(seed, i) % 17) - 8) / 4;
}

TEST(NormHalves, AllRanksClipAndSkipAlike) {
  constexpr int steps = 6;
  constexpr std::int64_t elements = 10'000;
  const auto grad = [](int step, std::uint64_t i) {
    if (step == 3 && i == 9'999) return HUGE_VAL;  // on the last rank
    return simple_number(static_cast<std::uint64_t>(step), i);
  };
  const StepOptions options{.max_grad_norm = 3.0, .skip_nonfinite = true};
  for (const int world : {2, 4}) {
    Array whole(DType::kFloat32, elements), whole_grad(DType::kFloat32, elements);
    whole.fill_numbers(1);
    Optimizer one;
    one.add_group("g", AdamHyper{.lr = 0.5}, {{"w", whole.view(), whole_grad.view()}});
    double norms[steps];
    for (int step = 0; step < steps; ++step) {
      whole_grad.fill([&](std::uint64_t i) { return grad(step, i); });
      one.step(options);
      norms[step] = one.last_grad_norm().norm;
    }
    EXPECT_EQ(one.skipped_steps(), 1);
    for (const Divide& divide : {Divide(evenly), Divide(anyhow)}) {
      Sums sums(world);
      Cuts cuts = divide(elements, world);
      cuts[1] = 0;  // the first has nothing
      EXPECT_TRUE(on_ranks(world, [&](int rank) {
        const auto begin = static_cast<std::uint64_t>(cuts[static_cast<std::size_t>(rank)]);
        const std::int64_t count =
            cuts[static_cast<std::size_t>(rank) + 1] - cuts[static_cast<std::size_t>(rank)];
        Array value(DType::kFloat32, count), value_grad(DType::kFloat32, count);
        value.fill([&](std::uint64_t i) { return number(1, begin + i); });
        Optimizer optimizer;
        optimizer.add_group("g", AdamHyper{.lr = 0.5},
                            {{"w", value.view(), value_grad.view(),
                              Shard{static_cast<std::int64_t>(begin), {elements}}}});
        for (int step = 0; step < steps; ++step) {
          value_grad.fill([&](std::uint64_t i) { return grad(step, begin + i); });
          const TensorView half = optimizer.norm_begin();
          sums.all_reduce(rank, static_cast<double*>(half.data));
          optimizer.norm_end();
          optimizer.step(options);
          EXPECT_EQ(optimizer.last_grad_norm().norm, norms[step]) << step;
        }
        EXPECT_EQ(optimizer.skipped_steps(), 1);
        EXPECT_EQ(optimizer.state("w").step(), steps - 1);
        EXPECT_EQ(
            count == 0 ? 0 : std::memcmp(value.data(), whole.data() + begin * 4, value.bytes()), 0);
      })) << world;
    }
  }
}

TEST(NormHalves, InTheirOrder) {
  std::vector<float> value = {1, 2}, grad = {3, 4};
  Optimizer optimizer;
  optimizer.add_group("g", SgdHyper{.lr = 1.0},
                      {{"w", view(value.data(), {2}), view(grad.data(), {2})}});
  const auto problem = [&](const std::function<void()>& work) -> std::string {
    try {
      work();
      return "";
    } catch (const InvalidArgument& error) {
      return error.what();
    }
  };
  const auto sums = [&] { return static_cast<double*>(optimizer.norm_begin().data); };
  EXPECT_EQ(problem([&] { optimizer.norm_end(); }),
            "norm_end() without norm_begin() since the last step");
  EXPECT_EQ(sums()[0], 25.0);
  EXPECT_EQ(problem([&] { optimizer.step(); }), "step: norm_begin() waits for norm_end()");
  EXPECT_EQ(problem([&] { optimizer.step({.skip = true}); }),
            "step: norm_begin() waits for norm_end()");
  EXPECT_EQ(value, (std::vector<float>{1, 2}));
  sums()[0] = 100.0;  // again, which is a beginning
  optimizer.norm_end();
  EXPECT_EQ(problem([&] { optimizer.norm_end(); }),
            "norm_end() without norm_begin() since the last step");
  EXPECT_EQ(optimizer.grad_norm().norm, 5.0);  // of this process
  optimizer.step({.max_grad_norm = 5.0});
  EXPECT_EQ(optimizer.last_grad_norm().norm, 10.0);
  EXPECT_NEAR(value[0], 1 - 1.5, 1e-5);
  // It holds for one step, whatever that was.
  optimizer.step({.max_grad_norm = 5.0});
  EXPECT_EQ(optimizer.last_grad_norm().norm, 5.0);
  sums()[0] = 400.0;
  optimizer.norm_end();
  optimizer.step();  // which does not need it
  EXPECT_EQ(optimizer.last_grad_norm().norm, 20.0);
  sums()[1] = 1.0;
  optimizer.norm_end();
  optimizer.step({.skip = true});
  optimizer.step({.skip_nonfinite = true});
  EXPECT_EQ(optimizer.last_grad_norm().nonfinite, 0);
  // A step that is refused leaves it for the next one.
  sums()[1] = 1.0;
  optimizer.norm_end();
  EXPECT_NE(problem([&] { optimizer.step({.max_grad_norm = -1}); }), "");
  const std::vector<float> before = value;
  optimizer.step({.skip_nonfinite = true});
  EXPECT_EQ(value, before);
  EXPECT_EQ(optimizer.skipped_steps(), 2);
}

// ---- shards that are none -----------------------------------------------------------------------

TEST(Shards, ThatAreNotWithinTheirTensorAreRefused) {
  struct Row {
    Shard shard;
    const char* message;
  };
  const Row rows[] = {
      {{-1, {8}}, "a shard of 3 elements at offset -1 is not within the whole tensor of shape [8]"},
      {{6, {8}}, "a shard of 3 elements at offset 6 is not within the whole tensor of shape [8]"},
      {{0, {2}}, "a shard of 3 elements at offset 0 is not within the whole tensor of shape [2]"},
      {{0, {}}, "a shard of 3 elements at offset 0 is not within the whole tensor of shape []"},
      {{0, {4, -2}}, "no tensor has the whole shape [4, -2]"},
      {{0, {1ll << 40, 1ll << 40}}, "no tensor has the whole shape [1099511627776, 1099511627776]"},
  };
  for (const Row& row : rows) {
    std::vector<float> value(3);
    Optimizer optimizer;
    try {
      optimizer.add_group("g", AdamHyper{}, {{"w", view(value.data(), {3}), {}, row.shard}});
      ADD_FAILURE() << row.message;
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(error.what(), "group 'g', parameter 'w': " + std::string(row.message));
    }
    optimizer.add_group("g", AdamHyper{}, {{"w", view(value.data(), {3}), {}, Shard{5, {4, 2}}}});
  }
}

}  // namespace
}  // namespace fusestep::test
