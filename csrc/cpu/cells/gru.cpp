// SPDX-License-Identifier: Apache-2.0
#include "cpu/arithmetic/vec.h"
// The formulas need FUSEDRNN_INLINE from vec.h.
#include "cells/gru.h"
#include "cpu/recurrence/cell.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

FUSEDRNN_TABLE(gru_table, cells::Gru)
FUSEDRNN_TABLE(gru_reset_before_table, cells::GruResetBefore)

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
