#include "mesa-flash-attn.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "quants.h"
#include "simd-mappings.h"

#include "mesa-kernels.h"
#include "mesa-simd.h"

#include <algorithm>
#include <cfloat>
#include <cstring>

// Where ggml's kernel reads the keys and values once for each head, the heads of a group share them here. A "row" is a query of one head; the
// rows of a group read a key together.
//
// Few rows (generation): a work item is a range of keys. Its logits are dot products along the head; it leaves the largest logit, the sum of the
// exponentials and the weighted values of each row, which are merged at the end.
// Many rows: a work item is a tile of queries of a group. Keys pass in blocks; logits are computed with the rows in the lanes, so that the softmax
// needs no sums across lanes. Where there are fewer tiles than threads want, the keys are split too.
//
// Keys that no row of an item sees are never touched.

#if defined(__GNUC__)
#define MESA_NOINLINE __attribute__((noinline))
#else
#define MESA_NOINLINE
#endif

namespace mesa {
namespace {

constexpr int BLOCK     = 64;        // keys at a time
constexpr int CHUNK_MAX = 512;       // keys of an item of few rows
constexpr int CHUNK_MIN = 128;       // less, and merging costs more than threads gain
constexpr int N_CHUNKS  = 64;        // of few rows; a fixed number, so that sums do not depend on the number of threads
constexpr int SPAN      = 4 * BLOCK; // keys whose mask is looked at together: its rows lie far apart
constexpr int FEW_KEYS  = 32;        // keys at a time, of few rows
constexpr int AHEAD     = 64;        // keys from what is read to what is fetched
constexpr int FEW_ROWS  = 8;         // up to here dot products are faster than rows in lanes
constexpr int TILE_ROWS = 192;       // of a tile of many rows, about
constexpr int PANEL     = 64;        // rows of a tile that pass a block of keys together
constexpr int SPLIT_MIN = 8 * BLOCK; // keys of an item of many rows
constexpr int KEYS      = 4;         // in registers at once, which v_sum4 sums

#if defined(MESA_SIMD_AVX512) || defined(MESA_SIMD_NEON) // 32 registers
constexpr int DOT_ROWS = 4, MIX_ROWS = 4, MIX_VECS = 4;
#else
constexpr int DOT_ROWS = 2, MIX_ROWS = 4, MIX_VECS = 2;
#endif

static_assert(PANEL % (MIX_VECS * LANES) == 0, "a panel is whole products");

constexpr int LINE = 16; // floats of a cache line, so that threads do not share one

constexpr ggml_fp16_t MASKED = 0xfc00; // -infinity

int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

//
// rows of a cache, as vectors
//

struct load_f32 {
    static vec at(const char * row, int j) { return v_load((const float *) row + j * LANES); }
};

struct load_f16 {
    static vec at(const char * row, int j) { return v_load_f16((const uint16_t *) row + j * LANES); }
};

struct load_bf16 {
    static vec at(const char * row, int j) { return v_load_bf16((const uint16_t *) row + j * LANES); }
};

struct load_q8_0 {
    static vec at(const char * row, int j) {
        const block_q8_0 & block = ((const block_q8_0 *) row)[j * LANES / QK8_0];
        return v_mul(v_load_i8(block.qs + j * LANES % QK8_0), v_set(GGML_CPU_FP16_TO_FP32(block.d)));
    }
};

// rows to f32
using to_floats = void (*)(const char * row, float * out, int n);

template <typename Load>
void to_f32(const char * row, float * out, int n) {
    for (int j = 0; j < n / LANES; j++) {
        v_store(out + j * LANES, Load::at(row, j));
    }
}

// [n_rows][n] f32, of rows of any type; how: null, or how this kernel does it
void rows_to_f32(const char * const * rows, int n_rows, ggml_type type, to_floats how, float * out, int n) {
    const ggml_to_float_t otherwise = ggml_get_type_traits(type)->to_float;
    for (int i = 0; i < n_rows; i++) {
        if (how != nullptr) {
            how(rows[i], out + (int64_t) i * n, n);
        } else {
            otherwise(rows[i], out + (int64_t) i * n, n);
        }
    }
}

//
// few rows
//

// rows of one head, and those that are read soon: the processor does not foresee where the next ones are
struct rows_of {
    const char * at[BLOCK];
    const char * soon[BLOCK];
    int n      = 0;
    int n_soon = 0;
    int n_lines; // of a row in memory

    void prefetch(int from, int n_rows) const {
        for (int i = from; i < std::min(from + n_rows, n_soon); i++) {
            for (int line = 0; line < n_lines; line++) {
                __builtin_prefetch(soon[i] + 64 * line, 0, 2);
            }
        }
    }
};

// logits[r][0 .. KEYS-1] of N rows
// VECS: n_vec, where it is known when this is compiled; 0: it is not
template <typename Load, int N, int VECS>
void dot(const char * const * keys, const float * q, int n_vec, float * logits, int stride) {
    if (VECS > 0) {
        n_vec = VECS;
    }
    vec sums[N][KEYS];
    for (int r = 0; r < N; r++) {
        for (int c = 0; c < KEYS; c++) {
            sums[r][c] = v_zero();
        }
    }
    for (int j = 0; j < n_vec; j++) {
        vec k[KEYS];
        for (int c = 0; c < KEYS; c++) {
            k[c] = Load::at(keys[c], j);
        }
        for (int r = 0; r < N; r++) {
            const vec x = v_keep(v_load(q + (r * n_vec + j) * LANES));
            for (int c = 0; c < KEYS; c++) {
                sums[r][c] = v_fma(x, k[c], sums[r][c]);
            }
        }
    }
    for (int r = 0; r < N; r++) {
        v_sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], logits + r * stride);
    }
}

