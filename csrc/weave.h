// The other methods' rules: keys stand at their token index, and distances are woven when a query reads them.
// docs/METHODS.md defines them. Free of ggml and of llama.cpp.

#pragma once

#include "plan.h"

#include <cstdint>

namespace mesa {

// one distance as two positions, d = (q - k)/divisor
struct woven {
    int32_t q;
    int32_t k;
    int32_t divisor = 1;
};

// do queries up to token i see every key at its true distance (of the anchored stair, for method_mesa)?
bool all_true(const params & p, const plan & pl, int32_t i);

// the first key whose distance from query i is the true one; those before it are far
int32_t window_start(const params & p, int32_t i);

// the distance of a far key, with E = pl.stair_width; q depends on i and k on j only, but where params::exact
woven weave(const params & p, const plan & pl, int32_t i, int32_t j);

// smallest E that takes n_tokens tokens into the reading length, for methods without an anchor
int32_t width_fit(const params & p, int64_t n_tokens);

} // namespace mesa
