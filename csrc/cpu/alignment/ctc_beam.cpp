// SPDX-License-Identifier: Apache-2.0
// CTC prefix search with a beam (Graves 2012, section 7.5.3, with a bounded number of prefixes; Hannun et al. 2014).
// A prefix carries two logarithms: of all paths that spell it and end in blank, and in its last label. At a step it
// stays, or grows by one label; the `width` most probable prefixes go on. Equal ones are ordered by prefix. Compiled
// once: it branches and chases pointers, wide registers would not help. A thread owns whole rows.
#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <map>
#include <tuple>
#include <utility>

#include "cpu/cpu.h"
#include "cpu/threads/machine.h"
#include "cpu/threads/threads.h"

namespace fusedrnn::cpu {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();
constexpr double kLargest = 1e37f;  // as wide.h's: from here on, as NaN, it is no score; below the negative it is -inf

double log_add(double a, double b) {
  if (a < b) std::swap(a, b);
  return b == kNone ? a : a + std::log1p(std::exp(b - a));
}

struct Prefix {
  int64_t parent, label;
};

struct Entry {
  int64_t prefix;  // -1: a new one, parent and label say which
  int64_t parent, label;
  double blank, spelled, total;  // log-probabilities: ends in blank, ends in its label, either
};

class Search {
 public:
  Search(const BeamSearch& call, int64_t b) : c_(call), b_(b) {}

  std::vector<Spelling> run(const Team& team) {
    prefixes_ = {{-1, -1}};
    beam_ = {{0, -1, -1, 0.0, kNone, 0.0}};
    child_of_.assign(static_cast<size_t>(c_.C), -1);
    for (int64_t t = 0; t < c_.lengths[b_]; ++t) {
      if (team.is_given_up()) return {};
      if (!team.seat) team.listen();
      if (!step(t)) return {{{}, std::numeric_limits<double>::quiet_NaN()}};
    }
    std::vector<Spelling> out;
    for (const Entry& entry : beam_) {
      if (static_cast<int64_t>(out.size()) == c_.top) break;
      Spelling spelling{{}, entry.total};
      for (int64_t p = entry.prefix; p > 0; p = prefixes_[static_cast<size_t>(p)].parent)
        spelling.labels.push_back(prefixes_[static_cast<size_t>(p)].label);
      std::reverse(spelling.labels.begin(), spelling.labels.end());
      out.push_back(std::move(spelling));
    }
    return out;
  }

 private:
  double score(int64_t t, int64_t label) const {
    const int64_t at = t * c_.log_probs.stride[0] + b_ * c_.log_probs.stride[1] + label * c_.log_probs.stride[2];
    return c_.dtype == Dtype::f64 ? logarithm(static_cast<const double*>(c_.log_probs.data)[at])
                                  : logarithm(static_cast<const float*>(c_.log_probs.data)[at]);
  }
  // NaN where it is no score.
  template <class S>
  static double logarithm(S x) {
    if (!(x < static_cast<S>(kLargest))) return std::numeric_limits<double>::quiet_NaN();
    return x <= static_cast<S>(-kLargest) ? kNone : static_cast<double>(x);
  }

