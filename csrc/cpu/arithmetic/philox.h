// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al., SC 2011): random numbers that a key and a counter name, so that nothing is stored.
#pragma once

#include "cpu/threads/threads.h"

namespace fusedrnn::cpu {

// The four words of one block.
FUSEDRNN_FORCE void philox(uint64_t key, uint64_t counter, uint32_t c2, uint32_t c3, uint32_t* word) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

}  // namespace fusedrnn::cpu
