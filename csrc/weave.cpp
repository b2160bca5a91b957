#include "weave.h"

#include "arithmetic.h"

#include <algorithm>

namespace mesa {

bool all_true(const params & p, const plan & pl, int32_t i) {
    switch (p.method) {
        case method_mesa:
        case method_star:          return true;
        case method_mesa_exact:    return i < pl.last_start() || pl.anchor == 0;
        case method_stair:         return i <= p.window || pl.stair_width == 1;
        case method_leaky_rerope:
        case method_self_extend:   return i < p.window || pl.stair_width == 1;
        case method_streaming_llm: return i < p.window + p.n_sinks;
        default:                   return i < p.window;
    }
}

int32_t window_start(const params & p, int32_t i) {
    return std::max(0, p.exact() ? i - p.window : i - p.window + 1);
}

woven weave(const params & p, const plan & pl, int32_t i, int32_t j) {
    const int32_t N = p.window;
    const int32_t E = pl.stair_width;

    switch (p.method) {
        case method_mesa_exact: {
            // E may have to be larger than the anchored stair needs it
            const int32_t E_i = std::max(E, ceil_div(i - N, p.reading_length - 1 - N));
            return { N + ceil_div(i - j - N, E_i), 0 };
        }
        case method_stair:         return { N + ceil_div(i - j - N, E), 0 };
        case method_leaky_rerope:  return { i + N * (E - 1), j, E };
        case method_self_extend:   return { i / E + N - N / E, j / E };
        case method_streaming_llm: return { std::min(i, N + p.n_sinks - 1), j };
        default:                   return { N, 0 };
    }
}

int32_t width_fit(const params & p, int64_t n_tokens) {
    switch (p.method) {
        case method_stair:
        case method_leaky_rerope:
        case method_self_extend:  {
            const int64_t n_far = std::min<int64_t>(INT32_MAX, n_tokens - 1 - p.window);
            return std::max(1, ceil_div((int32_t) n_far, std::max(1, p.reading_length - 1 - p.window)));
        }
        default: return 1;
    }
}

} // namespace mesa
