// SPDX-License-Identifier: Apache-2.0
// The functions that a formula of this folder takes for its gates, its candidate (g or n) and its cell state.
//   y = f(x);   back(d, y) = d f'(x), which every f here tells from y
// Route: these are the ones of a plain cell. An engine with options brings a struct of the same names.
// `peep` adds a peephole to a sum, and `peep_back` gives the state its gradient; a plain cell has none.
#pragma once

namespace fusedrnn::cells {

struct Functions {
  template <class V>
  FUSEDRNN_INLINE V gate(const V& a) {
    return sigmoid(a);
  }
  template <class V>
  FUSEDRNN_INLINE V gate_back(const V& d, const V& y) {
    return d * y * (1 - y);
  }
  template <class V>
  FUSEDRNN_INLINE V candidate(const V& a) {
    return tanh(a);
  }
  template <class V>
  FUSEDRNN_INLINE V candidate_back(const V& d, const V& y) {
    return d * (1 - y * y);
  }
  template <class V>
  FUSEDRNN_INLINE V state(const V& c) {
    return tanh(c);
  }
  template <class V>
  FUSEDRNN_INLINE V state_back(const V& d, const V& y) {
    return d * (1 - y * y);
  }
  // Sum number k of i, f, o.
  template <class V>
  FUSEDRNN_INLINE V peep(int, const V& a, const V&) {
    return a;
  }
  template <class V>
  FUSEDRNN_INLINE V peep_back(int, const V& dc, const V&) {
    return dc;
  }
};

// The RNN's unit takes the place of its gate.
template <bool Relu>
struct RnnFunctions : Functions {
  template <class V>
  FUSEDRNN_INLINE V gate(const V& a) {
    if constexpr (Relu)
      return relu(a);
    else
      return tanh(a);
  }
  template <class V>
  FUSEDRNN_INLINE V gate_back(const V& d, const V& y) {
    if constexpr (Relu)
      return positive(d, y);  // d where y > 0, else 0
    else
      return d * (1 - y * y);
  }
};

struct LiGruFunctions : Functions {
  template <class V>
  FUSEDRNN_INLINE V candidate(const V& a) {
    return relu(a);
  }
  template <class V>
  FUSEDRNN_INLINE V candidate_back(const V& d, const V& y) {
    return positive(d, y);
  }
};

}  // namespace fusedrnn::cells
