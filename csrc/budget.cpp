#include "budget.h"

#include <numeric>

namespace mesa {

range far_keys(const params & p, const plan & pl, int32_t n_keys) {
    const int32_t from = std::min(n_keys, n_first_of(p, pl));
    return { from, std::max(from, n_keys - p.last_chunk) };
}

bool over_budget(const params & p, const plan & pl, int32_t n_keys) {
    const auto far = far_keys(p, pl, n_keys);
    return p.read_budget > 0 && far.to - far.from > p.read_budget;
}

void add_scores(const params & p, const plan & pl, int32_t n_keys, const float * weights, std::vector<float> & scores) {
    for (auto & score : scores) {
        score *= 0.5f;
    }
    const auto far = far_keys(p, pl, n_keys);

    scores.resize((far.to + read_block - 1) / read_block, 0.0f);
    for (int32_t j = far.from; j < far.to; ++j) {
        scores[j / read_block] += weights[j];
    }
}

bool misses(
        const params & p, const plan & pl, int32_t n_keys, const float * weights, const std::vector<range> & ranges) {
    const auto far = far_keys(p, pl, n_keys);

    float most_read   = 0.0f;
    float most_unread = 0.0f;

    auto r = ranges.begin();
    for (int32_t j = far.from; j < far.to;) {
        const int32_t end = std::min(far.to, (j / read_block + 1) * read_block);
        while (r != ranges.end() && r->to <= j) {
            ++r;
        }
        const bool is_read = r != ranges.end() && r->from <= j; // blocks are read whole, or not
        const float drawn  = std::accumulate(weights + j, weights + end, 0.0f);

        auto & most = is_read ? most_read : most_unread;
        most        = std::max(most, drawn);
        j           = end;
    }
    return most_unread > most_read;
}

std::vector<range> choose(const params & p, const plan & pl, int32_t n_keys, const std::vector<float> & scores) {
    const auto far = far_keys(p, pl, n_keys);

    struct block {
        range keys;
        float score;
    };

    std::vector<block> blocks;
    for (int32_t start = far.from / read_block * read_block; start < far.to; start += read_block) {
        const size_t i = start / read_block;
        blocks.push_back({ { std::max(far.from, start), std::min(far.to, start + read_block) },
                i < scores.size() ? scores[i] : 0.0f });
    }
    std::stable_sort(blocks.begin(), blocks.end(), [](const block & a, const block & b) { return a.score > b.score; });

    std::vector<range> res = { { 0, far.from } };

    int32_t n_left = p.read_budget;
    for (const auto & b : blocks) {
        if (b.keys.to - b.keys.from <= n_left) {
            n_left -= b.keys.to - b.keys.from;
            res.push_back(b.keys);
        }
    }
    res.push_back({ far.to, n_keys });
    std::sort(res.begin(), res.end(), [](const range & a, const range & b) { return a.from < b.from; });

    // neighbours as one
    size_t n = 0;
    for (const auto & r : res) {
        if (n > 0 && res[n - 1].to == r.from) {
            res[n - 1].to = r.to;
        } else {
            res[n++] = r;
        }
    }
    res.resize(n);
    return res;
}

} // namespace mesa
