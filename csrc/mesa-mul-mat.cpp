// Quantized weights times many columns (a prompt, not one token), for CPUs with AVX2 or AVX-512 VNNI.
//
// ggml multiplies each row with each column (vec_dot) or in small blocks: it unpacks the same weights, and adds up the lanes of a register,
// for every few columns anew. Here a panel of rows is unpacked once for all columns, to one byte a weight, and so laid out that a lane of a
// register is a row: nothing is added across lanes. Nothing is kept: the weights stay as they are in the file.
//
// Columns are rounded to blocks of bytes with a scale, by ggml's own functions. The dot product of two blocks is exact, so the result is
// that of vec_dot but for the order in which the blocks' floats are added. It does not depend on the number of columns.

#include "mesa-mul-mat.h"
#include "mesa-flash-attn.h"
#include "mesa-kernels.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "repack.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define MESA_LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MESA_LANES 8
#endif

#ifdef MESA_LANES
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized" // of GCC's own header (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace mesa {
namespace {

constexpr int LANES =
        MESA_LANES; // rows in a register; 4 bytes of a row (a quad) are multiplied with 4 of a column in each lane

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
void store(float * p, floats x) {
    _mm512_store_ps(p, x);
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
__m256i add_dots(__m256i sums, __m256i weights, __m256i column) {
    return _mm256_dpbusd_epi32(sums, weights, column);
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
void store(float * p, floats x) {
    _mm256_store_ps(p, x);
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

// A weight is scale * (code - OFFSET) + min, code an unsigned byte; BLOCK weights share scale and min. decode() writes the codes, scales and
// mins of UNIT weights, a block of ggml's.

template <class block>
const block & block_of(const char * rows, size_t stride, int64_t row, int64_t unit) {
    return ((const block *) (rows + row * stride))[unit];
}

__m256i nibbles(__m128i bytes) {
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(0x0f));
}
__m256i nibbles(const uint8_t * qs) {
    return nibbles(_mm_loadu_si128((const __m128i *) qs));
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

void write(uint8_t * out, __m256i codes) {
    _mm256_storeu_si256((__m256i *) out, codes);
}

template <int offset, bool has_min, int unit = 32, int block = 32>
struct kind {
    static constexpr int OFFSET   = offset;
    static constexpr bool HAS_MIN = has_min;
    static constexpr int UNIT     = unit;
    static constexpr int BLOCK    = block;
    static constexpr bool SMALL   = false; // a small_kind
};

// what types of small blocks share: codes_of(block), and the scale in front of a block, with the min behind it
template <class type, class block_type, int offset, bool has_min>
struct small_kind : kind<offset, has_min> {
    using block                 = block_type;
    static constexpr bool SMALL = true;
    static void decode(const char * rows, size_t stride, int64_t row, int64_t unit, uint8_t * codes, float * scales,
            float * mins) {
        const auto & x = block_of<block>(rows, stride, row, unit);
        write(codes, type::codes_of(x));
        if constexpr (has_min) {
            *scales = _cvtsh_ss(x.data.data.d);
            *mins   = _cvtsh_ss(x.data.data.m);
        } else {
            *scales = _cvtsh_ss(x.d);
        }
    }
};

struct q4_0 : small_kind<q4_0, block_q4_0, 8, false> {
    static __m256i codes_of(const block & x) { return nibbles(x.qs); }
};
struct q4_1 : small_kind<q4_1, block_q4_1, 0, true> {
    static __m256i codes_of(const block & x) { return nibbles(x.qs); }
};
struct q5_0 : small_kind<q5_0, block_q5_0, 16, false> {
    static __m256i codes_of(const block & x) { return _mm256_or_si256(nibbles(x.qs), fifth_bits(x.qh)); }
};
struct q5_1 : small_kind<q5_1, block_q5_1, 0, true> {
    static __m256i codes_of(const block & x) { return _mm256_or_si256(nibbles(x.qs), fifth_bits(x.qh)); }
};
struct q8_0 : small_kind<q8_0, block_q8_0, 128, false> {
    static __m256i codes_of(const block & x) {
        return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) x.qs), _mm256_set1_epi8((char) 0x80));
    }
};
// scales and mins of 6 bits, 8 of each in 12 bytes
void unpack_6_bits(const uint8_t * packed, int i, int & scale, int & min) {
    if (i < 4) {
        scale = packed[i] & 63;
        min   = packed[i + 4] & 63;
    } else {
        scale = (packed[i + 4] & 15) | (packed[i - 4] >> 6 << 4);
        min   = (packed[i + 4] >> 4) | (packed[i] >> 6 << 4);
    }
}

// d and min of ggml's block times those of its 8 blocks of 32; mins are subtracted
void scale_blocks(const uint8_t * packed, float d, float min, float * scales, float * mins) {
    for (int i = 0; i < 8; ++i) {
        int scale_of_i, min_of_i;
        unpack_6_bits(packed, i, scale_of_i, min_of_i);
        scales[i] = d * scale_of_i;
        mins[i]   = -min * min_of_i;
    }
}

// 32 low nibbles, then 32 high ones
void write_nibbles(uint8_t * out, __m256i bytes) {
    const __m256i low = _mm256_set1_epi8(0x0f);
    write(out, _mm256_and_si256(bytes, low));
    write(out + 32, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
}

struct q4_K : kind<0, true, QK_K> {
    static void decode(const char * rows, size_t stride, int64_t row, int64_t unit, uint8_t * codes, float * scales,
            float * mins) {
        const auto & x = block_of<block_q4_K>(rows, stride, row, unit);
        for (int j = 0; j < QK_K / 64; ++j) {
            write_nibbles(codes + j * 64, _mm256_loadu_si256((const __m256i *) (x.qs + j * 32)));
        }
        scale_blocks(x.scales, _cvtsh_ss(x.data.data.d), _cvtsh_ss(x.data.data.dmin), scales, mins);
    }
};
struct q5_K : kind<0, true, QK_K> {
    static void decode(const char * rows, size_t stride, int64_t row, int64_t unit, uint8_t * codes, float * scales,
            float * mins) {
        const auto & x = block_of<block_q5_K>(rows, stride, row, unit);
        for (int j = 0; j < QK_K / 64; ++j) {
            for (int i = 0; i < 32; ++i) {
                const uint8_t q        = x.qs[j * 32 + i];
                codes[j * 64 + i]      = (q & 15) | (x.qh[i] >> (2 * j) & 1) << 4;
                codes[j * 64 + 32 + i] = (q >> 4) | (x.qh[i] >> (2 * j + 1) & 1) << 4;
            }
        }
        scale_blocks(x.scales, _cvtsh_ss(x.data.data.d), _cvtsh_ss(x.data.data.dmin), scales, mins);
    }
};
struct q6_K : kind<32, false, QK_K, 16> {
    static void decode(
            const char * rows, size_t stride, int64_t row, int64_t unit, uint8_t * codes, float * scales, float *) {
        const auto & x = block_of<block_q6_K>(rows, stride, row, unit);
        for (int j = 0; j < 2; ++j) {
            for (int i = 0; i < 32; ++i) {
                const uint8_t low = x.ql[j * 64 + i], high = x.ql[j * 64 + 32 + i], bits = x.qh[j * 32 + i];
                codes[j * 128 + i]      = (low & 15) | (bits & 3) << 4;
                codes[j * 128 + 32 + i] = (high & 15) | (bits >> 2 & 3) << 4;
                codes[j * 128 + 64 + i] = (low >> 4) | (bits >> 4 & 3) << 4;
                codes[j * 128 + 96 + i] = (high >> 4) | (bits >> 6) << 4;
            }
        }
        const float d = _cvtsh_ss(x.d);
        for (int i = 0; i < 16; ++i) {
            scales[i] = d * x.scales[i];
        }
    }
};

// As ggml repacks them: 8 rows in one block, by turns 8 bytes of each.

struct q4_0_repacked : kind<8, false> {
    static void decode(
            const char * rows, size_t stride, int64_t row, int64_t unit, uint8_t * codes, float * scales, float *) {
        const auto & x    = block_of<block_q4_0x8>(rows, stride, row / 8 * 8, unit);
        const int8_t * qs = x.qs + row % 8 * 8;
        const __m128i both =
                _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *) qs), _mm_loadl_epi64((const __m128i *) (qs + 64)));
        write(codes, nibbles(_mm_xor_si128(both, _mm_set1_epi8((char) 0x88)))); // the nibbles are signed there
        *scales = _cvtsh_ss(x.d[row % 8]);
    }
};
struct q4_K_repacked : kind<0, true, QK_K> {
    static void decode(const char * rows, size_t stride, int64_t row, int64_t unit, uint8_t * codes, float * scales,
            float * mins) {
        const auto & x = block_of<block_q4_Kx8>(rows, stride, row / 8 * 8, unit);
        const int r    = (int) (row % 8);
        for (int j = 0; j < QK_K / 64; ++j) {
            int64_t bytes[4];
            for (int i = 0; i < 4; ++i) {
                memcpy(&bytes[i], x.qs + (j * 4 + i) * 64 + r * 8, 8);
            }
            write_nibbles(codes + j * 64, _mm256_setr_epi64x(bytes[0], bytes[1], bytes[2], bytes[3]));
        }
        const float d = _cvtsh_ss(x.d[r]), min = _cvtsh_ss(x.dmin[r]);
        for (int i = 0; i < 8; ++i) {
            int scale_of_i, min_of_i;
            unpack_6_bits(x.scales + 12 * i, r, scale_of_i, min_of_i);
            scales[i] = d * scale_of_i;
            mins[i]   = -min * min_of_i;
        }
    }
};

