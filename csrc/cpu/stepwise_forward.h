// SPDX-License-Identifier: Apache-2.0
// Forward of the stepwise engine; see stepwise.h.
#pragma once

#include "stepwise.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S>
class StepwiseForward : Stepwise<S> {
  using Base = Stepwise<S>;
  using Base::act, Base::before_, Base::coupled_, Base::fill_units, Base::G, Base::GH, Base::gru_, Base::H,
      Base::has_c_, Base::kept_, Base::ldG, Base::ldH, Base::ldQ, Base::lstm_, Base::masks_, Base::N, Base::n_,
      Base::p_, Base::padded, Base::problem_, Base::Q, Base::tape_layout_, Base::units, Base::v_;
  using Base::L;
  using typename Base::Task;
  using typename Base::V;

 public:
  StepwiseForward(const Call& call, Workspace& workspace) : Base(call), out_(call.out), tape_(call.tape) {
    rows_ = this->all_rows(workspace);
    chunk_ = smaller(larger<int64_t>(n_.T, 1),
                     larger<int64_t>(1, (int64_t{1} << 20) / larger<int64_t>(1, N * ldG * int64_t{sizeof(S)})));
    pairs_ = chunk_ * N;
    const int64_t tiles = padded(GH);
    W_.data = take<S>(workspace, tiles * this->inputs_);
    R_.data = take<S>(workspace, (tiles + L) * Q);
    late_.data = before_ ? take<S>(workspace, ldH * Q) : nullptr;
    if (v_.proj) hr_.data = take<S>(workspace, ldQ * H);
    this->allocate(vectors_, workspace);
    zx_ = take<S>(workspace, pairs_ * ldG);
    zh_ = take<S>(workspace, N * ldG);
    copied_ = take<S>(workspace, pairs_ * this->inputs_);
    x_ = take<const S*>(workspace, pairs_);
    h_ = take<S>(workspace, N * ldQ);
    start_[0] = take<S>(workspace, N * ldQ);
    start_[1] = take<S>(workspace, N * ldH);
    masked_ = masks_ ? take<S>(workspace, N * ldQ) : h_;
    mask_ = masks_ ? take<S>(workspace, N * ldQ) : nullptr;
    c_ = take<S>(workspace, N * ldH);
    m_ = take<S>(workspace, N * ldH);
    new_h_ = v_.proj ? take<S>(workspace, N * ldQ) : m_;
    ld_new_ = v_.proj ? ldQ : ldH;
    masked_rows_ = take<const S*>(workspace, N);
    m_rows_ = take<const S*>(workspace, N);
    for (int64_t i = 0; i < N; ++i) masked_rows_[i] = masked_ + i * ldQ, m_rows_[i] = m_ + i * ldH;
    buffers_ = take<S>(workspace, call.threads * kBuffers * ldBuffer());
    if (!tape_)
      for (int parity = 0; parity < smaller(n_.L - 1, 2); ++parity)
        between_[parity] = take<S>(workspace, n_.E * n_.D * n_.T * N * Q);
  }

  void run(const Team& team) {
    for (int l = 0; l < n_.L; ++l)
      for (int64_t e = 0; e < n_.E; ++e)
        for (int d = 0; d < n_.D; ++d) direction(team, this->task(l, d, e, rows_));
  }

 private:
  static constexpr int kBuffers = 8;
  int64_t ldBuffer() const { return larger(ldH, ldQ); }

  S* plane(int l, int d, int64_t e) const {
    if (tape_) return this->tape_of(tape_, l, d, e);
    return l + 1 < n_.L ? between_[l & 1] + (e * n_.D + d) * n_.T * N * Q : nullptr;
  }

  void pack(const Team& team, const Task& t, Panels<S>& w, const Array<3>& m, int64_t row, int64_t K, int64_t columns,
            int64_t together) {
    static constexpr int gate[1] = {0};
    if (team.rank == 0) {
      this->shape(w, K, columns, team.size);
      w.source = worth_packing(together, K) || m.stride[2] != 1 ? nullptr : element<S>(m, t.e, row);
      w.row_stride = m.stride[1];
    }
    team.wait();
    if (w.source) return;
    for (int64_t b = team.begin(w.blocks()); b < team.end(w.blocks()); ++b)
      pack_transposed(w, b, element<S>(m, t.e, row), m.stride[1], m.stride[2], H, gate);
  }

  // C (n rows of ldc) = A M^T + init: the blocks of this member.
  void product(const Team& team, const Panels<S>& w, const S* const* a, int64_t n, const S* init, S* c, int64_t ldc) {
    for (int64_t b = team.begin(w.blocks()); b < team.end(w.blocks()); ++b) multiply(w, b, a, n, init, 0, c, ldc);
  }

