// SPDX-License-Identifier: Apache-2.0
#include "cpu/arithmetic/vec.h"
// The formulas need FUSEDRNN_INLINE from vec.h.
#include "cells/mingru.h"
#include "cpu/recurrence/cell.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

FUSEDRNN_TABLE(mingru_table, cells::MinGru)

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