// --- columns -------------------------------------------------------------------------------------------------------------

// Columns lie in groups of COLUMNS (the last one may be smaller), so that a tile reads one stream. Of n columns, for each block:
// quads [BLOCK / 4][n][4 bytes], scales [n], then what the code's offset or the min is multiplied with [n].
template <class type>
constexpr size_t COLUMN_BYTES = type::BLOCK + 2 * sizeof(float); // of one column and block

float largest(__m256 x) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most        = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

// what quantize_row_q8_K does, which ggml has in plain C only
void round_to_q8_K(const float * x, void * out, int64_t n) {
    for (block_q8_K * y = (block_q8_K *) out; n > 0; ++y, x += QK_K, n -= QK_K) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        __m256 high = _mm256_loadu_ps(x), low = _mm256_xor_ps(high, sign); // the values, and the values negated
        for (int i = 8; i < QK_K; i += 8) {
            const __m256 v = _mm256_loadu_ps(x + i);
            high           = _mm256_max_ps(high, v);
            low            = _mm256_max_ps(low, _mm256_xor_ps(v, sign));
        }
        const float most = largest(high), least = -largest(low);
        float peak = most > -least ? most : least; // the value furthest from 0
        if (most == -least) {
            peak = *std::find_if(x, x + QK_K, [&](float v) { return v == most || v == least; }); // the first of them
        }
        if (peak == 0) {
            memset(y, 0, sizeof(*y));
            continue;
        }
        const float scale   = -127.0f / peak;
        const __m256 scales = _mm256_set1_ps(scale);
        y->d                = 1 / scale;
        for (int i = 0; i < QK_K; i += 16) {
            const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), scales));
            const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), scales));
            const __m256i c = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
            const __m128i d = _mm_packs_epi16(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
            _mm_storeu_si128((__m128i *) (y->qs + i), d);
            const __m128i pairs = _mm_maddubs_epi16(_mm_set1_epi8(1), d);
            const __m128i fours = _mm_madd_epi16(pairs, _mm_set1_epi16(1));
            const __m128i twice = _mm_hadd_epi32(fours, fours);
            y->bsums[i / 16]    = (int16_t) _mm_cvtsi128_si32(_mm_hadd_epi32(twice, twice));
        }
    }
}

