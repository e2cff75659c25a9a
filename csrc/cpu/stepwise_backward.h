// SPDX-License-Identifier: Apache-2.0
// Backward of the stepwise engine; see stepwise.h.
#pragma once

#include "stepwise.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S>
class StepwiseBackward : Stepwise<S> {
  using Base = Stepwise<S>;
  using Base::act_back, Base::before_, Base::coupled_, Base::fill_units, Base::G, Base::GH, Base::gru_, Base::H,
      Base::has_c_, Base::kept_, Base::ldG, Base::ldH, Base::ldQ, Base::lstm_, Base::masks_, Base::N, Base::n_,
      Base::p_, Base::padded, Base::problem_, Base::Q, Base::tape_layout_, Base::units, Base::v_;
  using Base::L;
  using typename Base::Task;
  using typename Base::V;
  static constexpr int64_t kPairs = 512;  // of a chunk, as in backward.h
  static constexpr int kBuffers = 10;

 public:
  StepwiseBackward(const Call& call, Workspace& workspace)
      : Base(call), g_(call.g), dp_(call.dp), tape_(call.tape), apart_(v_.layer_norm || gru_) {
    rows_ = this->all_rows(workspace);
    chunk_ = smaller(larger<int64_t>(n_.T, 1), larger<int64_t>(1, kPairs / larger<int64_t>(1, N)));
    pairs_ = chunk_ * N;
    const int64_t widest = larger(this->inputs_, larger(Q, H));
    auto rows_of = [&](S*& data, const S**& pointers, int64_t count, int64_t ld) {
      data = take<S>(workspace, count * ld);
      pointers = take<const S*>(workspace, count);
      for (int64_t r = 0; r < count; ++r) pointers[r] = data + r * ld;
    };
    R_.data = take<S>(workspace, ldQ * GH);
    late_.data = before_ ? take<S>(workspace, ldQ * H) : nullptr;
    W_.data = take<S>(workspace, padded(this->inputs_) * GH);
    if (v_.proj) hr_.data = take<S>(workspace, ldH * Q);
    this->allocate(vectors_, workspace);
    // what the gates' gradients are before (raw) and after the norm; the same rows where nothing tells them apart
    rows_of(raw_[0], raw_rows_[0], pairs_, ldG);
    for (int k = 0; k < 2; ++k) {
      if (k == 1 && apart_) rows_of(raw_[1], raw_rows_[1], pairs_, ldG);
      if (k == 1 && !apart_) raw_[1] = raw_[0], raw_rows_[1] = raw_rows_[0];
      if (v_.layer_norm)
        rows_of(dz_[k], dz_rows_[k], pairs_, ldG);
      else
        dz_[k] = raw_[k], dz_rows_[k] = raw_rows_[k];
    }
    rows_of(m_, m_rows_, pairs_, ldH);
    rows_of(dnew_, dnew_rows_, pairs_, ldQ);
    rows_of(c_new_, c_new_rows_, pairs_, ldH);
    rows_of(dseen_, dseen_rows_, pairs_, ldH);
    rows_of(c_hat_, c_hat_rows_, pairs_, ldH);
    rows_of(masked_, masked_rows_, pairs_, ldQ);
    rows_of(dx_, dx_rows_, pairs_, padded(this->inputs_));
    late_rows_ = take<const S*>(workspace, pairs_);
    for (int64_t r = 0; r < pairs_; ++r) late_rows_[r] = raw_[0] + r * ldG + 2 * H;
    copied_ = take<S>(workspace, pairs_ * this->inputs_);
    x_ = take<const S*>(workspace, pairs_);
    for (int which = 0; which < 2; ++which) {
      const int64_t ld = which ? ldH : ldQ;
      before_rows_[which] = take<const S*>(workspace, pairs_);
      start_[which] = take<S>(workspace, N * ld);
      d_[which] = take<S>(workspace, N * ld);
      d_start_[which] = take<S>(workspace, N * ld);
    }
    back_ = take<S>(workspace, N * ldQ);
    dm_ = take<S>(workspace, N * ldH);
    extra_ = take<S>(workspace, N * ldQ);
    mask_ = take<S>(workspace, N * ldQ);
    zeros_ = take<S>(workspace, larger(ldH, ldQ));
    zero_row(zeros_, 1, larger(ldH, ldQ));
    packed_ = take<S>(workspace, pairs_ * (larger(GH, Q) + 2 * kTile));
    panels_ = take<S>(workspace, pairs_ * padded(widest));
    sums_ = take<S>(workspace, larger(GH, Q) * padded(widest));
    buffers_ = take<S>(workspace, call.threads * kBuffers * ldBuffer());
    if (n_.L > 1)
      for (S*& plane : between_) plane = take<S>(workspace, n_.E * n_.D * n_.T * N * Q);
  }

