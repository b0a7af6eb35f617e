// Gradients of slices: lookups that read several consecutive elements of an array. Slices overlap. Part of kernels.inl.

// Sorts entries into buckets and keeps their order. `walk` is called twice with the same entries: to count, then to
// place.
template <class Entry>
struct Buckets {
  i64 number, total;
  std::vector<i64> starts;
  Entry* entries;

  template <class Walk>
  void fill(i64 threads, i64 lookups, Scratch& scratch, Walk&& walk) {
    std::vector<std::vector<i64>> counts(threads);
    parallel(threads, [&](i64 thread, i64 team) {
      for (i64 part = thread; part < threads; part += team) {
        counts[part].assign(number, 0);
        walk(lookups * part / threads, lookups * (part + 1) / threads,
             [&](i64 bucket, const Entry&) { counts[part][bucket]++; });
      }
    });
    starts.assign(number + 1, 0);
    total = 0;
    for (i64 b = 0; b < number; b++) {
      starts[b] = total;
      for (auto& own : counts) {
        const i64 here = own[b];
        own[b] = total;
        total += here;
      }
    }
    starts[number] = total;
    entries = static_cast<Entry*>(scratch.take(total * sizeof(Entry)));
    parallel(threads, [&](i64 thread, i64 team) {
      for (i64 part = thread; part < threads; part += team) {
        i64* at = counts[part].data();
        walk(lookups * part / threads, lookups * (part + 1) / threads,
             [&](i64 bucket, const Entry& entry) { entries[at[bucket]++] = entry; });
      }
    });
  }

  // Calls fn(bucket, memory of the thread) for every bucket; a free thread takes the next four.
  template <class Memory, class F>
  void each(i64 threads, F&& fn) {
    i64 next = 0;
    parallel(threads, [&](i64, i64) {
      Memory memory;
      for (i64 first; (first = __atomic_fetch_add(&next, 4, __ATOMIC_RELAXED)) < number;)
        for (i64 b = first; b < std::min(first + 4, number); b++)
          if (starts[b] < starts[b + 1]) fn(b, memory);
    });
  }
};

struct Piece {
  u32 first, offset;
  uint16_t length, tag;
};

struct ElementMemory {
  std::vector<float> sum;
  std::vector<u64> touched;
};

// Slices overlap, so they are cut at the ends of fixed ranges of the array, and each range is summed by one thread.
static void update_elements(const Call& c, const std::vector<Source>& sources, const Bases& bases, const Update& u,
                            float* table, Scratch& scratch) {
  const i64 lookups = count_lookups(sources);
  i64 shift = 11;
  while (u.rows >> shift > 8192) shift++;
  const i64 range = i64(1) << shift;
  Buckets<Piece> buckets{(u.rows + range - 1) >> shift, 0, {}, nullptr};
  buckets.fill(c.threads, lookups, scratch, [&](i64 from, i64 to, auto&& put) {
    each_lookup(sources, from, to, [&](const Source& s, i64 b) {
      if (s.of[b] < 0) return;
      i64 at = s.of[b], left = s.num_rows, offset = s.place(b) * bases[s.tag].stride;
      while (left) {
        const i64 end = std::min(s.base + s.rows, (at >> shift << shift) + range), length = std::min(left, end - at);
        put(at >> shift, Piece{u32(at), u32(offset), uint16_t(length), uint16_t(s.tag)});
        left -= length, offset += length, at += length;
        if (at == s.base + s.rows) at = s.base;
      }
    });
  });
  buckets.each<ElementMemory>(c.threads, [&](i64 b, ElementMemory& memory) {
    const i64 first = b << shift;
    memory.sum.assign(range, 0.f);
    memory.touched.assign(range / 64, 0);
    for (i64 i = buckets.starts[b]; i < buckets.starts[b + 1]; i++) {
      const Piece& piece = buckets.entries[i];
      const Base& base = bases[piece.tag];
      const float* __restrict g = base.gradient + piece.offset;
      float* __restrict sum = memory.sum.data() + (piece.first - first);
      for (i64 k = 0; k < piece.length; k++) sum[k] += base.factor * g[k];
      for (i64 k = 0, at = piece.first - first; k < piece.length;) {
        const i64 bit = (at + k) & 63, here = std::min<i64>(64 - bit, piece.length - k);
        memory.touched[(at + k) >> 6] |= (here == 64 ? ~u64(0) : (u64(1) << here) - 1) << bit;
        k += here;
      }
    }
    i64 known = 0;
    if (u.rule.number == SPARSE_GRADIENT)
      for (u64 word : memory.touched) known += bits_set(word);
    i64 place = u.rule.number == SPARSE_GRADIENT ? claim(u, known) : 0;
    for (i64 word = 0, count = 0; word < range / 64; word++, place += count, count = 0) {
      Summed rows[64];
      for (u64 bits = memory.touched[word]; bits; bits &= bits - 1) {
        const i64 k = word * 64 + __builtin_ctzll(bits);
        rows[count++] = {first + k, memory.sum.data() + k};
      }
      update_rows<1>(u, table, rows, count, 0, place, 1);
    }
  });
}