template <typename Load, int VECS>
void dots_unrolled(const rows_of & keys, const float * q, int n_rows, int n_vec, float * logits, int stride) {
    const int n_keys = keys.n;
    for (int i = 0; i < n_keys; i += KEYS) {
        const char * const * four = keys.at + i;
        keys.prefetch(i, KEYS);
        const char * last[KEYS];
        if (n_keys - i < KEYS) { // the logits of what stands in for missing keys are overwritten or not looked at
            for (int c = 0; c < KEYS; c++) {
                last[c] = keys.at[std::min(i + c, n_keys - 1)];
            }
            four = last;
        }
        for (int r = 0; r < n_rows; r += DOT_ROWS) {
            const float * x = q + (int64_t) r * n_vec * LANES;
            float * out     = logits + r * stride + i;
            switch (std::min(DOT_ROWS, n_rows - r)) {
                case 1:  dot<Load, 1, VECS>(four, x, n_vec, out, stride); break;
                case 2:  dot<Load, 2, VECS>(four, x, n_vec, out, stride); break;
                case 3:  dot<Load, std::min(3, DOT_ROWS), VECS>(four, x, n_vec, out, stride); break;
                default: dot<Load, DOT_ROWS, VECS>(four, x, n_vec, out, stride); break;
            }
        }
    }
}

template <typename Load>
void dots(const rows_of & keys, const float * q, int n_rows, int n_vec, float * logits, int stride) {
    if (n_vec == 64 / LANES) { // the most common head
        dots_unrolled<Load, 64 / LANES>(keys, q, n_rows, n_vec, logits, stride);
    } else {
        dots_unrolled<Load, 0>(keys, q, n_rows, n_vec, logits, stride);
    }
}

using dots_fn = void (*)(const rows_of &, const float *, int, int, float *, int);

// out[r][j .. j+M-1] += the values weighted, of N rows and M vectors
template <typename Load, int N, int M>
void mix(const rows_of & values, const float * weights, int stride, int j, float * out, int out_stride) {
    vec sums[N][M];
    for (int r = 0; r < N; r++) {
        for (int c = 0; c < M; c++) {
            sums[r][c] = v_load(out + r * out_stride + (j + c) * LANES);
        }
    }
    for (int i = 0; i < values.n; i++) {
        values.prefetch(i, 1);
        vec v[M];
        for (int c = 0; c < M; c++) {
            v[c] = Load::at(values.at[i], j + c);
        }
        for (int r = 0; r < N; r++) {
            const vec w = v_set(weights[r * stride + i]);
            for (int c = 0; c < M; c++) {
                sums[r][c] = v_fma(w, v[c], sums[r][c]);
            }
        }
    }
    for (int r = 0; r < N; r++) {
        for (int c = 0; c < M; c++) {
            v_store(out + r * out_stride + (j + c) * LANES, sums[r][c]);
        }
    }
}

template <typename Load, int N>
void mix_rows(const rows_of & values, const float * weights, int stride, int n_vec, float * out, int out_stride) {
    int j = 0;
    for (; j + MIX_VECS <= n_vec; j += MIX_VECS) {
        mix<Load, N, MIX_VECS>(values, weights, stride, j, out, out_stride);
    }
    for (; j < n_vec; j++) {
        mix<Load, N, 1>(values, weights, stride, j, out, out_stride);
    }
}

template <typename Load>
void mixes(
        const rows_of & values, const float * weights, int stride, int n_rows, int n_vec, float * out, int out_stride) {
    for (int r = 0; r < n_rows; r += MIX_ROWS) {
        const float * w = weights + r * stride;
        float * o       = out + r * out_stride;
        switch (std::min(MIX_ROWS, n_rows - r)) {
            case 1:  mix_rows<Load, 1>(values, w, stride, n_vec, o, out_stride); break;
            case 2:  mix_rows<Load, 2>(values, w, stride, n_vec, o, out_stride); break;
            case 3:  mix_rows<Load, 3>(values, w, stride, n_vec, o, out_stride); break;
            default: mix_rows<Load, MIX_ROWS>(values, w, stride, n_vec, o, out_stride); break;
        }
    }
}

using mixes_fn = void (*)(const rows_of &, const float *, int, int, int, float *, int);

// what a type of the cache is read with; null: its rows become f32 first
struct reader {
    dots_fn dots;
    mixes_fn mixes;
    to_floats floats;
};

template <typename Load>
constexpr reader reads() {
    return { dots<Load>, mixes<Load>, to_f32<Load> };
}

reader reader_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  return reads<load_f32>();
        case GGML_TYPE_F16:  return reads<load_f16>();
        case GGML_TYPE_BF16: return reads<load_bf16>();
        case GGML_TYPE_Q8_0: return reads<load_q8_0>();
        default:             return { nullptr, nullptr, nullptr };
    }
}

