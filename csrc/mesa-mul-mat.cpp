// Quantized weights times many columns (a prompt, not one token), for CPUs with AVX2 or AVX-512 VNNI.
//
// ggml multiplies each row with each column (vec_dot) or in small blocks: it unpacks the same weights, and adds up the lanes of a register,
// for every few columns anew. Here a panel of rows is unpacked once for all columns, to one byte a weight, and so laid out that a lane of a
// register is a row: nothing is added across lanes. Nothing is kept: the weights stay as they are in the file.
//
// Columns are rounded to blocks of 32 bytes with a scale, by ggml's own functions. The dot product of two blocks is exact, so the result is
// that of vec_dot but for the order in which the blocks' floats are added. It does not depend on the number of columns.

#include "mesa-mul-mat.h"
#include "mesa-kernels.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define MESA_LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MESA_LANES 8
#endif

#ifdef MESA_LANES
#include <immintrin.h>

namespace mesa {
namespace {

constexpr int BLOCK = 32;         // weights with one scale
constexpr int QUADS = BLOCK / 4;  // 4 bytes of a row are multiplied with 4 of a column and added up, in each lane
constexpr int LANES = MESA_LANES; // rows in a register

// --- registers -----------------------------------------------------------------------------------------------------------

#if MESA_LANES == 16
using ints   = __m512i;
using floats = __m512;

// a tile of PARTS registers of rows and COLUMNS columns: 12 sums of integers and 12 of floats
constexpr int PARTS   = 2;
constexpr int COLUMNS = 6;

ints load(const uint8_t * p) {
    return _mm512_load_si512(p);
}
floats load(const float * p) {
    return _mm512_load_ps(p);
}
floats load_any(const float * p) {
    return _mm512_loadu_ps(p);
}
void store(float * p, floats x) {
    _mm512_storeu_ps(p, x);
}
void store(float * p, floats x, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16) ((1u << n) - 1), x);
}
ints all(int32_t x) {
    return _mm512_set1_epi32(x);
}
floats all(float x) {
    return _mm512_set1_ps(x);
}
floats to_floats(ints x) {
    return _mm512_cvtepi32_ps(x);
}
floats mul(floats a, floats b) {
    return _mm512_mul_ps(a, b);
}
floats mul_add(floats a, floats b, floats c) {
    return _mm512_fmadd_ps(a, b, c);
}
ints add_dots(ints sums, ints weights, ints column) {
    return _mm512_dpbusd_epi32(sums, weights, column);
}
#else
using ints   = __m256i;
using floats = __m256;

constexpr int PARTS   = 1;
constexpr int COLUMNS = 4;

ints load(const uint8_t * p) {
    return _mm256_load_si256((const __m256i *) p);
}
floats load(const float * p) {
    return _mm256_load_ps(p);
}
floats load_any(const float * p) {
    return _mm256_loadu_ps(p);
}
void store(float * p, floats x) {
    _mm256_storeu_ps(p, x);
}
void store(float * p, floats x, int n) {
    alignas(32) float lanes[LANES];
    _mm256_store_ps(lanes, x);
    memcpy(p, lanes, n * sizeof(float));
}
ints all(int32_t x) {
    return _mm256_set1_epi32(x);
}
floats all(float x) {
    return _mm256_set1_ps(x);
}
floats to_floats(ints x) {
    return _mm256_cvtepi32_ps(x);
}
floats mul(floats a, floats b) {
    return _mm256_mul_ps(a, b);
}
floats mul_add(floats a, floats b, floats c) {
    return _mm256_fmadd_ps(a, b, c);
}
#if defined(__AVXVNNI__)
ints add_dots(ints sums, ints weights, ints column) {
    return _mm256_dpbusd_avx_epi32(sums, weights, column);
}
#else
// exact while two products fit 16 bits: weights of at most 7 bits
ints add_dots(ints sums, ints weights, ints column) {
    const ints pairs = _mm256_maddubs_epi16(weights, column);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
#endif

constexpr int PANEL = PARTS * LANES; // rows that are unpacked together

// --- types of weights ----------------------------------------------------------------------------------------------------

// A weight is scale * (code - OFFSET) + min, code an unsigned byte.

__m256i nibbles(const uint8_t * qs) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *) qs);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(0x0f));
}

