/* Products of fp32 matrices on the matrix units (AMX) of recent Intel processors, which multiply bf16 and add in fp32.

   A float is the sum of two bf16, hi + lo, to 16 of its 24 bits. Of the four products of two such sums, lo times lo is
   below what was left out anyway; the other three give x w with an error of some 4e-6 of its size.

   A tile is 16 rows of 64 bytes, so the matrices are kept as tiles: for every 32 rows and 32 values of k two tiles of
   hi, then two of lo. In tiles of weights, values k and k + 1 of a row stand side by side, 16 rows in a line. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 32, TILE = 512, BOTH = 2 * TILE, BLOCK = 4 * TILE, LINE = 64 };  /* values; LINE in bytes */
#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")))

/* Linux lends the tiles to a process that asks. 1 if it may use them. */
int allowed(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

AMX static inline void split(const float *x, uint16_t *hi, uint16_t *lo) {  /* 16 floats */
  __m512 whole = _mm512_loadu_ps(x);
  __m256i near = (__m256i)_mm512_cvtneps_pbh(whole);
  __m512 rest = _mm512_sub_ps(whole, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(near), 16)));
  _mm256_storeu_si256((__m256i *)hi, near);
  _mm256_storeu_si256((__m256i *)lo, (__m256i)_mm512_cvtneps_pbh(rest));
}

AMX static void to_tiles(const float *x, int64_t rows, int64_t stride, uint16_t *to) {  /* 32 x 32, missing rows zero */
  for (int64_t r = 0; r < SIDE; r++, x += stride, to += SIDE)
    if (r < rows) {
      split(x, to, to + BOTH);
      split(x + 16, to + 16, to + BOTH + 16);
    } else {
      memset(to, 0, LINE);
      memset(to + BOTH, 0, LINE);
    }
}

#define NEW_A(from) /* and its products with the b at hand: one tile is loaded while others multiply */ \
  _tile_loadd(4, (from), LINE); _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); \
  _tile_loadd(5, (from) + TILE, LINE); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
#define NEW_B(from) \
  _tile_loadd(6, (from), LINE); _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6); \
  _tile_loadd(7, (from) + TILE, LINE); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(3, 5, 7);

/* y (32 x 32, its rows n values apart) = bias + the three products over all k. Tiles 0 to 3 are the sums, which start as
   the bias in every row; 4 and 5 are of a, 6 and 7 of b. */
AMX static void block(const uint16_t *a, const uint16_t *b, int64_t k, const float *bias, float *y, int64_t n) {
  _tile_loadd(0, bias, 0); _tile_loadd(1, bias + 16, 0); _tile_loadd(2, bias, 0); _tile_loadd(3, bias + 16, 0);
  for (int64_t c = 0; c < k; c += SIDE, a += BLOCK, b += BLOCK) {
    _tile_loadd(6, b + BOTH, LINE); _tile_loadd(7, b + BOTH + TILE, LINE);
    NEW_A(a)
    NEW_B(b)
    NEW_A(a + BOTH)
  }
  _tile_stored(0, y, 4 * n); _tile_stored(1, y + 16, 4 * n);
  _tile_stored(2, y + 16 * n, 4 * n); _tile_stored(3, y + 16 * n + 16, 4 * n);
}

/* y (m, n) = x (m, k) w.T + bias. Rows of x begin `stride` values apart; w: tiles; y has room for m rounded up to 32
   rows; k and n are multiples of 32. `rows` of x at a time, a multiple of 32, become tiles in `room` (2 k values each)
   and meet all of w: so many that they stay in the second cache. */
AMX void linear(const float *x, int64_t m, int64_t k, int64_t stride, const uint16_t *w, int64_t n, const float *bias,
                float *y, uint16_t *room, int64_t rows, int threads) {
  const int64_t high = 2 * SIDE * k;  /* values in 32 rows of tiles */
#pragma omp parallel num_threads(threads)
  {
    struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = LINE, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
    for (int64_t first = 0; first < m; first += rows) {
      const int64_t left = m - first < rows ? m - first : rows, stripes = (left + SIDE - 1) / SIDE;
#pragma omp for collapse(2)
      for (int64_t q = 0; q < stripes; q++)
        for (int64_t c = 0; c < k / SIDE; c++)
          to_tiles(x + (first + q * SIDE) * stride + c * SIDE, left - q * SIDE, stride, room + q * high + c * BLOCK);
#pragma omp for collapse(2)
      for (int64_t p = 0; p < n / SIDE; p++)
        for (int64_t q = 0; q < stripes; q++)
          block(room + q * high, w + p * high, k, bias + p * SIDE, y + (first + q * SIDE) * n + p * SIDE, n);
    }
    _tile_release();
  }
}