  void run(const Team& team) {
    for (int l = n_.L - 1; l >= 0; --l) {
      if (l == 0) zero_dx(team);
      for (int64_t e = 0; e < n_.E; ++e)
        for (int d = 0; d < n_.D; ++d) direction(team, this->task(l, d, e, rows_));
    }
  }

 private:
  int64_t ldBuffer() const { return larger(ldH, ldQ); }
  S* dplane(int l, int d, int64_t e) const { return between_[l & 1] + (e * n_.D + d) * n_.T * N * Q; }
  bool wants_dx(int l) const { return l > 0 || dp_.x.data; }
  bool dx_adds_up() const { return n_.E > 1 && !dp_.x.stride[1]; }

  void pack(const Team& team, const Task& t, Panels<S>& w, const Array<3>& m, int64_t row, int64_t K, int64_t columns) {
    static constexpr int part[1] = {0};
    if (team.rank == 0) this->shape(w, K, columns, team.size);
    team.wait();
    for (int64_t b = team.begin(w.blocks()); b < team.end(w.blocks()); ++b)
      pack_rows(w, b, element<S>(m, t.e, row), m.stride[1], m.stride[2], K, 1, part);
  }
  // C (n rows of ldc) = A M + init: the blocks of this member.
  void product(const Team& team, const Panels<S>& w, const S* const* a, int64_t n, const S* init, int64_t ldi, S* c,
               int64_t ldc) {
    for (int64_t b = team.begin(w.blocks()); b < team.end(w.blocks()); ++b) multiply(w, b, a, n, init, ldi, c, ldc);
  }

  void direction(const Team& team, const Task& t) {
    const Rows& rows = t.rows;
    const S* tape = this->tape_of(tape_, t.l, t.d, t.e);
    const Source<S> source =
        this->source(t.l, [&](int d) -> const S* { return this->tape_of(tape_, t.l - 1, d, t.e); });
    pack(team, t, R_, t.p->R, 0, before_ ? 2 * H : GH, Q);
    if (before_) pack(team, t, late_, t.p->R, 2 * H, H, Q);
    if (v_.proj) pack(team, t, hr_, t.x->hr, 0, Q, H);
    if (wants_dx(t.l)) pack(team, t, W_, t.p->W, 0, GH, source.width);
    if (team.rank == 0) this->read(t, vectors_);
    begin(team, t);
    team.wait();
    bool fresh = true;
    for (int64_t s0 = rows.steps > 0 ? (rows.steps - 1) / chunk_ * chunk_ : -1; s0 >= 0; s0 -= chunk_) {
      const int64_t s1 = smaller(s0 + chunk_, rows.steps);
      source.fill(team, rows, t.reversed, s0, s1, copied_, x_);
      states_before(team, t, tape, s0, s1);
      team.wait();
      for (int64_t s = s1 - 1; s >= s0; --s) step(team, t, tape, s, s0);
      gradients(team, t, tape, s0, s1, source.width, fresh);
      fresh = false;
    }
    if (rows.steps)
      for (int64_t i = team.begin(rows.live[0]); i < team.end(rows.live[0]); ++i) leave(t, 0, i);
    team.wait();
    finish(team, t, fresh, source.width);
    team.wait();
  }

  // ---- before the first chunk ----

  void begin(const Team& team, const Task& t) {
    const Rows& rows = t.rows;
    for (int64_t i = team.begin(N); i < team.end(N); ++i) {
      for (int which = 0; which < 1 + has_c_; ++which) {
        const Array<4>& given = which ? p_.c0 : p_.h0;
        const int64_t n = which ? H : Q, ld = which ? ldH : ldQ;
        S *to = start_[which] + i * ld, *sum = d_start_[which] + i * ld;
        zero_row(to, 1, ld);
        if (given.data) copy_row(element<S>(given, t.ld, rows.e[i], rows.b[i]), given.stride[3], to, 1, n);
        zero_row(sum, 1, ld);
        if (rows.length[i] == 0) last_gradient(t, which, i, sum);
      }
      zero_row(mask_ + i * ldQ, 1, ldQ);
      if (masks_) this->mask_row(t, i, mask_ + i * ldQ);
    }
  }
  void last_gradient(const Task& t, int which, int64_t i, S* to) const {
    const Array<4>& g = which ? g_.cn : g_.hn;
    if (g.data) add_row(element<S>(g, t.ld, t.rows.e[i], t.rows.b[i]), g.stride[3], to, 1, which ? H : Q);
  }

