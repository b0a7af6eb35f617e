// Optimizer steps of one row. Part of kernels.inl.
//
// A rule is a struct that holds its constants. An elementwise rule has `run`, the step of a block of elements from
// their gradient and states. A rowwise rule has `factors`, computed from the mean square of the row's gradient. `name`
// is that of the Python class (recsys_embed/optim); the rule's number is its index in `Rules`.

template <int W>
static inline float mean_square(const float* g, i64 w) {
  return row_sum<W>(w, [&](auto lanes, i64 k) { return lanes.load(g + k) * lanes.load(g + k); }) / float(width_of<W>(w));
}

// Buffer of one row, in registers if its width is known at compile time.
template <int W>
struct Row {
  float fixed[W ? W : 1];
  std::vector<float> memory;
  explicit Row(i64 width) : memory(W ? 0 : width) {}
  float* data() { return W ? fixed : memory.data(); }
};

struct ElementRule {
  static constexpr bool by_row = false, rare = false;
  // Step size of a row.
  inline float sized(const Update&, i64, float size) const { return size; }
  // Whether steps without a gradient leave the row unchanged.
  inline bool rests(const Rule&, i64, i64) const { return false; }
};

// A rowwise step: row = row * keep - gradient * step.
struct Factors {
  float keep, step;
};

// Vectors are named by the lanes: a type deduced from an argument is one that clang takes to be aligned.
struct Sgd : ElementRule {
  static constexpr const char* name = "sgd";
  static constexpr i64 elements = 0;
  explicit Sgd(const Rule&) {}
  template <class L>
  inline void run(L, typename L::V g, typename L::V& weight, typename L::V&, typename L::V&, float size, float) const {
    weight -= g * size;
  }
};

struct Adagrad : ElementRule {
  static constexpr const char* name = "adagrad";
  static constexpr i64 elements = 1;
  explicit Adagrad(const Rule&) {}
  template <class L>
  inline void run(L lanes, typename L::V g, typename L::V& weight, typename L::V& sum, typename L::V&, float size, float eps) const {
    sum += g * g;
    weight -= g / (lanes.root(sum) + eps) * size;
  }
};

struct RowwiseAdagrad {
  static constexpr const char* name = "rowwise_adagrad";
  static constexpr bool by_row = true, shrinks = false, rare = false;
  explicit RowwiseAdagrad(const Rule&) {}
  inline Factors factors(const Rule& r, i64 row, i64, float square, float size, float eps) const {
    return {1.f, size / (std::sqrt(r.state[0][row] += square) + eps)};
  }
};

struct Adam : ElementRule {
  static constexpr const char* name = "adam";
  static constexpr i64 elements = 2;
  float rest1, rest2;
  explicit Adam(const Rule& r) : rest1(float(r.constants[0])), rest2(float(r.constants[1])) {}
  // With state[2], each row counts its own steps.
  inline float sized(const Update& u, i64 row, float size) const {
    if (!u.rule.state[2]) return size;
    i32& count = reinterpret_cast<i32*>(u.rule.state[2])[row];
    return size * float(u.rule.curve[std::clamp<i64>(++count, 1, u.rule.curve_count) - 1]);
  }
  // A row that never had a gradient has zero moments, so it does not move.
  inline bool rests(const Rule& r, i64 place, i64 width) const {
    float moved = 0;
    for (i64 k = place; k < place + width; k++) moved += std::abs(r.state[0][k]) + r.state[1][k];
    return moved == 0;
  }
  template <class L>
  inline void run(L lanes, typename L::V g, typename L::V& weight, typename L::V& mean, typename L::V& square, float size, float eps) const {
    mean += (g - mean) * rest1;
    // A mean of squares that overflowed stays infinite, as torch's does: its weight rests. The difference would be NaN.
    square = square < lanes.all(INFINITY) ? square + (g * g - square) * rest2 : square;
    weight -= mean / (lanes.root(square) + eps) * size;
  }
};

// A weight stays 0 until |z| exceeds `l1`. Where the weight is not 0, z is computed from it: so a table may start
// from any weights.
struct Ftrl : ElementRule {
  static constexpr const char* name = "ftrl";
  static constexpr bool rare = true;
  static constexpr i64 elements = 2;
  float beta, l1, l2;
  explicit Ftrl(const Rule& r) : beta(float(r.constants[0])), l1(float(r.constants[1])), l2(float(r.constants[2])) {}
  template <class L>
  inline void run(L lanes, typename L::V g, typename L::V& weight, typename L::V& sum, typename L::V& z, float size, float) const {
    sum += g * g;
    if (size == 0) return;
    const typename L::V none = lanes.all(0.f), one = lanes.all(1.f), limit = lanes.all(l1), sign = lanes.sign(weight);
    typename L::V curvature = (lanes.root(sum) + beta) / size + l2;
    const typename L::V moved = weight * curvature - g, below = z < -limit ? -limit : z;
    z = weight != none ? -(moved + sign * l1) : (below > limit ? limit : below) + g;
    curvature = curvature > none ? curvature : one;
    const typename L::V crossed = lanes.far(z) <= limit ? none : -(z - lanes.sign(z) * l1) / curvature;
    const typename L::V kept = weight - g / curvature;
    weight = lanes.sign(moved) * sign > none ? kept : g == none ? kept : crossed;
  }
};

