// Visits the rows that a batch read, or rows in a list: their steps, or their deferred steps. Part of kernels.inl.

// Functions over the rows of a table.
struct Visits {
  void (*stream)(const Update&, float*, i64, const Bases&, const Share&);
  void (*catch_up)(const Update&, float*, i64, const u64*, i64, i64);
  void (*catch_up_listed)(const Update&, float*, i64, const i64*, i64, i64);
  void (*update_listed)(const Update&, float*, i64, const i64*, const float*, i64, i64);
};

template <int W>
static Visits visits_of() {
  return {stream<W>, catch_up_sorted<W>, catch_up_listed<W>, update_listed<W>};
}

static Visits choose_visits(i64 width) {
  switch (width) {
    case 1: return visits_of<compiled(1)>();
    case 4: return visits_of<compiled(4)>();
    case 8: return visits_of<compiled(8)>();
    case 16: return visits_of<16>();
    case 32: return visits_of<compiled(32)>();
    case 64: return visits_of<compiled(64)>();
    case 128: return visits_of<compiled(128)>();
    default: return visits_of<0>();
  }
}

static bool within(const Update& u, const i64* rows, i64 count) {
  for (i64 i = 0; i < count; i++)
    if (rows[i] < 0 || rows[i] >= u.rows) return false;
  return true;
}

// Applies the deferred steps of listed, distinct rows of a storage, or of all; false, and none is applied, where a row
// lies beyond it.
static bool catch_up_rows(const Update& u, float* table, i64 width, i64 threads, const i64* rows, i64 count) {
  if (rows && !within(u, rows, count)) return false;
  const auto catch_up = choose_visits(width).catch_up_listed;
  const i64 piece = 4096, end = rows ? count : u.rows;
  i64 next = 0;
  parallel(threads, [&](i64, i64) {
    for (i64 from; (from = __atomic_fetch_add(&next, piece, __ATOMIC_RELAXED)) < end;)
      catch_up(u, table, width, rows, from, std::min(from + piece, end));
  });
  return true;
}

// One step of listed, distinct rows of a storage; false, and none is made, where a row lies beyond it.
static bool update_listed_rows(const Update& u, float* table, i64 width, const i64* rows, const float* values, i64 count,
                               i64 threads) {
  if (!within(u, rows, count)) return false;
  const auto update = choose_visits(width).update_listed;
  const i64 piece = 1024;
  i64 next = 0;
  parallel(threads, [&](i64, i64) {
    for (i64 from; (from = __atomic_fetch_add(&next, piece, __ATOMIC_RELAXED)) < count;)
      update(u, table, width, rows, values, from, std::min(from + piece, count));
  });
  return true;
}

// Memory of one thread for marking tables.
struct Marks {
  u64* entries[2];
  std::vector<i32> left, place_of;
};

// The lookups of a storage by table, and tables with so many of them that one thread would take longest.
struct Divided {
  std::vector<TableReads> tables;
  std::vector<i64> wide, narrow;
  u64* wide_entries[2] = {nullptr, nullptr};
  std::vector<Marks> marks;      // of each thread

  Divided(const Call& c, const std::vector<Source>& sources, bool count_few, Scratch& scratch) : marks(c.threads) {
    for (const Source& s : sources) {
      auto found = std::find_if(tables.begin(), tables.end(), [&](const TableReads& t) { return t.base == s.base; });
      if (found == tables.end()) found = tables.insert(tables.end(), TableReads(s, c.offsets != nullptr));
      found->add(s);
    }
    const i64 all = count_lookups(sources);
    i64 widest = 0, largest = 0;
    for (i64 t = 0; t < i64(tables.size()); t++) {
      const bool is_wide = c.threads > 1 && tables[t].lookups() * c.threads * 2 > all;
      (is_wide ? wide : narrow).push_back(t);
      if (is_wide) widest = std::max(widest, tables[t].lookups());
      else if (!count_few || !has_few_rows(tables[t])) largest = std::max(largest, tables[t].lookups());
    }
    auto take = [&](i64 lookups) { return static_cast<u64*>(scratch.take(lookups * i64(sizeof(u64)))); };
    for (u64*& entries : wide_entries) entries = take(widest);
    for (Marks& own : marks)
      for (u64*& entries : own.entries) entries = take(largest);
  }
};