//
// many rows
//

// C[N][M vectors] = or += A B, where A's element (i, k) is a[i*a_row + k*a_col], and B and C have rows of `stride` and `c_stride`
// note: not inlined, because its registers spill then
template <int N, int M, bool ADD>
MESA_NOINLINE void gemm(
        int n_k, const float * a, int a_row, int a_col, const float * b, int stride, float * c, int c_stride) {
    vec sums[N][M];
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < M; j++) {
            sums[i][j] = ADD ? v_load(c + i * c_stride + j * LANES) : v_zero();
        }
    }
    for (int k = 0; k < n_k; k++) {
        vec x[M];
        for (int j = 0; j < M; j++) {
            x[j] = v_keep(v_load(b + (int64_t) k * stride + j * LANES));
        }
        for (int i = 0; i < N; i++) {
            const vec y = v_set(a[i * a_row + k * a_col]);
            for (int j = 0; j < M; j++) {
                sums[i][j] = v_fma(y, x[j], sums[i][j]);
            }
        }
    }
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < M; j++) {
            v_store(c + i * c_stride + j * LANES, sums[i][j]);
        }
    }
}

// n is a multiple of 4, n_cols of LANES
template <bool ADD>
void gemms(int n, int n_cols, int n_k, const float * a, int a_row, int a_col, const float * b, int stride, float * c,
        int c_stride) {
    for (int i = 0; i < n; i += 4) {
        int j = 0;
        for (; j + MIX_VECS * LANES <= n_cols; j += MIX_VECS * LANES) {
            gemm<4, MIX_VECS, ADD>(
                    n_k, a + i * a_row, a_row, a_col, b + j, stride, c + (int64_t) i * c_stride + j, c_stride);
        }
        for (; j + 2 * LANES <= n_cols; j += 2 * LANES) {
            gemm<4, 2, ADD>(n_k, a + i * a_row, a_row, a_col, b + j, stride, c + (int64_t) i * c_stride + j, c_stride);
        }
        for (; j < n_cols; j += LANES) {
            gemm<4, 1, ADD>(n_k, a + i * a_row, a_row, a_col, b + j, stride, c + (int64_t) i * c_stride + j, c_stride);
        }
    }
}

//
// the operation
//

// what the mask adds to the logits of some keys: nothing, the same to those of all rows, or to each its own
enum bias { BIAS_NONE, BIAS_OF_KEY, BIAS_OF_ROW };

struct attention {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;  // null: everything is seen
    const ggml_tensor * sinks; // null: none
    ggml_tensor * dst;

    int n_k, n_v;                    // values in a head's key, in a head's value
    int64_t n_kv;                    // keys
    int n_q;                         // queries
    int n_head_kv, n_group, n_batch; // n_group: heads that share a key
    float scale, max_bias, softcap;

    // how it is done
    bool few;
    int tile;    // queries of a tile
    int n_tiles; // over all groups
    int chunk;   // keys of an item
    int n_chunks;
    int64_t scratch;  // floats of a thread
    int64_t partials; // floats of all items

    attention(ggml_tensor * op, int n_threads);

    int rows_max() const { return n_group * tile; }
    int partial_size() const { return 2 + n_v; }
    int64_t n_rows() const { return (int64_t) n_batch * n_head_kv * n_group * n_q; }

    const ggml_fp16_t * mask_row(int query, int head, int batch) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + query * mask->nb[1] +
                                      (head % mask->ne[2]) * mask->nb[2] + (batch % mask->ne[3]) * mask->nb[3]);
    }
    const float * query(int query, int head, int batch) const {
        return (const float *) ((const char *) q->data + query * q->nb[1] + head * q->nb[2] + batch * q->nb[3]);
    }
    const char * key(int64_t i, int head_kv, int batch) const {
        return (const char *) k->data + i * k->nb[1] + head_kv * k->nb[2] + batch * k->nb[3];
    }
    const char * value(int64_t i, int head_kv, int batch) const {
        return (const char *) v->data + i * v->nb[1] + head_kv * v->nb[2] + batch * v->nb[3];
    }
    float * out(int query, int head, int batch) const {
        return (float *) ((char *) dst->data + head * dst->nb[1] + query * dst->nb[2] + batch * dst->nb[3]);
    }

    // ALiBi: what a head's mask is multiplied by
    float slope(int head) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int n_log2 = 1 << (int) std::floor(std::log2(n_head_kv * n_group));
        const float m0   = std::pow(2.0f, -max_bias / n_log2);
        const float m1   = std::pow(2.0f, -max_bias / 2.0f / n_log2);
        return head < n_log2 ? std::pow(m0, head + 1) : std::pow(m1, 2 * (head - n_log2) + 1);
    }

    void capped(float * logits, int64_t n) const {
        if (softcap != 0.0f) {
            for (int64_t i = 0; i < n; i++) {
                logits[i] = softcap * std::tanh(logits[i]);
            }
        }
    }

    // what an item of keys `part` leaves of a row: largest logit, sum of exponentials, weighted values
    float * partial_data = nullptr; // [n_chunks][n_rows][2 + n_v]
    float * partials_of(int part, int batch, int head, int query) const {
        const int64_t row = ((int64_t) batch * n_head_kv * n_group + head) * n_q + query;
        return partial_data + (part * n_rows() + row) * partial_size();
    }

    int live_keys(int64_t from, int64_t to, int q0, int n, int head, int n_heads, int batch, int32_t * live,
            int32_t * kinds) const;
    void item_few(int item, int next, float * data) const;
    void item_many(int item, float * data) const;
    void finish(int64_t row) const;
};

