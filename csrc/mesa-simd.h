// Vectors of floats for the CPU kernels: AVX-512, AVX2, NEON, or plain C++ that a compiler may vectorize.
// note: not ggml's own macros: those differ in what an F16 vector is, and have none for several rows at once

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized" // of GCC's own header (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(MESA_SIMD_PLAIN)
#elif defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#include <immintrin.h>
#define MESA_SIMD_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define MESA_SIMD_AVX2
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define MESA_SIMD_NEON
#endif

namespace mesa {
namespace {

// LANES: floats in a vector
// v_fma(a, b, c): a*b + c
// v_sum4(a, b, c, d, out): the sums of the lanes of four vectors
// v_exp_neg(x): exp(x) of x <= 0, relative error below 2e-7; 0 below about -87, for -infinity too
// v_keep(x): x, in a register. GCC loads it again for each product otherwise, and then loads are the limit

#if defined(MESA_SIMD_AVX512)

using vec           = __m512;
constexpr int LANES = 16;

inline vec v_zero() {
    return _mm512_setzero_ps();
}
inline vec v_set(float x) {
    return _mm512_set1_ps(x);
}
inline vec v_load(const float * p) {
    return _mm512_loadu_ps(p);
}
inline vec v_load_f16(const uint16_t * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}
inline vec v_load_bf16(const uint16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
inline vec v_load_i8(const int8_t * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}
inline void v_store(float * p, vec a) {
    _mm512_storeu_ps(p, a);
}
inline vec v_keep(vec a) {
#if defined(__GNUC__)
    asm("" : "+v"(a));
#endif
    return a;
}
inline vec v_add(vec a, vec b) {
    return _mm512_add_ps(a, b);
}
inline vec v_mul(vec a, vec b) {
    return _mm512_mul_ps(a, b);
}
inline vec v_max(vec a, vec b) {
    return _mm512_max_ps(a, b);
}
inline vec v_fma(vec a, vec b, vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline float v_sum(vec a) {
    return _mm512_reduce_add_ps(a);
}
inline float v_largest(vec a) {
    return _mm512_reduce_max_ps(a);
}
inline void v_sum4(vec a, vec b, vec c, vec d, float * out) {
    const vec ab      = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const vec cd      = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const vec all     = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
// 2^n, and 0 where x, of which n comes, is too small
inline vec v_exp2_int(vec p, vec n, vec /*x*/) {
    return _mm512_scalef_ps(p, n);
}
inline vec v_round(vec a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
constexpr float EXP_LEAST = -150.0f; // of which scalef makes 0

#elif defined(MESA_SIMD_AVX2)

using vec           = __m256;
constexpr int LANES = 8;

inline vec v_zero() {
    return _mm256_setzero_ps();
}
inline vec v_set(float x) {
    return _mm256_set1_ps(x);
}
inline vec v_load(const float * p) {
    return _mm256_loadu_ps(p);
}
inline vec v_load_f16(const uint16_t * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}
inline vec v_load_bf16(const uint16_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}
inline vec v_load_i8(const int8_t * p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)));
}
inline void v_store(float * p, vec a) {
    _mm256_storeu_ps(p, a);
}
inline vec v_keep(vec a) {
#if defined(__GNUC__)
    asm("" : "+x"(a));
#endif
    return a;
}
inline vec v_add(vec a, vec b) {
    return _mm256_add_ps(a, b);
}
inline vec v_mul(vec a, vec b) {
    return _mm256_mul_ps(a, b);
}
inline vec v_max(vec a, vec b) {
    return _mm256_max_ps(a, b);
}
inline vec v_fma(vec a, vec b, vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline void v_sum4(vec a, vec b, vec c, vec d, float * out) {
    const vec all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline float v_sum(vec a) {
    float out[4];
    v_sum4(a, a, a, a, out);
    return out[0];
}
inline float v_largest(vec a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half        = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
constexpr float EXP_LEAST = -87.3f; // 2^n must be a normal number
inline vec v_exp2_int(vec p, vec n, vec x) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const vec result       = _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
    return _mm256_and_ps(result, _mm256_cmp_ps(x, _mm256_set1_ps(EXP_LEAST), _CMP_GE_OQ));
}
inline vec v_round(vec a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(MESA_SIMD_NEON)

using vec           = float32x4_t;
constexpr int LANES = 4;

inline vec v_zero() {
    return vdupq_n_f32(0.0f);
}
inline vec v_set(float x) {
    return vdupq_n_f32(x);
}
inline vec v_load(const float * p) {
    return vld1q_f32(p);
}
inline vec v_load_f16(const uint16_t * p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
inline vec v_load_bf16(const uint16_t * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
inline vec v_load_i8(const int8_t * p) {
    int32_t four;
    memcpy(&four, p, sizeof(four));
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline void v_store(float * p, vec a) {
    vst1q_f32(p, a);
}
inline vec v_keep(vec a) {
    return a;
}
inline vec v_add(vec a, vec b) {
    return vaddq_f32(a, b);
}
inline vec v_mul(vec a, vec b) {
    return vmulq_f32(a, b);
}
inline vec v_max(vec a, vec b) {
    return vmaxq_f32(a, b);
}
inline vec v_fma(vec a, vec b, vec c) {
    return vfmaq_f32(c, a, b);
}
inline float v_sum(vec a) {
    return vaddvq_f32(a);
}
inline float v_largest(vec a) {
    return vmaxvq_f32(a);
}
inline void v_sum4(vec a, vec b, vec c, vec d, float * out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}
constexpr float EXP_LEAST = -87.3f;
inline vec v_exp2_int(vec p, vec n, vec x) {
    const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    const vec result         = vmulq_f32(p, vreinterpretq_f32_s32(exponent));
    return vbslq_f32(vcgeq_f32(x, vdupq_n_f32(EXP_LEAST)), result, vdupq_n_f32(0.0f));
}
inline vec v_round(vec a) {
    return vrndnq_f32(a);
}

#else

constexpr int LANES = 4;
struct vec {
    float x[LANES];
};

template <typename F>
inline vec v_each(F f) {
    vec r;
    for (int i = 0; i < LANES; i++) {
        r.x[i] = f(i);
    }
    return r;
}
inline vec v_zero() {
    return v_each([](int) { return 0.0f; });
}
inline vec v_set(float x) {
    return v_each([&](int) { return x; });
}
inline vec v_load(const float * p) {
    return v_each([&](int i) { return p[i]; });
}
inline vec v_load_f16(const uint16_t * p) {
    return v_each([&](int i) { return GGML_CPU_FP16_TO_FP32(p[i]); });
}
inline vec v_load_bf16(const uint16_t * p) {
    return v_each([&](int i) {
        const uint32_t bits = (uint32_t) p[i] << 16;
        float x;
        memcpy(&x, &bits, sizeof(x));
        return x;
    });
}
inline vec v_load_i8(const int8_t * p) {
    return v_each([&](int i) { return (float) p[i]; });
}
inline void v_store(float * p, vec a) {
    memcpy(p, a.x, sizeof(a.x));
}
inline vec v_keep(vec a) {
    return a;
}
inline vec v_add(vec a, vec b) {
    return v_each([&](int i) { return a.x[i] + b.x[i]; });
}
inline vec v_mul(vec a, vec b) {
    return v_each([&](int i) { return a.x[i] * b.x[i]; });
}
inline vec v_max(vec a, vec b) {
    return v_each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
inline vec v_fma(vec a, vec b, vec c) {
    return v_each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
}
inline float v_sum(vec a) {
    return (a.x[0] + a.x[2]) + (a.x[1] + a.x[3]);
}
inline float v_largest(vec a) {
    return std::fmax(std::fmax(a.x[0], a.x[1]), std::fmax(a.x[2], a.x[3]));
}
inline void v_sum4(vec a, vec b, vec c, vec d, float * out) {
    out[0] = v_sum(a);
    out[1] = v_sum(b);
    out[2] = v_sum(c);
    out[3] = v_sum(d);
}

#endif

#if defined(MESA_SIMD_AVX512) || defined(MESA_SIMD_AVX2) || defined(MESA_SIMD_NEON)
// 2^n times a polynomial of what is left: Cephes' expf
inline vec v_exp_neg(vec x) {
    const vec least = v_max(x, v_set(EXP_LEAST));
    const vec n     = v_round(v_mul(least, v_set(1.44269504088896341f)));
    const vec r     = v_fma(n, v_set(2.12194440e-4f), v_fma(n, v_set(-0.693359375f), least));

    vec p = v_set(1.9875691500e-4f);
    p     = v_fma(p, r, v_set(1.3981999507e-3f));
    p     = v_fma(p, r, v_set(8.3334519073e-3f));
    p     = v_fma(p, r, v_set(4.1665795894e-2f));
    p     = v_fma(p, r, v_set(1.6666665459e-1f));
    p     = v_fma(p, r, v_set(5.0000001201e-1f));
    p     = v_fma(p, v_mul(r, r), v_add(r, v_set(1.0f)));
    return v_exp2_int(p, n, x);
}
#else
inline vec v_exp_neg(vec x) {
    return v_each([&](int i) { return std::exp(x.x[i]); });
}
#endif

} // namespace
} // namespace mesa
