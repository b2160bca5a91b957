// The attention mask: who sees whom, ALiBi's distances and the bias of the stair. One rule for every method, for chunks and for the
// whole cache; what fills a tensor calls it. Free of ggml and of llama.cpp.

#pragma once

#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace mesa {

// T is what the mask is made of, f32 or f16
template <typename T>
class mask {
public:
    // note: p and pl must outlive it
    mask(const params & p, const plan & pl, bool alibi, T (*cast)(float)) :
            p(p), pl(pl), alibi(alibi), cast(cast), drop(cast(-std::numeric_limits<float>::infinity())),
            keep(cast(0.0f)), stair(cast(stair_bias(p, pl))) {
        const auto bias = near_bias(p, pl);

        near.reserve(bias.size());
        std::transform(bias.rbegin(), bias.rend(), std::back_inserter(near), cast);
    }

    // What is added to the logits of query i and the keys from .. to-1; -INFINITY where i does not see the key.
    void row(int32_t i, int32_t from, int32_t to, T * dst) const {
        const auto s = sees(p, pl, i);

        const auto clamp = [&](int32_t j) { return std::max(from, std::min(to, j)); };

        const int32_t end   = clamp(i + 1);
        const int32_t first = std::min(end, clamp(s.n_first));
        const int32_t start = std::max(first, std::min(end, clamp(s.start)));

        seen_keys(i, from, first, dst);
        std::fill(dst + (first - from), dst + (start - from), drop);
        seen_keys(i, start, end, dst + (start - from));
        std::fill(dst + (end - from), dst + (to - from), drop);
    }

private:
    void seen_keys(int32_t i, int32_t from, int32_t to, T * dst) const {
        if (from >= to) {
            return;
        }
        const bool in_chunk = i < pl.last_start(); // there keys stand as close as they were written

        if (alibi) {
            for (int32_t j = from; j < to; ++j) {
                const int32_t d = in_chunk ? chunk_pos(pl, i) - chunk_pos(pl, j) : query_pos(pl, i) - key_pos(pl, j);

                dst[j - from] = cast((float) -d);
            }
            return;
        }
        if (in_chunk) {
            std::fill(dst, dst + (to - from), keep);
            return;
        }
        // on the stair, or as far behind the query
        const int32_t n_near = (int32_t) near.size();
        const int32_t split  = std::max(from, std::min(to, std::max(pl.anchor, i + 1 - n_near)));

        std::fill(dst, dst + (split - from), stair);
        if (split < to) { // else near may be empty
            std::copy_n(near.begin() + (n_near - 1 - (i - split)), to - split, dst + (split - from));
        }
    }

    const params & p;
    const plan & pl;
    const bool alibi;

    T (*cast)(float);

    const T drop;
    const T keep;
    const T stair;

    std::vector<T> near; // by distance, the furthest first, so that a row is a copy of its end
};

} // namespace mesa
