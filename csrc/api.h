// SPDX-License-Identifier: Apache-2.0
// The waist: the plain structs that everything above (bindings) and below (cpu/, cuda/) agree on.
//
// Four operations, closed under differentiation. Write F for the whole stack of layers and directions:
//   forward   out  = F(p)
//   backward  dp   = J(p)^T g           g: gradients of the results
//   jvp       tout = J(p) v             v: tangents of the arguments
//   hvp       tdp  = d/ds [ J(p + s v)^T (g + s t) ] at s = 0
// `Arguments` holds what goes in (p), and so also its tangents (v) and its gradients (dp); `Results` holds what
// comes out, and so also its tangents (tout) and gradients (g, t). A null pointer means: not given (zero), or not
// wanted.
//
// Shapes: T steps, E weight sets, B rows, I inputs, H units, L layers, D directions, G gates. Strides count elements;
// any stride may be 0 or negative on what is read; what is written must not overlap itself.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedrnn {

// ONNX's list; alpha and beta where it has them. A slope is taken from the value, so alpha >= 0 for leaky_relu,
// thresholded_relu and elu, alpha != 0 for scaled_tanh.
enum class ActivationKind : int32_t {
  sigmoid,
  tanh,
  relu,
  affine,
  leaky_relu,
  thresholded_relu,
  scaled_tanh,
  hard_sigmoid,
  elu,
  softsign,
  softplus
};

// The cells: X(name, gates, kept, cell_state, state_product, gate, candidate), as CellFacts explains. Every list of
// cells in C++ is made from this one, so a new cell is one line here.
#define FUSEDRNN_CELLS(X)                               \
  X(rnn_tanh, 1, 0, false, true, tanh, tanh)            \
  X(rnn_relu, 1, 0, false, true, relu, relu)            \
  X(lstm, 4, 4, true, true, sigmoid, tanh)              \
  X(gru, 3, 4, false, true, sigmoid, tanh)              \
  X(gru_reset_before, 3, 3, false, true, sigmoid, tanh) \
  X(cifg, 3, 3, true, true, sigmoid, tanh)              \
  X(ligru, 2, 2, false, true, sigmoid, relu)            \
  X(mingru, 2, 2, false, false, sigmoid, affine)        \
  X(minlstm, 3, 4, false, false, sigmoid, affine)

#define FUSEDRNN_KIND(name, ...) name,
enum class CellKind : int32_t { FUSEDRNN_CELLS(FUSEDRNN_KIND) };
#undef FUSEDRNN_KIND

