// SPDX-License-Identifier: Apache-2.0
// The list of what is run: every cell x type x route x way of cutting the work, and the calls each is tried with.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cuda_reference.h"
#include "device_cpu.h"

namespace fusedrnn::test {

struct Outcome {
  std::string wrong;  // empty: nothing
  double worst = 0;   // the largest difference from the reference
};

struct Run {
  std::string name;                // cell/type/route/cut/pass
  std::vector<std::string> cases;  // in words
  std::function<Outcome(size_t which, const dev::sim::Options&, uint64_t data_seed)> run;
};

// One translation unit per cell.
void add_lstm(std::vector<Run>& runs);
void add_gru(std::vector<Run>& runs);
void add_rnn(std::vector<Run>& runs);
void add_ctc(std::vector<Run>& runs);
void add_inputs(std::vector<Run>& runs);

// A case in words.
std::string describe(const Case& c);

template <class F>
void add_run(std::vector<Run>& runs, const std::string& name, const std::vector<Case>& cases, F run) {
  runs.push_back({name, {}, [cases, run](size_t which, const dev::sim::Options& options, uint64_t data_seed) {
                    return run(cases[which], options, data_seed);
                  }});
  for (const Case& c : cases) runs.back().cases.push_back(describe(c));
}

}  // namespace fusedrnn::test
