// SPDX-License-Identifier: Apache-2.0
// Runs the CUDA kernels on the CPU twin of the device and compares with float64.
//   cuda_kernels [--only TEXT]... [--seeds N] [--first-seed N] [--case N] [--policy NAME] [--list] [--quiet]
// Every case runs under all three scheduling policies (or the one named) with every seed. Exit status 1 if anything was
// wrong.
//   cuda_kernels --primitives
// The test of the CPU twin itself.
//   cuda_kernels --break [--site TEXT] ...
// The test of the test: every barrier, wait and the like that a kernel reaches is broken, one call at a time, for all
// threads (see sim::Options::broken), or only those with TEXT in "primitive file:line:column". Prints for every such
// call how many of the runs that reach it notice; exit status 1 if a call is noticed by none.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cuda_primitives.h"
#include "cuda_runs.h"

namespace fusedrnn::test {
std::string describe(const Case& c) {
  std::string s = "T=" + std::to_string(c.T) + " E=" + std::to_string(c.E) + " B=" + std::to_string(c.B) +
                  " H=" + std::to_string(c.H) + " D=" + std::to_string(c.D);
  const auto flag = [&](bool on, const char* name) {
    if (on) s += std::string(" ") + name;
  };
  flag(c.reverse, "reverse");
  flag(c.with_state, "state");
  flag(c.with_bias, "bias");
  flag(c.with_lengths, "lengths");
  flag(c.with_reset, "reset");
  flag(c.reset_to_initial, "reset_to_initial");
  flag(c.keep, "keep");
  flag(c.with_nan, "nan");
  flag(c.clip_cell > 0, "clip_cell");
  flag(c.clip_grad > 0, "clip_grad");
  return s;
}
}  // namespace fusedrnn::test

namespace {

using namespace fusedrnn;
using namespace fusedrnn::test;
using dev::sim::Policy;

constexpr const char* kPolicyNames[] = {"round_robin", "random", "skewed"};

struct Settings {
  std::vector<std::string> only;
  std::string site;
  std::vector<Policy> policies = {Policy::skewed, Policy::random, Policy::round_robin};
  uint64_t seeds = 1, first_seed = 1;
  int only_case = -1;
  bool list = false, quiet = false, breaking = false, primitives = false;

  bool wants_case(size_t i) const { return only_case < 0 || static_cast<size_t>(only_case) == i; }
  bool wants(const std::string& name) const {
    for (const std::string& text : only)
      if (name.find(text) == std::string::npos) return false;
    return true;
  }
};

Settings parse(int count, char** words) {
  Settings s;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto value = [&]() -> const char* {
      if (i + 1 < count) return words[++i];
      std::fprintf(stderr, "%s wants a value\n", word.c_str());
      std::exit(2);
    };
    if (word == "--only") {
      s.only.push_back(value());
    } else if (word == "--site") {
      s.site = value();
    } else if (word == "--seeds") {
      s.seeds = std::strtoull(value(), nullptr, 10);
    } else if (word == "--first-seed") {
      s.first_seed = std::strtoull(value(), nullptr, 10);
    } else if (word == "--case") {
      s.only_case = std::atoi(value());
    } else if (word == "--policy") {
      const std::string name = value();
      std::erase_if(s.policies, [&](Policy p) { return name != kPolicyNames[static_cast<int>(p)]; });
    } else if (word == "--list") {
      s.list = true;
    } else if (word == "--primitives") {
      s.primitives = true;
    } else if (word == "--break") {
      s.breaking = true;
    } else if (word == "--quiet") {
      s.quiet = true;
    } else {
      std::fprintf(stderr,
                   "%s: not an option; there are --only, --seeds, --first-seed, --case, --policy, --list, --quiet, "
                   "--break, --site, --primitives\n",
                   word.c_str());
      std::exit(2);
    }
  }
  return s;
}

