// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set once, at run time, and hands every call to its table.
//
// How csrc/cpu is compiled (-std=c++20 -O3 -fopenmp -fvisibility=hidden for all; OpenMP is needed by threads.cpp only):
//   once:     dispatch.cpp rows.cpp threads.cpp
//   per ISA:  forward.cpp backward.cpp lstm.cpp gru.cpp rnn.cpp clip.cpp, each with -DFUSEDRNN_ISA=<name>
//             -ffp-contract=fast -fno-math-errno -fno-trapping-math and
//     baseline  (nothing more)
//     avx2      -mavx2 -mfma -mf16c
//     avx512    -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512
//     neon      (aarch64, in place of avx2 and avx512; nothing more)
//   dispatch.cpp gets one -DFUSEDRNN_HAVE_<NAME> for each ISA beside baseline: FUSEDRNN_HAVE_AVX2, _AVX512, _NEON.
