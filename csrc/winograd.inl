// Winograd's F(4x4, 3x3) for one vector width. winograd.cpp includes this file once per instruction
// set, inside a namespace, with LANES (floats of a vector) and ROWS (of the register tile) defined.
//
//   y = A^T [ (G w G^T) . (B^T d B) ] A     d: 6x6 input, y: 4x4 output (Lavin & Gray, 1509.09308)
//
// from the points 0, +-11/16, +-3/2 and infinity, whose rounding error is half that of the usual
// 0, +-1, +-2. Arithmetic is fp32 whatever the images are.

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

constexpr int VECTORS = PANEL / LANES;  // of a panel

static inline vec load(const float* p) {
  vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, vec v) { __builtin_memcpy(p, &v, sizeof v); }

static inline vec load(const bf16* p) {
  halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, bits) << 16);
}

static inline void store(bf16* p, vec v) {  // to nearest, ties to even; NaN stays NaN
  const bits u = (bits)v;
  const bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const bits is_nan = (bits)(v != v);
  const halves h = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), halves);
  __builtin_memcpy(p, &h, sizeof h);
}

constexpr float P = 0.6875f, Q = 1.5f;  // the points are 0, +-P, +-Q, infinity
constexpr float P2 = P * P, Q2 = Q * Q;

// v = B^T d for one column of 6
static inline void transform_input(const vec d[6], vec v[6]) {
  const vec even_p = d[4] - Q2 * d[2], odd_p = P * (d[3] - Q2 * d[1]);
  const vec even_q = d[4] - P2 * d[2], odd_q = Q * (d[3] - P2 * d[1]);
  v[0] = P2 * Q2 * d[0] - (P2 + Q2) * d[2] + d[4];
  v[1] = even_p + odd_p;
  v[2] = even_p - odd_p;
  v[3] = even_q + odd_q;
  v[4] = even_q - odd_q;
  v[5] = P2 * Q2 * d[1] - (P2 + Q2) * d[3] + d[5];
}

// y = A^T m for one column of 6
static inline void transform_output(const vec m[6], vec y[4]) {
  const vec sum_p = m[1] + m[2], difference_p = m[1] - m[2];
  const vec sum_q = m[3] + m[4], difference_q = m[3] - m[4];
  y[0] = m[0] + sum_p + sum_q;
  y[1] = P * difference_p + Q * difference_q;
  y[2] = P2 * sum_p + Q2 * sum_q;
  y[3] = P * P2 * difference_p + Q * Q2 * difference_q + m[5];
}

// u = G w for one column of 3
static inline void transform_weights(const vec w[3], vec u[6]) {
  constexpr float AT_P = 1 / (2 * P2 * (P2 - Q2)), AT_Q = 1 / (2 * Q2 * (Q2 - P2));
  const vec even_p = w[0] + P2 * w[2], odd_p = P * w[1], even_q = w[0] + Q2 * w[2],
            odd_q = Q * w[1];
  u[0] = w[0] * (1 / (P2 * Q2));
  u[1] = AT_P * (even_p + odd_p);
  u[2] = AT_P * (even_p - odd_p);
  u[3] = AT_Q * (even_q + odd_q);
  u[4] = AT_Q * (even_q - odd_q);
  u[5] = w[2];
}

// Gathers the 6x6 input tile at (top, left), which may lie partly outside the image: 36 rows of
// c_in.
template <class T>
static void gather_tile(const T* image, const Shape& s, long top, long left, float* v,
                        long v_stride) {
  const long row = s.width * s.c_in;
  const bool inside = top >= 0 && left >= 0 && top + 6 <= s.height && left + 6 <= s.width;
  for (long c = 0; c < s.c_in; c += LANES) {
    vec d[6][6], t[6][6];  // t[j]: column j after the first pass
    const T* corner = image + top * row + left * s.c_in + c;
    if (inside) {
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) d[j][i] = load(corner + i * row + j * s.c_in);
      }
    } else {
      for (int j = 0; j < 6; ++j)
        for (int i = 0; i < 6; ++i) {
          const bool there =
              top + i >= 0 && top + i < s.height && left + j >= 0 && left + j < s.width;
          d[j][i] = there ? load(corner + i * row + j * s.c_in) : vec{};
        }
    }
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) transform_input(d[j], t[j]);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      const vec across[6] = {t[0][i], t[1][i], t[2][i], t[3][i], t[4][i], t[5][i]};
      vec out[6];
      transform_input(across, out);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store(v + (i * 6 + j) * v_stride + c, out[j]);
    }
  }
}

// Scatters the 4x4 output tile at (top, left), `channels` channels from c on.
template <class T>
static void scatter_tile(const float* m, long m_stride, T* image, const Shape& s, long top,
                         long left, long c, long channels) {
  const long row = s.width * s.c_out;
  const long rows = s.height - top < 4 ? s.height - top : 4,
             columns = s.width - left < 4 ? s.width - left : 4;
  for (long k = 0; k < channels; k += LANES) {
    vec t[6][4];  // t[j]: column j after the first pass
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      vec down[6];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) down[i] = load(m + (i * 6 + j) * m_stride + k);
      transform_output(down, t[j]);
    }
    T* corner = image + top * row + left * s.c_out + c + k;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (i >= rows) break;
      const vec across[6] = {t[0][i], t[1][i], t[2][i], t[3][i], t[4][i], t[5][i]};
      vec y[4];
      transform_output(across, y);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        if (j < columns) store(corner + i * row + j * s.c_out, y[j]);
    }
  }
}