  // The labels that can make a new prefix that survives: of one prefix's new ones at most `width` do, and at most
  // `width` of its labels lead to prefixes that are in the beam already. False where one of all classes has no score.
  bool choose_labels(int64_t t) {
    labels_.clear();
    bool sound = true;
    for (int64_t label = 0; label < c_.C; ++label) {
      const double log_prob = score(t, label);
      sound = sound && log_prob == log_prob;
      if (label != c_.blank) labels_.push_back({log_prob, label});
    }
    const auto most = static_cast<size_t>(2 * c_.width + 1);
    if (!sound || labels_.size() <= most) return sound;
    const auto better = [](const auto& a, const auto& b) {
      return a.first > b.first || (a.first == b.first && a.second < b.second);
    };
    std::nth_element(labels_.begin(), labels_.begin() + static_cast<std::ptrdiff_t>(most), labels_.end(), better);
    labels_.resize(most);
    std::sort(labels_.begin(), labels_.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    return true;
  }

  // False where a class has no score.
  bool step(int64_t t) {
    if (!choose_labels(t)) return false;
    next_.clear();
    // A prefix keeps its number, so what was marked for it may be a child that has fallen out of the beam since.
    std::fill(child_of_.begin(), child_of_.end(), -1);
    const double blank = score(t, c_.blank);
    for (const Entry& entry : beam_) {  // those that stay, at their old places
      const double stay = entry.prefix > 0 ? entry.spelled + score(t, entry.label) : kNone;
      next_.push_back({entry.prefix, entry.parent, entry.label, entry.total + blank, stay, kNone});
    }
    const size_t old = beam_.size();
    for (size_t i = 0; i < old; ++i) {
      const Entry& from = beam_[i];
      for (size_t k = 0; k < old; ++k) {  // grown into a prefix that the beam has already
        if (beam_[k].prefix == 0 || beam_[k].parent != from.prefix) continue;
        const int64_t label = beam_[k].label;
        child_of_[static_cast<size_t>(label)] = from.prefix;
        next_[k].spelled = log_add(next_[k].spelled, grown(from, label) + score(t, label));
      }
      for (const auto& [log_prob, label] : labels_) {
        const double spelled = grown(from, label) + log_prob;
        if (child_of_[static_cast<size_t>(label)] != from.prefix && spelled > kNone)
          next_.push_back({-1, from.prefix, label, kNone, spelled, spelled});
      }
    }
    for (size_t i = 0; i < old; ++i) next_[i].total = log_add(next_[i].blank, next_[i].spelled);
    std::erase_if(next_, [](const Entry& entry) { return !(entry.total > kNone); });
    // Every difference is ordered, so the result does not depend on how the library sorts.
    const auto better = [](const Entry& a, const Entry& b) {
      if (a.total != b.total) return a.total > b.total;
      return std::tie(a.prefix, a.parent, a.label) < std::tie(b.prefix, b.parent, b.label);
    };
    if (static_cast<int64_t>(next_.size()) > c_.width) {
      std::nth_element(next_.begin(), next_.begin() + static_cast<std::ptrdiff_t>(c_.width), next_.end(), better);
      next_.resize(static_cast<size_t>(c_.width));
    }
    std::sort(next_.begin(), next_.end(), better);
    for (Entry& entry : next_)
      if (entry.prefix < 0) {  // it may have been in the beam before: then its children know it by its old number
        const auto [found, fresh] =
            numbers_.try_emplace({entry.parent, entry.label}, static_cast<int64_t>(prefixes_.size()));
        entry.prefix = found->second;
        if (fresh) prefixes_.push_back({entry.parent, entry.label});
      }
    beam_.swap(next_);
    return true;
  }

  // All paths of a prefix after which `label` begins a new label.
  static double grown(const Entry& entry, int64_t label) { return label == entry.label ? entry.blank : entry.total; }

  const BeamSearch& c_;
  int64_t b_;
  std::vector<Prefix> prefixes_;
  std::map<std::pair<int64_t, int64_t>, int64_t> numbers_;  // (parent, label) -> prefix
  std::vector<Entry> beam_, next_;
  std::vector<int64_t> child_of_;  // by label: the prefix in work, if the beam has it grown by this label
  std::vector<std::pair<double, int64_t>> labels_;
};

struct Rows {
  const BeamSearch* c;
  std::vector<std::vector<Spelling>>* out;
  int64_t next;
  std::exception_ptr* failed;  // of each thread
};

void some_rows(void* argument, const Team& team) {
  Rows& rows = *static_cast<Rows*>(argument);
  try {
    for (;;) {
      const int64_t b = __atomic_fetch_add(&rows.next, 1, __ATOMIC_RELAXED);
      if (b >= rows.c->B || team.is_given_up()) return;
      (*rows.out)[static_cast<size_t>(b)] = Search(*rows.c, b).run(team);
    }
  } catch (const Interrupted&) {
    throw;
  } catch (...) {  // no memory; it must not leave the parallel region
    rows.failed[team.rank] = std::current_exception();
  }
}

}  // namespace

std::vector<std::vector<Spelling>> ctc_beam(const BeamSearch& call, int threads) {
  std::vector<std::vector<Spelling>> out(static_cast<size_t>(call.B));
  threads = static_cast<int>(std::min<int64_t>(std::min(threads, processors()), std::max<int64_t>(call.B, 1)));
  std::vector<std::exception_ptr> failed(static_cast<size_t>(threads));
  Rows rows{&call, &out, 0, failed.data()};
  parallel(threads, some_rows, &rows);
  for (const std::exception_ptr& error : failed)
    if (error) std::rethrow_exception(error);
  return out;
}

}  // namespace fusedrnn::cpu