attention::attention(ggml_tensor * op, int n_threads) :
        q(op->src[0]), k(op->src[1]), v(op->src[2]), mask(op->src[3]), sinks(op->src[4]), dst(op) {
    n_k       = (int) k->ne[0];
    n_v       = (int) v->ne[0];
    n_kv      = k->ne[1];
    n_q       = (int) q->ne[1];
    n_head_kv = (int) k->ne[2];
    n_group   = (int) (q->ne[2] / k->ne[2]);
    n_batch   = (int) q->ne[3];
    memcpy(&scale, (const float *) op->op_params + 0, sizeof(float));
    memcpy(&max_bias, (const float *) op->op_params + 1, sizeof(float));
    memcpy(&softcap, (const float *) op->op_params + 2, sizeof(float));
    if (softcap != 0.0f) {
        scale /= softcap;
    }

    few = n_group * n_q <= FEW_ROWS;
    if (few) {
        tile     = n_q;
        n_tiles  = 1;
        chunk    = (int) std::min<int64_t>(CHUNK_MAX, round_up(std::max<int64_t>(CHUNK_MIN, n_kv / N_CHUNKS), BLOCK));
        n_chunks = (int) ((n_kv + chunk - 1) / chunk);

        const int rows = n_head_kv * rows_max();
        scratch        = rows * n_k + (rows + 3) * CHUNK_MAX + BLOCK * std::max(n_k, n_v);
    } else {
        // a multiple of the lanes where queries are many: then all heads of a group share a vector of the mask
        tile     = n_group >= TILE_ROWS ? 1 : TILE_ROWS / n_group;
        tile     = tile >= LANES ? tile / LANES * LANES : n_q >= LANES && n_group <= 16 ? LANES : tile;
        tile     = std::min(tile, n_q);
        n_tiles  = n_batch * n_head_kv * ((n_q + tile - 1) / tile);
        n_chunks = 1;
        if (n_tiles < 4 * n_threads) {
            n_chunks = (int) std::min<int64_t>(
                    (4 * n_threads + n_tiles - 1) / n_tiles, std::max<int64_t>(1, n_kv / SPLIT_MIN));
        }
        chunk    = (int) round_up((n_kv + n_chunks - 1) / n_chunks, BLOCK);
        n_chunks = (int) ((n_kv + chunk - 1) / chunk);

        const int rows = (int) round_up(rows_max(), PANEL);
        scratch        = rows * (n_k + n_v + 2) + PANEL * (1 + BLOCK) + BLOCK * (tile + PANEL + n_k + n_v + 1) +
                         2 * (SPAN + BLOCK);
    }
    scratch  = round_up(scratch, LINE) + LINE;
    partials = n_rows() * n_chunks * partial_size();
}

// the keys of from .. to-1 that one of n queries of n_heads heads sees; kinds: what is added to their logits, as enum bias
int attention::live_keys(int64_t from, int64_t to, int q0, int n, int head, int n_heads, int batch, int32_t * live,
        int32_t * kinds) const {
    int n_live = 0;
    if (mask == nullptr) {
        for (int64_t i = from; i < to; i++) {
            kinds[n_live]  = BIAS_NONE;
            live[n_live++] = (int32_t) i;
        }
        return n_live;
    }
    n_heads = mask->ne[2] > 1 ? n_heads : 1;
    for (int64_t start = from; start < to; start += BLOCK) {
        const int n_keys        = (int) std::min<int64_t>(BLOCK, to - start);
        ggml_fp16_t seen[BLOCK] = {}, added[BLOCK] = {}, other[BLOCK] = {};
        const ggml_fp16_t * first = mask_row(q0, head, batch) + start;
        for (int h = 0; h < n_heads; h++) {
            for (int i = 0; i < n; i++) {
                const ggml_fp16_t * row = mask_row(q0 + i, head + h, batch) + start;
                for (int c = 0; c < n_keys; c++) {
                    seen[c] |= row[c] ^ MASKED;
                    added[c] |= row[c];
                    other[c] |= row[c] ^ first[c];
                }
            }
        }
        ggml_fp16_t any = 0;
        for (int c = 0; c < BLOCK; c++) {
            any |= seen[c];
        }
        if (any == 0) { // of a long text of which little is read that is most of them
            continue;
        }
        for (int c = 0; c < n_keys; c++) {
            live[n_live]  = (int32_t) (start + c);
            kinds[n_live] = other[c] != 0 ? BIAS_OF_ROW : added[c] != 0 ? BIAS_OF_KEY : BIAS_NONE;
            n_live += seen[c] != 0;
        }
    }
    return n_live;
}