// 16 in each byte whose bit is set
__m256i fifth_bits(const uint8_t * qh) {
    uint32_t bits;
    memcpy(&bits, qh, sizeof(bits));
    const __m256i own = _mm256_shuffle_epi8(_mm256_set1_epi32((int) bits),
            _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i bit = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(own, bit), bit), _mm256_set1_epi8(16));
}

struct q4_0 {
    using block                   = block_q4_0;
    static constexpr int OFFSET   = 8;
    static constexpr bool HAS_MIN = false;
    static ggml_half scale(const block & x) { return x.d; }
    static __m256i codes(const block & x) { return nibbles(x.qs); }
};
struct q4_1 {
    using block                   = block_q4_1;
    static constexpr int OFFSET   = 0;
    static constexpr bool HAS_MIN = true;
    static ggml_half scale(const block & x) { return x.data.data.d; }
    static ggml_half min(const block & x) { return x.data.data.m; }
    static __m256i codes(const block & x) { return nibbles(x.qs); }
};
struct q5_0 {
    using block                   = block_q5_0;
    static constexpr int OFFSET   = 16;
    static constexpr bool HAS_MIN = false;
    static ggml_half scale(const block & x) { return x.d; }
    static __m256i codes(const block & x) { return _mm256_or_si256(nibbles(x.qs), fifth_bits(x.qh)); }
};
struct q5_1 {
    using block                   = block_q5_1;
    static constexpr int OFFSET   = 0;
    static constexpr bool HAS_MIN = true;
    static ggml_half scale(const block & x) { return x.data.data.d; }
    static ggml_half min(const block & x) { return x.data.data.m; }
    static __m256i codes(const block & x) { return _mm256_or_si256(nibbles(x.qs), fifth_bits(x.qh)); }
};
struct q8_0 {
    using block                   = block_q8_0;
    static constexpr int OFFSET   = 128;
    static constexpr bool HAS_MIN = false;
    static ggml_half scale(const block & x) { return x.d; }
    static __m256i codes(const block & x) {
        return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) x.qs), _mm256_set1_epi8((char) 0x80));
    }
};

// --- columns -------------------------------------------------------------------------------------------------------------

// Columns lie in groups of COLUMNS (the last one may be smaller), so that a tile reads one stream. Of n columns, for each block:
// quads [QUADS][n][4 bytes], scales [n], then what the code's offset or the min is multiplied with [n].
constexpr size_t COLUMN_BYTES = BLOCK + 2 * sizeof(float); // of one column and block

// a block of one column, as it was quantized
struct column_block {
    const int8_t * codes;
    float scale;
    int32_t correction; // an int (the first value of a sum), or a float (the factor of the min)
};

template <class type>
column_block column_of(const block_q8_0 & x) {
    int32_t sum = 0;
    for (const int8_t code : x.qs) {
        sum += code;
    }
    return { x.qs, _cvtsh_ss(x.d), -type::OFFSET * sum };
}

template <class type>
column_block column_of(const block_q8_1 & x) {
    const float sum = _cvtsh_ss(x.data.data.s);
    column_block out{ x.qs, _cvtsh_ss(x.data.data.d), 0 };
    memcpy(&out.correction, &sum, sizeof(sum));
    return out;
}