// What everyone outside the engines may ask about a cell; csrc/cells says the same to the engines.
struct CellFacts {
  const char* name;
  int gates;                       // row blocks of W and R
  int kept;                        // values on the tape beside h and c, per unit
  bool cell_state;                 // has c
  bool state_product;              // has R
  ActivationKind gate, candidate;  // the usual ones; an RNN's unit is its gate, and no other is asked for without R
};
#define FUSEDRNN_FACTS(name, gates, kept, cell_state, state_product, gate, candidate) \
  {#name, gates, kept, cell_state, state_product, ActivationKind::gate, ActivationKind::candidate},
constexpr CellFacts cell_facts[] = {FUSEDRNN_CELLS(FUSEDRNN_FACTS)};
#undef FUSEDRNN_FACTS
constexpr const CellFacts& facts_of(CellKind kind) { return cell_facts[static_cast<int>(kind)]; }
enum class Dtype : int32_t { f32, f64, bf16, f16 };

// data[i0*stride[0] + i1*stride[1] + ...]
template <int Rank>
struct Array {
  void* data = nullptr;
  int64_t stride[Rank] = {};
};

struct Sizes {
  int64_t T = 0, E = 1, B = 0, I = 0, H = 0;
  int32_t L = 1, D = 1;
  int64_t K = 0;  // of the context
};

constexpr const char* activation_names[] = {"Sigmoid",         "Tanh",       "Relu",        "Affine", "LeakyRelu",
                                            "ThresholdedRelu", "ScaledTanh", "HardSigmoid", "Elu",    "Softsign",
                                            "Softplus"};
struct Activation {
  ActivationKind kind = ActivationKind::sigmoid;
  double alpha = 0, beta = 0;
};

// What goes beyond a plain cell: docs/semantics.md, "Options".
struct Variant {
  bool given = false;
  Activation activations[3];  // of the gates, of g or n, of c
  int64_t proj = 0;           // units of h; 0: no projection, so H
  bool peepholes = false, layer_norm = false;
  double clip_gates = 0;
  double zoneout_h = 0, zoneout_c = 0, recurrent_dropout = 0;
  bool training = false;  // the last three draw
};

struct Problem {
  CellKind cell = CellKind::lstm;
  Dtype dtype = Dtype::f32;
  Sizes sizes;
  bool reverse = false;           // D == 1 only: walk from the last step to the first
  bool reset_to_initial = false;  // a reset goes back to h0, c0 instead of zero
  bool recompute = false;         // tape without gates: rebuilt in backward
  bool bf16_weights = false;      // W and R are bfloat16, the rest is f32: forward without a tape only
  bool bf16_state = false;        // with bf16_weights: x is bfloat16's, and h may be rounded to it where it meets R
  bool packed = false;            // x, y hold the steps there are and no others: docs/semantics.md, "Packed rows"
  double clip_cell = 0;           // |c| <= clip_cell after every step; 0 = off (LSTM only)
  double clip_grad = 0;           // |dh|, |dc| <= clip_grad at every step of backward; 0 = off
  double dropout = 0;             // on the output of every layer but the last, only while training
  uint64_t seed = 0;              // of the dropout mask: the same seed gives the same mask on every backend
  Array<2> lengths;               // int64 (E,B); null = T for every row
  Array<3> reset;                 // uint8 (T,E,B): row b begins a new sequence at step t
  Variant variant;
};
constexpr int64_t outputs_of(const Problem& problem) {  // units of h
  return problem.variant.proj > 0 ? problem.variant.proj : problem.sizes.H;
}
constexpr bool has_cell_state(const Problem& problem) {  // a GRU with projection carries m beside h
  return facts_of(problem.cell).cell_state || problem.variant.proj > 0;
}

// One layer in one direction. W (E, G*H, I_l), R (E, G*H, H), bW, bR (E, G*H); I_l = I, then D*H. Cells without a
// product with the state have no R and no bR.
struct Params {
  Array<3> W, R;
  Array<2> bW, bR;
};

// What a variant adds, per layer and direction. With a projection h has P units, so that R is (E, G*H, P).
struct Extras {
  Array<3> hr;                // (E,P,H): h = m hr^T
  Array<2> ph;                // (E,3*H) of i, f, o; (E,2*H) of i, o for cifg
  Array<2> gain_ih, gain_hh;  // (E,G*H)
  Array<2> gain_c, bias_c;    // (E,H)
};

struct Arguments {
  Array<4> x;                // (T,E,B,I)
  Array<3> tokens;           // in place of x: int32 (T,E,B); each stands for a one-hot vector of I, and has no gradient
  Array<4> h0, c0;           // (L*D,E,B,H)
  Params* params = nullptr;  // [L*D], layer-major, forward direction first
  Array<3> context;          // (E,B,K): what layer 0 sees at every step beside x; null: nothing
  Array<3> context_weights[2];  // of each direction: (E, G*H, K)
  Extras* extras = nullptr;     // [L*D], with a variant
};

struct Results {
  Array<4> y;       // (T,E,B,D*H): zero past a row's length
  Array<4> hn, cn;  // (L*D,E,B,H)
  Array<5> cells;   // (L,T,E,B,D*H): c of every layer (LSTM) or h (the others); zero past a row's length
};

// CTC: the loss of every row, and its gradient. Row b spells labels[first[b] .. first[b] + label_counts[b]).
struct Ctc {
  Dtype dtype = Dtype::f32;
  int64_t T = 0, B = 0, C = 0, blank = 0;
  bool zero_infinity = false;             // loss and gradient of a row that cannot be spelled: 0 instead of inf and NaN
  Array<3> log_probs;                     // (T,B,C)
  const int64_t* labels = nullptr;        // classes, none of them blank
  const int64_t* first = nullptr;         // (B)
  const int64_t* label_counts = nullptr;  // (B)
  const int64_t* lengths = nullptr;       // (B): steps, 0..T
  void* loss = nullptr;                   // (B) contiguous
  const void* dloss = nullptr;            // (B) contiguous; null = 1
  Array<3> dlog_probs;                    // (T,B,C), contiguous in C; null: not wanted
  int64_t* states = nullptr;              // (T,B) contiguous, with it the best path is wanted and no loss:
  void* log_probability = nullptr;        // (B) contiguous; see ctc_align.cpp
};

// A hidden Markov model over given scores: logarithms, any size, -inf allowed. With `paths` the best path, else the
// log-likelihood and, with `states`, the expectations (and so the gradient): a row that is impossible adds nothing.
struct Hmm {
  Dtype dtype = Dtype::f32;
  int64_t T = 0, B = 0, N = 0;
  Array<3> scores;                    // (T,B,N)
  const void* initial = nullptr;      // (N) contiguous
  const void* transitions = nullptr;  // (N,N) contiguous: from, to
  const int64_t* lengths = nullptr;   // (B): steps, 0..T
  void* log_likelihood = nullptr;     // (B) contiguous; of the best path where `paths` is given
  const void* weights = nullptr;      // (B) contiguous: of the rows in all that follows; null = 1
  Array<3> states;                    // (T,B,N), contiguous in N
  void* dinitial = nullptr;           // (N)
  void* dtransitions = nullptr;       // (N,N)
  int64_t* paths = nullptr;           // (T,B) contiguous: -1 past a row's length, and where no path is possible
};

// CTC prefix search: the `top` best of a beam of `width`.
struct BeamSearch {
  Dtype dtype = Dtype::f32;
  int64_t T = 0, B = 0, C = 0, blank = 0, width = 1, top = 1;
  Array<3> log_probs;                // (T,B,C)
  const int64_t* lengths = nullptr;  // (B)
};

}  // namespace fusedrnn
