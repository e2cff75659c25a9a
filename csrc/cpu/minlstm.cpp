// SPDX-License-Identifier: Apache-2.0
#include "vec.h"
// The formulas need FUSEDRNN_INLINE from vec.h.
#include "../cells/minlstm.h"
#include "cell.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

FUSEDRNN_TABLE(minlstm_table, cells::MinLstm)

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