// columns [0, n) of a group, each `stride` bytes after the other
template <class type>
void pack_columns(const char * src, size_t stride, int n, int64_t n_blocks, uint8_t * out) {
    using block = std::conditional_t<type::HAS_MIN, block_q8_1, block_q8_0>;

    constexpr ggml_type quantized = type::HAS_MIN ? GGML_TYPE_Q8_1 : GGML_TYPE_Q8_0;
    const auto quantize           = ggml_get_type_traits_cpu(quantized)->from_float;
    constexpr int AT_ONCE         = 16;
    for (int c = 0; c < n; ++c) {
        const float * x = (const float *) (src + c * stride);
        for (int64_t b0 = 0; b0 < n_blocks; b0 += AT_ONCE) {
            const int64_t count = std::min<int64_t>(AT_ONCE, n_blocks - b0);
            block blocks[AT_ONCE];
            quantize(x + b0 * BLOCK, blocks, count * BLOCK);
            for (int64_t b = 0; b < count; ++b) {
                const column_block column = column_of<type>(blocks[b]);
                uint8_t * quads           = out + (b0 + b) * n * COLUMN_BYTES;
                for (int g = 0; g < QUADS; ++g) {
                    memcpy(quads + (g * n + c) * 4, column.codes + g * 4, 4);
                }
                memcpy(quads + (QUADS * n + c) * 4, &column.scale, 4);
                memcpy(quads + (QUADS * n + n + c) * 4, &column.correction, 4);
            }
        }
    }
}

// --- panels of rows ------------------------------------------------------------------------------------------------------

constexpr int MAX_BLOCKS = 20; // of a row at once: a panel and the columns of a tile fit the first cache

struct panel {
    alignas(64) uint8_t codes[MAX_BLOCKS][QUADS][PARTS][LANES][4];
    alignas(64) float scales[MAX_BLOCKS][PARTS][LANES];
    alignas(64) float mins[MAX_BLOCKS][PARTS][LANES];
};