// a range of keys for all heads and queries: heads within blocks of keys, so that memory is read in the order that it has. Behind the keys the
// values are fetched, behind those the keys of the item that this thread does next.
void attention::item_few(int item, int next, float * data) const {
    const int rows = rows_max(), n_rows = n_head_kv * rows, n_vec_k = n_k / LANES, n_vec_v = n_v / LANES;
    const int64_t from = (int64_t) item * chunk, to = std::min(n_kv, from + chunk);

    float * queries = data;                                                        // [n_rows][n_k]
    float * logits  = queries + (int64_t) n_rows * n_k;                            // [n_rows][CHUNK_MAX]
    float * floats  = logits + n_rows * CHUNK_MAX;                                 // [BLOCK][n_k or n_v]
    int32_t * live  = (int32_t *) (floats + (int64_t) BLOCK * std::max(n_k, n_v)); // [CHUNK_MAX]
    int32_t * kinds = live + CHUNK_MAX;                                            // [CHUNK_MAX]
    float * added   = (float *) (kinds + CHUNK_MAX);                               // [CHUNK_MAX]

    const reader read_k = reader_of(k->type), read_v = reader_of(v->type);
    const int64_t stride_k = k->nb[1], stride_v = v->nb[1];
    const int lines_k = (int) (ggml_row_size(k->type, n_k) + 63) / 64;
    const int lines_v = (int) (ggml_row_size(v->type, n_v) + 63) / 64;

    for (int batch = 0; batch < n_batch; batch++) {
        float * partial = partials_of(item, batch, 0, 0); // the rows' order is the heads', then the queries'

        const int n_live   = live_keys(from, to, 0, n_q, 0, n_head_kv * n_group, batch, live, kinds);
        const int32_t kind = n_live > 0 ? *std::max_element(kinds, kinds + n_live) : BIAS_NONE;
        for (int r = 0; r < n_rows; r++) {
            partial[r * partial_size()] = -INFINITY;
        }
        if (n_live == 0) { // the rest is not looked at
            continue;
        }
        for (int r = 0; r < n_rows; r++) {
            partial[r * partial_size() + 1] = 0.0f;
            memset(partial + r * partial_size() + 2, 0, n_v * sizeof(float));
            const float * x = query(r % n_q, r / n_q, batch);
            for (int d = 0; d < n_k; d++) {
                queries[(int64_t) r * n_k + d] = x[d] * scale;
            }
        }

        rows_of now;
        for (int start = 0; start < n_live; start += FEW_KEYS) {
            for (int head_kv = 0; head_kv < n_head_kv; head_kv++) {
                now.n               = std::min(FEW_KEYS, n_live - start);
                now.n_soon          = now.n;
                now.n_lines         = lines_k;
                const char * keys   = key(0, head_kv, batch);
                const char * values = value(0, head_kv, batch);
                for (int i = 0; i < now.n; i++) {
                    now.at[i] = keys + live[start + i] * stride_k;
                }
                for (int i = 0; i < now.n_soon; i++) {
                    const int soon = start + AHEAD + i;
                    now.soon[i]    = soon < n_live ? keys + live[soon] * stride_k
                                                   : values + live[std::min(soon - n_live, n_live - 1)] * stride_v;
                }
                dots_fn dots_of = read_k.dots;
                if (dots_of == nullptr) {
                    rows_to_f32(now.at, now.n, k->type, nullptr, floats, n_k);
                    for (int i = 0; i < now.n; i++) {
                        now.at[i] = (const char *) (floats + (int64_t) i * n_k);
                    }
                    dots_of = dots<load_f32>;
                }
                const int r = head_kv * rows;
                dots_of(now, queries + (int64_t) r * n_k, rows, n_vec_k, logits + r * CHUNK_MAX + start, CHUNK_MAX);
            }
        }

        const int n_padded = (int) round_up(n_live, LANES);
        for (int r = 0; r < n_rows; r++) {
            float * x = logits + r * CHUNK_MAX;
            capped(x, n_live);
            if (kind != BIAS_NONE) {
                if (r == 0 || kind == BIAS_OF_ROW) {
                    const ggml_fp16_t * row = mask_row(r % n_q, r / n_q, batch);
                    for (int i = 0; i < n_live; i++) {
                        added[i] = GGML_CPU_FP16_TO_FP32(row[live[i]]);
                    }
                }
                const vec by = v_set(slope(r / n_q));
                for (int i = 0; i < n_padded; i += LANES) { // what is behind the last key is no number that matters
                    v_store(x + i, v_fma(by, v_load(added + i), v_load(x + i)));
                }
            }
            for (int i = n_live; i < n_padded; i++) {
                x[i] = -INFINITY;
            }

            vec largest = v_set(-INFINITY);
            for (int i = 0; i < n_padded; i += LANES) {
                largest = v_max(largest, v_load(x + i));
            }
            const float top = v_largest(largest);
            const vec by    = v_set(-std::max(top, -FLT_MAX)); // note: -infinity less -infinity is no number
            vec sum         = v_zero();
            for (int i = 0; i < n_padded; i += LANES) {
                const vec e = v_exp_neg(v_add(v_load(x + i), by));
                v_store(x + i, e);
                sum = v_add(sum, e);
            }
            partial[r * partial_size()]     = top;
            partial[r * partial_size() + 1] = v_sum(sum);
        }

        for (int start = 0; start < n_live; start += FEW_KEYS) {
            for (int head_kv = 0; head_kv < n_head_kv; head_kv++) {
                now.n               = std::min(FEW_KEYS, n_live - start);
                now.n_soon          = now.n;
                now.n_lines         = lines_v;
                const char * values = value(0, head_kv, batch);
                for (int i = 0; i < now.n; i++) {
                    now.at[i] = values + live[start + i] * stride_v;
                }
                for (int i = 0; i < now.n_soon; i++) {
                    const int soon = start + AHEAD + i;
                    if (soon < n_live) {
                        now.soon[i] = values + live[soon] * stride_v;
                        continue;
                    }
                    const int64_t ahead = (int64_t) next * chunk + soon - n_live;
                    if (ahead >= n_kv || (mask != nullptr && mask_row(0, 0, batch)[ahead] == MASKED)) {
                        now.n_soon = i; // what is not read is not fetched
                        break;
                    }
                    now.soon[i] = key(ahead, head_kv, batch);
                }
                mixes_fn mix_of = read_v.mixes;
                if (mix_of == nullptr) {
                    rows_to_f32(now.at, now.n, v->type, nullptr, floats, n_v);
                    for (int i = 0; i < now.n; i++) {
                        now.at[i] = (const char *) (floats + (int64_t) i * n_v);
                    }
                    mix_of = mixes<load_f32>;
                }
                const int r = head_kv * rows;
                mix_of(now, logits + r * CHUNK_MAX + start, CHUNK_MAX, rows, n_vec_v, partial + r * partial_size() + 2,
                        partial_size());
            }
        }
    }
}

