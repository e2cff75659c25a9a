// SPDX-License-Identifier: Apache-2.0
#include "vec.h"
// The formulas need FUSEDRNN_INLINE from vec.h.
#include "../cells/gru.h"
#include "cell.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

FUSEDRNN_TABLE(gru_table, cells::Gru)
FUSEDRNN_TABLE(gru_reset_before_table, cells::GruResetBefore)

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