// the 32 bytes of LANES rows, turned so that quad g of all rows lies together, `stride` bytes after quad g - 1
#if MESA_LANES == 16
void turn(const __m256i (&rows)[LANES], uint8_t * out, size_t stride) {
    __m512i x[8], y[8];
    for (int i = 0; i < 8; ++i) {
        x[i] = _mm512_inserti64x4(_mm512_castsi256_si512(rows[i]), rows[i + 8], 1);
    }
    for (int i = 0; i < 8; i += 2) {
        y[i]     = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i odd  = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int i = 0; i < 2; ++i) { // rows 0 to 3 and 4 to 7 of a quad, and 8 further on
        const __m512i a = _mm512_unpacklo_epi64(y[i], y[i + 2]), b = _mm512_unpacklo_epi64(y[i + 4], y[i + 6]);
        const __m512i c = _mm512_unpackhi_epi64(y[i], y[i + 2]), d = _mm512_unpackhi_epi64(y[i + 4], y[i + 6]);
        _mm512_store_si512(out + (2 * i + 0) * stride, _mm512_permutex2var_epi64(a, even, b));
        _mm512_store_si512(out + (2 * i + 1) * stride, _mm512_permutex2var_epi64(c, even, d));
        _mm512_store_si512(out + (2 * i + 4) * stride, _mm512_permutex2var_epi64(a, odd, b));
        _mm512_store_si512(out + (2 * i + 5) * stride, _mm512_permutex2var_epi64(c, odd, d));
    }
}
#else
void turn(const __m256i (&rows)[LANES], uint8_t * out, size_t stride) {
    __m256i y[8];
    for (int i = 0; i < 8; i += 2) {
        y[i]     = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        y[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        const __m256i a = _mm256_unpacklo_epi64(y[i], y[i + 2]), b = _mm256_unpacklo_epi64(y[i + 4], y[i + 6]);
        const __m256i c = _mm256_unpackhi_epi64(y[i], y[i + 2]), d = _mm256_unpackhi_epi64(y[i + 4], y[i + 6]);
        _mm256_store_si256((__m256i *) (out + (2 * i + 0) * stride), _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_store_si256((__m256i *) (out + (2 * i + 1) * stride), _mm256_permute2x128_si256(c, d, 0x20));
        _mm256_store_si256((__m256i *) (out + (2 * i + 4) * stride), _mm256_permute2x128_si256(a, b, 0x31));
        _mm256_store_si256((__m256i *) (out + (2 * i + 5) * stride), _mm256_permute2x128_si256(c, d, 0x31));
    }
}
#endif

void to_floats(const ggml_half (&x)[LANES], float * out) {
    for (int i = 0; i < LANES; i += 8) {
        _mm256_store_ps(out + i, _mm256_cvtph_ps(_mm_load_si128((const __m128i *) (x + i))));
    }
}

// blocks [b0, b0 + count) of n_rows rows; the last row again in lanes that have none
template <class type>
void unpack(const char * rows, size_t stride, int n_rows, int64_t b0, int count, panel & out) {
    for (int p = 0; p < PARTS && p * LANES < n_rows; ++p) {
        const typename type::block * row[LANES];
        for (int i = 0; i < LANES; ++i) {
            row[i] = (const typename type::block *) (rows + std::min(p * LANES + i, n_rows - 1) * stride) + b0;
        }
        for (int b = 0; b < count; ++b) {
            __m256i codes[LANES];
            alignas(32) ggml_half scales[LANES], mins[LANES];
            for (int i = 0; i < LANES; ++i) {
                const auto & x = row[i][b];
                codes[i]       = type::codes(x);
                scales[i]      = type::scale(x);
                if constexpr (type::HAS_MIN) {
                    mins[i] = type::min(x);
                }
            }
            turn(codes, &out.codes[b][0][p][0][0], sizeof(out.codes[b][0]));
            to_floats(scales, out.scales[b][p]);
            if constexpr (type::HAS_MIN) {
                to_floats(mins, out.mins[b][p]);
            }
        }
    }
}

// --- a tile --------------------------------------------------------------------------------------------------------------

// sums [N_COLUMNS][n_parts][LANES] += panel x columns, or = where it is the first part of the rows
template <class type, int N_PARTS, int N_COLUMNS>
void multiply(const panel & rows, const uint8_t * columns, int count, bool first, float * sums, size_t stride) {
    floats sum[N_COLUMNS][N_PARTS];
    for (int c = 0; c < N_COLUMNS; ++c) {
        for (int p = 0; p < N_PARTS; ++p) {
            sum[c][p] = first ? all(0.0f) : load_any(sums + c * stride + p * LANES);
        }
    }
    for (int b = 0; b < count; ++b) {
        const int32_t * quads   = (const int32_t *) (columns + b * N_COLUMNS * COLUMN_BYTES);
        const float * scales    = (const float *) (quads + QUADS * N_COLUMNS);
        const int32_t * offsets = quads + (QUADS + 1) * N_COLUMNS;
        const float * factors   = (const float *) offsets;

        ints dot[N_COLUMNS][N_PARTS];
        for (int c = 0; c < N_COLUMNS; ++c) {
            for (int p = 0; p < N_PARTS; ++p) {
                dot[c][p] = type::OFFSET != 0 ? all(offsets[c]) : all(0);
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < QUADS; ++g) {
            ints weights[N_PARTS];
            for (int p = 0; p < N_PARTS; ++p) {
                weights[p] = load(&rows.codes[b][g][p][0][0]);
            }
            for (int c = 0; c < N_COLUMNS; ++c) {
                const ints column = all(quads[g * N_COLUMNS + c]);
                for (int p = 0; p < N_PARTS; ++p) {
                    dot[c][p] = add_dots(dot[c][p], weights[p], column);
                }
            }
        }
        for (int p = 0; p < N_PARTS; ++p) {
            const floats scale = load(rows.scales[b][p]);
            for (int c = 0; c < N_COLUMNS; ++c) {
                sum[c][p] = mul_add(to_floats(dot[c][p]), mul(scale, all(scales[c])), sum[c][p]);
            }
            if constexpr (type::HAS_MIN) {
                const floats min = load(rows.mins[b][p]);
                for (int c = 0; c < N_COLUMNS; ++c) {
                    sum[c][p] = mul_add(min, all(factors[c]), sum[c][p]);
                }
            }
        }
    }
    for (int c = 0; c < N_COLUMNS; ++c) {
        for (int p = 0; p < N_PARTS; ++p) {
            store(sums + c * stride + p * LANES, sum[c][p]);
        }
    }
}

template <class type, int N_PARTS, int N_COLUMNS = COLUMNS>
void multiply(const panel & rows, const uint8_t * columns, int n_columns, int count, bool first, float * sums,
        size_t stride) {
    if (n_columns == N_COLUMNS) {
        multiply<type, N_PARTS, N_COLUMNS>(rows, columns, count, first, sums, stride);
    } else if constexpr (N_COLUMNS > 1) {
        multiply<type, N_PARTS, N_COLUMNS - 1>(rows, columns, n_columns, count, first, sums, stride);
    }
}

// --- the operation -------------------------------------------------------------------------------------------------------

constexpr int64_t SLAB = 384; // columns whose sums are kept while a row is worked off in parts; a multiple of COLUMNS

size_t scratch_size() {
    return GGML_PAD(sizeof(panel), 64) + SLAB * PANEL * sizeof(float);
}

// columns [c0, c0 + n) (c0 a multiple of COLUMNS) of a batch, all rows of a panel: `columns` is where column 0 of the batch is packed
template <class type>
void compute(const ggml_tensor * dst, const char * rows, int64_t row0, const uint8_t * columns, int64_t c0, int64_t n,
        char * out, char * scratch) {
    const ggml_tensor * src0 = dst->src[0];
    const int64_t n_blocks   = src0->ne[0] / BLOCK;
    const int n_rows         = (int) std::min<int64_t>(PANEL, src0->ne[1] - row0);
    const int64_t n_steps    = (n_blocks + MAX_BLOCKS - 1) / MAX_BLOCKS;
    const bool narrow        = n_rows <= LANES;

    panel & unpacked = *(panel *) scratch;
    float * sums     = (float *) (scratch + GGML_PAD(sizeof(panel), 64));
    for (int64_t step = 0; step < n_steps; ++step) {
        const int64_t b0 = n_blocks * step / n_steps;
        const int count  = (int) (n_blocks * (step + 1) / n_steps - b0);
        unpack<type>(rows + row0 * src0->nb[1], src0->nb[1], n_rows, b0, count, unpacked);
        for (int64_t c = 0; c < n; c += COLUMNS) {
            const int n_columns   = (int) std::min<int64_t>(COLUMNS, n - c);
            const uint8_t * group = columns + ((c0 + c) * n_blocks + b0 * n_columns) * COLUMN_BYTES;
            float * tile          = sums + c * PANEL;
            if (PARTS > 1 && !narrow) {
                multiply<type, PARTS>(unpacked, group, n_columns, count, step == 0, tile, PANEL);
            } else {
                multiply<type, 1>(unpacked, group, n_columns, count, step == 0, tile, PANEL);
            }
            if (step == n_steps - 1) {
                for (int i = 0; i < n_columns; ++i) {
                    memcpy(out + (c0 + c + i) * dst->nb[1] + row0 * sizeof(float), tile + i * PANEL,
                            n_rows * sizeof(float));
                }
            }
        }
    }
}

template <class type>
void mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    const int64_t n_blocks = src0->ne[0] / BLOCK, n_columns = src1->ne[1], n_batches = src1->ne[2] * src1->ne[3];
    const int64_t n_groups = (n_columns + COLUMNS - 1) / COLUMNS;
    const size_t batch     = n_columns * n_blocks * COLUMN_BYTES;

    uint8_t * columns = (uint8_t *) GGML_PAD((uintptr_t) params->wdata, 64);
    char * scratch    = (char *) columns + GGML_PAD(n_batches * batch, 64) + params->ith * scratch_size();

    for (int64_t i = params->ith; i < n_groups * n_batches; i += params->nth) {
        const int64_t i1 = i % n_groups * COLUMNS, i2 = i / n_groups % src1->ne[2], i3 = i / n_groups / src1->ne[2];
        const char * src = (const char *) src1->data + i1 * src1->nb[1] + i2 * src1->nb[2] + i3 * src1->nb[3];
        pack_columns<type>(src, src1->nb[1], (int) std::min<int64_t>(COLUMNS, n_columns - i1), n_blocks,
                columns + i / n_groups * batch + i1 * n_blocks * COLUMN_BYTES);
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // as many slabs as give each thread some panels to take
    const int64_t n_panels = (src0->ne[1] + PANEL - 1) / PANEL;
    int64_t slab           = SLAB;
    while (n_panels * n_batches * ((n_columns + slab - 1) / slab) < 4 * params->nth && slab > 8 * COLUMNS) {
        slab /= 2;
    }
    const int64_t n_slabs = (n_columns + slab - 1) / slab;
    const int64_t r2 = src1->ne[2] / src0->ne[2], r3 = src1->ne[3] / src0->ne[3];
    for (int64_t i = params->ith; i < n_panels * n_slabs * n_batches;
            i      = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t i0 = i % n_panels * PANEL, i1 = i / n_panels % n_slabs * slab, ib = i / n_panels / n_slabs;
        const int64_t i2 = ib % src1->ne[2], i3 = ib / src1->ne[2];
        compute<type>(dst, (const char *) src0->data + i2 / r2 * src0->nb[2] + i3 / r3 * src0->nb[3], i0,
                columns + ib * batch, i1, std::min(slab, n_columns - i1),
                (char *) dst->data + i2 * dst->nb[2] + i3 * dst->nb[3], scratch);
    }
}

// of so many columns on, unpacking the weights takes no longer than ggml's own kernel for them; 0: never
int64_t min_columns(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_1: return 4;
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q5_0: return 8;
#if MESA_LANES == 16 || defined(__AVXVNNI__)
        case GGML_TYPE_Q8_0: return 8;
#endif
        default: return 0;
    }
}

bool fits(const ggml_tensor * dst) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    const int64_t n = min_columns(src0->type);
    return n != 0 && src1->ne[1] >= n && src1->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 &&
           src1->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float) && src0->nb[0] == ggml_type_size(src0->type) &&
           src0->ne[1] >= LANES / 2;
}

} // namespace
} // namespace mesa