// a block of one column, as it was rounded
struct column_block {
    float scale;
    int32_t correction; // an int (the first value of a sum), or a float (the factor of the min)
};

int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

template <class type>
column_block column_of(const block_q8_0 & x, int) {
    int32_t sum = 0;
    for (const int8_t code : x.qs) {
        sum += code;
    }
    return { _cvtsh_ss(x.d), -type::OFFSET * sum };
}

template <class type>
column_block column_of(const block_q8_1 & x, int) {
    return { _cvtsh_ss(x.data.data.d), bits_of(_cvtsh_ss(x.data.data.s)) };
}

template <class type>
column_block column_of(const block_q8_K & x, int block) {
    int32_t sum = 0;
    for (int i = block * type::BLOCK / 16; i < (block + 1) * type::BLOCK / 16; ++i) {
        sum += x.bsums[i];
    }
    return { x.d, type::HAS_MIN ? bits_of((float) sum) : -type::OFFSET * sum };
}

// the n columns of a group
template <class type>
void pack_columns(const float * const * src, int n, int64_t n_units, uint8_t * out) {
    constexpr bool K = type::UNIT == QK_K;
    using block      = std::conditional_t<K, block_q8_K, std::conditional_t<type::HAS_MIN, block_q8_1, block_q8_0>>;

    constexpr ggml_type rounded = K ? GGML_TYPE_Q8_K : type::HAS_MIN ? GGML_TYPE_Q8_1 : GGML_TYPE_Q8_0;
    const auto round            = K ? round_to_q8_K : ggml_get_type_traits_cpu(rounded)->from_float;
    constexpr int AT_ONCE = 512 / type::UNIT, N_BLOCKS = type::UNIT / type::BLOCK, QUADS = type::BLOCK / 4;
    for (int c = 0; c < n; ++c) {
        const float * x = src[c];
        uint8_t * quads = out;
        for (int64_t u0 = 0; u0 < n_units; u0 += AT_ONCE) {
            const int64_t count = std::min<int64_t>(AT_ONCE, n_units - u0);
            block blocks[AT_ONCE];
            round(x + u0 * type::UNIT, blocks, count * type::UNIT);
            for (int64_t b = 0; b < count * N_BLOCKS; ++b) {
                const block & own         = blocks[b / N_BLOCKS];
                const int i               = (int) (b % N_BLOCKS);
                const column_block column = column_of<type>(own, i);
                for (int g = 0; g < QUADS; ++g) {
                    memcpy(quads + (g * n + c) * 4, own.qs + i * type::BLOCK + g * 4, 4);
                }
                memcpy(quads + (QUADS * n + c) * 4, &column.scale, 4);
                memcpy(quads + (QUADS * n + n + c) * 4, &column.correction, 4);
                quads += n * COLUMN_BYTES<type>;
            }
        }
    }
}

// --- panels of rows ------------------------------------------------------------------------------------------------------

constexpr int MAX_WEIGHTS = 640; // of a row at once: a panel and the columns of a tile fit the first cache

struct panel {
    alignas(64) uint8_t codes[MAX_WEIGHTS / 4][PARTS][LANES][4];
    alignas(64) float scales[MAX_WEIGHTS / 16][PARTS][LANES];
    alignas(64) float mins[MAX_WEIGHTS / 16][PARTS][LANES];
};

