// Steps of rows while gradients are read in the order of samples, once, as they lie in memory. Duplicates are summed in
// order of occurrence, so bits do not depend on the number of threads. Part of kernels.inl.

// Lookups of one thread: those of tables side by side, or of a part of one table's rows.
struct Share {
  const Marked* tables;
  i64 count;
  i64 first_row, last_row, first_place, end_place;  // of a part
};

// Where one lookup's gradient is, and where it goes.
struct Item {
  const float* gradient;
  const float* other;            // row that it is multiplied by; null: none
  float* sum;
  i32 row;
  float factor;
};

// Items of one kind that are worked on together.
struct Items {
  static constexpr i64 MOST = 64, AHEAD = 16;
  Item all[MOST];
  i64 count = 0;
};

// Kinds of items: MIDDLE adds to a sum that FIRST begins and LAST takes; ALONE is the gradient of a row by itself.
enum ItemKind { MIDDLE = 0, ALONE = 3, NO_ROW = 4, ITEM_KINDS = 5 };

struct Portion {
  Items of[ITEM_KINDS];
};

// Reads the marks of a share's lookups in their order, a portion at a time.
template <int W>
class Portions {
 public:
  Portions(const Update& u, const float* table, const Share& share, const Bases& bases, i64 width)
      : update_(u), table_(table), share_(share), width_(width), bags_(share.tables[0].reads->bags) {
    for (i64 t = 0; t < share.count; t++)
      for (const Source& s : share.tables[t].reads->sources) reads_.push_back({&s, &share.tables[t], bases[s.tag]});
  }

  // False at the end. Gradients are prefetched, and what the first items of each kind go to.
  bool next(Portion& to) {
    for (Items& items : to.of) items.count = 0;
    const i64 number = i64(reads_.size());
    i64 n = 0;
    if (bags_)
      while (n < Items::MOST && read_ < number) {
        const i64 count = reads_[read_].source->count, stop = std::min(count, id_ + Items::MOST - n);
        for (n += stop - id_; id_ < stop; id_++) add(reads_[read_], id_, to);
        if (id_ == count) read_++, id_ = 0;
      }
    else
      for (const i64 count = reads_[0].source->count; n < Items::MOST && id_ < count; n++) {
        add(reads_[read_], id_, to);
        if (++read_ == number) read_ = 0, id_++;
      }
    prefetch_first(to);
    return n > 0;
  }

 private:
  struct Read {
    const Source* source;
    const Marked* table;
    Base base;
  };

  void add(const Read& read, i64 b, Portion& to) const {
    const i32 mark = read.source->of[b], code = -2 - mark;
    const bool shared = mark < -1;
    const i64 place = shared ? code >> 2 : 0, from = read.source->place(b);
    i64 kind = shared ? code & 3 : ALONE + (mark < 0);
    static_assert(NO_ROW == ALONE + 1, "");
    if (share_.end_place && kind != NO_ROW) {
      const bool own = shared ? place >= share_.first_place && place < share_.end_place : mark >= share_.first_row && mark <= share_.last_row;
      kind = own ? kind : i64(NO_ROW);
    }
    Items& items = to.of[kind];
    Item& item = items.all[items.count++];
    item.gradient = read.base.gradient + from * read.base.stride;
    item.other = read.base.other ? read.base.other + from * read.base.other_stride : nullptr;
    item.sum = read.table->sums + place * width_;
    // Read without a branch on the mark, which is hard to predict; of a row that is not shared, it is not used.
    const i32 row = read.table->row_of[place];
    item.row = shared ? row : mark;
    item.factor = read.base.factor;
    prefetch<2>(item.gradient, 4 * width_of<W>(width_));
    if (item.other) prefetch<2>(item.other, 4 * width_of<W>(width_));
  }

  // What the first items of each kind go to; later ones are prefetched while these are worked on.
  void prefetch_first(const Portion& of) const {
    const i64 width = width_of<W>(width_);
    for (i64 kind : {i64(MIDDLE), i64(FIRST), i64(LAST)})
      for (i64 i = 0; i < std::min(of.of[kind].count, Items::AHEAD); i++) prefetch<2>(of.of[kind].all[i].sum, 4 * width);
    for (i64 kind : {i64(LAST), i64(ALONE)})
      for (i64 i = 0; i < std::min(of.of[kind].count, Items::AHEAD); i++) prefetch_state(update_, table_, of.of[kind].all[i].row, width);
  }

  const Update& update_;
  const float* table_;
  const Share& share_;
  i64 width_, read_ = 0, id_ = 0;
  bool bags_;
  std::vector<Read> reads_;
};

// to = gradient, or with ADD to + gradient, of an item.
template <int W, bool ADD>
static inline __attribute__((always_inline)) void take_gradient(const Item& item, float* to, i64 w) {
  auto take = [&](auto by) __attribute__((always_inline)) {
    blocks<W>(width_of<W>(w), [&](auto lanes, i64 k) __attribute__((always_inline)) {
      auto v = lanes.load(item.gradient + k) * item.factor;
      if (decltype(by)::value) v *= lanes.load(item.other + k);
      lanes.store(to + k, ADD ? lanes.load(to + k) + v : v);
    });
  };
  if (item.other) take(std::true_type());
  else take(std::false_type());
}

// Sums of a share's rows, and the steps of those whose gradient is complete.
template <int W>
static RSE_ONCE void stream(const Update& u, float* table, i64 w, const Bases& bases, const Share& share) {
  const i64 width = width_of<W>(w);
  Row<W * Items::MOST> memory(width * Items::MOST);
  Portions<W> portions(u, table, share, bases, width);
  std::unique_ptr<Portion[]> two(new Portion[2]);
  Portion *now = &two[0], *later = &two[1];
  Summed rows[Items::MOST];
  for (bool more = portions.next(*now); more; std::swap(now, later)) {
    more = portions.next(*later);
    auto sum = [&](i64 kind, auto add) {
      const Items& items = now->of[kind];
      for (i64 i = 0; i < items.count; i++) {
        if (i + Items::AHEAD < items.count) prefetch<2>(items.all[i + Items::AHEAD].sum, 4 * width);
        take_gradient<W, decltype(add)::value>(items.all[i], items.all[i].sum, w);
      }
    };
    sum(FIRST, std::false_type());
    sum(MIDDLE, std::true_type());
    sum(LAST, std::true_type());
    i64 count = 0;
    for (i64 i = 0; i < now->of[LAST].count; i++) rows[count++] = {now->of[LAST].all[i].row, now->of[LAST].all[i].sum};
    for (i64 i = 0; i < now->of[ALONE].count; i++) {
      const Item& item = now->of[ALONE].all[i];
      float* own = const_cast<float*>(item.gradient);
      if (item.other || item.factor != 1.f || u.decay != 0) take_gradient<W, false>(item, own = memory.data() + i * width, w);
      rows[count++] = {item.row, own};
    }
    const i64 at = u.rule.number == SPARSE_GRADIENT ? claim(u, count) : 0;
    update_rows<W>(u, table, rows, count, Items::AHEAD, at, w);
  }
}