// A tile of queries of a group, and a range of keys. A block of keys becomes floats once for all rows of the tile; then panels of rows take turns, so
// that what a panel works with stays near: its queries, logits and sums, and the block's keys and values.
void attention::item_many(int item, float * data) const {
    const int n_tiles_q = (n_q + tile - 1) / tile;
    const int part      = item / n_tiles; // the items that follow each other read the same keys
    const int group     = item % n_tiles / n_tiles_q;
    const int batch = group / n_head_kv, head_kv = group % n_head_kv, head0 = head_kv * n_group;
    const int q0 = item % n_tiles_q * tile, n = std::min(tile, n_q - q0);
    const int n_rows   = n_group * n; // a row is that of query r % n and head r / n
    const int rows     = (int) round_up(n_rows, LANES);
    const int64_t from = (int64_t) part * chunk, to = std::min(n_kv, from + chunk);
    // lanes are queries of one head, so that all heads share what the mask adds; else every row has its own
    const bool shared = n % LANES == 0 && (mask == nullptr || mask->ne[2] == 1);

    float * queries = data;                                         // [panel][n_k][PANEL]
    float * sums    = queries + round_up(n_rows, PANEL) * n_k;      // [rows][n_v]
    float * largest = sums + round_up(n_rows, PANEL) * n_v;         // [rows]
    float * total   = largest + round_up(n_rows, PANEL);            // [rows]
    float * shrink  = total + round_up(n_rows, PANEL);              // [PANEL]
    float * logits  = shrink + PANEL;                               // [BLOCK][PANEL]
    float * added   = logits + BLOCK * PANEL;                       // [BLOCK][n, or PANEL]
    float * of_key  = added + (int64_t) BLOCK * (tile + PANEL);     // [BLOCK]
    float * keys    = of_key + BLOCK;                               // [BLOCK][n_k]
    float * values  = keys + (int64_t) BLOCK * n_k;                 // [BLOCK][n_v]
    int32_t * live  = (int32_t *) (values + (int64_t) BLOCK * n_v); // [SPAN + BLOCK]
    int32_t * kinds = live + SPAN + BLOCK;                          // [SPAN + BLOCK]

    const to_floats floats_k = reader_of(k->type).floats, floats_v = reader_of(v->type).floats;

    memset(sums, 0, (int64_t) rows * n_v * sizeof(float));
    for (int r = 0; r < rows; r++) {
        largest[r]      = -INFINITY;
        total[r]        = 0.0f;
        const float * x = r < n_rows ? query(q0 + r % n, head0 + r / n, batch) : nullptr;
        float * y       = queries + (int64_t) (r / PANEL) * n_k * PANEL + r % PANEL;
        for (int d = 0; d < n_k; d++) {
            y[d * PANEL] = x != nullptr ? x[d] * scale : 0.0f;
        }
    }

    // what the mask adds to the logits of rows r0 .. r0+m-1 and these keys, transposed
    const auto transpose = [&](const int32_t * now, int n_live, int r0, int m, int stride) {
        for (int r = 0; r < m; r++) {
            if (r0 + r >= n_rows) {
                for (int c = 0; c < n_live; c++) {
                    added[c * stride + r] = 0.0f;
                }
                continue;
            }
            const int head          = head0 + (r0 + r) / n;
            const ggml_fp16_t * row = mask_row(q0 + (r0 + r) % n, head, batch);
            const float by          = shared ? 1.0f : slope(head);
            for (int c = 0; c < n_live; c++) {
                added[c * stride + r] = by * GGML_CPU_FP16_TO_FP32(row[now[c]]);
            }
        }
    };

    const auto read_block = [&](const int32_t * now, int n_live, int32_t kind) {
        const int n_padded = (int) round_up(n_live, 4);
        const char * pointers[BLOCK];

        for (int i = 0; i < n_live; i++) {
            pointers[i] = key(now[i], head_kv, batch);
        }
        rows_to_f32(pointers, n_live, k->type, floats_k, keys, n_k);
        memset(keys + (int64_t) n_live * n_k, 0, (int64_t) (n_padded - n_live) * n_k * sizeof(float));
        for (int i = 0; i < n_live; i++) {
            pointers[i] = value(now[i], head_kv, batch);
        }
        rows_to_f32(pointers, n_live, v->type, floats_v, values, n_v);

        if (kind == BIAS_OF_KEY && max_bias > 0.0f && !shared) {
            kind = BIAS_OF_ROW;
        }
        if (kind == BIAS_OF_KEY) {
            const ggml_fp16_t * row = mask_row(q0, head0, batch);
            for (int c = 0; c < n_live; c++) {
                of_key[c] = GGML_CPU_FP16_TO_FP32(row[now[c]]);
            }
        } else if (kind == BIAS_OF_ROW && shared) {
            transpose(now, n_live, 0, n, n);
        }

        for (int r0 = 0; r0 < rows; r0 += PANEL) {
            const int m = std::min(PANEL, rows - r0);

            gemms<false>(n_padded, m, n_k, keys, n_k, 1, queries + (int64_t) r0 * n_k, PANEL, logits, PANEL);
            capped(logits, (int64_t) n_live * PANEL);
            if (kind == BIAS_OF_ROW && !shared) {
                transpose(now, n_live, r0, m, PANEL);
            }

            for (int r = 0; r < m; r += LANES) {
                float * x        = logits + r;
                const vec before = v_load(largest + r0 + r);
                vec top          = before;
                const vec by     = v_set(shared ? slope(head0 + (r0 + r) / n) : 1.0f);
                if (kind == BIAS_NONE) {
                    for (int i = 0; i < n_live; i++) {
                        top = v_max(top, v_load(x + i * PANEL));
                    }
                } else {
                    const float * more = added + (shared ? (r0 + r) % n : r);
                    const int stride   = shared ? n : PANEL;
                    for (int i = 0; i < n_live; i++) {
                        const vec to = kind == BIAS_OF_KEY ? v_set(of_key[i]) : v_load(more + i * stride);
                        const vec y  = v_fma(by, to, v_load(x + i * PANEL));
                        v_store(x + i * PANEL, y);
                        top = v_max(top, y);
                    }
                }
                const vec least =
                        v_mul(v_max(top, v_set(-FLT_MAX)), v_set(-1.0f)); // note: -infinity less -infinity is no number
                const vec old = v_exp_neg(v_add(before, least));
                vec sum       = v_mul(v_load(total + r0 + r), old);
                for (int i = 0; i < n_live; i++) {
                    const vec e = v_exp_neg(v_add(v_load(x + i * PANEL), least));
                    v_store(x + i * PANEL, e);
                    sum = v_add(sum, e);
                }
                v_store(largest + r0 + r, top);
                v_store(total + r0 + r, sum);
                v_store(shrink + r, old);
            }
            for (int r = 0; r < m; r++) {
                if (shrink[r] != 1.0f) {
                    const vec by = v_set(shrink[r]);
                    for (int j = 0; j < n_v; j += LANES) {
                        float * x = sums + (int64_t) (r0 + r) * n_v + j;
                        v_store(x, v_mul(v_load(x), by));
                    }
                }
            }
            gemms<true>(m, n_v, n_live, logits, 1, PANEL, values, n_v, sums + (int64_t) r0 * n_v, n_v);
        }
    };

    int n_live = 0;
    for (int64_t start = from; start < to; start += SPAN) {
        const int64_t end = std::min(to, start + SPAN);
        n_live += live_keys(start, end, q0, n, head0, n_group, batch, live + n_live, kinds + n_live);

        int at = 0;
        while (n_live - at >= (end < to ? BLOCK : 1)) {
            const int n_now = std::min(BLOCK, n_live - at);
            read_block(live + at, n_now, *std::max_element(kinds + at, kinds + at + n_now));
            at += n_now;
        }
        std::copy(live + at, live + n_live, live);
        std::copy(kinds + at, kinds + n_live, kinds);
        n_live -= at;
    }

    for (int r = 0; r < n_rows; r++) {
        float * partial = partials_of(part, batch, head0 + r / n, q0 + r % n);
        partial[0]      = largest[r];
        partial[1]      = total[r];
        memcpy(partial + 2, sums + (int64_t) r * n_v, n_v * sizeof(float));
    }
}