// Weight decay grows with the number of steps since the row was last read.
struct RowwiseRmsprop {
  static constexpr const char* name = "rowwise_rmsprop";
  static constexpr bool by_row = true, shrinks = true, rare = true;
  float rest, alpha, least;
  explicit RowwiseRmsprop(const Rule& r)
      : rest(float(r.constants[0])), alpha(float(r.constants[1])), least(float(r.constants[2])) {}
  inline Factors factors(const Rule& r, i64 row, i64 step, float square, float size, float eps) const {
    float& mean = r.state[0][row];
    // One that overflowed stays infinite: the difference would be NaN.
    if (mean < INFINITY) mean += (square - mean) * rest;
    float gap = 1;
    if (r.state[1]) {
      i32& seen = reinterpret_cast<i32*>(r.state[1])[row];
      if (seen) gap = float(step - seen);
      seen = i32(step);
    }
    return {std::max(least, 1 - std::min(1.f, gap * (size * alpha))), size / (std::sqrt(mean) + eps)};
  }
};

template <class... All>
struct RuleList {
  // Names of all rules in order, each followed by a space.
  static std::string names() { return ((std::string(All::name) + " ") + ...); }
  // Calls fn with the rule of this number.
  template <class F>
  static inline __attribute__((always_inline)) void with(const Rule& r, F&& fn) {
    i64 number = 0;
    (void)((r.number == number++ && (fn(All(r)), true)) || ...);
  }
};

using Rules = RuleList<Sgd, Adagrad, RowwiseAdagrad, Adam, Ftrl, RowwiseRmsprop>;

static inline float size_of(const Update& u, i64 step) { return float(u.sizes[step - u.first - 1]); }
static inline float epsilon_of(const Update& u, i64 step) { return float(u.epsilons[step - u.first - 1]); }

// Calls fn(lanes, k, weight, first, second) for the blocks of a row and stores the weights and states it changes.
template <int W, class R, class F>
static inline __attribute__((always_inline)) void each_block(const Rule& r, float* weight, i64 place, i64 width, F&& fn) {
  float* first = R::elements > 0 ? r.state[0] + place : nullptr;
  float* second = R::elements > 1 ? r.state[1] + place : nullptr;
  blocks<W>(width, [&](auto lanes, i64 k) {
    typename decltype(lanes)::V x = lanes.load(weight + k), a = x, b = x;
    if constexpr (R::elements > 0) a = lanes.load(first + k);
    if constexpr (R::elements > 1) b = lanes.load(second + k);
    fn(lanes, k, x, a, b);
    lanes.store(weight + k, x);
    if constexpr (R::elements > 0) lanes.store(first + k, a);
    if constexpr (R::elements > 1) lanes.store(second + k, b);
  });
}

template <int W, class R>
static inline __attribute__((always_inline)) void scale_row(float* weight, const float* g, Factors by, i64 width) {
  blocks<W>(width, [&](auto lanes, i64 k) {
    auto x = lanes.load(weight + k);
    if constexpr (R::shrinks) x *= by.keep;
    lanes.store(weight + k, x - lanes.load(g + k) * by.step);
  });
}

// Makes steps [from, to] of a row without a gradient: their gradient is the weight decay alone.
template <int W>
static inline void step_without_gradient(const Update& u, float* weight, i64 row, i64 from, i64 to, i64 w) {
  const i64 width = width_of<W>(w), place = row * width;
  const float decay = float(u.decay);
  Rules::with(u.rule, [&](const auto& rule) {
    using R = std::decay_t<decltype(rule)>;
    if constexpr (R::by_row) {
      Row<W> memory(width);
      float* g = memory.data();
      for (i64 t = from; t <= to; t++) {
        blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(g + k, lanes.load(weight + k) * decay); });
        scale_row<W, R>(weight, g, rule.factors(u.rule, row, t, mean_square<W>(g, w), size_of(u, t), epsilon_of(u, t)), width);
      }
    } else {
      if (decay == 0 && rule.rests(u.rule, place, width)) return;
      each_block<W, R>(u.rule, weight, place, width, [&](auto lanes, i64, typename decltype(lanes)::V& x, typename decltype(lanes)::V& a, typename decltype(lanes)::V& b) {
        for (i64 t = from; t <= to; t++) rule.run(lanes, x * decay, x, a, b, size_of(u, t), epsilon_of(u, t));
      });
    }
  });
}

// As step_without_gradient, of a row or states that each step rounds, whether it was deferred or not.
static void step_rounded_without_gradient(const Update& u, float* table, i64 row, i64 from, i64 to, i64 width);