  void direction(const Team& team, const Task& t) {
    const Rows& rows = t.rows;
    const Source<S> source = this->source(t.l, [&](int d) { return plane(t.l - 1, d, t.e); });
    const int64_t total = rows.total;
    pack(team, t, W_, t.p->W, 0, source.width, GH, total);
    pack(team, t, R_, t.p->R, 0, Q, before_ ? 2 * H : GH, total);
    if (before_) pack(team, t, late_, t.p->R, 2 * H, Q, H, total);
    if (v_.proj) pack(team, t, hr_, t.x->hr, 0, H, Q, total);
    if (team.rank == 0) this->read(t, vectors_);
    start(team, t);
    team.wait();
    const S *bias_x = v_.layer_norm ? nullptr : vectors_.bias[0], *bias_h = v_.layer_norm ? nullptr : vectors_.bias[1];
    S* tape = tape_ ? plane(t.l, t.d, t.e) : nullptr;
    for (int64_t s0 = 0; s0 < rows.steps; s0 += chunk_) {
      const int64_t s1 = smaller(s0 + chunk_, rows.steps), pair0 = rows.off[s0], pairs = rows.off[s1] - pair0;
      source.fill(team, rows, t.reversed, s0, s1, copied_, x_);
      team.wait();
      product(team, W_, x_, pairs, bias_x, zx_, ldG);
      team.wait();
      if (v_.layer_norm) {
        for (int64_t r = team.begin(pairs); r < team.end(pairs); ++r) {
          S* hat = tape ? tape + tape_layout_.x_hat() + (pair0 + r) * GH : nullptr;
          const S scale = this->normalise(zx_ + r * ldG, GH, vectors_.gain[0], vectors_.bias[0], hat);
          if (tape) tape[tape_layout_.numbers() + (pair0 + r) * 4] = scale;
        }
        team.wait();
      }
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t live = rows.live[s], first = team.begin(live), end = team.end(live);
        product(team, R_, masked_rows_, live, bias_h, zh_, ldG);
        team.wait();
        S* buffer = buffers_ + team.rank * kBuffers * ldBuffer();
        if (before_) {
          for (int64_t i = first; i < end; ++i) reset_row(zx_ + (rows.off[s] - pair0 + i) * ldG, i, buffer);
          team.wait();
          product(team, late_, m_rows_, live, bias_h ? bias_h + 2 * H : nullptr, zh_ + 2 * H, ldG);
          team.wait();
        }
        for (int64_t i = first; i < end; ++i) {
          const int64_t pair = rows.off[s] + i;
          S* x = zx_ + (pair - pair0) * ldG;
          if (v_.layer_norm) {
            S* hat = tape ? tape + tape_layout_.h_hat() + pair * GH : nullptr;
            const S scale = this->normalise(zh_ + i * ldG, GH, vectors_.gain[1], vectors_.bias[1], hat);
            if (tape) tape[tape_layout_.numbers() + pair * 4 + 1] = scale;
          }
          if (lstm_)
            lstm_row(t, s, i, x, tape, buffer);
          else if (gru_)
            gru_row(t, s, i, x, tape, buffer);
          else
            rnn_row(i, x, tape ? tape + tape_layout_.gates() + pair * H : nullptr);
          if (!v_.proj) finish_row(t, s, i, tape, buffer);
        }
        team.wait();
        if (v_.proj) {
          product(team, hr_, m_rows_, live, nullptr, new_h_, ldQ);
          team.wait();
          for (int64_t i = first; i < end; ++i) finish_row(t, s, i, tape, buffer);
          team.wait();
        }
      }
    }
    team.wait();
  }

  // States and masks before the first step; rows of length 0 have the former as their last ones.
  void start(const Team& team, const Task& t) {
    const Rows& rows = t.rows;
    for (int64_t i = team.begin(N); i < team.end(N); ++i) {
      for (int which = 0; which < 1 + has_c_; ++which) {
        const Array<4>& a = which ? p_.c0 : p_.h0;
        const int64_t n = which ? H : Q, ld = which ? ldH : ldQ;
        S* to = start_[which] + i * ld;
        zero_row(to, 1, ld);
        if (a.data) copy_row(element<S>(a, t.ld, rows.e[i], rows.b[i]), a.stride[3], to, 1, n);
        copy_row(to, 1, (which ? c_ : h_) + i * ld, 1, ld);
      }
      if (masks_) {
        zero_row(mask_ + i * ldQ, 1, ldQ);
        this->mask_row(t, i, mask_ + i * ldQ);
      }
      if (rows.length[i] == 0) final_state(t, i);
      if (rows.steps && i < rows.live[0]) restart(t, 0, i);
      mask_state(i);
      for (int64_t time = rows.length[i]; time < n_.T; ++time) {
        if (out_.y.data && t.l + 1 == n_.L)
          zero_row(element<S>(out_.y, time, rows.e[i], rows.b[i], t.d * Q), out_.y.stride[3], Q);
        if (out_.cells.data)
          zero_row(element<S>(out_.cells, t.l, time, rows.e[i], rows.b[i], t.d * H), out_.cells.stride[4], H);
      }
    }
  }
  // Row i begins a new sequence at step s, perhaps.
  void restart(const Task& t, int64_t s, int64_t i) {
    if (!t.rows.is_cut(t.reversed, s, i)) return;
    for (int which = 0; which < 1 + has_c_; ++which) {
      const int64_t ld = which ? ldH : ldQ;
      S* state = (which ? c_ : h_) + i * ld;
      if (problem_.reset_to_initial)
        copy_row(start_[which] + i * ld, 1, state, 1, ld);
      else
        zero_row(state, 1, ld);
    }
  }
  void mask_state(int64_t i) {
    if (!masks_) return;
    const S *h = h_ + i * ldQ, *mask = mask_ + i * ldQ;
    units(ldQ, [&](int64_t u) { store(masked_ + i * ldQ + u, load(h + u) * load(mask + u)); });
  }
  void final_state(const Task& t, int64_t i) {
    if (out_.hn.data)
      copy_row(h_ + i * ldQ, 1, element<S>(out_.hn, t.ld, t.rows.e[i], t.rows.b[i]), out_.hn.stride[3], Q);
    if (out_.cn.data)
      copy_row(c_ + i * ldH, 1, element<S>(out_.cn, t.ld, t.rows.e[i], t.rows.b[i]), out_.cn.stride[3], H);
  }

  // ---- a row of a step: from the products to m and c ----

  void lstm_row(const Task& t, int64_t s, int64_t i, const S* x, S* tape, S* buffer) {
    const S* zh = zh_ + i * ldG;
    S* c = c_ + i * ldH;
    S *gate[4], *c_new = buffer + 4 * ldBuffer(), *seen = buffer + 5 * ldBuffer();
    for (int g = 0; g < G; ++g) {
      gate[g] = buffer + g * ldBuffer();
      units(H, [&](int64_t u) { store(gate[g] + u, load(x + g * H + u) + load(zh + g * H + u)); });
    }
    S *in = gate[0], *forget = coupled_ ? nullptr : gate[1], *g = gate[this->g_gate()], *o = gate[this->o_gate()];
    if (v_.peepholes) {
      const S *p_i = vectors_.peep[0], *p_f = vectors_.peep[1];
      units(H, [&](int64_t u) { store(in + u, load(in + u) + load(p_i + u) * load(c + u)); });
      if (forget) units(H, [&](int64_t u) { store(forget + u, load(forget + u) + load(p_f + u) * load(c + u)); });
    }
    act(0, in, true);
    if (forget) act(0, forget, true);
    act(1, g, true);
    const S limit = this->limit_c();
    units(H, [&](int64_t u) {
      const V f = forget ? load(forget + u) : 1 - load(in + u);
      store(c_new + u, clamp(f * load(c + u) + load(in + u) * load(g + u), limit));
    });
    if (v_.peepholes) {
      const S* p_o = vectors_.peep[2];
      units(H, [&](int64_t u) { store(o + u, load(o + u) + load(p_o + u) * load(c_new + u)); });
    }
    act(0, o, true);
    units(H, [&](int64_t u) { store(seen + u, load(c_new + u)); });
    if (v_.layer_norm) {
      S mean, scale;
      this->moments(seen, H, &mean, &scale);
      const V m(mean), f(scale);
      units(H, [&](int64_t u) {
        store(seen + u, (load(seen + u) - m) * f * load(vectors_.gain_c + u) + load(vectors_.bias_c + u));
      });
      if (tape) {
        S* numbers = tape + tape_layout_.numbers() + (t.rows.off[s] + i) * 4;
        numbers[2] = mean, numbers[3] = scale;
      }
    }
    act(2, seen, false);
    S* m = m_ + i * ldH;
    units(H, [&](int64_t u) { store(m + u, load(o + u) * load(seen + u)); });
    keep_gates(t, s, i, tape, gate, static_cast<int>(G));
    zone_c(t, s, i, c_new, seen);
  }

  void keep_gates(const Task& t, int64_t s, int64_t i, S* tape, S* const* gate, int count) {
    if (!tape) return;
    S* to = tape + tape_layout_.gates() + (t.rows.off[s] + i) * kept_ * H;
    for (int g = 0; g < count; ++g) this->copy(gate[g], to + g * H, H);
  }
  // c from what it would be.
  void zone_c(const Task& t, int64_t s, int64_t i, const S* c_new, S* buffer) {
    S* c = c_ + i * ldH;
    if (!this->zoned(v_.zoneout_c)) {
      units(H, [&](int64_t u) { store(c + u, load(c_new + u)); });
      return;
    }
    this->keep_row(t, s, i, v_.zoneout_c, 3, H, buffer);
    units(H, [&](int64_t u) {
      const V keep = load(buffer + u);  // 0 and 1 leave no rounding behind
      store(c + u, keep * load(c + u) + (1 - keep) * load(c_new + u));
    });
  }

  // Before the second product of gru_reset_before: r and z in place of x's, r h' in m.
  void reset_row(S* x, int64_t i, S* buffer) {
    const S *zh = zh_ + i * ldG, *h = masked_ + i * ldQ;
    for (int g = 0; g < 2; ++g) {
      S* gate = buffer + g * ldBuffer();
      units(H, [&](int64_t u) { store(gate + u, load(x + g * H + u) + load(zh + g * H + u)); });
      act(0, gate, true);
      this->copy(gate, x + g * H, H);
    }
    S* m = m_ + i * ldH;
    units(H, [&](int64_t u) { store(m + u, load(buffer + u) * load(h + u)); });
  }

  void gru_row(const Task& t, int64_t s, int64_t i, const S* x, S* tape, S* buffer) {
    const S *zh = zh_ + i * ldG, *before = v_.proj ? c_ + i * ldH : h_ + i * ldQ;
    S *gate[4], *m = m_ + i * ldH;
    for (int g = 0; g < 4; ++g) gate[g] = buffer + g * ldBuffer();
    for (int g = 0; g < 2; ++g) {
      units(H, [&](int64_t u) {
        store(gate[g] + u, before_ ? load(x + g * H + u) : load(x + g * H + u) + load(zh + g * H + u));
      });
      if (!before_) act(0, gate[g], true);
    }
    units(H, [&](int64_t u) {
      const V from_h = load(zh + 2 * H + u), r = before_ ? V(S(1)) : load(gate[0] + u);
      store(gate[2] + u, load(x + 2 * H + u) + r * from_h);
      store(gate[3] + u, from_h);
    });
    act(1, gate[2], true);
    units(H, [&](int64_t u) {
      const V n = load(gate[2] + u);
      store(m + u, n + load(gate[1] + u) * (load(before + u) - n));
    });
    keep_gates(t, s, i, tape, gate, static_cast<int>(kept_));
    if (v_.proj) zone_c(t, s, i, m, gate[0]);
  }

  void rnn_row(int64_t i, const S* x, S* kept) {
    const S* zh = zh_ + i * ldG;
    S* m = m_ + i * ldH;
    units(H, [&](int64_t u) { store(m + u, load(x + u) + load(zh + u)); });
    act(0, m, true);
    if (kept) this->copy(m, kept, H);
  }

  // h from what it would be, and everyone who wants it; the state before the next step.
  void finish_row(const Task& t, int64_t s, int64_t i, S* tape, S* buffer) {
    const Rows& rows = t.rows;
    S* h = h_ + i * ldQ;
    const S* fresh = new_h_ + i * ld_new_;
    if (this->zoned(v_.zoneout_h)) {
      this->keep_row(t, s, i, v_.zoneout_h, 2, Q, buffer);
      units(Q, [&](int64_t u) {
        const V keep = load(buffer + u);
        store(h + u, keep * load(h + u) + (1 - keep) * load(fresh + u));
      });
    } else {
      units(Q, [&](int64_t u) { store(h + u, load(fresh + u)); });
    }
    const int64_t pair = rows.off[s] + i, time = rows.time(t.reversed, s, i);
    if (S* to = plane(t.l, t.d, t.e)) this->copy(h, to + pair * Q, Q);
    if (tape && has_c_) this->copy(c_ + i * ldH, tape + tape_layout_.c() + pair * H, H);
    if (out_.y.data && t.l + 1 == n_.L)
      copy_row(h, 1, element<S>(out_.y, time, rows.e[i], rows.b[i], t.d * Q), out_.y.stride[3], Q);
    if (out_.cells.data)
      copy_row(has_c_ ? c_ + i * ldH : h, 1, element<S>(out_.cells, t.l, time, rows.e[i], rows.b[i], t.d * H),
               out_.cells.stride[4], H);
    if (s + 1 < rows.length[i])
      restart(t, s + 1, i);
    else
      final_state(t, i);
    mask_state(i);
  }

  const Results& out_;
  void* tape_;
  Rows* rows_;
  int64_t chunk_, pairs_, ld_new_;
  Panels<S> W_, R_, late_, hr_;
  typename Base::Vectors vectors_;
  S *zx_, *zh_, *copied_, *h_, *start_[2], *masked_, *mask_, *c_, *m_, *new_h_, *buffers_, *between_[2] = {};
  const S **x_, **masked_rows_, **m_rows_;
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