  // Row pointers to h and c before each step of a chunk, and h as R saw it.
  void states_before(const Team& team, const Task& t, const S* tape, int64_t s0, int64_t s1) {
    const Rows& rows = t.rows;
    const int64_t pair0 = rows.off[s0];
    for (int64_t s = s0; s < s1; ++s) {
      for (int64_t i = team.begin(rows.live[s]); i < team.end(rows.live[s]); ++i) {
        const int64_t r = rows.off[s] - pair0 + i;
        const bool cut = rows.is_cut(t.reversed, s, i);
        for (int which = 0; which < 1 + has_c_; ++which) {
          const int64_t n = which ? H : Q, ld = which ? ldH : ldQ;
          const S* from = tape + (which ? tape_layout_.c() : 0);
          before_rows_[which][r] = cut && !problem_.reset_to_initial ? zeros_
                                   : cut || s == 0                   ? start_[which] + i * ld
                                                                     : from + (rows.off[s - 1] + i) * n;
        }
        const S *h = before_rows_[0][r], *mask = mask_ + i * ldQ;
        S* to = masked_ + r * ldQ;
        for (int64_t u = 0; u < Q; u += L) {
          const V x = load(h + u, smaller<int64_t>(L, Q - u));
          store(to + u, masks_ ? x * load(mask + u) : x);
        }
      }
    }
  }

  // ---- a step ----

  void step(const Team& team, const Task& t, const S* tape, int64_t s, int64_t s0) {
    const Rows& rows = t.rows;
    const int64_t live = rows.live[s], first = team.begin(live), end = team.end(live);
    const int64_t r0 = rows.off[s] - rows.off[s0];
    S* buffer = buffers_ + team.rank * kBuffers * ldBuffer();
    for (int64_t i = first; i < end; ++i) arrive(t, s, i, r0 + i, buffer);
    if (v_.proj) {
      team.wait();
      product(team, hr_, dnew_rows_ + r0, live, nullptr, 0, dm_, ldH);
      team.wait();
    }
    for (int64_t i = first; i < end; ++i) {
      const int64_t pair = rows.off[s] + i;
      const S* kept = tape + tape_layout_.gates() + pair * kept_ * H;
      if (!v_.proj) {
        const S* from = dnew_ + (r0 + i) * ldQ;
        units(H, [&](int64_t u) { store(dm_ + i * ldH + u, load(from + u)); });
      }
      for (int g = 0; g < kept_; ++g) take_row(kept + g * H, buffer + g * ldBuffer());
      if (lstm_)
        lstm_row(t, tape, s, i, r0 + i, buffer);
      else if (gru_)
        gru_row(t, s, i, r0 + i, buffer);
      else
        rnn_row(i, r0 + i, buffer);
      if (v_.layer_norm) {
        const S* numbers = tape + tape_layout_.numbers() + pair * 4;
        for (int k = 0; k < 2; ++k)
          this->normalise_back(raw_[k] + (r0 + i) * ldG, vectors_.gain[k],
                               tape + (k ? tape_layout_.h_hat() : tape_layout_.x_hat()) + pair * GH, numbers[k], GH,
                               dz_[k] + (r0 + i) * ldG);
      }
    }
    team.wait();
    if (before_) {
      product(team, late_, late_rows_ + r0, live, nullptr, 0, extra_, ldQ);
      team.wait();
      for (int64_t i = first; i < end; ++i) reset_row(tape, rows.off[s] + i, i, r0 + i, buffer);
      team.wait();
    }
    product(team, R_, dz_rows_[1] + r0, live, before_ ? extra_ : nullptr, ldQ, back_, ldQ);
    team.wait();
  }

  // From memory without padding; what follows is zero.
  void take_row(const S* from, S* to) const {
    for (int64_t u = 0; u < H; u += L) store(to + u, load(from + u, smaller<int64_t>(L, H - u)));
  }