// merges what the items have left of a row
void attention::finish(int64_t row) const {
    const int batch = (int) (row / n_q / (n_head_kv * n_group)), head = (int) (row / n_q % (n_head_kv * n_group));
    float * y = out((int) (row % n_q), head, batch);

    const float sink = sinks != nullptr ? ((const float *) sinks->data)[head] : -INFINITY;
    float largest    = sink;
    for (int c = 0; c < n_chunks; c++) {
        largest = std::max(largest, partials_of(c, batch, head, (int) (row % n_q))[0]);
    }
    float total = sink == -INFINITY ? 0.0f : std::exp(sink - largest);
    memset(y, 0, n_v * sizeof(float));
    for (int c = 0; c < n_chunks; c++) {
        const float * partial = partials_of(c, batch, head, (int) (row % n_q));
        if (partial[0] == -INFINITY) {
            continue;
        }
        const float by = std::exp(partial[0] - largest);
        total += by * partial[1];
        for (int j = 0; j < n_v; j += LANES) {
            v_store(y + j, v_fma(v_set(by), v_load(partial + 2 + j), v_load(y + j)));
        }
    }
    const vec by = v_set(total == 0.0f ? 0.0f : 1.0f / total);
    for (int j = 0; j < n_v; j += LANES) {
        v_store(y + j, v_mul(v_load(y + j), by));
    }
}

