// k-means of one row for one lambda. Included once for each vector unit, within a namespace of its own, with LANES
// doubles to a vector; all do the same IEEE operations, and nothing here depends on LANES but speed.

typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef double LooseDoubles __attribute__((vector_size(8 * LANES), aligned(8)));
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
typedef int32_t LooseInts __attribute__((vector_size(4 * LANES), aligned(4)));

// g and from of entry j, started anywhere in low..high.
INLINE void best_start(const Row& row, double lambda, int32_t* from, int j, int low, int high) {
  const double *g = row.g, *S = row.S, *W = row.W, s = S[j], w = W[j];
  double best = -__builtin_inf();
  int at = low, i = low;
  if (high - low + 1 >= 2 * LANES) {
    Doubles bests = best - Doubles{};
    Longs here = {};
    for (int t = 0; t < LANES; ++t) here[t] = low + t;
    Longs ats = here;
    for (; i + LANES - 1 <= high; i += LANES, here += LANES) {
      const Doubles ds = s - *reinterpret_cast<const LooseDoubles*>(S + i);
      const Doubles dw = w - *reinterpret_cast<const LooseDoubles*>(W + i);
      const Doubles found = *reinterpret_cast<const LooseDoubles*>(g + i) + ds * ds / dw;
      const Longs better = found > bests;
      bests = better ? found : bests;
      ats = better ? here : ats;
    }
    best = bests[0];
    at = static_cast<int>(ats[0]);
    for (int t = 1; t < LANES; ++t) {
      if (bests[t] > best || (bests[t] == best && ats[t] < at)) {
        best = bests[t];
        at = static_cast<int>(ats[t]);
      }
    }
  }
  for (; i <= high; ++i) {
    const double ds = s - S[i], found = g[i] + ds * ds / (w - W[i]);
    at = found > best ? i : at;
    best = found > best ? found : best;
  }
  row.g[j] = best - lambda;
  from[j] = at;
}

// The same for LANES * VECTORS entries from j on, which share their starts.
template <int VECTORS>
INLINE void best_starts(const Row& row, double lambda, int32_t* from, int j, int low, int high) {
  const double *g = row.g, *S = row.S, *W = row.W;
  Doubles s[VECTORS], w[VECTORS], best[VECTORS];
  Longs at[VECTORS], here = low - Longs{};
  for (int t = 0; t < VECTORS; ++t) {
    s[t] = *reinterpret_cast<const LooseDoubles*>(S + j + LANES * t);
    w[t] = *reinterpret_cast<const LooseDoubles*>(W + j + LANES * t);
    const Doubles ds = s[t] - S[low];
    best[t] = g[low] + ds * ds / (w[t] - W[low]);
    at[t] = here;
  }
  for (int i = low + 1; i <= high; ++i) {
    here += 1;
    for (int t = 0; t < VECTORS; ++t) {
      const Doubles ds = s[t] - S[i], found = g[i] + ds * ds / (w[t] - W[i]);
      const Longs better = found > best[t];
      best[t] = better ? found : best[t];
      at[t] = better ? here : at[t];
    }
  }
  for (int t = 0; t < VECTORS; ++t) {
    *reinterpret_cast<LooseDoubles*>(row.g + j + LANES * t) = best[t] - lambda;
    *reinterpret_cast<LooseInts*>(from + j + LANES * t) = __builtin_convertvector(at[t], LooseInts);
  }
}

INLINE void best_group(const Row& row, double lambda, int32_t* from, int j, int entries, int low, int high) {
  if (entries <= HALF_GROUP) {
    best_starts<HALF_GROUP / LANES>(row, lambda, from, j, low, high);
  } else {
    best_starts<GROUP / LANES>(row, lambda, from, j, low, high);
  }
}

// All entries, block by block. Inside a block the starts of an entry lie between those of its neighbours: entries at
// falling powers of two from each other narrow them down to groups.
void by_blocks(const Row& row, double lambda, int32_t* from) {
  const double *Q = row.Q, *g = row.g;
  row.g[0] = 0;
  from[0] = 0;
  for (int a = 0, piece = 0, block = HALF_GROUP; a < row.u;) {
    piece += a == row.cuts[piece + 1];
    const int low = a == row.cuts[piece] ? a : from[a], stop = row.cuts[piece + 1];
    const double reached = Q[a] - g[a], limit = reached + lambda;
    if (block <= GROUP) {
      const int entries = least(block, stop - a);
      best_group(row, lambda, from, a + 1, block, low, a);
      int sure = 1;
      while (sure < entries && Q[a + sure + 1] - g[a + sure + 1] <= limit) ++sure;
      a += sure;
      const bool grow = sure == GROUP && 2 * (Q[a] - g[a] - reached) < lambda;
      block = grow ? GROUP * 3 / 2 : sure >= HALF_GROUP ? GROUP : HALF_GROUP;
      continue;
    }
    const int end = least(a + block, stop);
    best_start(row, lambda, from, end, low, a);
    const double g_end = g[end];
    if (!(Q[end] - g_end <= limit)) {
      block = (end - a) * 5 / 8;
      continue;
    }
    const int inner = end - a - 1, high = from[end];
    int stride = GROUP;
    while (2 * stride <= inner) stride *= 2;
    for (; stride >= GROUP; stride /= 2) {
      for (int t = stride - 1; t < inner; t += 2 * stride) {
        const int j = a + 1 + t;
        const int left = t < stride ? low : from[j - stride], right = t + stride < inner ? from[j + stride] : high;
        best_start(row, lambda, from, j, left, right);
      }
    }
    for (int t = 0; t < inner; t += GROUP) {
      const int j = a + 1 + t, right = t + GROUP <= inner ? from[j + GROUP - 1] : high;
      best_group(row, lambda, from, j, inner - t, t ? from[j - 1] : low, right);
    }
    row.g[end] = g_end;  // the last group may have run over it
    from[end] = high;
    if (2 * (Q[end] - g_end - reached) < lambda) block = block * 3 / 2;
    a = end;
  }
}

// All entries, with starts between those of a larger lambda (low) and of a smaller one (high).
void by_brackets(const Row& row, double lambda, const int32_t* low, const int32_t* high, int32_t* from) {
  row.g[0] = 0;
  from[0] = 0;
  for (int j = 1; j <= row.u;) {
    const int last = j + HALF_GROUP - 1;
    if (last <= row.u && high[last] < j) {
      best_starts<HALF_GROUP / LANES>(row, lambda, from, j, low[j], most(low[j], high[last]));
      j = last + 1;
    } else {
      best_start(row, lambda, from, j, low[j], most(low[j], high[j]));
      ++j;
    }
  }
}