// Does any case, policy or seed notice?
bool notices(const Run& run, const Settings& settings, const std::string& site, std::string& how) {
  for (uint64_t seed = settings.first_seed; seed < settings.first_seed + settings.seeds; ++seed)
    for (const Policy policy : settings.policies)
      for (size_t i = 0; i < run.cases.size(); ++i) {
        if (!settings.wants_case(i)) continue;
        const Outcome o = run.run(i, {.seed = seed, .policy = policy, .broken = site}, seed + 100 * i);
        if (o.wrong.empty()) continue;
        how = o.wrong;
        return true;
      }
  return false;
}

int break_all(const std::vector<Run>& runs, const Settings& settings) {
  struct Count {
    int reached = 0, noticed = 0;
    std::string how, missed_by;
  };
  std::map<std::string, Count> counts;
  for (const Run& run : runs) {
    if (!settings.wants(run.name)) continue;
    std::set<std::string> sites;
    for (size_t i = 0; i < run.cases.size(); ++i)
      if (settings.wants_case(i)) run.run(i, {.seed = 1, .policy = Policy::round_robin, .sites = &sites}, 100 * i);
    for (const std::string& site : sites) {
      if (site.find(settings.site) == std::string::npos) continue;
      Count& count = counts[site];
      ++count.reached;
      if (notices(run, settings, site, count.how))
        ++count.noticed;
      else
        count.missed_by += " " + run.name;
    }
  }
  int missed = 0;
  for (const auto& [site, count] : counts) {
    std::printf("%-8s %-44s %2d of %2d runs, e.g. %s\n", count.noticed ? "noticed" : "MISSED", site.c_str(),
                count.noticed, count.reached, count.noticed ? count.how.c_str() : count.missed_by.c_str());
    missed += count.noticed == 0;
  }
  std::printf("%zu calls broken, %d not noticed\n", counts.size(), missed);
  return missed != 0 || counts.empty();
}

}  // namespace

int main(int count, char** words) {
  const Settings settings = parse(count, words);
  if (settings.primitives) return check_primitives() != 0;
  std::vector<Run> runs;
  add_lstm(runs);
  add_gru(runs);
  add_rnn(runs);
  add_ctc(runs);
  add_inputs(runs);
  if (settings.breaking) return break_all(runs, settings);
  int launches = 0, wrong = 0;
  for (const Run& run : runs) {
    if (!settings.wants(run.name)) continue;
    if (settings.list) {
      for (size_t i = 0; i < run.cases.size(); ++i)
        std::printf("%s case %zu: %s\n", run.name.c_str(), i, run.cases[i].c_str());
      continue;
    }
    const auto start = std::chrono::steady_clock::now();
    double worst = 0;
    int bad = 0, tried = 0;
    for (size_t i = 0; i < run.cases.size(); ++i) {
      if (!settings.wants_case(i)) continue;
      for (uint64_t seed = settings.first_seed; seed < settings.first_seed + settings.seeds; ++seed)
        for (const Policy policy : settings.policies) {
          const Outcome o = run.run(i, {.seed = seed, .policy = policy}, seed + 100 * i);
          ++tried;
          worst = std::max(worst, o.worst);
          if (o.wrong.empty()) continue;
          ++bad;
          if (bad <= 6)
            std::printf("WRONG %s case %zu (%s) seed %llu %s: %s\n", run.name.c_str(), i, run.cases[i].c_str(),
                        static_cast<unsigned long long>(seed), kPolicyNames[static_cast<int>(policy)], o.wrong.c_str());
        }
    }
    const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    if (!settings.quiet || bad)
      std::printf("%-36s %3d of %3d wrong, off by %.2g at most, %.0f ms\n", run.name.c_str(), bad, tried, worst, ms);
    launches += tried;
    wrong += bad;
  }
  if (!settings.list) std::printf("%d runs, %d wrong\n", launches, wrong);
  return wrong != 0 || (launches == 0 && !settings.list);
}
