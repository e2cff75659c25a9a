// SPDX-License-Identifier: Apache-2.0
#include "cpu/arithmetic/vec.h"
// The formulas need FUSEDRNN_INLINE from vec.h.
#include "cells/ligru.h"
#include "cpu/recurrence/cell.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

FUSEDRNN_TABLE(ligru_table, cells::LiGru)

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
