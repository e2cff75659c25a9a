// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fusedrnn::test {

// Tests the CPU twin of the device; gives the number of things that were wrong.
int check_primitives();

}  // namespace fusedrnn::test