bool fits(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];

    const auto readable = [](ggml_type type) {
        return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr;
    };
    return q->type == GGML_TYPE_F32 && readable(k->type) && readable(v->type) &&
           (mask == nullptr || mask->type == GGML_TYPE_F16) && k->ne[0] % LANES == 0 && v->ne[0] % LANES == 0 &&
           k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0 && k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3] &&
           q->nb[0] == sizeof(float) && k->nb[0] == ggml_type_size(k->type) && v->nb[0] == ggml_type_size(v->type) &&
           k->ne[1] > 0 && q->ne[1] > 0;
}

} // namespace
} // namespace mesa

size_t mesa_flash_attn_ext_work_size(const ggml_tensor * dst, int n_threads) {
    if (!mesa::fits(dst)) {
        return 0;
    }
    const mesa::attention op(const_cast<ggml_tensor *>(dst), n_threads);
    return (op.scratch * n_threads + op.partials + mesa::LINE) * sizeof(float);
}

bool mesa_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !mesa_kernels_on() || !mesa::fits(dst)) {
        return false;
    }
    mesa::attention op(dst, params->nth);

    // a vector that lies in two lines is loaded twice
    float * wdata   = (float *) mesa::round_up((intptr_t) params->wdata, mesa::LINE * sizeof(float));
    float * scratch = wdata + params->ith * op.scratch;
    op.partial_data = wdata + params->nth * op.scratch;

    // items are taken as they come: a thread that has lost its core holds up none of the others
    const int n_items = op.n_tiles * op.n_chunks;
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int item = params->ith; item < n_items;) {
        const int next = ggml_threadpool_chunk_add(params->threadpool, 1);
        op.few ? op.item_few(item, next, scratch) : op.item_many(item, scratch);
        item = next;
        mesa_kernels_look(params);
    }
    ggml_barrier(params->threadpool);
    for (int64_t row = params->ith; row < op.n_rows(); row += params->nth) {
        op.finish(row);
    }
    return true;
}

bool mesa_key_products(const ggml_compute_params * params, ggml_tensor * dst) {
    using namespace mesa;

    const ggml_tensor *k = dst->src[0], *q = dst->src[1];
    if (dst->op != GGML_OP_MUL_MAT || params->use_ref || !mesa_kernels_on()) {
        return false;
    }
    const dots_fn dots_of = reader_of(k->type).dots;
    const size_t row      = dots_of == nullptr ? 0 : ggml_row_size(k->type, k->ne[0]);
    // rows that lie apart: those of a head, in a cache. Matrices are left to ggml
    if (dots_of == nullptr || k->ne[0] % LANES != 0 || k->nb[0] != ggml_type_size(k->type) || k->nb[1] <= row ||
            k->ne[2] != q->ne[2] || k->ne[3] != 1 || q->ne[3] != 1 || q->ne[1] > FEW_ROWS || q->type != GGML_TYPE_F32 ||
            q->nb[0] != sizeof(float) || q->nb[1] != k->ne[0] * sizeof(float) || dst->nb[0] != sizeof(float)) {
        return false;
    }
    const int n_cols = (int) q->ne[1], n_vec = (int) k->ne[0] / LANES, stride = (int) (dst->nb[1] / sizeof(float));
    const int64_t n_keys = k->ne[1], n_blocks = (n_keys + BLOCK - 1) / BLOCK;

    rows_of now;
    now.n_lines = (int) (row + 63) / 64;
    for (int64_t b = n_blocks * params->ith / params->nth; b < n_blocks * (params->ith + 1) / params->nth; b++) {
        for (int64_t head = 0; head < k->ne[2]; head++) {
            const int64_t start = b * BLOCK;
            const char * keys   = (const char *) k->data + head * k->nb[2];
            now.n               = (int) std::min<int64_t>(BLOCK, n_keys - start);
            now.n_soon          = (int) std::max<int64_t>(0, std::min<int64_t>(BLOCK, n_keys - start - AHEAD));
            for (int i = 0; i < now.n; i++) {
                now.at[i] = keys + (start + i) * k->nb[1];
            }
            for (int i = 0; i < now.n_soon; i++) {
                now.soon[i] = keys + (start + AHEAD + i) * k->nb[1];
            }
            const float * x = (const float *) ((const char *) q->data + head * q->nb[2]);
            float * y       = (float *) ((char *) dst->data + head * dst->nb[2]) + start;
            if (now.n % KEYS == 0) {
                dots_of(now, x, n_cols, n_vec, y, stride);
                continue;
            }
            float last[FEW_ROWS * BLOCK];
            dots_of(now, x, n_cols, n_vec, last, BLOCK);
            for (int r = 0; r < n_cols; r++) {
                std::copy_n(last + r * BLOCK, now.n, y + (int64_t) r * stride);
            }
        }
    }
    return true;
}
