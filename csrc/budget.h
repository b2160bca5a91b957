// Reading less: which keys a generated token reads where a budget bounds them. Free of ggml and of llama.cpp.
//
// A few layers tell of each token what it attends to, of all that there is. The blocks that drew most of it so far are what the next token reads,
// beside the first chunk and the last tokens.

#pragma once

#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mesa {

// tokens from .. to-1
struct range {
    int32_t from;
    int32_t to;

    bool operator==(const range & other) const { return from == other.from && to == other.to; }
};

// keys are chosen by blocks of this many
constexpr int32_t read_block = 32;

// The keys that the budget is for: those behind the first chunk and more than last_chunk tokens before the end of n_keys.
range far_keys(const params & p, const plan & pl, int32_t n_keys);

// does a token with n_keys keys read fewer of them than there are, once they are chosen?
bool over_budget(const params & p, const plan & pl, int32_t n_keys);

// Note what the last of n_keys tokens attended to [n_keys]; scores: what each block has drawn so far. What was noted before counts by a half.
void add_scores(const params & p, const plan & pl, int32_t n_keys, const float * weights, std::vector<float> & scores);

// Did a token that read these ranges of n_keys keys miss what it attends to: does a block that it did not read draw more than any that it did?
bool misses(
        const params & p, const plan & pl, int32_t n_keys, const float * weights, const std::vector<range> & ranges);

// The ranges that are read of n_keys keys, in order and apart.
std::vector<range> choose(const params & p, const plan & pl, int32_t n_keys, const std::vector<float> & scores);

// Lower what lies outside of the ranges, of the keys 0 .. n_keys-1, to drop.
template <typename T>
void hide(const std::vector<range> & ranges, int32_t n_keys, T * mask, T drop) {
    int32_t start = 0;
    for (const auto & r : ranges) {
        std::fill(mask + start, mask + std::max(start, r.from), drop);
        start = r.to;
    }
    std::fill(mask + start, mask + std::max(start, n_keys), drop);
}

} // namespace mesa
