// SPDX-License-Identifier: Apache-2.0
// The persistent kernels that are built: for every cell and type, the cuts among which the cost model (cost.h)
// chooses. Registers bound a cut: 128 of the 255 for weights leave none to spill at 8 rows (nvcc -Xptxas -v says). A
// grid's backward can lay the rest of its weights in shared memory; its cuts differ in rows, since a device's blocks
// must all be there at once.
#pragma once

#include "backward.h"

namespace fusedrnn::cuda {

template <class Cell, class T>
struct Shapes {  // only step by step
  using Forward = List<>;
  using Backward = List<>;
};

// groups, split, octets, chunks, tiles | (wide) groups, depths, chunks, tiles | warps, tiles of 16 units, units of a
// block, chunks, tiles of rows, held chunks
template <class T>
  requires(T::kPer == 8)
struct Shapes<cells::Lstm, T> {
  template <int... n>
  using S = Shape<cells::Lstm, T, Route::single, n...>;
  template <int... n>
  using C = Shape<cells::Lstm, T, Route::cluster, n...>;
  template <int... n>
  using G = Shape<cells::Lstm, T, Route::grid, n...>;
  template <int... n>
  using W = WideShape<cells::Lstm, T, n...>;
  using Forward = List<S<8, 1, 1, 2, 1>, S<8, 1, 1, 2, 2>, S<8, 1, 2, 4, 1>,                    // H <= 64, 128
                       C<2, 4, 1, 2, 1>, C<2, 4, 1, 2, 2>, C<2, 4, 1, 2, 4>,                    // 256, 16 blocks
                       C<4, 2, 1, 4, 1>, C<4, 2, 1, 4, 2>, C<4, 2, 1, 4, 4>,                    // 256, 8
                       C<8, 1, 1, 8, 1>, C<8, 1, 1, 8, 2>,                                      // 256, 4
                       C<4, 2, 1, 8, 1>, C<4, 2, 1, 8, 2>,                                      // 512, 16
                       G<1, 8, 2, 2, 1>, G<1, 8, 2, 2, 2>, G<1, 8, 2, 3, 1>, G<1, 8, 2, 3, 2>,  // 512, 32; 768, 48
                       G<1, 8, 2, 4, 1>, G<1, 8, 2, 4, 2>,                                      // 1024, 64
                       W<2, 1, 8, 8>, W<1, 2, 8, 4>, W<2, 1, 16, 4>,                     // 256, 8; 512, 32 and 16
                       W<1, 2, 12, 4>, W<1, 2, 12, 8>, W<1, 2, 16, 4>, W<1, 2, 16, 8>>;  // 768, 48; 1024, 64
  template <int... n>
  using s = BackwardShape<cells::Lstm, T, Route::single, n...>;
  template <int... n>
  using c = BackwardShape<cells::Lstm, T, Route::cluster, n...>;
  template <int... n>
  using g = BackwardShape<cells::Lstm, T, Route::grid, n...>;
  using Backward =
      List<s<4, 1, 64, 8, 1>, s<8, 1, 128, 16, 1>,                                         // H <= 64, 128
           c<8, 2, 16, 2, 1>, c<8, 2, 16, 2, 2>, c<8, 2, 32, 4, 1>, c<8, 2, 32, 4, 2>,     // 256, 16 and 8 blocks
           c<8, 2, 64, 8, 1>, c<8, 4, 32, 4, 1>, c<8, 4, 32, 4, 2>,                        // 256, 4; 512, 16
           g<8, 1, 16, 8, 1>, g<8, 1, 16, 12, 1>, g<8, 1, 16, 12, 2>, g<8, 1, 16, 12, 4>,  // 512, 768
           g<8, 1, 16, 16, 1, 12>, g<8, 1, 16, 16, 2, 10>, g<8, 1, 16, 16, 4, 8>,          // 1024
           g<8, 1, 16, 24, 1, 10>, g<8, 1, 16, 32, 1, 12>>;                                // 1536, 2048
};

template <class T>
  requires(T::kPer == 8)
struct Shapes<cells::Gru, T> {
  template <int... n>
  using S = Shape<cells::Gru, T, Route::single, n...>;
  template <int... n>
  using C = Shape<cells::Gru, T, Route::cluster, n...>;
  template <int... n>
  using G = Shape<cells::Gru, T, Route::grid, n...>;
  template <int... n>
  using W = WideShape<cells::Gru, T, n...>;
  using Forward = List<S<4, 1, 2, 2, 1>, S<8, 1, 2, 4, 1>,                                      // H <= 64, 128
                       C<1, 8, 2, 1, 1>, C<1, 8, 2, 1, 2>, C<2, 4, 2, 2, 1>, C<2, 4, 2, 2, 2>,  // 256, 16 and 8 blocks
                       C<4, 2, 2, 4, 1>, C<4, 2, 2, 4, 2>, C<2, 4, 2, 4, 1>, C<2, 4, 2, 4, 2>,  // 256, 4; 512, 16
                       G<1, 8, 2, 2, 1>, G<1, 8, 2, 3, 1>, G<1, 8, 2, 4, 1>, G<1, 8, 2, 4, 2>,  // 512, 768, 1024
                       W<2, 1, 8, 8>, W<1, 2, 8, 4>, W<2, 1, 16, 4>,                            // 256, 512
                       W<1, 2, 12, 4>, W<1, 2, 12, 8>, W<1, 2, 16, 4>, W<1, 2, 16, 8>>;         // 768, 1024
  template <int... n>
  using s = BackwardShape<cells::Gru, T, Route::single, n...>;
  template <int... n>
  using c = BackwardShape<cells::Gru, T, Route::cluster, n...>;
  template <int... n>
  using g = BackwardShape<cells::Gru, T, Route::grid, n...>;
  using Backward =
      List<s<4, 1, 64, 6, 1>, s<8, 1, 128, 12, 1>,                                      // H <= 64, 128
           c<8, 2, 16, 2, 1>, c<8, 2, 32, 3, 1>, c<8, 2, 32, 3, 2>, c<8, 2, 64, 6, 1>,  // 256, 16, 8 and 4 blocks
           c<8, 4, 32, 3, 1>, c<8, 4, 32, 3, 2>,                                        // 512, 16
           g<8, 1, 16, 6, 1>, g<8, 1, 16, 9, 1>, g<8, 1, 16, 9, 2>, g<8, 1, 16, 9, 4>,  // 512, 768
           g<8, 1, 16, 12, 1>, g<8, 1, 16, 12, 2>, g<8, 1, 16, 12, 4>,                  // 1024
           g<8, 1, 16, 18, 1, 12>, g<8, 1, 16, 24, 1, 10>>;                             // 1536, 2048
};

template <bool kRelu, class T>
  requires(T::kPer == 8)
struct Shapes<cells::Rnn<kRelu>, T> {
  template <int... n>
  using S = Shape<cells::Rnn<kRelu>, T, Route::single, n...>;
  template <int... n>
  using C = Shape<cells::Rnn<kRelu>, T, Route::cluster, n...>;
  template <int... n>
  using G = Shape<cells::Rnn<kRelu>, T, Route::grid, n...>;
  using Forward = List<S<4, 1, 2, 2, 1>, S<8, 1, 2, 4, 1>,                     // H <= 64, 128
                       C<2, 4, 2, 4, 1>, C<2, 4, 2, 4, 2>, C<4, 2, 2, 16, 1>,  // 512, 1024, 16 blocks
                       G<1, 8, 2, 4, 1>, G<1, 8, 2, 8, 1>,                     // 1024, 2048
                       WideShape<cells::Rnn<kRelu>, T, 1, 2, 8, 8>, WideShape<cells::Rnn<kRelu>, T, 1, 2, 16, 4>>;
  template <int... n>
  using s = BackwardShape<cells::Rnn<kRelu>, T, Route::single, n...>;
  template <int... n>
  using c = BackwardShape<cells::Rnn<kRelu>, T, Route::cluster, n...>;
  template <int... n>
  using g = BackwardShape<cells::Rnn<kRelu>, T, Route::grid, n...>;
  using Backward = List<s<4, 1, 64, 2, 1>, s<8, 1, 128, 4, 1>,                    // H <= 64, 128
                        c<8, 4, 32, 1, 1>, c<8, 4, 32, 1, 2>, c<8, 8, 64, 2, 1>,  // 512, 1024, 16 blocks
                        g<8, 1, 16, 4, 1>, g<8, 1, 16, 8, 1>>;                    // 1024, 2048
};

template <class T>
  requires(T::kPer == 4)
struct Shapes<cells::Lstm, T> {
  template <int... n>
  using S = Shape<cells::Lstm, T, Route::single, n...>;
  template <int... n>
  using C = Shape<cells::Lstm, T, Route::cluster, n...>;
  template <int... n>
  using G = Shape<cells::Lstm, T, Route::grid, n...>;
  using Forward =
      decltype(joined(List<S<8, 1, 1, 4, 1>, C<2, 4, 1, 2, 1>,                                      // H <= 64, 128
                           C<2, 4, 1, 4, 1>, C<2, 4, 1, 4, 2>, C<4, 2, 1, 8, 1>,                    // 256
                           G<1, 8, 1, 4, 1>, G<1, 8, 1, 4, 2>, G<1, 8, 1, 6, 1>, G<1, 8, 1, 6, 2>,  // 512, 768
                           G<1, 8, 1, 8, 1>>(),                                                     // 1024
                      // 512 and more rows; 1024 and 16 rows, which would spill in TF32
                      std::conditional_t<kByFma<T>, List<G<1, 8, 1, 8, 2>>, Wide<cells::Lstm, T, 1, 2, 16, 4>>()));
  template <int... n>
  using s = BackwardShape<cells::Lstm, T, Route::single, n...>;
  template <int... n>
  using c = BackwardShape<cells::Lstm, T, Route::cluster, n...>;
  template <int... n>
  using g = BackwardShape<cells::Lstm, T, Route::grid, n...>;
  // the first, of H <= 64, would spill in float32 by fused multiply-adds: a cluster or a grid does it there
  using Backward = decltype(joined(
      std::conditional_t<kByFma<T>, List<>, List<s<4, 1, 64, 16, 1>>>(),
      List<c<8, 1, 16, 4, 1>, c<8, 2, 16, 4, 1>, c<8, 2, 32, 8, 1>, g<8, 1, 16, 16, 1, 14>,  // the last: 512
           g<8, 1, 16, 24, 1, 12>>()));                                                      // 768; 1024 would spill
};

template <class T>
  requires(T::kPer == 4)
struct Shapes<cells::Gru, T> {
  template <int... n>
  using S = Shape<cells::Gru, T, Route::single, n...>;
  template <int... n>
  using C = Shape<cells::Gru, T, Route::cluster, n...>;
  template <int... n>
  using G = Shape<cells::Gru, T, Route::grid, n...>;
  using Forward = decltype(joined(List<S<4, 1, 2, 4, 1>, C<1, 8, 2, 1, 1>, C<1, 8, 2, 2, 1>,  // H <= 64; 128, 256
                                       C<2, 4, 2, 4, 1>, G<1, 8, 2, 4, 1>>(),                 // 256, 512
                                  Wide<cells::Gru, T, 1, 2, 16, 4>()));                       // 512
  template <int... n>
  using s = BackwardShape<cells::Gru, T, Route::single, n...>;
  template <int... n>
  using c = BackwardShape<cells::Gru, T, Route::cluster, n...>;
  template <int... n>
  using g = BackwardShape<cells::Gru, T, Route::grid, n...>;
  using Backward = List<s<4, 1, 64, 12, 1>, c<8, 2, 16, 3, 1>, c<8, 2, 32, 6, 1>, g<8, 1, 16, 12, 1>,
                        g<8, 1, 16, 18, 1, 12>, g<8, 1, 16, 24, 1, 12>>;
};

template <bool kRelu, class T>
  requires(T::kPer == 4)
struct Shapes<cells::Rnn<kRelu>, T> {
  template <int... n>
  using S = Shape<cells::Rnn<kRelu>, T, Route::single, n...>;
  template <int... n>
  using C = Shape<cells::Rnn<kRelu>, T, Route::cluster, n...>;
  template <int... n>
  using G = Shape<cells::Rnn<kRelu>, T, Route::grid, n...>;
  using Forward = List<S<8, 1, 2, 8, 1>, C<2, 4, 2, 8, 1>, G<1, 8, 2, 8, 1>>;  // H <= 128, 512, 1024
  template <int... n>
  using s = BackwardShape<cells::Rnn<kRelu>, T, Route::single, n...>;
  template <int... n>
  using c = BackwardShape<cells::Rnn<kRelu>, T, Route::cluster, n...>;
  template <int... n>
  using g = BackwardShape<cells::Rnn<kRelu>, T, Route::grid, n...>;
  using Backward = List<s<8, 1, 128, 8, 1>, c<8, 4, 32, 2, 1>, g<8, 1, 16, 8, 1>>;
};

// Of 3xTF32 what is faster than IEEE float32 from 5 rows on, and does not spill; for the rest that one's kernels.
template <>
struct Shapes<cells::Lstm, TF32x3> {
  template <int... n>
  using C = Shape<cells::Lstm, TF32x3, Route::cluster, n...>;
  template <int... n>
  using c = BackwardShape<cells::Lstm, TF32x3, Route::cluster, n...>;
  using Forward = decltype(joined(List<Shape<cells::Lstm, TF32x3, Route::single, 8, 1, 1, 4, 1>,   // H <= 64
                                       C<2, 4, 1, 2, 2>, C<2, 4, 1, 4, 1>, C<2, 4, 1, 4, 2>,       // 128, 256
                                       Shape<cells::Lstm, TF32x3, Route::grid, 1, 8, 1, 4, 1>>(),  // 512
                                  Shapes<cells::Lstm, F32>::Forward()));
  using Backward = decltype(joined(List<c<8, 1, 16, 4, 2>, c<8, 2, 16, 4, 1>, c<8, 2, 16, 4, 2>>(),  // 128, 256
                                   Shapes<cells::Lstm, F32>::Backward()));
};

template <>
struct Shapes<cells::Gru, TF32x3> {
  template <int... n>
  using C = Shape<cells::Gru, TF32x3, Route::cluster, n...>;
  template <int... n>
  using c = BackwardShape<cells::Gru, TF32x3, Route::cluster, n...>;
  using Forward = decltype(joined(List<C<1, 8, 2, 1, 2>, C<1, 8, 2, 2, 1>, C<1, 8, 2, 2, 2>>(),  // H <= 128, 256
                                  Shapes<cells::Gru, F32>::Forward()));
  using Backward = decltype(joined(List<c<8, 2, 16, 3, 1>, c<8, 2, 16, 3, 2>>(), Shapes<cells::Gru, F32>::Backward()));
};

template <bool kRelu>
struct Shapes<cells::Rnn<kRelu>, TF32x3> {
  using Cell = cells::Rnn<kRelu>;
  using Forward = decltype(joined(List<Shape<Cell, TF32x3, Route::cluster, 2, 4, 2, 8, 1>>(),  // H <= 512
                                  typename Shapes<Cell, F32>::Forward()));
  using Backward = decltype(joined(List<BackwardShape<Cell, TF32x3, Route::cluster, 8, 4, 32, 2, 1>>(),
                                   typename Shapes<Cell, F32>::Backward()));
};

}  // namespace fusedrnn::cuda
