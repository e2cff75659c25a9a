// SPDX-License-Identifier: Apache-2.0
#include "cpu/arithmetic/vec.h"
// The formulas need FUSEDRNN_INLINE from vec.h.
#include "cells/rnn.h"
#include "cpu/recurrence/cell.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

FUSEDRNN_TABLE(rnn_tanh_table, cells::Rnn<false>)
FUSEDRNN_TABLE(rnn_relu_table, cells::Rnn<true>)

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
