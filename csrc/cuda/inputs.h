// SPDX-License-Identifier: Apache-2.0
// Formula: what layer 0 sees beside, or in place of, the product x W^T. Tokens stand for one-hot vectors: the product
// is a column of W, its gradient a sum of da over the steps that have the token. A context is the same at every step.
//   gx[t,b] = W[:, token[t,b]] + context[b];  dW[:, v] = sum of da[t,b] where token[t,b] = v;  dz[b] = sum_t da[t,b]
// Shapes at each kernel. All overwrite. Every route, outside the recurrence.
// Limit: bytes; TokenGradient reads all tokens once for every kTokens of the vocabulary and 256 columns.
#pragma once

#include "arrange.h"

namespace fusedrnn::cuda {

// Which integers tokens are.
struct TokenType {
  int bytes = 4;  // 1, 2, 4 or 8
  bool is_signed = true;
};

// Tokens (T,E,B) where the caller has them, and the steps that a row has. `t_` below counts from step `first`.
struct Tokens {
  const void* data;
  TokenType type;
  int64_t first;
  int64_t t, e, b;  // strides in elements
  int64_t vocabulary;
  const int64_t* lengths;
  int64_t len_e, len_b;

  FUSEDRNN_DEVICE bool alive(int64_t e_, int64_t t_, int64_t b_) const {
    return !lengths || first + t_ < lengths[e_ * len_e + b_ * len_b];
  }
  // Of a step that is run; -1 for what is no input.
  FUSEDRNN_DEVICE int64_t at(int64_t e_, int64_t t_, int64_t b_) const {
    const int64_t n = (first + t_) * t + e_ * e + b_ * b;
    int64_t v;
    if (type.bytes == 8)
      v = static_cast<const int64_t*>(data)[n];
    else if (type.bytes == 4)
      v = type.is_signed ? static_cast<const int32_t*>(data)[n]
                         : static_cast<int64_t>(static_cast<const u32*>(data)[n]);
    else if (type.bytes == 2)
      v = type.is_signed ? static_cast<const int16_t*>(data)[n] : static_cast<const u16*>(data)[n];
    else
      v = type.is_signed ? static_cast<const int8_t*>(data)[n] : static_cast<const u8*>(data)[n];
    return v >= 0 && v < vocabulary ? v : -1;
  }
};

// gx (E,T,B,G,pitch) of one direction = columns of W where there are tokens, else itself, plus context (E,B,G,pitch),
// which may be null. A token that is no input gives zeros, and sets `wrong`.
template <class T>
struct InputSum {
  Tokens tokens;  // data may be null
  const typename T::Storage* W;
  int64_t w_e, w_gate, w_unit, w_token;  // strides of (E,G,H,I)
  const MathOf<T>* context;
  typename T::Storage* gx;
  int64_t gx_e;
  int E, Tn, B, gates, H, pitch;
  int* wrong;
  static constexpr int kThreads = kArrangeThreads;

  FUSEDRNN_DEVICE void operator()() const {
    const int width = gates * pitch;
    for (int64_t row = dev::block(); row < static_cast<int64_t>(E) * Tn * B; row += dev::blocks()) {
      const int64_t e = row / (static_cast<int64_t>(Tn) * B), n = row % (static_cast<int64_t>(Tn) * B), b = n % B;
      int64_t token = -1;
      if (tokens.data && tokens.alive(e, n / B, b)) {
        token = tokens.at(e, n / B, b);
        if (token < 0 && dev::tid() == 0) *wrong = 1;
      }
      typename T::Storage* const to = gx + e * gx_e + n * width;
      const MathOf<T>* const more = context ? context + (e * B + b) * width : nullptr;
      for (int j = dev::tid(); j < width; j += kThreads) {
        const int gate = j / pitch, unit = j % pitch;
        MathOf<T> v = 0;
        if (!tokens.data)
          v = T::load(to[j]);
        else if (token >= 0 && unit < H)
          v = T::load(W[e * w_e + gate * w_gate + unit * w_unit + token * w_token]);
        to[j] = T::store(more ? v + more[j] : v);
      }
    }
  }
};

// dW (E,G,pitch,I_pitch) of one direction, or with `add` what is added to it; rows and columns of padding are left as
// they are. A block has kTokens columns of dW and 256 rows: it looks for its tokens in all steps, and adds their da up
// step by step.
template <class T>
struct TokenGradient {
  using Math = MathOf<T>;
  static constexpr int kThreads = 256, kTokens = 16;
  static constexpr int kRun = 16, kChunk = kThreads * kRun;  // steps that a thread, a block looks at in one go
  static_assert(kTokens * kChunk == 1 << 16);