size_t mesa_mul_mat_work_size(const ggml_tensor * dst, int n_threads) {
    if (!mesa::fits(dst)) {
        return 0;
    }
    const size_t columns = ggml_nelements(dst->src[1]) / mesa::BLOCK * mesa::COLUMN_BYTES;
    return 64 + GGML_PAD(columns, 64) + n_threads * mesa::scratch_size();
}

bool mesa_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !mesa_kernels_on() || !mesa::fits(dst)) {
        return false;
    }
    switch (dst->src[0]->type) {
        case GGML_TYPE_Q4_0: mesa::mul_mat<mesa::q4_0>(params, dst); break;
        case GGML_TYPE_Q4_1: mesa::mul_mat<mesa::q4_1>(params, dst); break;
        case GGML_TYPE_Q5_0: mesa::mul_mat<mesa::q5_0>(params, dst); break;
        case GGML_TYPE_Q5_1: mesa::mul_mat<mesa::q5_1>(params, dst); break;
        case GGML_TYPE_Q8_0: mesa::mul_mat<mesa::q8_0>(params, dst); break;
        default:             return false;
    }
    return true;
}

#else // another CPU: ggml's own kernels

size_t mesa_mul_mat_work_size(const ggml_tensor *, int) {
    return 0;
}

bool mesa_mul_mat(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