  // What step s hands on: to the step before, or to h0, c0 at a row's first step and at cuts.
  void leave(const Task& t, int64_t s, int64_t i) {
    S* dh = d_[0] + i * ldQ;
    const S *back = back_ + i * ldQ, *mask = mask_ + i * ldQ;
    units(Q, [&](int64_t u) {
      store(dh + u, load(dh + u) + (masks_ ? load(back + u) * load(mask + u) : load(back + u)));
    });
    const bool cut = t.rows.is_cut(t.reversed, s, i);
    if (s > 0 && !cut) return;
    for (int which = 0; which < 1 + has_c_; ++which) {
      const int64_t ld = which ? ldH : ldQ;
      S* from = d_[which] + i * ld;
      if (!cut || problem_.reset_to_initial) add_row(from, 1, d_start_[which] + i * ld, 1, which ? H : Q);
      zero_row(from, 1, ld);
    }
  }

  // dh and dc after step s, clipped; then the part of dh that passes by (zoneout) stays in d, the rest goes to dnew.
  void arrive(const Task& t, int64_t s, int64_t i, int64_t r, S* buffer) {
    const Rows& rows = t.rows;
    const int64_t time = rows.time(t.reversed, s, i);
    if (s + 1 < rows.length[i]) {
      leave(t, s + 1, i);
    } else {
      for (int which = 0; which < 1 + has_c_; ++which) {
        S* to = d_[which] + i * (which ? ldH : ldQ);
        zero_row(to, 1, which ? ldH : ldQ);
        last_gradient(t, which, i, to);
      }
    }
    S *dh = d_[0] + i * ldQ, *dc = d_[1] + i * ldH;
    if (t.l + 1 < n_.L)
      add_row(dplane(t.l, t.d, t.e) + (rows.off[s] + i) * Q, 1, dh, 1, Q);
    else if (g_.y.data)
      add_row(element<S>(g_.y, time, rows.e[i], rows.b[i], t.d * Q), g_.y.stride[3], dh, 1, Q);
    if (g_.cells.data)
      add_row(element<S>(g_.cells, t.l, time, rows.e[i], rows.b[i], t.d * H), g_.cells.stride[4], has_c_ ? dc : dh, 1,
              H);
    if (problem_.clip_grad > 0) {
      const S limit = static_cast<S>(problem_.clip_grad);
      units(Q, [&](int64_t u) { store(dh + u, clamp(load(dh + u), limit)); });
      if (has_c_) units(H, [&](int64_t u) { store(dc + u, clamp(load(dc + u), limit)); });
    }
    S* fresh = dnew_ + r * ldQ;
    if (this->zoned(v_.zoneout_h)) {
      this->keep_row(t, s, i, v_.zoneout_h, 2, Q, buffer);
      units(Q, [&](int64_t u) {
        const V all = load(dh + u), stays = load(buffer + u) * all;
        store(fresh + u, all - stays);
        store(dh + u, stays);
      });
    } else {
      units(Q, [&](int64_t u) {
        store(fresh + u, load(dh + u));
        store(dh + u, V(S(0)));
      });
    }
  }
  // The same for c: what passes by stays in dc, the rest is in `fresh`.
  void zone_c(const Task& t, int64_t s, int64_t i, S* fresh) {
    S* dc = d_[1] + i * ldH;
    if (this->zoned(v_.zoneout_c)) {
      this->keep_row(t, s, i, v_.zoneout_c, 3, H, fresh);
      units(H, [&](int64_t u) {
        const V all = load(dc + u), stays = load(fresh + u) * all;
        store(fresh + u, all - stays);
        store(dc + u, stays);
      });
    } else {
      units(H, [&](int64_t u) {
        store(fresh + u, load(dc + u));
        store(dc + u, V(S(0)));
      });
    }
  }
  // A gate's gradient into its place among raw_[k] of row r.
  void put(int k, int64_t r, int64_t gate, const S* d) {
    fill_units(raw_[k] + r * ldG + gate * H, H, [&](int64_t u) { return load(d + u); });
  }

