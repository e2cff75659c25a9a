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
  std::string name;  // cell/type/route/cut/pass
  std::vector<Case> cases;
  std::function<Outcome(const Case&, const dev::sim::Options&, uint64_t data_seed)> run;
};

// One translation unit per cell.
void add_lstm(std::vector<Run>& runs);
void add_gru(std::vector<Run>& runs);
void add_rnn(std::vector<Run>& runs);

std::string describe(const Case& c);

}  // namespace fusedrnn::test