  Tokens tokens;
  const typename T::Storage* da;  // (E,T,B,G,pitch)
  int64_t da_e;
  Math* dW;
  int64_t dW_row;
  int E, gates, H, pitch, B;
  int64_t steps;          // T*B
  int64_t columns, rows;  // of parts: kTokens columns and kThreads rows of dW each
  bool add;

  static constexpr int shared_bytes() {
    return dev::shared_size<Math>(kTokens * kThreads) + dev::shared_size<u16>(kChunk) + dev::shared_size<int>(kThreads);
  }

  FUSEDRNN_DEVICE void operator()() const {
    dev::Shared shared;
    Math* const sums = shared.take<Math>(kTokens * kThreads);
    u16* const list = shared.take<u16>(kChunk);  // column * kChunk + step of the chunk
    int* const counts = shared.take<int>(kThreads);
    const int tid = dev::tid(), width = gates * pitch;
    for (int64_t part = dev::block(); part < E * columns * rows; part += dev::blocks()) {
      const int64_t first = part / rows % columns * kTokens, e = part / rows / columns;
      const int j = static_cast<int>(part % rows) * kThreads + tid;
      const bool mine = j < width && j % pitch < H;
      for (int k = 0; k < kTokens; ++k) sums[k * kThreads + tid] = 0;
      for (int64_t begin = 0; begin < steps; begin += kChunk) {
        const int64_t own = begin + static_cast<int64_t>(tid) * kRun, end = own + kRun < steps ? own + kRun : steps;
        int found = 0;
        for (int64_t n = own; n < end; ++n) found += column(e, n, first) >= 0;
        counts[tid] = found;
        dev::sync_block();  // and the list of the chunk before has been read
        int before = 0, total = 0;
        for (int k = 0; k < kThreads; ++k) {
          if (k == tid) before = total;
          total += counts[k];
        }
        for (int64_t n = own; found > 0 && n < end; ++n)
          if (const int at = column(e, n, first); at >= 0)
            list[before++] = static_cast<u16>(at * kChunk + static_cast<int>(n - begin));
        dev::sync_block();
        const typename T::Storage* const from = da + e * da_e + begin * width + j;
        for (int k = 0; mine && k < total; k += 4) {
          Math v[4];
          FUSEDRNN_UNROLL
          for (int i = 0; i < 4; ++i)
            if (k + i < total) v[i] = T::load(from[static_cast<int64_t>(list[k + i] % kChunk) * width]);
          FUSEDRNN_UNROLL
          for (int i = 0; i < 4; ++i)
            if (k + i < total) sums[list[k + i] / kChunk * kThreads + tid] += v[i];
        }
      }
      for (int k = 0; mine && k < kTokens && first + k < tokens.vocabulary; ++k) {
        Math& to = dW[(e * width + j) * dW_row + first + k];
        to = (add ? to : Math(0)) + sums[k * kThreads + tid];
      }
    }
  }

 private:
  // Which of the block's columns the token of a step is; -1: none.
  FUSEDRNN_DEVICE int column(int64_t e, int64_t n, int64_t first) const {
    const int64_t t = n / B, b = n % B;
    if (!tokens.alive(e, t, b)) return -1;
    const int64_t at = tokens.at(e, t, b) - first;
    return at >= 0 && at < kTokens ? static_cast<int>(at) : -1;
  }
};

// dz (E,B,columns) = sum over t, in order, of da (E,T,B,columns); with `add` added to it.
template <class T>
struct StepSum {
  const typename T::Storage* da;
  int64_t da_e;
  MathOf<T>* dz;
  int E, Tn;
  int64_t row;  // B * columns
  bool add;
  static constexpr int kThreads = kArrangeThreads;

  FUSEDRNN_DEVICE void operator()() const {
    for (int64_t at = static_cast<int64_t>(dev::block()) * kThreads + dev::tid(); at < E * row;
         at += static_cast<int64_t>(dev::blocks()) * kThreads) {
      const typename T::Storage* const from = da + at / row * da_e + at % row;
      MathOf<T> v = add ? dz[at] : MathOf<T>(0);
      for (int64_t t = 0; t < Tn; ++t) v += T::load(from[t * row]);
      dz[at] = v;
    }
  }
};

}  // namespace fusedrnn::cuda