// Applies the deferred steps of the rows that are read.
static void catch_up_tables(const Call& c, const std::vector<Source>& sources, const Update& u, float* table, i64 width, Scratch& scratch) {
  Divided divided(c, sources, false, scratch);
  const auto visit = choose_visits(width).catch_up;
  for (i64 t : divided.wide) {
    i64 count = 0;
    const u64* entries = sorted_entries(divided.tables[t], divided.wide_entries[0], divided.wide_entries[1], c.threads, count);
    parallel(c.threads, [&](i64 thread, i64 team) {
      visit(u, table, width, entries, start_of_part(entries, count, thread, team), start_of_part(entries, count, thread + 1, team));
    });
  }
  i64 next = 0;
  parallel(c.threads, [&](i64 thread, i64) {
    Marks& own = divided.marks[thread];
    for (i64 i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < i64(divided.narrow.size());) {
      i64 count = 0;
      const u64* entries = sorted_entries(divided.tables[divided.narrow[i]], own.entries[0], own.entries[1], 1, count);
      visit(u, table, width, entries, 0, count);
    }
  });
}

// One step of the rows that are read.
static void update_tables(const Call& c, const std::vector<Source>& sources, const Bases& bases, const Update& u, float* table, i64 width, Scratch& scratch) {
  Divided divided(c, sources, true, scratch);
  std::vector<Marked> marked;
  for (const TableReads& t : divided.tables)
    marked.push_back({&t, static_cast<i32*>(scratch.take((t.lookups() / 2 + c.threads + 1) * i64(sizeof(i32)))), 0, nullptr, {}});
  for (i64 t : divided.wide) mark_in_parts(divided.tables[t], marked[t], divided.wide_entries[0], divided.wide_entries[1], c.threads);
  i64 next = 0;
  parallel(c.threads, [&](i64 thread, i64) {
    Marks& own = divided.marks[thread];
    for (i64 i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < i64(divided.narrow.size());) {
      const TableReads& t = divided.tables[divided.narrow[i]];
      Marked& to = marked[divided.narrow[i]];
      if (has_few_rows(t)) {
        mark_by_count(t, to, own.left, own.place_of);
        continue;
      }
      i64 count = 0;
      const u64* entries = sorted_entries(t, own.entries[0], own.entries[1], 1, count);
      to.places = mark_sorted(t, entries, 0, count, 0, to.row_of);
    }
  });
  i64 places = 0;
  for (const Marked& m : marked) places += m.places + 1;
  float* sums = static_cast<float*>(scratch.take(places * width * i64(sizeof(float))));
  for (Marked& m : marked) m.sums = sums, sums += (m.places + 1) * width;
  std::vector<Share> shares;
  for (i64 t : divided.wide)
    for (i64 p = 0, place = 0; p < c.threads; place = marked[t].ends[2 * p++])
      shares.push_back({&marked[t], 1, p ? marked[t].ends[2 * p - 1] + 1 : 0, marked[t].ends[2 * p + 1], place, marked[t].ends[2 * p]});
  // Tables whose gradients lie side by side are read together.
  const i64 most = c.threads == 1 ? INT64_MAX : count_lookups(sources) / (4 * c.threads);
  i64 held = 0;
  for (i64 i = 0, before = -2; i < i64(divided.narrow.size()); before = divided.narrow[i++]) {
    const i64 t = divided.narrow[i];
    if (t != before + 1 || held + divided.tables[t].lookups() / 2 > most) shares.push_back({&marked[t], 0, 0, 0, 0, 0}), held = 0;
    shares.back().count++, held += divided.tables[t].lookups();
  }
  const auto visit = choose_visits(width).stream;
  next = 0;
  parallel(c.threads, [&](i64, i64) {
    for (i64 i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < i64(shares.size());) visit(u, table, width, bases, shares[i]);
  });
}