  // buffer: i, f, g, o (without f where coupled), then room.
  void lstm_row(const Task& t, const S* tape, int64_t s, int64_t i, int64_t r, S* buffer) {
    const int64_t ld = ldBuffer();
    const S *in = buffer, *forget = coupled_ ? nullptr : buffer + ld, *g = buffer + this->g_gate() * ld;
    const S* o = buffer + this->o_gate() * ld;
    S *c_before = buffer + 4 * ld, *seen = buffer + 5 * ld, *d_o = buffer + 6 * ld, *d_seen = buffer + 7 * ld;
    S *dc_new = buffer + 8 * ld, *d = buffer + 9 * ld, *c_new = c_new_ + r * ldH, *m = m_ + r * ldH;
    S* dc = d_[1] + i * ldH;
    const S* dm = dm_ + i * ldH;
    take_row(before_rows_[1][r], c_before);
    const S limit = this->limit_c();
    units(H, [&](int64_t u) {
      const V f = forget ? load(forget + u) : 1 - load(in + u);
      store(c_new + u, clamp(f * load(c_before + u) + load(in + u) * load(g + u), limit));
      store(seen + u, load(c_new + u));
    });
    const S* numbers = v_.layer_norm ? tape + tape_layout_.numbers() + (t.rows.off[s] + i) * 4 : nullptr;
    if (numbers) {
      const V mean(numbers[2]), scale(numbers[3]);
      S* hat = c_hat_ + r * ldH;
      units(H, [&](int64_t u) {
        const V x = (load(c_new + u) - mean) * scale;
        store(hat + u, x);
        store(seen + u, x * load(vectors_.gain_c + u) + load(vectors_.bias_c + u));
      });
    }
    this->act(2, seen, false);
    units(H, [&](int64_t u) {
      store(m + u, load(o + u) * load(seen + u));
      store(d_o + u, load(dm + u) * load(seen + u));
      store(d_seen + u, load(dm + u) * load(o + u));
    });
    act_back(0, o, d_o, true);
    act_back(2, seen, d_seen, false);
    if (numbers) {
      S* to = dseen_ + r * ldH;
      units(H, [&](int64_t u) { store(to + u, load(d_seen + u)); });
      this->normalise_back(to, vectors_.gain_c, c_hat_ + r * ldH, numbers[3], H, d_seen);
    }
    zone_c(t, s, i, dc_new);
    const S* p_o = vectors_.peep[2];
    units(H, [&](int64_t u) {
      V sum = load(dc_new + u) + load(d_seen + u);
      if (v_.peepholes) sum = sum + load(d_o + u) * load(p_o + u);
      sum = inside(sum, load(c_new + u), limit);
      store(dc_new + u, sum);
      const V f = forget ? load(forget + u) : 1 - load(in + u);
      store(dc + u, load(dc + u) + sum * f);
      const V by_i = forget ? load(g + u) : load(g + u) - load(c_before + u);
      store(d + u, sum * by_i);
    });
    auto gate = [&](int64_t k, int which, const S* y, int peep) {
      act_back(which, y, d, true);
      if (v_.peepholes && peep >= 0) {
        const S* p = vectors_.peep[peep];
        units(H, [&](int64_t u) { store(dc + u, load(dc + u) + load(d + u) * load(p + u)); });
      }
      put(0, r, k, d);
    };
    gate(0, 0, in, 0);
    if (forget) {
      units(H, [&](int64_t u) { store(d + u, load(dc_new + u) * load(c_before + u)); });
      gate(1, 0, forget, 1);
    }
    units(H, [&](int64_t u) { store(d + u, load(dc_new + u) * load(in + u)); });
    gate(this->g_gate(), 1, g, -1);
    put(0, r, this->o_gate(), d_o);
    if (apart_) copy_row(raw_[0] + r * ldG, 1, raw_[1] + r * ldG, 1, GH);
  }