// the 32 bytes of LANES rows, turned so that quad g of all rows lies together, `stride` bytes after quad g - 1
#if MESA_LANES == 16
void turn(const uint8_t * rows, size_t row_size, uint8_t * out, size_t stride) {
    __m512i x[8], y[8];
    for (int i = 0; i < 8; ++i) {
        x[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) (rows + i * row_size))),
                _mm256_loadu_si256((const __m256i *) (rows + (i + 8) * row_size)), 1);
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
void turn(const uint8_t * rows, size_t row_size, uint8_t * out, size_t stride) {
    __m256i x[8], y[8];
    for (int i = 0; i < 8; ++i) {
        x[i] = _mm256_loadu_si256((const __m256i *) (rows + i * row_size));
    }
    for (int i = 0; i < 8; i += 2) {
        y[i]     = _mm256_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
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

// units [u0, u0 + count) of rows [row0, row0 + n_rows); the last row again in lanes that have none
template <class type>
void unpack(const char * rows, size_t stride, int64_t row0, int n_rows, int64_t u0, int count, panel & out) {
    constexpr int N_BLOCKS = type::UNIT / type::BLOCK;
    for (int p = 0; p < PARTS && p * LANES < n_rows; ++p) {
        for (int u = 0; u < count; ++u) {
            alignas(64) uint8_t codes[LANES][type::UNIT];
            float scales[LANES][N_BLOCKS], mins[LANES][N_BLOCKS];
            for (int i = 0; i < LANES; ++i) {
                const int64_t row = row0 + std::min(p * LANES + i, n_rows - 1);
                type::decode(rows, stride, row, u0 + u, codes[i], scales[i], mins[i]);
            }
            for (int k = 0; k < type::UNIT; k += 32) {
                turn(&codes[0][k], type::UNIT, &out.codes[(u * type::UNIT + k) / 4][p][0][0], sizeof(out.codes[0]));
            }
            for (int b = 0; b < N_BLOCKS; ++b) {
                for (int i = 0; i < LANES; ++i) {
                    out.scales[u * N_BLOCKS + b][p][i] = scales[i][b];
                    if constexpr (type::HAS_MIN) {
                        out.mins[u * N_BLOCKS + b][p][i] = mins[i][b];
                    }
                }
            }
        }
    }
}

// --- a tile --------------------------------------------------------------------------------------------------------------

// dot products of block b of a panel and of columns, which are packed from `quads` on: exact
template <class type, int N_PARTS, int N_COLUMNS>
inline void dots(const panel & rows, int b, const int32_t * quads, ints (&dot)[N_COLUMNS][N_PARTS]) {
    constexpr int QUADS = type::BLOCK / 4;
    for (int c = 0; c < N_COLUMNS; ++c) {
        for (int p = 0; p < N_PARTS; ++p) {
            dot[c][p] = type::OFFSET != 0 ? all(quads[(QUADS + 1) * N_COLUMNS + c]) : all(0);
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < QUADS; ++g) {
        ints weights[N_PARTS];
        for (int p = 0; p < N_PARTS; ++p) {
            weights[p] = load(&rows.codes[b * QUADS + g][p][0][0]);
        }
        for (int c = 0; c < N_COLUMNS; ++c) {
            const ints column = all(quads[g * N_COLUMNS + c]);
            for (int p = 0; p < N_PARTS; ++p) {
                dot[c][p] = add_dots(dot[c][p], weights[p], column);
            }
        }
    }
}

// sums [N_COLUMNS][n_parts][LANES] += panel x columns, or = where it is the first part of the rows
template <class type, int N_PARTS, int N_COLUMNS>
void multiply(const panel & rows, const uint8_t * columns, int count, bool first, float * sums, size_t stride) {
    constexpr int QUADS = type::BLOCK / 4, N_BLOCKS = type::UNIT / type::BLOCK;
    constexpr bool K =
            type::UNIT == QK_K; // one scale of a column for a whole unit, whose sum is scaled when it is complete
    floats sum[N_COLUMNS][N_PARTS];
    const auto each = [&](auto && then) {
        for (int c = 0; c < N_COLUMNS; ++c) {
            for (int p = 0; p < N_PARTS; ++p) {
                then(c, p, sums + c * stride + p * LANES);
            }
        }
    };
    if constexpr (!K) {
        each([&](int c, int p, float * at) { sum[c][p] = first ? all(0.0f) : load(at); });
    }
    for (int u = 0; u < count; u += N_BLOCKS) {
        if constexpr (K) {
            each([&](int c, int p, float *) { sum[c][p] = all(0.0f); });
        }
        const float * scales = nullptr;
        for (int b = u; b < u + N_BLOCKS; ++b) {
            const int32_t * quads = (const int32_t *) (columns + b * N_COLUMNS * COLUMN_BYTES<type>);
            scales                = (const float *) (quads + QUADS * N_COLUMNS);
            const float * factors = scales + N_COLUMNS;
            ints dot[N_COLUMNS][N_PARTS];
            dots<type>(rows, b, quads, dot);
            for (int p = 0; p < N_PARTS; ++p) {
                const floats scale = load(rows.scales[b][p]);
                for (int c = 0; c < N_COLUMNS; ++c) {
                    sum[c][p] = mul_add(to_floats(dot[c][p]), K ? scale : mul(scale, all(scales[c])), sum[c][p]);
                }
                if constexpr (type::HAS_MIN) {
                    const floats min = load(rows.mins[b][p]);
                    for (int c = 0; c < N_COLUMNS; ++c) {
                        sum[c][p] = mul_add(min, all(factors[c]), sum[c][p]);
                    }
                }
            }
        }
        if constexpr (K) {
            each([&](int c, int p, float * at) {
                const floats scale = all(scales[c]);
                store(at, first && u == 0 ? mul(sum[c][p], scale) : mul_add(sum[c][p], scale, load(at)));
            });
        }
    }
    if constexpr (!K) {
        each([&](int c, int p, float * at) { store(at, sum[c][p]); });
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

// columns to be worked off together: as many as leave each thread some items to take, of which a slab has n_panels
int64_t slab_of(int64_t n_columns, int64_t n_panels, int n_threads) {
    int64_t slab = SLAB;
    while (n_panels * ((n_columns + slab - 1) / slab) < 4 * n_threads && slab > 8 * COLUMNS) {
        slab /= 2;
    }
    return slab;
}

// columns [c0, c0 + n) (c0 a multiple of COLUMNS) of a matrix, all rows of a panel
// columns: where column 0 of the matrix is packed; out(column): where its products go
template <class type, class where>
void compute(const ggml_tensor * src0, const char * rows, int64_t row0, const uint8_t * columns, int64_t c0, int64_t n,
        const where & out, char * scratch) {
    constexpr int N_BLOCKS = type::UNIT / type::BLOCK, MAX_UNITS = MAX_WEIGHTS / type::UNIT;
    const int64_t n_units = src0->ne[0] / type::UNIT;
    const int n_rows      = (int) std::min<int64_t>(PANEL, src0->ne[1] - row0);
    const int64_t n_steps = (n_units + MAX_UNITS - 1) / MAX_UNITS;
    const bool narrow     = n_rows <= LANES;

    panel & unpacked = *(panel *) scratch;
    float * sums     = (float *) (scratch + GGML_PAD(sizeof(panel), 64));
    for (int64_t step = 0; step < n_steps; ++step) {
        const int64_t u0  = n_units * step / n_steps;
        const int n_taken = (int) (n_units * (step + 1) / n_steps - u0), count = n_taken * N_BLOCKS;
        unpack<type>(rows, src0->nb[1], row0, n_rows, u0, n_taken, unpacked);
        for (int64_t c = 0; c < n; c += COLUMNS) {
            const int n_columns   = (int) std::min<int64_t>(COLUMNS, n - c);
            const uint8_t * group = columns + ((c0 + c) * n_units + u0 * n_columns) * N_BLOCKS * COLUMN_BYTES<type>;
            float * tile          = sums + c * PANEL;
            if (PARTS > 1 && !narrow) {
                multiply<type, PARTS>(unpacked, group, n_columns, count, step == 0, tile, PANEL);
            } else {
                multiply<type, 1>(unpacked, group, n_columns, count, step == 0, tile, PANEL);
            }
            if (step == n_steps - 1) {
                for (int i = 0; i < n_columns; ++i) {
                    memcpy(out(c0 + c + i) + row0, tile + i * PANEL, n_rows * sizeof(float));
                }
            }
        }
    }
}

template <class type>
void mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    const int64_t n_units = src0->ne[0] / type::UNIT, n_columns = src1->ne[1], n_batches = src1->ne[2] * src1->ne[3];
    const int64_t n_groups = (n_columns + COLUMNS - 1) / COLUMNS;
    const size_t column = src0->ne[0] / type::BLOCK * COLUMN_BYTES<type>, batch = n_columns * column;

    uint8_t * columns = (uint8_t *) GGML_PAD((uintptr_t) params->wdata, 64);
    char * scratch    = (char *) columns + GGML_PAD(n_batches * batch, 64) + params->ith * scratch_size();

    for (int64_t i = params->ith; i < n_groups * n_batches; i += params->nth) {
        const int64_t i1 = i % n_groups * COLUMNS, i2 = i / n_groups % src1->ne[2], i3 = i / n_groups / src1->ne[2];
        const char * src = (const char *) src1->data + i1 * src1->nb[1] + i2 * src1->nb[2] + i3 * src1->nb[3];
        const int n      = (int) std::min<int64_t>(COLUMNS, n_columns - i1);
        const float * group[COLUMNS];
        for (int c = 0; c < n; ++c) {
            group[c] = (const float *) (src + c * src1->nb[1]);
        }
        pack_columns<type>(group, n, n_units, columns + i / n_groups * batch + i1 * column);
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t n_panels = (src0->ne[1] + PANEL - 1) / PANEL;
    const int64_t slab     = slab_of(n_columns, n_panels * n_batches, params->nth);
    const int64_t n_slabs  = (n_columns + slab - 1) / slab;
    const int64_t r2 = src1->ne[2] / src0->ne[2], r3 = src1->ne[3] / src0->ne[3];
    for (int64_t i = params->ith; i < n_panels * n_slabs * n_batches;
            i      = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t i0 = i % n_panels * PANEL, i1 = i / n_panels % n_slabs * slab, ib = i / n_panels / n_slabs;
        const int64_t i2 = ib % src1->ne[2], i3 = ib / src1->ne[2];
        char * out       = (char *) dst->data + i2 * dst->nb[2] + i3 * dst->nb[3];
        const auto where = [&](int64_t c) { return (float *) (out + c * dst->nb[1]); };
        compute<type>(src0, (const char *) src0->data + i2 / r2 * src0->nb[2] + i3 / r3 * src0->nb[3], i0,
                columns + ib * batch, i1, std::min(slab, n_columns - i1), where, scratch);
        mesa_kernels_look(params);
    }
}

// Experts: each column is multiplied with the matrices that ids [n_used, n_tokens] names for its token.

// what an expert has to do, counted from that of the first expert; that of expert n_experts is all
struct expert_start {
    int32_t column; // of its columns: columns of an expert are packed together
    int32_t group;
    int32_t item;
};

struct expert_plan {
    expert_start * starts; // [n_experts + 1]
    int32_t * used;        // [n_used * n_tokens] of each column: n_used * token + which of its experts

    static size_t size(const ggml_tensor * dst) {
        return (dst->src[0]->ne[2] + 1) * sizeof(expert_start) + ggml_nelements(dst->src[2]) * sizeof(int32_t);
    }

    expert_plan(char * data, const ggml_tensor * dst) :
            starts((expert_start *) data), used((int32_t *) (starts + dst->src[0]->ne[2] + 1)) {}

    void make(const ggml_tensor * dst, int n_threads) {
        const ggml_tensor * ids = dst->src[2];
        const int64_t n_experts = dst->src[0]->ne[2];
        const int64_t n_panels  = (dst->src[0]->ne[1] + PANEL - 1) / PANEL;
        const auto each_use     = [&](auto && then) {
            for (int64_t token = 0; token < ids->ne[1]; ++token) {
                for (int64_t i = 0; i < ids->ne[0]; ++i) {
                    const char * id      = (const char *) ids->data + token * ids->nb[1] + i * ids->nb[0];
                    const int32_t expert = *(const int32_t *) id;
                    GGML_ASSERT(expert >= 0 && expert < n_experts);
                    then(expert, (int32_t) (token * ids->ne[0] + i));
                }
            }
        };
        std::fill_n(starts, n_experts + 1, expert_start{});
        each_use([&](int32_t expert, int32_t) { ++starts[expert].column; });
        expert_start next{};
        for (int64_t e = 0; e <= n_experts; ++e) {
            const int32_t n = starts[e].column;
            starts[e]       = next;
            next.column += n;
            next.group += (n + COLUMNS - 1) / COLUMNS;
            next.item += (int32_t) (n_panels * n_slabs(n, n_panels, n_threads));
        }
        // the column of an expert's start is moved on, and back
        each_use([&](int32_t expert, int32_t use) { used[starts[expert].column++] = use; });
        for (int64_t e = n_experts; e > 0; --e) {
            starts[e].column = starts[e - 1].column;
        }
        starts[0].column = 0;
    }

    static int64_t n_slabs(int64_t n_columns, int64_t n_panels, int n_threads) {
        const int64_t slab = slab_of(n_columns, n_panels, n_threads);
        return (n_columns + slab - 1) / slab;
    }
};

template <class type>
void mul_mat_id(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    const int64_t n_units = src0->ne[0] / type::UNIT, n_used = dst->src[2]->ne[0];
    const int32_t n_experts = (int32_t) src0->ne[2];
    const size_t column     = src0->ne[0] / type::BLOCK * COLUMN_BYTES<type>;

    uint8_t * columns = (uint8_t *) GGML_PAD((uintptr_t) params->wdata, 64);
    char * plan_data  = (char *) columns + GGML_PAD(ggml_nelements(dst->src[2]) * column, 64);
    char * scratch    = plan_data + GGML_PAD(expert_plan::size(dst), 64) + params->ith * scratch_size();

    expert_plan plan(plan_data, dst);
    if (params->ith == 0) {
        plan.make(dst, params->nth);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const expert_start * starts = plan.starts;
    int32_t e                   = 0; // items, and groups, come in the order of experts
    for (int64_t i = params->ith; i < starts[n_experts].group; i += params->nth) {
        while (i >= starts[e + 1].group) {
            ++e;
        }
        const int64_t first = starts[e].column + (i - starts[e].group) * COLUMNS;
        const int n         = (int) std::min<int64_t>(COLUMNS, starts[e + 1].column - first);
        const float * group[COLUMNS];
        for (int c = 0; c < n; ++c) {
            const int64_t use = plan.used[first + c];
            group[c]          = (const float *) ((const char *) src1->data + use % n_used % src1->ne[1] * src1->nb[1] +
                                                 use / n_used * src1->nb[2]);
        }
        pack_columns<type>(group, n, n_units, columns + first * column);
    }
    ggml_barrier(params->threadpool);

    const int64_t n_panels = (src0->ne[1] + PANEL - 1) / PANEL;
    e                      = 0;
    for (int64_t i = params->ith; i < starts[n_experts].item; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        while (i >= starts[e + 1].item) {
            ++e;
        }
        const int64_t n_columns = starts[e + 1].column - starts[e].column;
        const int64_t slab      = slab_of(n_columns, n_panels, params->nth);
        const int64_t item      = i - starts[e].item;
        const int64_t i0 = item % n_panels * PANEL, i1 = item / n_panels * slab;
        const int32_t * used = plan.used + starts[e].column;
        const auto where     = [&](int64_t c) {
            return (float *) ((char *) dst->data + used[c] % n_used * dst->nb[1] + used[c] / n_used * dst->nb[2]);
        };
        compute<type>(src0, (const char *) src0->data + e * src0->nb[2], i0, columns + starts[e].column * column, i1,
                std::min(slab, n_columns - i1), where, scratch);
        mesa_kernels_look(params);
    }
}

// --- few columns ---------------------------------------------------------------------------------------------------------

// So few columns that unpacking a panel does not pay: mostly one, which is how tokens are generated. ggml's vec_dot adds each block to the sum of
// those before it; here blocks of a row have several sums by turns, so that none waits.

constexpr int TURNS    = 4;
constexpr int ROWS_MIN = 16; // of an item

// 32 values of a column
struct alignas(32) column_part {
    int8_t codes[32];
    union {
        int32_t offsets[8]; // of sums that begin with them: where codes of weights are offset
        float factors[8];   // by turns the scale, and what a block's min is multiplied with
    };
    float scale;
};

template <class type>
void split_column(const float * x, int64_t from, int64_t to, column_part * out) {
    using block                 = std::conditional_t<type::HAS_MIN, block_q8_1, block_q8_0>;
    constexpr ggml_type rounded = type::HAS_MIN ? GGML_TYPE_Q8_1 : GGML_TYPE_Q8_0;
    const auto round            = ggml_get_type_traits_cpu(rounded)->from_float;
    for (int64_t u = from; u < to; ++u) {
        block b;
        round(x + u * 32, &b, 32);
        column_part & part = out[u];
        memcpy(part.codes, b.qs, 32);
        if constexpr (type::HAS_MIN) {
            part.scale = _cvtsh_ss(b.data.data.d);
            for (int i = 0; i < 8; i += 2) {
                part.factors[i]     = part.scale;
                part.factors[i + 1] = _cvtsh_ss(b.data.data.s);
            }
        } else {
            part.scale = _cvtsh_ss(b.d);
            for (int i = 0; i < 8; ++i) {
                const int8_t * q = b.qs + i * 4;
                part.offsets[i]  = -type::OFFSET * (q[0] + q[1] + q[2] + q[3]);
            }
        }
    }
}

float sum_of(__m256 x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum        = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// a block's products with the column's part, times the scales, are added to sum; those of the min to low, in every second lane
template <class type>
inline void add_block(const typename type::block & x, const column_part & part, __m256 & sum, __m256 & low) {
    __m256i first = _mm256_setzero_si256();
    __m256 scale;
    if constexpr (type::HAS_MIN) {
        int32_t scale_and_min;
        memcpy(&scale_and_min, &x, 4);
        const __m256 both = _mm256_mul_ps(_mm256_cvtph_ps(_mm_set1_epi32(scale_and_min)), _mm256_load_ps(part.factors));
        low               = _mm256_add_ps(low, both);
        scale             = _mm256_moveldup_ps(both);
    } else {
        first = _mm256_load_si256((const __m256i *) part.offsets);
        scale = _mm256_mul_ps(_mm256_cvtph_ps(_mm_set1_epi16((int16_t) x.d)), _mm256_set1_ps(part.scale));
    }
    const __m256i codes = _mm256_load_si256((const __m256i *) part.codes);
    sum                 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(add_dots(first, type::codes_of(x), codes)), scale, sum);
}

template <class type>
float multiply_row(const char * row, const column_part * column, int64_t n_units) {
    const auto * x = (const typename type::block *) row;
    __m256 sums[TURNS], lows[TURNS];
    for (int i = 0; i < TURNS; ++i) {
        sums[i] = lows[i] = _mm256_setzero_ps();
    }
    int64_t u = 0;
    for (; u + TURNS <= n_units; u += TURNS) {
        for (int i = 0; i < TURNS; ++i) {
            add_block<type>(x[u + i], column[u + i], sums[i], lows[i]);
        }
    }
    for (; u < n_units; ++u) {
        add_block<type>(x[u], column[u], sums[0], lows[0]);
    }
    float out = sum_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    if constexpr (type::HAS_MIN) {
        const __m256 low = _mm256_add_ps(_mm256_add_ps(lows[0], lows[1]), _mm256_add_ps(lows[2], lows[3]));
        out += _mm256_cvtss_f32(_mm256_permute_ps(low, 1));
    }
    return out;
}

template <class type>
void mul_mat_few(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1], *ids = dst->src[2];
    const int64_t n_units = src0->ne[0] / 32, n_rows = src0->ne[1], n_columns = src1->ne[1];
    const int ith = params->ith, nth = params->nth;

    column_part * columns = (column_part *) GGML_PAD((uintptr_t) params->wdata, 64);
    for (int64_t c = 0; c < n_columns; ++c) {
        const float * x = (const float *) ((const char *) src1->data + c * src1->nb[1]);
        split_column<type>(x, n_units * ith / nth, n_units * (ith + 1) / nth, columns + c * n_units);
    }
    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    ggml_barrier(params->threadpool);

    const bool experts    = dst->op == GGML_OP_MUL_MAT_ID;
    const int64_t n_used  = experts ? ids->ne[0] : 1;
    const int64_t wanted  = n_rows * n_used / (8 * nth);
    const int64_t step    = std::min(n_rows, std::max<int64_t>(ROWS_MIN, wanted / ROWS_MIN * ROWS_MIN));
    const int64_t n_steps = (n_rows + step - 1) / step;
    for (int64_t i = ith; i < n_steps * n_used; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t used = i / n_steps, i0 = i % n_steps * step, i1 = std::min(n_rows, i0 + step);
        const char * rows = (const char *) src0->data;
        char * out        = (char *) dst->data + used * dst->nb[1];
        if (experts) {
            const int32_t expert = *(const int32_t *) ((const char *) ids->data + used * ids->nb[0]);
            GGML_ASSERT(expert >= 0 && expert < src0->ne[2]);
            rows += expert * src0->nb[2];
            for (int64_t r = i0; r < i1; ++r) {
                ((float *) out)[r] =
                        multiply_row<type>(rows + r * src0->nb[1], columns + used % n_columns * n_units, n_units);
            }
            continue;
        }
        for (int64_t r = i0; r < i1; ++r) {
            for (int64_t c = 0; c < n_columns; ++c) {
                ((float *) (out + c * dst->nb[1]))[r] =
                        multiply_row<type>(rows + r * src0->nb[1], columns + c * n_units, n_units);
            }
        }
    }
}

// whether ggml's own kernel for few columns falls behind the memory
bool is_slow(const ggml_tensor * dst) {
    switch (dst->src[0]->type) {
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_1: return true;
        case GGML_TYPE_Q5_0: return dst->op == GGML_OP_MUL_MAT_ID || dst->src[1]->ne[1] == 1; // it has another for more
        default:             return false;
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
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
        case GGML_TYPE_Q6_K:
        case GGML_TYPE_Q8_0: return 8;
#endif
        default: return 0;
    }
}

enum class way { ggml, few, many };

way way_of(const ggml_tensor * dst) {
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    if ((dst->op != GGML_OP_MUL_MAT && dst->op != GGML_OP_MUL_MAT_ID) || src1->type != GGML_TYPE_F32 ||
            dst->type != GGML_TYPE_F32 || src1->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float) ||
            src0->nb[0] != ggml_type_size(src0->type) || src0->ne[1] < LANES / 2) {
        return way::ggml;
    }
    const int64_t n    = min_columns(src0->type);
    const bool experts = dst->op == GGML_OP_MUL_MAT_ID; // n of each on average
    if (n != 0 && (experts ? ggml_nelements(dst->src[2]) >= n * src0->ne[2] : src1->ne[1] >= n)) {
        return way::many;
    }
    const bool one_batch = experts ? dst->src[2]->ne[1] == 1 : src1->ne[2] * src1->ne[3] == 1;
    return one_batch && is_slow(dst) ? way::few : way::ggml;
}

template <class type>
bool multiply(const ggml_compute_params * params, ggml_tensor * dst) {
    const way by = way_of(dst);
    if (by == way::many) {
        dst->op == GGML_OP_MUL_MAT_ID ? mul_mat_id<type>(params, dst) : mul_mat<type>(params, dst);
    } else if constexpr (type::SMALL) {
        if (by == way::few) {
            mul_mat_few<type>(params, dst);
        }
    }
    return by != way::ggml;
}

} // namespace
} // namespace mesa

size_t mesa_mul_mat_work_size(const ggml_tensor * dst, int n_threads) {
    const mesa::way by      = mesa::way_of(dst);
    const ggml_tensor *src0 = dst->src[0], *src1 = dst->src[1];
    if (by == mesa::way::few) {
        return 64 + src1->ne[1] * (src0->ne[0] / 32) * sizeof(mesa::column_part);
    }
    if (by == mesa::way::ggml) {
        return 0;
    }
    const bool experts     = dst->op == GGML_OP_MUL_MAT_ID;
    const int64_t n_values = experts ? ggml_nelements(dst->src[2]) * src0->ne[0] : ggml_nelements(src1);
    const size_t columns   = n_values / 16 * (16 + 2 * sizeof(float)); // of the smallest blocks
    const size_t plan      = experts ? GGML_PAD(mesa::expert_plan::size(dst), 64) : 0;
    return 64 + GGML_PAD(columns, 64) + plan + n_threads * mesa::scratch_size();
}

bool mesa_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    if ((dst->op != GGML_OP_MUL_MAT && dst->op != GGML_OP_MUL_MAT_ID) || params->use_ref || !mesa_kernels_on()) {
        return false;
    }
    if (mesa_key_products(params, dst)) {
        return true;
    }
    switch (dst->src[0]->type) {
        case GGML_TYPE_Q4_0: return mesa::multiply<mesa::q4_0>(params, dst);
        case GGML_TYPE_Q4_1: return mesa::multiply<mesa::q4_1>(params, dst);
        case GGML_TYPE_Q5_0: return mesa::multiply<mesa::q5_0>(params, dst);
        case GGML_TYPE_Q5_1: return mesa::multiply<mesa::q5_1>(params, dst);
        case GGML_TYPE_Q8_0: return mesa::multiply<mesa::q8_0>(params, dst);
        case GGML_TYPE_Q4_K: return mesa::multiply<mesa::q4_K>(params, dst);
        case GGML_TYPE_Q5_K: return mesa::multiply<mesa::q5_K>(params, dst);
        case GGML_TYPE_Q6_K: return mesa::multiply<mesa::q6_K>(params, dst);
        default:             return false;
    }
}

bool mesa_mul_mat_repacked(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !mesa_kernels_on() || mesa::way_of(dst) != mesa::way::many) {
        return false;
    }
    switch (dst->src[0]->type) {
#if MESA_LANES == 16 || defined(__AVXVNNI__)
        case GGML_TYPE_Q4_0: return mesa::multiply<mesa::q4_0_repacked>(params, dst);
        case GGML_TYPE_Q4_K: return mesa::multiply<mesa::q4_K_repacked>(params, dst);
#endif
        default: return false;
    }
}

#else // another CPU: ggml's own kernels

size_t mesa_mul_mat_work_size(const ggml_tensor *, int) {
    return 0;
}

bool mesa_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    return mesa_key_products(params, dst);
}

bool mesa_mul_mat_repacked(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