template <int W>
static RSE_ONCE void catch_up_missed(const Update& u, float* table, i64 row, i64 to, i64 w) {
  const i64 width = width_of<W>(w);
  // Steps before the first of the log are part of every row.
  const i64 from = std::max<i64>(u.last[row], u.first) + 1;
  u.last[row] = i32(to);
  if (u.rule.rounded || u.stored.bytes) step_rounded_without_gradient(u, table, row, from, to, width);
  else step_without_gradient<W>(u, table + row * width, row, from, to, w);
}

// Applies the steps up to `to` that a row was not read in.
template <int W>
static inline __attribute__((always_inline)) void catch_up(const Update& u, float* table, i64 row, i64 to, i64 w) {
  if (u.last && u.last[row] < to) catch_up_missed<W>(u, table, row, to, w);
}

// A row and its summed gradient, and its weights where they are not those of the table.
struct Summed {
  i64 row;
  float* gradient;
  float* weight;
};

// Writes the gradients instead of making a step; `at` is the first row's place in a sparse gradient.
template <int W>
static void hand_out(const Update& u, const Summed* rows, i64 count, i64 at, i64 w) {
  const i64 width = width_of<W>(w);
  const bool sparse = u.rule.number == SPARSE_GRADIENT;
  for (i64 i = 0; i < count; i++) {
    if (sparse) u.touched[at + i] = rows[i].row;
    float* to = u.gradient + (sparse ? at + i : rows[i].row) * width;
    blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(to + k, lanes.load(rows[i].gradient + k)); });
  }
}

// One step of a row; overwrites its gradient.
template <int W, class R>
static inline __attribute__((always_inline)) void step_row(const Update& u, const R& rule, float* weight, float* g, i64 row, float size, float eps, float decay, i64 w) {
  const i64 width = width_of<W>(w);
  if (decay != 0)
    blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(g + k, lanes.load(g + k) + lanes.load(weight + k) * decay); });
  if constexpr (R::by_row) {
    scale_row<W, R>(weight, g, rule.factors(u.rule, row, u.step, mean_square<W>(g, w), size, eps), width);
  } else {
    const float sized = rule.sized(u, row, size);
    each_block<W, R>(u.rule, weight, row * width, width, [&](auto lanes, i64 k, typename decltype(lanes)::V& x, typename decltype(lanes)::V& a, typename decltype(lanes)::V& b) {
      rule.run(lanes, lanes.load(g + k), x, a, b, sized, eps);
    });
  }
}

static inline __attribute__((always_inline)) void prefetch_state(const Update& u, const float* table, i64 row, i64 width) {
  if (u.stored.bytes) prefetch<2>(reinterpret_cast<const char*>(table) + row * u.stored.bytes, u.stored.bytes);
  else if (u.rule.number >= 0) prefetch<2>(table + row * width, 4 * width);
  for (i64 i = 0; i < 4 && u.rule.state[i]; i++) {
    const i64 bytes = (i < u.rule.elements ? width : 1) * (u.rule.forms[i].bits ? u.rule.forms[i].bits / 8 : 4);
    prefetch<2>(reinterpret_cast<const char*>(u.rule.state[i]) + row * bytes, bytes);
  }
  if (u.last) prefetch<2>(u.last + row, 4);
}

// One step on each row; may overwrite its gradient with weight decay. The rule is chosen once for all rows: for narrow
// rows, choosing it takes half of the time. `ahead`: rows that are prefetched before the one in work; 0: none.
template <int W>
static RSE_ONCE void step_rows(const Update& u, float* table, const Summed* rows, i64 count, i64 ahead, i64 w) {
  const i64 width = width_of<W>(w);
  const float size = size_of(u, u.step), eps = epsilon_of(u, u.step), decay = float(u.decay);
  const i64 prefetched = ahead ? count - ahead : 0;
  Rules::with(u.rule, [&](const auto& rule) {
    constexpr int V = std::decay_t<decltype(rule)>::rare && W != 16 ? 0 : W;  // what few use is compiled for few widths
    for (i64 i = 0; i < count; i++) {
      if (i < prefetched) prefetch_state(u, table, rows[i + ahead].row, width);
      const i64 row = rows[i].row;
      if (u.last) {
        catch_up<W>(u, table, row, u.step - 1, w);
        u.last[row] = i32(u.step);
      }
      step_row<V>(u, rule, table ? table + row * width : rows[i].weight, rows[i].gradient, row, size, eps, decay, width);
    }
  });
}

#include "low_precision.inl"

template <int W>
static void update_rows(const Update& u, float* table, const Summed* rows, i64 count, i64 ahead, i64 at, i64 w) {
  if (u.rule.number < 0) hand_out<W>(u, rows, count, at, w);
  else if (u.rule.rounded || u.stored.bytes) step_rounded_rows(u, table, rows, count, width_of<W>(w), step_rows<W>);
  else step_rows<W>(u, table, rows, count, ahead, w);
}