  // buffer: r, z, n, n's part of h' (reset after), then room.
  void gru_row(const Task& t, int64_t s, int64_t i, int64_t r, S* buffer) {
    const int64_t ld = ldBuffer();
    const S *reset = buffer, *z = buffer + ld, *n = buffer + 2 * ld, *from_h = buffer + 3 * ld;
    S *carried = buffer + 4 * ld, *d_n = buffer + 5 * ld, *d_z = buffer + 6 * ld, *d_r = buffer + 7 * ld;
    S *dm = dm_ + i * ldH, *passes = v_.proj ? d_[1] + i * ldH : d_[0] + i * ldQ, *m = m_ + r * ldH;
    take_row(before_rows_[v_.proj > 0][r], carried);
    if (v_.proj) {
      zone_c(t, s, i, d_n);
      units(H, [&](int64_t u) { store(dm + u, load(dm + u) + load(d_n + u)); });
    }
    units(H, [&](int64_t u) {
      const V at = load(n + u), share = load(z + u), all = load(dm + u), was = load(carried + u);
      store(m + u, at + share * (was - at));
      store(d_n + u, all * (1 - share));
      store(d_z + u, all * (was - at));
      store(passes + u, load(passes + u) + all * share);
    });
    act_back(1, n, d_n, true);
    act_back(0, z, d_z, true);
    if (before_) {
      // r h' takes m's place: what the second product saw
      const S* h = masked_ + r * ldQ;
      units(H, [&](int64_t u) { store(m + u, load(reset + u) * load(h + u)); });
    } else {
      units(H, [&](int64_t u) { store(d_r + u, load(d_n + u) * load(from_h + u)); });
      act_back(0, reset, d_r, true);
      for (int k = 0; k < 2; ++k) put(k, r, 0, d_r);
    }
    for (int k = 0; k < 2; ++k) put(k, r, 1, d_z);
    put(0, r, 2, d_n);
    if (before_) return put(1, r, 2, d_n);
    units(H, [&](int64_t u) { store(d_n + u, load(d_n + u) * load(reset + u)); });
    put(1, r, 2, d_n);
  }
  // gru_reset_before once d(r h') is in extra: r's gradient, and what reaches h' through r h'.
  void reset_row(const S* tape, int64_t pair, int64_t i, int64_t r, S* buffer) {
    S *reset = buffer, *d_r = buffer + ldBuffer(), *drh = extra_ + i * ldQ;
    const S* h = masked_ + r * ldQ;
    take_row(tape + tape_layout_.gates() + pair * kept_ * H, reset);
    units(H, [&](int64_t u) {
      const V d = load(drh + u);
      store(d_r + u, d * load(h + u));
      store(drh + u, d * load(reset + u));
    });
    act_back(0, reset, d_r, true);
    for (int k = 0; k < 2; ++k) put(k, r, 0, d_r);
  }

  void rnn_row(int64_t i, int64_t r, S* buffer) {
    S* dm = dm_ + i * ldH;
    act_back(0, buffer, dm, true);
    put(0, r, 0, dm);
  }

  // ---- the time-batched products ----

  void gradients(const Team& team, const Task& t, const S* tape, int64_t s0, int64_t s1, int64_t width, bool fresh) {
    const Rows& rows = t.rows;
    const int64_t pair0 = rows.off[s0], R = rows.off[s1] - pair0;
    if (dp_.params) {
      const Params& dp = dp_.params[t.ld];
      gradient(team, dp.W, t.e, 0, dz_rows_[0], GH, x_, width, R, fresh);
      gradient(team, dp.R, t.e, 0, dz_rows_[1], before_ ? 2 * H : GH, masked_rows_, Q, R, fresh);
      if (before_) gradient(team, dp.R, t.e, 2 * H, late_rows_, H, m_rows_, Q, R, fresh);
      sums(team, dp.bW, t.e, 0, raw_rows_[0], 0, GH, nullptr, 0, R, fresh);
      sums(team, dp.bR, t.e, 0, raw_rows_[1], 0, GH, nullptr, 0, R, fresh);
    }
    if (dp_.extras) {
      const Extras& dp = dp_.extras[t.ld];
      if (v_.proj) gradient(team, dp.hr, t.e, 0, dnew_rows_, Q, m_rows_, H, R, fresh);
      if (v_.layer_norm) {
        hats(team, tape + tape_layout_.x_hat() + pair0 * GH, R);
        sums(team, dp.gain_ih, t.e, 0, raw_rows_[0], 0, GH, hat_rows(), 0, R, fresh);
        hats(team, tape + tape_layout_.h_hat() + pair0 * GH, R);
        sums(team, dp.gain_hh, t.e, 0, raw_rows_[1], 0, GH, hat_rows(), 0, R, fresh);
        if (lstm_) {
          sums(team, dp.gain_c, t.e, 0, dseen_rows_, 0, H, c_hat_rows_, 0, R, fresh);
          sums(team, dp.bias_c, t.e, 0, dseen_rows_, 0, H, nullptr, 0, R, fresh);
        }
      }
      if (v_.peepholes) {
        for (int64_t g = 0; g + 1 < G - 1; ++g)
          sums(team, dp.ph, t.e, g * H, raw_rows_[0], g * H, H, before_rows_[1], 0, R, fresh);
        sums(team, dp.ph, t.e, (G - 2) * H, raw_rows_[0], (G - 1) * H, H, c_new_rows_, 0, R, fresh);
      }
    }
    team.wait();
    if (wants_dx(t.l)) input_gradient(team, t, s0, s1, width);
    team.wait();
  }

  // Row pointers into the tape, in late_rows_' place (which only cells without a norm use).
  const S* const* hat_rows() const { return late_rows_; }
  void hats(const Team& team, const S* from, int64_t R) {
    team.wait();
    for (int64_t r = team.begin(R); r < team.end(R); ++r) late_rows_[r] = from + r * GH;
    team.wait();
  }

