// SPDX-License-Identifier: Apache-2.0
// The gradient of tokens (csrc/cuda/inputs.h) against plain sums; the other kernels there have no barrier.
// clang-format off: the device comes first
#include "cuda_harness.h"
#include "cuda/inputs.h"
// clang-format on

namespace fusedrnn::test {
namespace {

struct InputsCase {
  int E, T, B, G, H, I;
  bool with_lengths = false, with_wrong = false, add = false;
};

template <class T>
Outcome run(const InputsCase& c, const dev::sim::Options& options, uint64_t data_seed) {
  using Math = cuda::MathOf<T>;
  std::mt19937_64 random(data_seed);
  const int pitch = (c.H + 7) / 8 * 8, width = c.G * pitch, in = (c.I + 7) / 8 * 8, steps = c.T * c.B;
  constexpr int kChunk = cuda::TokenGradient<T>::kChunk;
  const auto n = [](auto... sizes) { return (size_t{1} * ... * static_cast<size_t>(sizes)); };
  Heap<int32_t> tokens(n(steps, c.E));
  Heap<int64_t> lengths(n(c.E, c.B));
  // a broken call may make the kernel read any step of its list
  Heap<typename T::Storage> da(n(c.E, steps, width) + (options.broken.empty() ? 0 : n(kChunk, width)));
  Heap<Math> dW(n(c.E, width, in));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int32_t>(random() % static_cast<uint64_t>(c.I + c.with_wrong)) -
                (random() % 9 == 0 && c.with_wrong);
  for (size_t i = 0; i < lengths.size(); ++i)
    lengths[i] = i == 0 ? c.T : static_cast<int64_t>(random() % static_cast<uint64_t>(c.T + 1));
  // eighths: their sums are exact in every type
  for (size_t i = 0; i < da.size(); ++i) da[i] = T::store(static_cast<Math>(static_cast<int>(random() % 33) - 16) / 8);
  for (size_t i = 0; i < dW.size(); ++i) dW[i] = c.add ? static_cast<Math>(i % 7) : static_cast<Math>(NAN);

  cuda::TokenGradient<T> k{};
  k.tokens = {tokens.get(), {}, 0,   n(c.E, c.B) > 0 ? static_cast<int64_t>(c.E) * c.B : 0,
              c.B,          1,  c.I, c.with_lengths ? lengths.get() : nullptr,
              c.B,          1};
  k.da = da.get(), k.da_e = static_cast<int64_t>(steps) * width, k.dW = dW.get(), k.dW_row = in;
  k.E = c.E, k.gates = c.G, k.H = c.H, k.pitch = pitch, k.B = c.B, k.steps = steps, k.add = c.add;
  k.columns = (c.I + k.kTokens - 1) / k.kTokens, k.rows = (width + k.kThreads - 1) / k.kThreads;
  try {
    dev::sim::launch(2, 1, k.kThreads, k.shared_bytes(), k, options);  // so a block has several parts
  } catch (const dev::sim::Failure& failure) {
    return {failure.what(), 0};
  }
  std::vector<double> expected(dW.size(), c.add ? 0 : NAN);
  for (size_t i = 0; i < expected.size(); ++i) {
    const int column = static_cast<int>(i) % in, row = static_cast<int>(i) / in % width;
    if (c.add) expected[i] = static_cast<double>(i % 7);
    if (column >= c.I || row % pitch >= c.H) continue;  // padding: left as it is
    if (!c.add) expected[i] = 0;
    const size_t e = i / n(width, in);
    for (int s = 0; s < steps; ++s)
      if ((!c.with_lengths || s / c.B < lengths[e * n(c.B) + n(s % c.B)]) &&
          tokens[(n(s / c.B) * n(c.E) + e) * n(c.B) + n(s % c.B)] == column)
        expected[i] += static_cast<double>(T::load(da[(e * n(steps) + n(s)) * n(width) + n(row)]));
  }
  Compare compare(0);
  for (size_t i = 0; i < expected.size(); ++i)
    compare.value("dW", static_cast<int>(i / n(width, in)), static_cast<int>(i) / in % width, 0,
                  static_cast<int>(i) % in, static_cast<double>(dW[i]), expected[i]);
  return {compare.wrong(), compare.worst()};
}

template <class T>
void add(std::vector<Run>& runs, const char* name, const std::vector<InputsCase>& cases) {
  runs.push_back({name, {}, nullptr});
  for (const InputsCase& c : cases)
    runs.back().cases.push_back("E=" + std::to_string(c.E) + " T=" + std::to_string(c.T) + " B=" + std::to_string(c.B) +
                                " gates=" + std::to_string(c.G) + " H=" + std::to_string(c.H) +
                                " I=" + std::to_string(c.I));
  runs.back().run = [cases](size_t i, const dev::sim::Options& options, uint64_t data_seed) {
    return run<T>(cases[i], options, data_seed);
  };
}

}  // namespace

void add_inputs(std::vector<Run>& runs) {
  // one step; several columns and rows of parts; tokens that are none; more steps than a block looks at in one go
  const std::vector<InputsCase> cases = {
      {.E = 1, .T = 1, .B = 1, .G = 1, .H = 1, .I = 1},
      {.E = 2, .T = 5, .B = 3, .G = 4, .H = 67, .I = 37, .with_lengths = true, .add = true},
      {.E = 1, .T = 7, .B = 9, .G = 3, .H = 5, .I = 16, .with_wrong = true},
      {.E = 1, .T = 71, .B = 61, .G = 2, .H = 3, .I = 5, .with_lengths = true, .with_wrong = true},
  };
  add<dev::F16>(runs, "inputs/f16", cases);
  add<cuda::F64>(runs, "inputs/f64", cases);
}

}  // namespace fusedrnn::test
