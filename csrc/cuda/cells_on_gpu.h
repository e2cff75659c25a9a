// SPDX-License-Identifier: Apache-2.0
// The cells for the GPU: the device first, then the functions that the cells call, then the cells. (The tests on the
// CPU twin do the same with device_cpu.h.)
#pragma once

// clang-format off
#include "device.h"
#include "gates.h"
#include "../cells/cifg.h"
#include "../cells/gru.h"
#include "../cells/ligru.h"
#include "../cells/lstm.h"
#include "../cells/mingru.h"
#include "../cells/minlstm.h"
#include "../cells/rnn.h"
// clang-format on
