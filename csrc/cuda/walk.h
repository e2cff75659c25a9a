// SPDX-License-Identifier: Apache-2.0
// What every kernel of the recurrence knows of the walk over time: sizes, rows' lengths, where sequences begin anew.
#pragma once

#include <cstdint>

namespace fusedrnn::cuda {

using dev::u8;

struct Walk {
  int Tn, B, H, pitch;   // pitch: H rounded up to 8, the row length of everything padded
  int sets, directions;  // set = weight set * directions + direction; the last direction of two walks backwards
  int s;                 // which step, where each has a launch of its own
  bool reverse;          // with one direction: walk backwards
  bool reset_to_initial;
  const int64_t* lengths;  // (E,B), may be null
  int64_t len_e, len_b;
  const u8* reset;  // (T,E,B), may be null
  int64_t reset_t, reset_e, reset_b;
  // a part of the walk (recompute), in direction d from time index begin + d * begin_d on; lengths and reset are the
  // whole call's, all else the part's
  int begin, begin_d;

  FUSEDRNN_DEVICE bool backwards(int set) const { return directions == 2 ? set % 2 == 1 : reverse; }
  FUSEDRNN_DEVICE int first(int set) const { return begin + set % directions * begin_d; }
  FUSEDRNN_DEVICE int length(int set, int row) const {
    if (!lengths) return Tn;
    const int64_t n = lengths[set / directions * len_e + row * len_b] - first(set);
    return static_cast<int>(n < 0 ? 0 : n > Tn ? Tn : n);
  }
  FUSEDRNN_DEVICE bool restart(int set, int row, int t) const {
    return reset[(first(set) + t) * reset_t + set / directions * reset_e + row * reset_b] != 0;
  }
  // Does a new sequence begin between steps s and s + 1 of a row of this length?
  FUSEDRNN_DEVICE bool cut(int set, int row, int s_, int len) const {
    if (!reset) return false;
    if (backwards(set)) return first(set) + len - 1 - s_ > 0 && restart(set, row, len - 1 - s_);
    return s_ + 1 < len && restart(set, row, s_ + 1);
  }
  FUSEDRNN_DEVICE bool restarts_at_once(int set, int row) const {
    return reset && !backwards(set) && restart(set, row, 0);
  }
};

}  // namespace fusedrnn::cuda