  // to[row + m] = sum over r of left[r][column + m] (times right[r][m]), for the members' shares of [0, M).
  void sums(const Team& team, const Array<2>& to, int64_t e, int64_t row, const S* const* left, int64_t column,
            int64_t M, const S* const* right, int64_t right_column, int64_t R, bool fresh) {
    if (!to.data) return;
    const int64_t tiles = (M + L - 1) / L;
    const bool add = !fresh || (to.stride[0] == 0 && e > 0);
    for (int64_t tile = team.begin(tiles); tile < team.end(tiles); ++tile) {
      const int64_t m = tile * L, n = smaller<int64_t>(L, M - m);
      V sum(S(0));
      for (int64_t r = 0; r < R; ++r) {
        const V a = load(left[r] + column + m, n);
        sum = sum + (right ? a * load(right[r] + right_column + m, n) : a);
      }
      for (int64_t j = 0; j < n; ++j) {
        S& at = *element<S>(to, e, row + m + j);
        at = add ? at + sum.v[j] : sum.v[j];
      }
    }
  }

  // Rows [row, row + M) of to = left^T right over R rows. Every member calls it; two barriers.
  void gradient(const Team& team, const Array<3>& to, int64_t e, int64_t row, const S* const* left, int64_t M,
                const S* const* right, int64_t columns, int64_t R, bool fresh) {
    if (!to.data) return;
    const int64_t width = kWidest * L, count = (columns + width - 1) / width;
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel) {
      const int64_t column = panel * width, valid = smaller(width, columns - column);
      pack_panel(right, R, column, valid, static_cast<int>((valid + L - 1) / L), panels_ + column * R);
    }
    team.wait();
    const int64_t tiles = (M + kTile - 1) / kTile;
    const int64_t m0 = team.begin(tiles) * kTile, m1 = smaller(team.end(tiles) * kTile, M);
    if (m1 > m0) {
      S* packed = packed_ + m0 * pairs_;
      pack_columns(left, R, m0, m1 - m0, packed);
      const bool add = !fresh || (to.stride[0] == 0 && e > 0), straight = to.stride[2] == 1;
      const int64_t ld = straight ? to.stride[1] : padded(columns);
      S* base = straight ? element<S>(to, e, row + m0) : sums_ + m0 * ld;
      for (int64_t m = m0; !straight && add && m < m1; ++m)
        copy_row(element<S>(to, e, row + m), to.stride[2], base + (m - m0) * ld, 1, columns);
      for (int64_t column = 0; column < columns; column += width) {
        const int64_t valid = smaller(width, columns - column);
        const int nv = static_cast<int>((valid + L - 1) / L);
        Tile<S> t{};
        t.b = panels_ + column * R;
        t.ldb = nv * L;
        t.K = R;
        t.ldi = t.ldc = ld;
        t.last = valid - (nv - 1) * L;
        for (int j = 0; j < nv; ++j) t.offset[j] = j * L;
        for (int64_t m = m0; m < m1; m += kTile) {
          for (int64_t i = 0; i < smaller<int64_t>(kTile, m1 - m); i += rows_of(nv)) {
            t.packed = packed + (m - m0) * R + i;
            t.c = base + (m - m0 + i) * ld + column;
            t.init = add ? t.c : nullptr;
            run_tile<S, true>(t, static_cast<int>(smaller<int64_t>(rows_of(nv), smaller<int64_t>(kTile, m1 - m) - i)),
                              nv);
          }
        }
      }
      for (int64_t m = m0; !straight && m < m1; ++m)
        copy_row(base + (m - m0) * ld, 1, element<S>(to, e, row + m), to.stride[2], columns);
    }
    team.wait();
  }

  // dx of a chunk: to the user, or to the layer below.
  void input_gradient(const Team& team, const Task& t, int64_t s0, int64_t s1, int64_t width) {
    const Rows& rows = t.rows;
    const int64_t pair0 = rows.off[s0], ld = padded(this->inputs_);
    product(team, W_, dz_rows_[0], rows.off[s1] - pair0, nullptr, 0, dx_, ld);
    team.wait();
    for (int64_t s = s0; s < s1; ++s) {
      for (int64_t i = team.begin(rows.live[s]); i < team.end(rows.live[s]); ++i) {
        const int64_t time = rows.time(t.reversed, s, i);
        S* from = dx_ + (rows.off[s] - pair0 + i) * ld;
        if (t.l == 0) {
          S* to = element<S>(dp_.x, time, rows.e[i], rows.b[i]);
          if (t.d == 0 && !dx_adds_up())
            copy_row(from, 1, to, dp_.x.stride[3], width);
          else
            add_row(from, 1, to, dp_.x.stride[3], width);
          continue;
        }
        if (problem_.dropout > 0) {
          const uint64_t row = static_cast<uint64_t>((time * n_.E + rows.e[i]) * n_.B + rows.b[i]);
          Dropout{problem_.dropout, problem_.seed}.apply(from, width, row * static_cast<uint64_t>(width), t.l - 1);
        }
        for (int d = 0; d < n_.D; ++d) {
          const int64_t walk = n_.D == 1 ? s : rows.time(d == 1, time, i);
          S* to = dplane(t.l - 1, d, t.e) + (rows.off[walk] + i) * Q;
          if (t.d == 0)
            copy_row(from + d * Q, 1, to, 1, Q);
          else
            add_row(from + d * Q, 1, to, 1, Q);
        }
      }
    }
  }

  // dx where no step writes it, or where all weight sets add into it.
  void zero_dx(const Team& team) {
    if (dp_.x.data && team.rank == 0)
      for (int64_t e = 0; e < n_.E; ++e)
        for (int64_t i = 0; i < N; ++i)
          for (int64_t t = dx_adds_up() ? 0 : rows_[e].length[i]; t < n_.T; ++t)
            zero_row(element<S>(dp_.x, t, rows_[e].e[i], rows_[e].b[i]), dp_.x.stride[3], n_.I);
    team.wait();
  }

  // ---- after the last chunk ----

  void finish(const Team& team, const Task& t, bool fresh, int64_t width) {
    if (team.rank != 0) return;
    for (int which = 0; which < 1 + has_c_; ++which) {
      const Array<4>& to = which ? dp_.c0 : dp_.h0;
      if (!to.data) continue;
      const int64_t n = which ? H : Q, ld = which ? ldH : ldQ;
      const bool adds = n_.E > 1 && to.stride[1] == 0 && t.e > 0;
      for (int64_t i = 0; i < N; ++i) {
        S* at = element<S>(to, t.ld, t.rows.e[i], t.rows.b[i]);
        adds ? add_row(d_start_[which] + i * ld, 1, at, to.stride[3], n)
             : copy_row(d_start_[which] + i * ld, 1, at, to.stride[3], n);
      }
    }
    if (!fresh) return;  // else no step at all: every gradient of the weights is zero
    auto zero3 = [&](const Array<3>& a, int64_t rows, int64_t columns) {
      if (!a.data || (t.e > 0 && a.stride[0] == 0)) return;
      for (int64_t m = 0; m < rows; ++m) zero_row(element<S>(a, t.e, m), a.stride[2], columns);
    };
    auto zero2 = [&](const Array<2>& a, int64_t n) {
      if (a.data && (t.e == 0 || a.stride[0])) zero_row(element<S>(a, t.e, 0), a.stride[1], n);
    };
    if (dp_.params) {
      const Params& dp = dp_.params[t.ld];
      zero3(dp.W, GH, width), zero3(dp.R, GH, Q), zero2(dp.bW, GH), zero2(dp.bR, GH);
    }
    if (dp_.extras) {
      const Extras& dp = dp_.extras[t.ld];
      zero3(dp.hr, Q, H), zero2(dp.ph, GH - H), zero2(dp.gain_ih, GH), zero2(dp.gain_hh, GH);
      zero2(dp.gain_c, H), zero2(dp.bias_c, H);
    }
  }

  const Results& g_;
  const Arguments& dp_;
  void* tape_;
  bool apart_;
  Rows* rows_;
  int64_t chunk_, pairs_;
  Panels<S> R_, late_, W_, hr_;
  typename Base::Vectors vectors_;
  S *raw_[2], *dz_[2], *m_, *dnew_, *c_new_, *dseen_, *c_hat_, *masked_, *dx_, *copied_, *start_[2], *d_[2],
      *d_start_[2], *back_, *dm_, *extra_, *mask_, *zeros_, *packed_, *panels_, *sums_, *buffers_, *between_[2] = {};
  const S **raw_rows_[2], **dz_rows_[2], **m_rows_, **dnew_rows_, **c_new_rows_, **dseen_rows_, **c_hat_rows_,
      **masked_rows_, **dx_rows_, **late_rows_, **x_, **before_rows_[2];
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