// m (R, N panels) = v (R, k) u, in sums of at most CHUNK products: one long sum would round more.
template <int R, int N>
static void multiply_strip(const float* v, long v_stride, const float* u, long k, float* m,
                           long m_stride) {
  const float* panel[N];
  for (int n = 0; n < N; ++n) panel[n] = u + n * k * PANEL;
  for (long start = 0; start < k; start += CHUNK) {
    const long stop = start + CHUNK < k ? start + CHUNK : k;
    vec sum[R][N * VECTORS] = {};  // in registers
    for (long i = start; i < stop; ++i) {
      vec b[N * VECTORS];
#pragma GCC unroll 8
      for (int n = 0; n < N * VECTORS; ++n)
        b[n] = load(panel[n / VECTORS] + i * PANEL + n % VECTORS * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vec a = v[r * v_stride + i] - vec{};
#pragma GCC unroll 8
        for (int n = 0; n < N * VECTORS; ++n) sum[r][n] += a * b[n];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N * VECTORS; ++n) {
        float* to = m + r * m_stride + n * LANES;
        store(to, start == 0 ? sum[r][n] : sum[r][n] + load(to));
      }
  }
}

template <int R, int N>
static inline void multiply_rest(long rows, const float* v, long v_stride, const float* u, long k,
                                 float* m, long m_stride) {
  if (rows == R) return multiply_strip<R, N>(v, v_stride, u, k, m, m_stride);
  if constexpr (R > 1) multiply_rest<R - 1, N>(rows, v, v_stride, u, k, m, m_stride);
}

// m (rows, panels) = v (rows, k) u, in strips of almost equal height.
template <int N>
static void multiply_panels(long rows, const float* v, long v_stride, const float* u, long k,
                            float* m, long m_stride) {
  const long strips = (rows + ROWS - 1) / ROWS;
  for (long s = 0, r = 0; s < strips; ++s) {
    const long next = rows * (s + 1) / strips;
    multiply_rest<ROWS, N>(next - r, v + r * v_stride, v_stride, u, k, m + r * m_stride, m_stride);
    r = next;
  }
}

static void multiply(long rows, const float* v, long v_stride, const float* u, long k, long panels,
                     float* m, long m_stride) {
  constexpr int PAIR = LANES * 2 / PANEL;  // panels in two vectors: 2 or 1
  long p = 0;
  for (; p + PAIR <= panels; p += PAIR)
    multiply_panels<PAIR>(rows, v, v_stride, u + p * k * PANEL, k, m + p * PANEL, m_stride);
  for (; p < panels; ++p)
    multiply_panels<1>(rows, v, v_stride, u + p * k * PANEL, k, m + p * PANEL, m_stride);
}

// Units [begin, end) of the plan: blocks of tiles, each in groups of output panels. False: no
// memory.
template <class T>
static bool convolve(const T* x, const float* u, T* y, const Shape& s, const Plan& plan, long begin,
                     long end) {
  // a little more than a row, so that the 36 matrices do not lie in the same sets of the cache
  const long v_stride = plan.tiles_per_block * s.c_in + PANEL,
             width = plan.panels_per_group * PANEL;
  const long m_stride = plan.tiles_per_block * width + PANEL;
  const Scratch scratch(36 * (v_stride + m_stride));
  if (scratch.floats == nullptr) return false;
  float *v = scratch.floats, *m = v + 36 * v_stride;
  const long panels = s.c_out / PANEL;
  for (long unit = begin, gathered = -1; unit < end; ++unit) {
    const long block = unit / plan.groups, group = unit % plan.groups;
    const long first = block * plan.tiles_per_block;
    const long count =
        plan.tiles - first < plan.tiles_per_block ? plan.tiles - first : plan.tiles_per_block;
    const long panel = group * plan.panels_per_group;
    const long here =
        panels - panel < plan.panels_per_group ? panels - panel : plan.panels_per_group;
    if (block != gathered) {
      for (long t = 0; t < count; ++t) {
        const Tile tile(s, first + t);
        gather_tile(x + tile.image * s.height * s.width * s.c_in, s, tile.top - 1, tile.left - 1,
                    v + t * s.c_in, v_stride);
      }
      gathered = block;
    }
    for (long i = 0; i < 36; ++i)
      multiply(count, v + i * v_stride, s.c_in, u + (i * panels + panel) * s.c_in * PANEL, s.c_in,
               here, m + i * m_stride, width);
    for (long t = 0; t < count; ++t) {
      const Tile tile(s, first + t);
      scatter_tile(m + t * width, m_stride, y + tile.image * s.height * s.width * s.c_out, s,
                   tile.top, tile.left, panel * PANEL, here * PANEL);
    }
  }
  return true;
}

// Panels [begin, end) of u (36, c_out / PANEL, c_in, PANEL) from w (c_out, c_in, 3, 3).
static void transform_panels(const Weights& w, float* u, long begin, long end) {
  const long c_in = w.c_in, panels = w.c_out / PANEL;
  for (long p = begin; p < end; ++p)
    for (long c = 0; c < c_in; ++c)
      for (long lane = 0; lane < PANEL; lane += LANES) {
        vec t[3][6];  // t[j]: column j after the first pass
        for (int j = 0; j < 3; ++j) {
          vec down[3];
          for (int i = 0; i < 3; ++i) {
            const float* first = w.at(p * PANEL + lane, c, i, j);
            float lanes[LANES];
            for (int l = 0; l < LANES; ++l) lanes[l] = first[l * w.stride[0]];
            down[i] = load(lanes);
          }
          transform_weights(down, t[j]);
        }
        for (int i = 0; i < 6; ++i) {
          const vec across[3] = {t[0][i], t[1][i], t[2][i]};
          vec out[6];
          transform_weights(across, out);
          for (int j = 0; j < 6; ++j)
            store(u + (((i * 6 + j) * panels + p) * c_in + c) * PANEL + lane, out[j]);
        }
      }
}
